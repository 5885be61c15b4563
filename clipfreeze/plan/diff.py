"""What two plans for one model do differently."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict

from clipfreeze.errors import PlanError
from clipfreeze.plan.value import Plan

COMPARED = ("trainable", "lr", "weight_decay", "schedule", "init", "clamp", "l2sp", "dropout")

Settings = dict[str, tuple[Any, Any]]
"""What differs: setting -> (one, other); null where one does not say it."""


class ParameterDifference(BaseModel):
    """One parameter that two plans treat differently."""

    model_config = ConfigDict(frozen=True)

    name: str
    role: str
    block: int | None
    settings: Settings


class PlanDifference(BaseModel):
    """All that differs between two plans."""

    model_config = ConfigDict(frozen=True)

    parameters: tuple[ParameterDifference, ...]
    optimizer: Settings
    schedule: Settings


def compare_plans(one: Plan, other: Plan) -> PlanDifference:
    """The differences, parameters in the model's order. Raises PlanError when the plans are for different models."""
    if [(p.name, p.shape) for p in one.parameters] != [(p.name, p.shape) for p in other.parameters]:
        raise PlanError(f"the plans are for different models: {one.model.name} and {other.model.name}")
    parameters = (
        ParameterDifference(name=left.name, role=left.role, block=left.block, settings=settings)
        for left, right in zip(one.parameters, other.parameters, strict=True)
        if (settings := _differing({s: getattr(left, s) for s in COMPARED}, {s: getattr(right, s) for s in COMPARED}))
    )
    return PlanDifference(
        parameters=tuple(parameters),
        optimizer=_differing(
            {"name": one.optimizer.name} | one.optimizer.options,
            {"name": other.optimizer.name} | other.optimizer.options,
        ),
        schedule=_differing(one.schedule.model_dump(), other.schedule.model_dump()),
    )


def _differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> Settings:
    return {
        setting: (one.get(setting), other.get(setting))
        for setting in {**one, **other}
        if one.get(setting) != other.get(setting)
    }
