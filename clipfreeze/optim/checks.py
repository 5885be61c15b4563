"""Optimizer and schedule as a policy names them, checked without a model."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from dataclasses import replace

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from clipfreeze.errors import PlanError, Problem
from clipfreeze.optim.optimizers import build_optimizer
from clipfreeze.optim.schedules import build_scheduler
from clipfreeze.policy.loading import Policy
from clipfreeze.policy.schema import Optimizer, Schedule


def check_optimizer(policy: Policy, dims: Collection[int] = (2,)) -> list[Problem]:
    """What is wrong with a policy's optimizer and schedule: names, options and values, each with its place.

    `dims` are the numbers of dimensions of what trains.
    """
    by_group = any(rule.active and rule.rule.schedule for rule in policy.rules)
    optimizer, schedule = training_problems(policy.optimizer, policy.schedule, by_group, dims)
    return [*_at(policy.optimizer_source, optimizer), *_at(policy.schedule_source, schedule)]


def training_problems(
    optimizer: Optimizer, schedule: Schedule, by_group: bool, dims: Collection[int]
) -> tuple[tuple[Problem, ...], tuple[Problem, ...]]:
    """Problems of the optimizer and of the schedule, found by building them on a small tensor of each of `dims`.

    `by_group` says that some rules have a schedule of their own.
    """
    group = {"params": [nn.Parameter(torch.zeros((2,) * dim)) for dim in dims], "name": "", "lr": 1e-3}
    groups = [group | {"weight_decay": optimizer.weight_decay}]
    wrong: tuple[Problem, ...] = ()
    try:
        made = build_optimizer(optimizer, groups)
        _try_step(made, optimizer.name)
    except PlanError as error:
        wrong = error.problems
        made = torch.optim.AdamW([group | {"params": [nn.Parameter(torch.zeros(2))]}])
    try:
        scheduler = build_scheduler(schedule, made, 1000, 100, {"": "cosine"} if by_group else None)
        _try_step(scheduler, schedule.name)
    except PlanError as error:
        return wrong, error.problems
    return wrong, ()


def _try_step(made: torch.optim.Optimizer | LRScheduler, name: str) -> None:
    """Some options are looked at in the first step only; and each library raises what it likes."""
    if isinstance(made, torch.optim.Optimizer):
        for group in made.param_groups:
            for tensor in group["params"]:
                tensor.grad = torch.ones_like(tensor)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a scheduler that steps before its optimizer did
            for _ in range(3):
                made.step()
    except Exception as error:
        raise PlanError(f"{name} does not take these options: {error}", "see its documentation") from error


def _at(source: str, problems: tuple[Problem, ...]) -> list[Problem]:
    path, _, line = source.rpartition(":")
    return [replace(problem, path=path, line=int(line)) for problem in problems]
