"""What happens around each optimizer step: a pull to the start values before it, bounds after it.

Both leave alone what is frozen at that time.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from clipfreeze.errors import RunError
from clipfreeze.pieces import piece, whole


@dataclass
class Pull:
    """`strength` * |parameter - start|^2, a term of the loss (L2-SP, arXiv 1802.01483)."""

    name: str
    parameter: nn.Parameter
    start: Tensor
    strength: float

    def penalty(self) -> Tensor:
        """The term, a scalar with a gradient."""
        return self.strength * whole(self._distance(self.parameter).square().sum())

    @torch.no_grad()
    def add_gradient(self, scale: Tensor | float = 1.0) -> None:
        """Add the term's gradient to the parameter's, times `scale`."""
        pull = self._distance(self.parameter) * (2 * self.strength * scale)
        if self.parameter.grad is None:
            self.parameter.grad = torch.empty_like(self.parameter).copy_(pull)  # in memory as the weight is
        else:
            self.parameter.grad.add_(pull)

    def _distance(self, parameter: Tensor) -> Tensor:
        self.start = self.start.to(parameter.device)
        return parameter - self.start


def pull_before_steps(optimizer: torch.optim.Optimizer, pulls: Iterable[Pull]) -> RemovableHandle:
    """Add the gradients of `pulls` at the start of each step, hence after unscaling and clipping."""
    return optimizer.register_step_pre_hook(partial(_pull, tuple(pulls)))


def clamp_after_steps(
    optimizer: torch.optim.Optimizer, bounds: Iterable[tuple[nn.Parameter, tuple[float, float]]]
) -> RemovableHandle:
    """Bring each parameter within its bounds after each step, in place."""
    return optimizer.register_step_post_hook(partial(_clamp, tuple(bounds)))


def _pull(
    pulls: tuple[Pull, ...], optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    if any(value is not None and value is not optimizer for value in (*args, *kwargs.values())):
        raise RunError("l2sp does not go with optimizer.step(closure): the closure makes the gradients anew")
    scale = getattr(optimizer, "grad_scale", None)  # a fused optimizer unscales by itself, after this
    for pull in pulls:
        if pull.parameter.requires_grad:
            pull.add_gradient(1.0 if scale is None else scale)


@torch.no_grad()
def _clamp(
    bounds: tuple[tuple[nn.Parameter, tuple[float, float]], ...],
    optimizer: torch.optim.Optimizer,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    for parameter, (low, high) in bounds:
        if parameter.requires_grad:
            piece(parameter).clamp_(low, high)
