"""Towers that make their feature of one token of the last block's output, and which token that is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer, text_global_pool
from torch import Tensor, nn

from clipfreeze.anatomy.partition import find_tower
from clipfreeze.anatomy.parts import Tokens


@dataclass(frozen=True)
class Pooled:
    """`block` is the last one; `place` takes a batch of pictures or ids to the pooled token of each, (B,)."""

    block: str
    place: Callable[[Tensor], Tensor]


def pooled_token(model: nn.Module, tower: str) -> Pooled | None:
    """Of "vision" or "text"; None where more than one token of the last block matters, or its kind is not known."""
    found = find_tower(model, tower)
    block = model.get_submodule(found.blocks[-1])
    if (
        type(block) is not ResidualAttentionBlock
        or not isinstance(found.tokens, Tokens)
        or not found.tokens.batch_first
    ):
        return None
    if tower == "vision":
        visual: Any = model.get_submodule("visual")
        first = isinstance(visual, VisionTransformer) and visual.attn_pool is None and visual.pool_type == "tok"
        return Pooled(found.blocks[-1], _first) if first else None
    if found.tokens.whole:
        return None
    text: Any = dict(model.named_children()).get("text")
    kind, end = (model.text_pool_type, model.text_eos_id) if text is None else (text.pool_type, text.eos_id)
    return Pooled(found.blocks[-1], lambda ids: _pooled_by(ids, kind, end))


def _first(pictures: Tensor) -> Tensor:
    return torch.zeros(len(pictures), dtype=torch.long, device=pictures.device)


def _pooled_by(ids: Tensor, kind: Any, end: Any) -> Tensor:
    """open_clip's own pooling, of each token's place."""
    places = torch.arange(ids.shape[1], device=ids.device).expand(len(ids), -1)
    pooled: Tensor = text_global_pool(places, ids, kind, eos_token_id=end)
    return pooled
