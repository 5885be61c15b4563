"""Phases at work: where they begin, what each does to the param groups, and the schedule through all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch

from clipfreeze.errors import PlanError
from clipfreeze.optim.policy_scheduler import Leg, PolicyScheduler, Timetable
from clipfreeze.optim.schedules import (
    base_lr,
    check_length,
    schedule_problems,
    span_steps,
    warmup_steps,
    whole_schedule,
)
from clipfreeze.plan.value import PhaseGroup, Plan, PlannedPhase
from clipfreeze.policy.span import parse_span

PHASE = "phase"
"""Entry of a param group: index of the phase it is in."""


def phase_starts(phases: Sequence[PlannedPhase], total_steps: int, steps_per_epoch: int | None = None) -> list[int]:
    """The first step of each phase in a run. PlanError unless each has some steps, and the order is the run's."""
    starts = [0]
    for phase, following in pairwise(phases):
        assert phase.until is not None
        end = span_steps(parse_span(phase.until), total_steps, steps_per_epoch)
        if not starts[-1] < end < total_steps:
            what = (
                f"the phase {phase.name!r} ends at step {end} (until = {phase.until!r}) and {following.name!r} would "
                f"follow, in a run of {total_steps} steps in which {phase.name!r} begins at step {starts[-1]}"
            )
            raise PlanError(what, "say the ends in shares, or make the run longer")
        starts.append(end)
    return starts


def set_groups(optimizer: torch.optim.Optimizer, plan: Plan, index: int) -> None:
    """Lr and weight decay as a phase has them; what is frozen in it has neither, nor a state, nor has what is new."""
    now = {group.name: group for group in plan.phases[index].groups}
    for group in optimizer.param_groups:
        if group.get("name") not in {of.name for of in plan.groups}:
            continue  # the user's own
        settings = now.get(group["name"])
        former = group.get(PHASE)
        went_on = former is not None and group["name"] in {of.name for of in plan.phases[former].groups}
        if settings is None or not went_on:
            _forget(optimizer, group)
        group[PHASE] = index
        group["lr"] = settings.lr if settings else 0.0
        group["weight_decay"] = settings.weight_decay if settings else 0.0


def _forget(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> None:
    """Momentum and counts of a group."""
    for parameter in group["params"]:
        optimizer.state.pop(parameter, None)
    group.pop("step", None)  # where Lamb and Adan count


def plan_scheduler(
    plan: Plan,
    optimizer: torch.optim.Optimizer,
    total_steps: int,
    steps_per_epoch: int | None,
    enter: Callable[[int], None],
) -> PolicyScheduler:
    """The plan's schedules over a run; `enter` is called with the index of each phase as it begins."""
    check_length(total_steps)
    schedules = [plan.schedule, *(whole_schedule(of.schedule, plan.schedule) for of in plan.settings if of.schedule)]
    if problems := [problem for schedule in schedules for problem in schedule_problems(schedule)]:
        raise PlanError(problems)
    warm_start = span_steps(plan.optimizer.warm_start_span, total_steps, steps_per_epoch)
    if warm_start >= total_steps:
        what = f"the warm start of {warm_start} steps is as long as the run of {total_steps}"
        raise PlanError(what, "shorten it, or make the run longer")
    warmups = [span_steps(parse_span(phase.warmup), total_steps, steps_per_epoch) for phase in plan.phases]
    starts = phase_starts(plan.phases, total_steps, steps_per_epoch)
    times = Timetable(total_steps, warm_start, tuple(starts), tuple(warmups) or (0,))

    def leg(group: PhaseGroup | None, fresh: bool) -> Leg | None:
        if group is None:
            return None
        schedule = whole_schedule(group.schedule, plan.schedule)
        return Leg(group.lr, schedule, warmup_steps(schedule, total_steps, steps_per_epoch), fresh)

    legs = []
    for group in optimizer.param_groups:
        course = _course(plan, group)
        legs.append(tuple(leg(of, not number or course[number - 1] is None) for number, of in enumerate(course)))
    return PolicyScheduler(optimizer, legs, times, enter)


def _course(plan: Plan, group: Mapping[str, Any]) -> list[PhaseGroup | None]:
    """Of a param group, how it trains in each phase; one that no plan speaks of trains in all."""
    name = group.get("name")
    if name not in {of.name for of in plan.groups}:
        own = PhaseGroup(name=str(name), lr=base_lr(group), weight_decay=0.0)
        return [own for _ in plan.phases or (None,)]
    if not plan.phases:
        return [next(of for of in plan.groups if of.name == name)]
    return [next((of for of in phase.groups if of.name == name), None) for phase in plan.phases]
