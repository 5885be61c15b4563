"""What two plans for one model do differently."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import zip_longest
from typing import Any

from pydantic import BaseModel, ConfigDict

from clipfreeze.errors import PlanError
from clipfreeze.plan.value import Plan, PlannedParameter, PlannedPhase
from clipfreeze.policy.schema import Optimizer

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
    anchor: Settings = {}
    phases: Settings = {}


def compare_plans(one: Plan, other: Plan) -> PlanDifference:
    """The differences, parameters in the model's order. Raises PlanError when the plans are for different models."""
    left, right = ({p.name: p for p in plan.parameters} for plan in (one, other))
    own, others = ([(p.name, p.shape) for p in plan.parameters if p.origin == "model"] for plan in (one, other))
    if own != others:
        raise PlanError(f"the plans are for different models: {one.model.name} and {other.model.name}")
    parameters = (
        ParameterDifference(name=name, role=of.role, block=of.block, settings=settings)
        for name, of in (left | right).items()
        if (settings := _differing(_treatment(one, left.get(name)), _treatment(other, right.get(name))))
    )
    return PlanDifference(
        parameters=tuple(parameters),
        optimizer=_differing(_optimizer(one.optimizer), _optimizer(other.optimizer)),
        schedule=_differing(one.schedule.model_dump(), other.schedule.model_dump()),
        anchor=_differing(one.anchor.model_dump(), other.anchor.model_dump()),
        phases=_phases(one, other),
    )


def _optimizer(of: Optimizer) -> dict[str, Any]:
    return {"name": of.name, "warm_start": of.warm_start} | of.options


def _phases(one: Plan, other: Plan) -> Settings:
    """By number: name, end and warmup."""
    pairs = zip_longest(map(_told, one.phases), map(_told, other.phases))
    return {str(number): pair for number, pair in enumerate(pairs, start=1) if pair[0] != pair[1]}


def _told(phase: PlannedPhase) -> str:
    until = "to the end" if phase.until is None else f"until {phase.until}"
    return f"{phase.name}, {until}" + (f" with warmup {phase.warmup}" if phase.warmup else "")


def _treatment(plan: Plan, parameter: PlannedParameter | None) -> dict[str, Any]:
    """Nothing of what one plan adds and the other does not."""
    if parameter is None:
        return {}
    treatment = {setting: getattr(parameter, setting) for setting in COMPARED}
    return treatment | {"phases": parameter.group if plan.phases else None}


def _differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> Settings:
    return {
        setting: (one.get(setting), other.get(setting))
        for setting in {**one, **other}
        if one.get(setting) != other.get(setting)
    }
