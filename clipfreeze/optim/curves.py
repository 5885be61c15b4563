"""One learning rate over a run: our own schedules by formula, any of torch's stepped on an optimizer of its own."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.lr_scheduler import LRScheduler, PolynomialLR

from clipfreeze.errors import PlanError
from clipfreeze.policy.schema import SCHEDULES, Schedule


class Curve(Protocol):
    """The settings of a param group at each step: "lr", and momentum where the schedule moves that too."""

    def at(self, step: int) -> Mapping[str, Any]:
        """From 0, behind any warmup."""
        ...


def draw_curve(
    schedule: Schedule, lr: float, length: int, group: Mapping[str, Any], defaults: Mapping[str, Any]
) -> Curve:
    """The curve of `length` steps from `lr` for a param group; `defaults` are its optimizer's.

    PlanError where torch's scheduler does not take the schedule's options.
    """
    own = own_name(schedule.name)
    if own is not None:
        return _OwnCurve(own, lr, length)
    found = torch_class(schedule.name)
    assert found is not None
    try:
        return _TorchCurve(found, schedule.options, lr, length, group, defaults)
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise PlanError(f"{schedule.name} does not take these options: {error}", "see its documentation") from error


class _OwnCurve:
    def __init__(self, name: str, lr: float, length: int) -> None:
        self.name, self.lr, self.length = name, lr, length

    def at(self, step: int) -> Mapping[str, Any]:
        """1 at the start; cosine and linear are 0 at the end of the run."""
        done = min(1.0, step / self.length)
        factors = {"cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done, "constant": 1.0}
        return {"lr": self.lr * factors[self.name]}


class _TorchCurve:
    def __init__(
        self,
        found: Callable[..., LRScheduler],
        options: Mapping[str, Any],
        lr: float,
        length: int,
        group: Mapping[str, Any],
        defaults: Mapping[str, Any],
    ) -> None:
        takes = parameters_of(found)
        filled: dict[str, Any] = {"T_max": length, "total_steps": length, "max_lr": lr}
        if (
            found is PolynomialLR
        ):  # it ends at 0, after 5 steps unless told; others with total_iters only begin with them
            filled["total_iters"] = length
        self.make = found
        self.options = {name: value for name, value in filled.items() if name in takes} | dict(options)
        self.group = {name: value for name, value in group.items() if name not in ("params", "initial_lr")} | {"lr": lr}
        self.defaults = dict(defaults)
        self.moved = ("lr", *(name for name in ("momentum", "betas") if "cycle_momentum" in takes and name in group))
        self._begin()

    def _begin(self) -> None:
        self.step = 0
        self.optimizer = _StandIn(self.group, self.defaults)
        self.scheduler = self.make(self.optimizer, **self.options)

    def at(self, step: int) -> Mapping[str, Any]:
        """Many of torch's schedules know no formula: they are stepped there."""
        if step < self.step:
            self._begin()
        while self.step < step:
            self.optimizer.step()
            self.scheduler.step()
            self.step += 1
        (group,) = self.optimizer.param_groups
        return {name: group[name] for name in self.moved}


class _StandIn(torch.optim.Optimizer):
    """One param group with the settings of a real one, for a scheduler to act on."""

    def __init__(self, group: dict[str, Any], defaults: dict[str, Any]) -> None:
        super().__init__([group | {"params": [nn.Parameter(torch.zeros(1))]}], defaults)

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        """Schedulers look whether it was called."""


def own_name(name: str) -> str | None:
    """A schedule of our own, whatever the case."""
    return name.lower() if name.lower() in SCHEDULES else None


def torch_class(name: str) -> Callable[..., LRScheduler] | None:
    """One of torch's, whatever the case."""
    return next((found for known, found in torch_classes().items() if known.lower() == name.lower()), None)


def torch_classes() -> dict[str, type[LRScheduler]]:
    """All of torch.optim.lr_scheduler, those too that cannot be used here."""
    return {
        name: found
        for name, found in vars(lr_scheduler).items()
        if isinstance(found, type)
        and issubclass(found, LRScheduler)
        and found.__module__ == lr_scheduler.__name__
        and not name.startswith("_")
        and found is not LRScheduler
    }


def parameters_of(found: Callable[..., LRScheduler]) -> dict[str, inspect.Parameter]:
    """What a scheduler takes, but for what every one takes."""
    parameters = dict(inspect.signature(found).parameters)
    return {name: parameter for name, parameter in parameters.items() if name not in ("optimizer", "last_epoch")}
