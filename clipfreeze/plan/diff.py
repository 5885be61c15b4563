"""What two plans for one model do differently."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict

from clipfreeze.errors import PlanError
from clipfreeze.plan.value import Plan, PlannedParameter

COMPARED = ("shape", "trainable", "lr", "weight_decay", "schedule", "init", "clamp", "l2sp", "dropout")

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
    left, right = ({p.name: p for p in plan.parameters} for plan in (one, other))
    own, others = ([(p.name, p.shape) for p in plan.parameters if p.origin == "model"] for plan in (one, other))
    if own != others:
        raise PlanError(f"the plans are for different models: {one.model.name} and {other.model.name}")
    parameters = (
        ParameterDifference(name=name, role=of.role, block=of.block, settings=settings)
        for name, of in (left | right).items()
        if (settings := _differing(_treatment(left.get(name)), _treatment(right.get(name))))
    )
    return PlanDifference(
        parameters=tuple(parameters),
        optimizer=_differing(
            {"name": one.optimizer.name} | one.optimizer.options,
            {"name": other.optimizer.name} | other.optimizer.options,
        ),
        schedule=_differing(one.schedule.model_dump(), other.schedule.model_dump()),
    )


def _treatment(parameter: PlannedParameter | None) -> dict[str, Any]:
    """Nothing of what one plan adds and the other does not."""
    return {} if parameter is None else {setting: getattr(parameter, setting) for setting in COMPARED}


def _differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> Settings:
    return {
        setting: (one.get(setting), other.get(setting))
        for setting in {**one, **other}
        if one.get(setting) != other.get(setting)
    }
