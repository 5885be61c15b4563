"""Texts as the text tower needs them: each caption once, no longer than it is, those of like length together.

Under a causal mask nothing behind the end of a text reaches its feature, and Hugging Face encoders mask what pads it:
features and gradients are those of the whole rows to rounding. Texts change places only within a batch, so which pairs
meet in a loss stays as it was drawn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from clipfreeze.anatomy.partition import find_tower
from clipfreeze.anatomy.parts import Tokens
from clipfreeze.anatomy.pooled import Pooled
from clipfreeze.anatomy.tokens import text_ends
from clipfreeze.inject.text_prompt import TextPrompt
from clipfreeze.train.blocks import shadowed
from clipfreeze.train.last_block import at_token

STEP = 8
"""Tokens by which lengths are told apart: of less, groups would be small and gain little."""

FEWEST = 8
"""Texts in a group of their own; fewer go with the next longer ones."""


class TextTower:
    """The text tower, of rows of any length where that is exact."""

    def __init__(self, model: Any) -> None:
        self.model = model
        tokens = find_tower(model, "text").tokens
        self.tokens = tokens if isinstance(tokens, Tokens) and not tokens.whole else None
        self.whole = tokens if isinstance(tokens, str) else tokens.whole
        self.owner: Any = dict(model.named_children()).get("text", model)
        self.pooled: Pooled | None = None  # where only that token of the last block is wanted
        self.prompts = [module for module in model.modules() if isinstance(module, TextPrompt)]

    def rewritten(self, ids: Tensor) -> Tensor:
        """ids with the placeholders of learned prompts, which take up length."""
        for prompt in self.prompts:
            ids = prompt.rewritten(ids)
        return ids

    def lengths(self, ids: Tensor) -> list[int]:
        """ids: (B, L) -> how many tokens of each text reach its feature."""
        if self.tokens is None:
            return [ids.shape[1]] * len(ids)
        return (text_ends(self.tokens, ids) + 1).tolist()

    def looked_up(self, ids: Tensor) -> AbstractContextManager[None]:
        """Inside, `ids` have been looked up together: each time makes a gradient as large as a table that trains."""
        if self.tokens is None or not torch.is_grad_enabled():
            return nullcontext()
        table = self.model.get_submodule(self.tokens.table.removesuffix(".weight"))
        if not table.weight.requires_grad:
            return nullcontext()
        known = torch.unique(ids).to(table.weight.device, non_blocking=True)
        rows = table(known)
        return shadowed(table, {"forward": lambda given: functional.embedding(torch.searchsorted(known, given), rows)})

    def encode(self, ids: Tensor, normalize: bool = True) -> Tensor:
        """ids: (B, l) -> (B, D) fp32 features, of rows that may be cut short."""
        with self._as_long_as(ids), self._last_block(ids):
            features: Tensor = self.model.encode_text(ids, normalize=normalize)
        return features.float()

    def _last_block(self, ids: Tensor) -> AbstractContextManager[None]:
        if self.pooled is None:
            return nullcontext()
        return at_token(self.model.get_submodule(self.pooled.block), self.pooled.place(self.rewritten(ids)))

    def _as_long_as(self, ids: Tensor) -> AbstractContextManager[None]:
        """open_clip's tower has positions and mask of its whole context; Hugging Face's take any length."""
        positions = self.owner._parameters.get("positional_embedding")
        if self.tokens is None or positions is None or ids.shape[1] >= len(positions):
            return nullcontext()
        length = ids.shape[1]
        values: dict[str, Tensor | None] = {"positional_embedding": positions[:length]}
        if (mask := self.owner._buffers.get("attn_mask")) is not None:
            values["attn_mask"] = mask[:length, :length]
        return shadowed(self.owner, values)


def length_groups(lengths: Sequence[int], longest: int, fewest: int = FEWEST) -> Iterator[tuple[int, list[int]]]:
    """Rows of like length, each group with the length it is cut to: a multiple of STEP, at most `longest`.

    A group of less than `fewest` goes with the next longer one.
    """
    order = sorted(range(len(lengths)), key=lambda row: lengths[row])
    group: list[int] = []
    for place, row in enumerate(order):
        group.append(row)
        size = _rounded(lengths[row], longest)
        last = place + 1 == len(order)
        if last or (len(group) >= fewest and _rounded(lengths[order[place + 1]], longest) > size):
            yield size, group
            group = []


def _rounded(length: int, longest: int) -> int:
    return min(-(-length // STEP) * STEP, longest)


def unique(ids: Tensor) -> tuple[list[int], list[int]]:
    """ids: (B, L) on the CPU -> rows that are the first of their kind, and of each row the place among these."""
    seen: dict[bytes, int] = {}
    first: list[int] = []
    places = []
    for row, key in enumerate(map(bytes, ids.contiguous().numpy().view("uint8"))):
        if key not in seen:
            seen[key] = len(first)
            first.append(row)
        places.append(seen[key])
    return first, places
