"""Optimizer and schedule as a policy names them, checked without a model."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import torch
from torch import nn

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
    except PlanError as error:
        wrong = error.problems
        made = torch.optim.AdamW(groups)
    try:
        build_scheduler(schedule, made, 1000, 100, {"": "cosine"} if by_group else None)
    except PlanError as error:
        return wrong, error.problems
    return wrong, ()


def _at(source: str, problems: tuple[Problem, ...]) -> list[Problem]:
    path, _, line = source.rpartition(":")
    return [replace(problem, path=path, line=int(line)) for problem in problems]
