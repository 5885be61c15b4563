"""An exponential moving average of the trained weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from clipfreeze.pieces import cut_like, piece


class Average:
    """`decay` * average + (1 - `decay`) * weights, after each step; (1 + n) / (10 + n) at step n while that is smaller,
    so that a short run does not average its start."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.parameters, self.decay = dict(parameters), decay
        self.values = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        self.steps = 0

    @torch.no_grad()
    def update(self) -> None:
        """After an optimizer step."""
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        now: list[Tensor] = [piece(parameter) for parameter in self.parameters.values()]
        average: Any = get_ema_multi_avg_fn
        average(decay)([piece(value) for value in self.values.values()], now, self.steps)
        self.steps += 1

    def restore(self, values: Mapping[str, Tensor], steps: int) -> None:
        """Go on from an average that was saved."""
        for name, value in self.values.items():
            value.copy_(cut_like(values[name], value))
        self.steps = steps

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model has the average inside, and its own weights again after it."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self.parameters.items():
            own = parameter.detach().clone()
            parameter.copy_(self.values[name])
            self.values[name] = own
