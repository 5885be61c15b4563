"""The last block at the pooled token alone: keys and values of all tokens, and of the rest one token in so many.

No other token of its output reaches the feature. Dropout there draws numbers for that token only.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from clipfreeze.train.blocks import shadowed


def at_token(block: nn.Module, place: Tensor) -> AbstractContextManager[None]:
    """Inside, open_clip's ResidualAttentionBlock gives in every place what it would give at `place`, (B,)."""
    return shadowed(block, {"forward": partial(_forward, block, place)})


def _forward(
    block: Any,
    place: Tensor,
    q_x: Tensor,
    k_x: Tensor | None = None,
    v_x: Tensor | None = None,
    attn_mask: Tensor | None = None,
) -> Tensor:
    """q_x: (B, L, D), attn_mask: (L, L) -> (B, L, D), all places alike."""
    given = block.ln_1(q_x)
    rows = torch.arange(len(q_x), device=q_x.device)
    place = place[:1].expand(len(q_x)) if len(place) < len(q_x) else place  # of a stand-in for a whole batch
    if attn_mask is not None:
        attn_mask = attn_mask[place].repeat_interleave(block.attn.num_heads, 0).unsqueeze(1)
    query, x = (of[rows, place].unsqueeze(1) for of in (given, q_x))
    x = x + block.ls_1(block.attention(q_x=query, k_x=given, v_x=given, attn_mask=attn_mask))
    x = x + block.ls_2(block.mlp(block.ln_2(x)))
    everywhere: Tensor = x.expand(-1, q_x.shape[1], -1)
    return everywhere
