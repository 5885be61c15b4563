"""Schedules by name, checked: our own cosine, linear and constant, or any scheduler of torch that needs steps alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from clipfreeze.errors import PlanError, Problem, did_you_mean
from clipfreeze.optim.curves import own_name, parameters_of, torch_class, torch_classes
from clipfreeze.optim.policy_scheduler import Leg, PolicyScheduler, Timetable
from clipfreeze.policy.schema import SCHEDULES, Schedule
from clipfreeze.policy.span import Span

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


def span_steps(span: Span, total_steps: int, steps_per_epoch: int | None = None) -> int:
    """The steps of a stretch of a run; PlanError when it is said in epochs and their length is not given."""
    try:
        return span.steps(total_steps, steps_per_epoch)
    except ValueError as error:
        raise PlanError(str(error), "give steps_per_epoch, or say it in steps or per cent") from error


def warmup_steps(schedule: Schedule, total_steps: int, steps_per_epoch: int | None = None) -> int:
    """The steps of warmup in a run; PlanError when it is said in epochs and their length is not given."""
    return span_steps(schedule.warmup_span, total_steps, steps_per_epoch)


def build_scheduler(
    schedule: Schedule,
    optimizer: torch.optim.Optimizer,
    total_steps: int,
    steps_per_epoch: int | None = None,
    by_group: Mapping[str, str | Schedule] | None = None,
) -> PolicyScheduler:
    """A schedule over a run without phases, to be stepped once after every optimizer step.

    `by_group` gives groups, by name, another one. PlanError for a wrong name, option or value.
    """
    check_length(total_steps)
    legs = []
    for group in optimizer.param_groups:
        own = whole_schedule((by_group or {}).get(group.get("name", "")), schedule)
        if problems := list(schedule_problems(own)):
            raise PlanError(problems)
        legs.append((Leg(base_lr(group), own, warmup_steps(own, total_steps, steps_per_epoch)),))
    return PolicyScheduler(optimizer, legs, Timetable(total_steps), lambda phase: None)


def check_length(total_steps: int) -> None:
    """PlanError for a run without steps."""
    if total_steps < 1:
        raise PlanError(f"a run of {total_steps} steps has no schedule", "total_steps = 1 or more")


def base_lr(group: Mapping[str, object]) -> float:
    """The peak lr of a group that no plan speaks of, as torch's own schedulers take it."""
    return float(group.get("initial_lr", group["lr"]))  # type: ignore[arg-type]


def whole_schedule(said: str | Schedule | None, policy: Schedule) -> Schedule:
    """The schedule of a group: as a plan says it, with the policy's warmup where it is a name alone."""
    if said is None:
        return policy
    return said if isinstance(said, Schedule) else Schedule(name=said, warmup=policy.warmup)


def schedule_problems(schedule: Schedule) -> Iterator[Problem]:
    """A wrong name, wrong options, and what does not go together."""
    if own_name(schedule.name) is not None:
        for option in schedule.options:
            yield Problem(f"the schedule {schedule.name} has no option {option!r}", did_you_mean(option, ["warmup"]))
        return
    found = torch_class(schedule.name)
    if found is None:
        names = [*SCHEDULES, *(name for name in torch_classes() if name not in _REFUSED)]
        yield Problem(f"no schedule {schedule.name!r}", did_you_mean(schedule.name, names))
        return
    if reason := _REFUSED.get(found.__name__):
        yield Problem(f"the schedule {found.__name__} cannot be used here: {reason}", "one of: " + ", ".join(SCHEDULES))
        return
    takes = parameters_of(found)
    options = [name for name in takes if name not in _THE_RUNS]
    for option in schedule.options:
        if option in _THE_RUNS and option in takes:
            yield Problem(f"{option} of {found.__name__} is {_THE_RUNS[option]}", "take it out")
        elif option not in options:
            yield Problem(f"{found.__name__} has no option {option!r}", did_you_mean(option, options))
    for name, parameter in takes.items():
        if parameter.default is parameter.empty and name not in (*schedule.options, "T_max", "max_lr", "total_steps"):
            yield Problem(f"{found.__name__} needs {name}", f"write {name} beside its name")
    if "max_lr" in takes and schedule.warmup_span.amount:
        yield Problem(f"{found.__name__} rises by itself, and there is a warmup before it", "warmup = 0")
