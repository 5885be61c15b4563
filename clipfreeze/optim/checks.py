"""Optimizer and schedules as a policy names them, checked without a model."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence
from dataclasses import replace

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from clipfreeze.errors import PlanError, Problem
from clipfreeze.optim.optimizers import build_optimizer
from clipfreeze.optim.schedules import build_scheduler, whole_schedule
from clipfreeze.plan.value import Plan
from clipfreeze.policy.loading import Policy
from clipfreeze.policy.schema import Optimizer, Schedule


def check_optimizer(policy: Policy, dims: Collection[int] = (2,)) -> list[Problem]:
    """What is wrong with a policy's optimizer and schedules: names, options and values, each with its place.

    `dims` are the numbers of dimensions of what trains.
    """
    own = [rule for rule in policy.all_rules if rule.active and rule.rule.schedule]
    places = [policy.optimizer_source, policy.schedule_source, *(rule.source for rule in own)]
    schedules = [policy.schedule, *(whole_schedule(rule.rule.schedule, policy.schedule) for rule in own)]
    wrong = _problems(policy.optimizer, schedules, dims)
    return [problem for place, of in zip(places, wrong, strict=True) for problem in _at(place, of)]


def training_problems(plan: Plan) -> list[Problem]:
    """The same of a plan, which knows no places."""
    schedules = [plan.schedule, *(whole_schedule(of.schedule, plan.schedule) for of in plan.settings if of.schedule)]
    dims = {len(planned.shape) for planned in plan.trainable}
    return [problem for of in _problems(plan.optimizer, schedules, dims) for problem in of]


def _problems(optimizer: Optimizer, schedules: Sequence[Schedule], dims: Collection[int]) -> list[tuple[Problem, ...]]:
    """Of the optimizer, then of each schedule, found by building them on a small tensor of each of `dims`."""
    group = {"params": [nn.Parameter(torch.zeros((2,) * dim)) for dim in dims], "name": "", "lr": 1e-3}
    groups = [group | {"weight_decay": optimizer.weight_decay}]
    wrong: list[tuple[Problem, ...]] = [()]
    try:
        made = build_optimizer(optimizer, groups)
        _try_step(made, optimizer.name)
        _check_warm_start(optimizer, dims)
    except PlanError as error:
        wrong = [error.problems]
        made = torch.optim.AdamW([group | {"params": [nn.Parameter(torch.zeros(2))]}])
    for schedule in schedules:
        try:
            _try_step(build_scheduler(schedule, made, 1000, 100), schedule.name)
        except PlanError as error:
            wrong.append(error.problems)
        else:
            wrong.append(())
    return wrong


def _check_warm_start(optimizer: Optimizer, dims: Collection[int]) -> None:
    """PlanError where a step at lr 0 moves weights."""
    if not optimizer.warm_start_span.amount:
        return
    held = [nn.Parameter(torch.ones((2,) * dim)) for dim in dims]
    made = build_optimizer(
        optimizer, [{"params": held, "name": "", "lr": 1e-3, "weight_decay": optimizer.weight_decay}]
    )
    made.param_groups[0]["lr"] = 0.0
    _try_step(made, optimizer.name)
    if any((tensor != 1).any() for tensor in held):
        what = f"{optimizer.name} moves weights at lr 0, so it cannot have a warm start"
        raise PlanError(what, "warm_start = 0, or another optimizer")


def _try_step(made: torch.optim.Optimizer | LRScheduler, name: str) -> None:
    """Some options are looked at in the first step only; and each library raises what it likes."""
    needs_loss = isinstance(made, torch.optim.LBFGS)
    if isinstance(made, torch.optim.Optimizer):
        for group in made.param_groups:
            for tensor in group["params"]:
                tensor.grad = torch.ones_like(tensor)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a scheduler that steps before its optimizer did
            for _ in range(3):
                made.step(*[lambda: 0.0] * needs_loss)  # type: ignore[arg-type]
    except Exception as error:
        raise PlanError(f"{name} does not take these options: {error}", "see its documentation") from error


def _at(source: str, problems: tuple[Problem, ...]) -> list[Problem]:
    path, _, line = source.rpartition(":")
    return [replace(problem, path=path, line=int(line)) for problem in problems]
