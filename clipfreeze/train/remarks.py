"""What a run's numbers say that its user should know."""

from __future__ import annotations

import math
from collections.abc import Mapping

from clipfreeze.changes import Applied
from clipfreeze.train.evaluate import Metrics
from clipfreeze.train.objective import Training


def warmup_notes(applied: Applied, total_steps: int, steps_per_epoch: int) -> list[str]:
    """A warmup that is never over, after the steps at lr 0 before it."""
    warmup = applied.plan.schedule.warmup_span.steps(total_steps, steps_per_epoch)
    first = applied.plan.optimizer.warm_start_span.steps(total_steps, steps_per_epoch)
    if first + warmup < total_steps:
        return []
    before = f" after {first} steps at lr 0" if first else ""
    return [f"the warmup of {warmup} steps{before} is as long as the run of {total_steps}: shorten it"]


def collapse_notes(module: Training, loss: float, batch_size: int) -> list[str]:
    """A loss that is what guessing gives."""
    chance = module.by_guessing(batch_size)
    if chance is None or abs(loss - chance) > 0.01 * chance:
        return []
    return [
        f"the loss stayed at {loss:.3f}, which is what guessing gives: "
        "features collapsed, captions all equal, or too small an lr"
    ]


def decline_notes(before: Mapping[str, Metrics], after: Mapping[str, Metrics]) -> list[str]:
    """A goal that fell by more than two standard errors."""
    for name in list(before)[:1]:
        measured, start = next(iter(before[name].scores.items()))
        end = after[name].scores[measured]
        fall = start.value - end.value
        if fall > 2 * math.hypot(start.error, end.error):
            return [f"{measured} on {name} fell from {start.value:.3f} to {end.value:.3f}: lower the lr, or train less"]
    return []
