"""What two plans for one model do differently."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ConfigDict

from clipfreeze.errors import PlanError
from clipfreeze.plan.value import Plan, PlannedParameter

COMPARED = ("trainable", "lr", "weight_decay", "schedule", "init", "clamp", "l2sp", "dropout")


class Difference(BaseModel):
    """One parameter that two plans treat differently: the settings that differ, as `setting: (one, other)`."""

    model_config = ConfigDict(frozen=True)

    name: str
    role: str
    block: int | None
    settings: dict[str, tuple[Any, Any]]


def differences(one: Plan, other: Plan) -> Iterator[Difference]:
    """In the model's order. Raises PlanError when the plans are for different models."""
    if [(p.name, p.shape) for p in one.parameters] != [(p.name, p.shape) for p in other.parameters]:
        raise PlanError(f"the plans are for different models: {one.model.name} and {other.model.name}")
    for left, right in zip(one.parameters, other.parameters, strict=True):
        if settings := _settings(left, right):
            yield Difference(name=left.name, role=left.role, block=left.block, settings=settings)


def _settings(left: PlannedParameter, right: PlannedParameter) -> dict[str, tuple[Any, Any]]:
    pairs = {setting: (getattr(left, setting), getattr(right, setting)) for setting in COMPARED}
    return {setting: pair for setting, pair in pairs.items() if pair[0] != pair[1]}
