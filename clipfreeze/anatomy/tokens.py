"""The row of tokens that a tower works on: how long, what stands first, where a text ends."""

from __future__ import annotations

from typing import Any

import torch
from open_clip import CLIP
from open_clip.hf_model import HFTextEncoder
from open_clip.transformer import VisionTransformer
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from torch import Tensor, nn

from clipfreeze.anatomy.parts import Tokens

T5_END = 1
"""The id of `</s>` in the vocabularies of T5, mT5 and Gemma, whose texts have no start token."""

STARTLESS = ("t5", "mt5", "umt5")
"""Hugging Face model types whose texts have no start token."""


def text_tokens(model: nn.Module) -> Tokens | str:
    """Of the text tower, or why prompts are of no use in it.

    Which tokens a text starts and ends with is the tokenizer's doing, and the model does not say; this is how
    open_clip's configs pair them. CLIP's: start, words, end, zeros. xlm-v (eos_id 2): start, words, end. mT5 (eos_id 1)
    and SigLIP (pooled at the last position): words, end. CLIPA, pooled there too but with a bare projection: BERT's
    start, words, zeros in place of its end. Hugging Face: start (of NLLB the language), words, end; T5's no start.
    """
    tower: Any = dict(model.named_children()).get("text", model)
    within = "" if tower is model else "text."
    return _hugging_face(tower, within) if isinstance(tower, HFTextEncoder) else _open_clip(tower, within)


def text_ends(tokens: Tokens, ids: Tensor) -> Tensor:
    """ids: (B, L) -> (B,), the place of each text's end token; never before `first`."""
    place = torch.arange(ids.shape[1], device=ids.device)
    last = torch.where(ids != tokens.pad, place, 0).amax(1)
    if tokens.end == "largest":
        found = ids.argmax(1)
    elif tokens.end == "id":
        ends = ids == tokens.end_id
        found = torch.where(ends.any(1), ends.int().argmax(1), last)
    else:
        found = last + (tokens.end == "pad")
    return found.clamp(min=tokens.first, max=max(ids.shape[1] - 1, tokens.first))


def vision_tokens(tower: Any) -> Tokens | str:
    """Of the vision tower, or why it takes no more tokens than it has."""
    if isinstance(tower, VisionTransformer):
        return Tokens(tower.transformer.width, first=1, batch_first=tower.transformer.batch_first)
    trunk = dict(tower.named_children()).get("trunk")
    if isinstance(trunk, (TimmVisionTransformer, Eva)):
        return Tokens(trunk.embed_dim, first=trunk.num_prefix_tokens)
    if any("rel_pos" in name for name, _ in tower.named_modules()):
        return "adds a bias to each pair of its positions, of which there are as many as patches"
    return "has no tokens: its blocks work on images of features"


def _open_clip(tower: Any, within: str) -> Tokens | str:
    top = isinstance(tower, CLIP)  # there the tower's attributes bear other names
    pool, eos = (tower.text_pool_type, tower.text_eos_id) if top else (tower.pool_type, tower.eos_id)
    common: dict[str, Any] = {
        "width": tower.transformer.width,
        "batch_first": tower.transformer.batch_first,
        "table": f"{within}token_embedding.weight",
        "context": tower.context_length,
        "pad": 0 if top else tower.pad_id,
        "whole": _seen_behind_the_end(tower, pool),
    }
    if not top and tower.cls_emb is not None:  # CoCa appends the token that it pools
        return Tokens(first=1, end="last", **common)
    if pool == "argmax":
        return Tokens(first=1, end="largest", **common)
    if pool == "eos":
        return Tokens(first=int(eos != T5_END), end="id", end_id=eos, **common)
    if pool == "last":
        if isinstance(tower.text_projection, nn.Parameter):
            return Tokens(first=1, end="pad", **common)
        return Tokens(first=0, end="id", end_id=T5_END, **common)
    if pool == "first" and tower.attn_mask is not None:
        return "is causal and pooled at its first token, so all captions have one feature"
    return Tokens(first=1, end="last", **common)


def _seen_behind_the_end(tower: Any, pool: str) -> str:
    """Why the tokens there reach the feature, if they do."""
    if dict(tower.named_parameters(recurse=False)).get("cls_emb") is not None:
        return "its pooled token stands behind all others"
    if pool not in ("argmax", "eos"):
        return f"it pools at the {pool} position"
    return "" if tower.attn_mask is not None else "no causal mask hides them"


def _hugging_face(tower: Any, within: str) -> Tokens:
    encoder = tower.transformer
    embeddings = encoder.get_input_embeddings()
    [path] = [name for name, module in encoder.named_modules() if module is embeddings]
    pooled_first = "cls_token_position" in vars(tower.pooler)
    return Tokens(
        width=embeddings.embedding_dim,
        first=int(pooled_first or tower.config.model_type not in STARTLESS),
        table=f"{within}transformer.{path}.weight",
        context=_positions(encoder),
        end="last",
        pad=tower.config.pad_token_id,
    )


def _positions(encoder: Any) -> int | None:
    """How many there are; RoBERTa counts from behind its padding id."""
    for name, module in encoder.named_modules():
        if isinstance(module, nn.Embedding) and name.endswith("position_embeddings"):
            return module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
    return getattr(encoder.config, "max_position_embeddings", None)
