"""Learning rates over a run: our own cosine, linear and constant, or any scheduler of torch."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch.optim import lr_scheduler
from torch.optim.lr_scheduler import LambdaLR, LinearLR, LRScheduler, PolynomialLR, SequentialLR

from clipfreeze.errors import PlanError, Problem, did_you_mean
from clipfreeze.policy.schema import SCHEDULES, Schedule

_REFUSED = {
    "ReduceLROnPlateau": "it waits for a metric, which a schedule of steps does not have",
    "LambdaLR": "it takes a function, which a policy cannot write",
    "MultiplicativeLR": "it takes a function, which a policy cannot write",
    "SequentialLR": "it takes other schedulers; warmup is there without it",
    "ChainedScheduler": "it takes other schedulers; warmup is there without it",
}


_THE_RUNS = {
    "max_lr": "the lr of each rule",
    "total_steps": "the run's length",
    "epochs": "the run's",
    "steps_per_epoch": "the run's",
}
"""Options that a policy leaves to the run."""


def warmup_steps(schedule: Schedule, total_steps: int, steps_per_epoch: int | None = None) -> int:
    """The steps of warmup in a run; PlanError when it is said in epochs and their length is not given."""
    try:
        return schedule.warmup_span.steps(total_steps, steps_per_epoch)
    except ValueError as error:
        raise PlanError(str(error), "give steps_per_epoch, or say the warmup in steps or per cent") from error


def build_scheduler(
    schedule: Schedule,
    optimizer: torch.optim.Optimizer,
    total_steps: int,
    steps_per_epoch: int | None = None,
    by_group: Mapping[str, str] | None = None,
) -> LRScheduler:
    """The schedule a policy names, to be stepped once after every optimizer step.

    `by_group` gives groups, by name, another of our own schedules. PlanError for a wrong name, option or value.
    """
    if total_steps < 1:
        raise PlanError(f"a run of {total_steps} steps has no schedule", "total_steps = 1 or more")
    if problems := list(_problems(schedule, bool(by_group))):
        raise PlanError(problems)
    warmup = warmup_steps(schedule, total_steps, steps_per_epoch)
    own = _own_name(schedule.name)
    if own is not None:
        names = [(by_group or {}).get(group.get("name", ""), own) for group in optimizer.param_groups]
        return LambdaLR(optimizer, [partial(_factor, name, warmup, total_steps) for name in names])
    try:
        return _torch_scheduler(schedule, optimizer, total_steps, warmup)
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise PlanError(f"{schedule.name} does not take these options: {error}", "see its documentation") from error


def _problems(schedule: Schedule, by_group: bool) -> Iterator[Problem]:
    """A wrong name, wrong options, and what does not go together."""
    if _own_name(schedule.name) is not None:
        for option in schedule.options:
            yield Problem(f"the schedule {schedule.name} has no option {option!r}", did_you_mean(option, ["warmup"]))
        return
    found = _torch_class(schedule.name)
    if found is None:
        names = [*SCHEDULES, *(name for name in _torch_classes() if name not in _REFUSED)]
        yield Problem(f"no schedule {schedule.name!r}", did_you_mean(schedule.name, names))
        return
    if reason := _REFUSED.get(found.__name__):
        yield Problem(f"the schedule {found.__name__} cannot be used here: {reason}", "one of: " + ", ".join(SCHEDULES))
        return
    if by_group:
        what = f"some rules have a schedule of their own, which does not go with {found.__name__}"
        yield Problem(what, f"with them, [schedule] is one of: {', '.join(SCHEDULES)}")
    takes = _parameters(found)
    options = [name for name in takes if name not in _THE_RUNS]
    for option in schedule.options:
        if option in _THE_RUNS and option in takes:
            yield Problem(f"{option} of {found.__name__} is {_THE_RUNS[option]}", "take it out")
        elif option not in options:
            yield Problem(f"{found.__name__} has no option {option!r}", did_you_mean(option, options))
    for name, parameter in takes.items():
        if parameter.default is parameter.empty and name not in (*schedule.options, "T_max", "max_lr", "total_steps"):
            yield Problem(f"{found.__name__} needs {name}", f"write {name} under [schedule]")
    if "max_lr" in takes and schedule.warmup_span.amount:
        yield Problem(f"{found.__name__} rises by itself, and there is a warmup before it", "warmup = 0")


def _factor(name: str, warmup: int, total: int, step: int) -> float:
    """Times the lr at `step`, from 0: up to 1 through the warmup, then down to 0 at the end of the run."""
    if step < warmup:
        return (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    if name == "cosine":
        return (1 + math.cos(math.pi * done)) / 2
    return 1 - done if name == "linear" else 1.0


def _torch_scheduler(
    schedule: Schedule, optimizer: torch.optim.Optimizer, total_steps: int, warmup: int
) -> LRScheduler:
    found = _torch_class(schedule.name)
    assert found is not None
    after = max(1, total_steps - warmup)
    filled: dict[str, Any] = {
        "T_max": after,
        "total_steps": after,
        "max_lr": [group["lr"] for group in optimizer.param_groups],
    }
    if found is PolynomialLR:  # it ends at 0, after 5 steps unless told; others with total_iters only begin with them
        filled["total_iters"] = after
    options = {name: value for name, value in filled.items() if name in _parameters(found)} | schedule.options
    if not warmup:
        return found(optimizer, **options)
    rise = LinearLR(optimizer, start_factor=1 / warmup, total_iters=warmup - 1)
    return SequentialLR(optimizer, [rise, found(optimizer, **options)], milestones=[warmup])


def _own_name(name: str) -> str | None:
    return name.lower() if name.lower() in SCHEDULES else None


def _torch_class(name: str) -> Callable[..., LRScheduler] | None:
    return next((found for known, found in _torch_classes().items() if known.lower() == name.lower()), None)


def _torch_classes() -> dict[str, type[LRScheduler]]:
    return {
        name: found
        for name, found in vars(lr_scheduler).items()
        if isinstance(found, type)
        and issubclass(found, LRScheduler)
        and found.__module__ == lr_scheduler.__name__
        and not name.startswith("_")
        and found is not LRScheduler
    }


def _parameters(found: Callable[..., LRScheduler]) -> dict[str, inspect.Parameter]:
    parameters = dict(inspect.signature(found).parameters)
    return {name: parameter for name, parameter in parameters.items() if name not in ("optimizer", "last_epoch")}
