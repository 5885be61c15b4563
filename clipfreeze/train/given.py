"""Images and texts on their way through an encoder, from where a frozen prefix left them; see objective.Given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from clipfreeze.train.prefix import Prefix
from clipfreeze.train.texts import TextTower, length_groups, unique


@dataclass
class Images:
    """Pictures, or what the frozen prefix made of them: (B, ...); and how they become features."""

    states: Tensor
    encode: Callable[[Tensor], Tensor]

    def features(self) -> Tensor:
        """(B, D) normalised, fp32."""
        return self.encode(self.states)

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, rows: slice) -> Images:
        return Images(self.states[rows], self.encode)

    def tensor_split(self, count: int) -> list[Images]:
        """As of a tensor."""
        return [Images(part, self.encode) for part in self.states.tensor_split(count)]

    def to(self, device: torch.device, **how: Any) -> Images:
        """They are where they are needed."""
        return self

    @property
    def device(self) -> torch.device:
        """Where the tower is."""
        return self.states.device


@dataclass
class Texts:
    """Texts: ids (B, L) on the CPU, and what the frozen prefix made of each, where there is one."""

    ids: Tensor
    tower: TextTower
    device: torch.device
    once: bool  # whether equal texts have equal features
    prefix: Prefix | None = None
    states: Sequence[Tensor] = ()

    def features(self) -> Tensor:
        """(B, D) normalised, fp32."""
        first, places = self._unique
        given = self.ids[first]
        if self.tower.prompts:  # placeholders take up length while the prompt is on
            given = self.tower.rewritten(given.to(self.device)).cpu()
        parts, order = [], []
        with self.tower.looked_up(given):
            for length, rows in length_groups(self.tower.lengths(given), given.shape[1]):
                ids = given[rows, :length].to(self.device, non_blocking=True)
                parts.append(self._encoded(ids, [first[row] for row in rows]))
                order += rows
        place = torch.empty(len(order), dtype=torch.long)
        place[order] = torch.arange(len(order))
        return torch.cat(parts)[place[places].to(self.device, non_blocking=True)]

    def _encoded(self, ids: Tensor, rows: list[int]) -> Tensor:
        if self.prefix is None:
            return self.tower.encode(ids)
        joined = nn.utils.rnn.pad_sequence([self.states[row] for row in rows], batch_first=True)
        if joined.ndim > 2:  # of tokens, which the longest text need not fill
            joined = nn.functional.pad(joined, (0, 0, 0, max(0, ids.shape[1] - joined.shape[1])))
        return self.prefix.go_on(joined.to(self.device, non_blocking=True), ids=ids)

    @cached_property
    def _unique(self) -> tuple[list[int], list[int]]:
        return unique(self.ids) if self.once else (list(range(len(self))), list(range(len(self))))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: slice) -> Texts:
        return Texts(self.ids[rows], self.tower, self.device, self.once, self.prefix, self.states[rows])

    def tensor_split(self, count: int) -> list[Texts]:
        """As of a tensor."""
        edges = [0, *(len(part) for part in self.ids.tensor_split(count))]
        starts = torch.tensor(edges).cumsum(0).tolist()
        return [self[start:end] for start, end in pairwise(starts)]

    def to(self, device: torch.device, **how: Any) -> Texts:
        """Groups go there one by one."""
        return self
