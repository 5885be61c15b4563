"""The learning rate of every param group at every step of a run, through its phases."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from clipfreeze.errors import ApplyError
from clipfreeze.optim.curves import Curve, draw_curve
from clipfreeze.policy.schema import Schedule


@dataclass(frozen=True, slots=True)
class Leg:
    """How a param group trains in one phase: its peak lr and its schedule, with the steps of that one's warmup.

    `fresh` where it did not train in the phase before.
    """

    lr: float
    schedule: Schedule
    warmup: int
    fresh: bool = True


@dataclass(frozen=True, slots=True)
class Timetable:
    """A run in steps: its length, those at lr 0 at its begin, and of each phase the first step and the entry warmup."""

    total_steps: int
    warm_start: int = 0
    starts: tuple[int, ...] = (0,)
    warmups: tuple[int, ...] = (0,)

    def phase_at(self, step: int) -> int:
        """The phase of a step, from 0."""
        return bisect_right(self.starts, step) - 1


class PolicyScheduler(LRScheduler):
    """Step it once after every optimizer step. A schedule runs over the whole run, whatever the phases.

    `legs` are those of each param group, one a phase, None where it is frozen. When a phase begins, `enter` is called
    with its index before the rates are set. The state is a few numbers: all else follows from them.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        legs: Sequence[Sequence[Leg | None]],
        times: Timetable,
        enter: Callable[[int], None],
    ) -> None:
        self._legs, self._times, self._enter = legs, times, enter
        self._curves = {
            (number, phase): self._curve(leg, optimizer.param_groups[number], optimizer.defaults)
            for number, of_group in enumerate(legs)
            for phase, leg in enumerate(of_group)
            if leg is not None
        }
        super().__init__(optimizer)

    def step(self, epoch: int | None = None) -> None:
        """On to the next step of the run."""
        if self.last_epoch >= 0:  # when made, it leaves the phase alone: the optimizer may be one that goes on
            self._enter(self._times.phase_at(self.last_epoch + 1 if epoch is None else epoch))
        super().step(epoch)
        self._move_momentum()

    def get_lr(self) -> list[float | torch.Tensor]:
        """Of each group, at the step the run is at."""
        return [self._lr(number, self.last_epoch) for number in range(len(self._legs))]

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return {
            "step": self.last_epoch,
            "total_steps": self._times.total_steps,
            "starts": list(self._times.starts),
            "lrs": [float(lr) for lr in self.get_last_lr()],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where another one was. ApplyError where that one was of another run, which has other rates."""
        step, saved = state_dict["step"], state_dict["lrs"]
        lrs = [self._lr(number, step) for number in range(len(self._legs))]
        own = (self._times.total_steps, list(self._times.starts))
        same = len(lrs) == len(saved) and all(map(_close, lrs, saved))
        if not same or own != (state_dict["total_steps"], state_dict["starts"]):
            what = (
                f"the run that was saved has {state_dict['total_steps']} steps and at step {step} lr {_shown(saved)}; "
                f"this one has {own[0]} steps and there lr {_shown(lrs)}"
            )
            raise ApplyError(what, "go on with the same policy, data, batch size and epochs")
        self._enter(self._times.phase_at(step))
        self.last_epoch, self._step_count, self._last_lr = step, step + 1, [*lrs]
        for group, lr in zip(self.optimizer.param_groups, lrs, strict=True):
            group["lr"] = lr
        self._move_momentum()

    def _curve(self, leg: Leg, group: dict[str, Any], defaults: dict[str, Any]) -> Curve:
        length = max(1, self._times.total_steps - self._times.warm_start - leg.warmup)
        return draw_curve(leg.schedule, leg.lr, length, group, defaults)

    def _lr(self, number: int, step: int) -> float:
        phase = self._times.phase_at(step)
        leg, begin = self._legs[number][phase], self._times.warm_start
        if leg is None or step < begin:
            return 0.0
        at = step - begin - leg.warmup
        lr = leg.lr * ((at + leg.warmup + 1) / leg.warmup) if at < 0 else self._curves[number, phase].at(at)["lr"]
        since, entry = step - max(self._times.starts[phase], begin), self._times.warmups[phase]
        return float(lr * ((since + 1) / entry) if leg.fresh and since < entry else lr)

    def _move_momentum(self) -> None:
        """What OneCycleLR and CyclicLR do besides."""
        phase = self._times.phase_at(self.last_epoch)
        for number, group in enumerate(self.optimizer.param_groups[: len(self._legs)]):
            leg = self._legs[number][phase]
            if leg is not None:
                at = max(0, self.last_epoch - self._times.warm_start - leg.warmup)
                settings = self._curves[number, phase].at(at)
                group.update({name: value for name, value in settings.items() if name != "lr"})


def _close(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=1e-9, abs_tol=1e-30)


def _shown(lrs: Sequence[float]) -> str:
    return ", ".join(f"{lr:.3g}" for lr in lrs[:4]) + (", ..." if len(lrs) > 4 else "")
