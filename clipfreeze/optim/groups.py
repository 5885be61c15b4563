"""Param groups as the plan has them, and the proof that they are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from clipfreeze.errors import ApplyError
from clipfreeze.plan.value import Plan


def param_groups(plan: Plan, parameters: Mapping[str, nn.Parameter]) -> list[dict[str, Any]]:
    """A group for each of the plan's, in its order; `parameters` are the model's by name."""
    members: dict[str | None, list[nn.Parameter]] = {}
    for planned in plan.trainable:
        members.setdefault(planned.group, []).append(parameters[planned.name])
    return [
        {
            "params": members[group.name],
            "name": group.name,
            "lr": group.lr,
            "weight_decay": group.weight_decay,
        }
        for group in plan.groups
    ]


def prove_groups(
    optimizer: torch.optim.Optimizer, plan: Plan, parameters: Mapping[str, nn.Parameter], phase: int | None = None
) -> None:
    """ApplyError unless each trainable tensor is in one group, with its own settings, and no other is in any.

    `phase` is the one that the model is in.
    """
    training = plan.trains_in(phase)
    held = Counter(id(tensor) for group in optimizer.param_groups for tensor in group["params"])
    group_of = {id(tensor): group for group in optimizer.param_groups for tensor in group["params"]}
    for planned in plan.parameters:
        tensor = parameters[planned.name]
        if (count := held.pop(id(tensor), 0)) != planned.trainable:
            raise ApplyError(f"{planned.name} is in {count} param groups")
        if tensor.requires_grad != (planned.name in training):
            what = f"{planned.name} has requires_grad={tensor.requires_grad}, which is not what the plan says"
            raise ApplyError(what, "leave requires_grad to the policy, or remove() it and apply another")
        if planned.trainable:
            group = group_of[id(tensor)]
            made = (group["name"], group["lr"], group["weight_decay"])
            if made != (planned.group, planned.lr, planned.weight_decay):
                raise ApplyError(f"{planned.name} is in group {made}, which is not what the plan says")
    if held:
        raise ApplyError(f"{len(held)} tensors in param groups are not of the model")
