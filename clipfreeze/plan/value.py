"""The plan: what a policy does to a model, parameter by parameter, readable before anything changes."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from clipfreeze.plan.sites import Site
from clipfreeze.policy.schema import Anchor, Optimizer, Schedule

Value = bool | int | float | str | tuple[float, float] | dict[str, Any]
"""Of a setting; an action's is the table of what its rule says."""


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Claim(_Value):
    """One rule's word on one setting of one parameter."""

    setting: str
    value: Value
    rule: int = Field(description="number of the rule in the policy, from 1; 0 for the policy's own default")
    source: str = Field(description="file:line")
    wins: bool
    phases: tuple[int, ...] | None = Field(
        None, description="numbers of the phases, from 1, in which it wins; null without phases"
    )


class PlannedParameter(_Value):
    """What becomes of one parameter. `lr`, `weight_decay` and `group` are null where it does not train.

    With phases it is trainable if it trains in one, and `lr`, `weight_decay` and `schedule` are of the first such.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    role: str
    block: int | None = Field(None, description="index of its block in its tower, from 0")
    origin: Literal["model", "lora", "adapter", "prompt", "head"] = "model"
    trainable: bool
    fixed: bool = Field(False, description="the model itself never trains it")
    lr: float | None = None
    weight_decay: float | None = None
    schedule: str | Schedule | None = Field(None, description="null: the policy's")
    init: float | str | None = None
    clamp: tuple[float, float] | None = None
    l2sp: float | None = None
    dropout: float | None = None
    group: str | None = None
    claims: tuple[Claim, ...] = ()

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


class PhaseGroup(_Value):
    """One param group as it trains in a phase."""

    name: str
    lr: float
    weight_decay: float
    schedule: str | Schedule | None = Field(None, description="null: the policy's")


class PlannedGroup(PhaseGroup):
    """One param group of the optimizer: parameters that are treated alike in every phase. Settings as of its first."""

    tensors: int
    parameters: int


class PlannedPhase(_Value):
    """A stretch of the run. Groups that are not among its own are frozen in it."""

    name: str
    until: int | str | None = Field(None, description="its end: steps, epochs or a share; null: to the end of the run")
    warmup: int | str = Field(0, description="of the groups that did not train in the phase before")
    tensors: int = Field(description="that train")
    parameters: int
    groups: tuple[PhaseGroup, ...]
    frontier: dict[str, str | None]


class RuleReport(_Value):
    """What one rule came to: how many parameters it matched, and of how many it decided some setting."""

    rule: int
    source: str
    phase: int | None = Field(None, description="number of the phase it stands in, from 1")
    match: tuple[str, ...]
    says: dict[str, Value]
    active: bool = Field(description="false: switched off by its `when`")
    matched: int
    decided: int


class PolicyFacts(_Value):
    name: str
    sources: tuple[str, ...]
    params: dict[str, bool | int | float | str]


class ModelFacts(_Value):
    name: str
    family: str
    parameters: int


class Totals(_Value):
    """Numbers of elements. `fixed` ones are among the frozen, `injected` ones are what the policy adds."""

    parameters: int
    trainable: int
    injected: int
    frozen: int


class Estimate(_Value):
    """Bytes; `optimizer` is null for an optimizer whose state we do not know."""

    weights: int
    gradients: int
    optimizer: int | None


class Plan(_Value):
    """A policy resolved against a model's anatomy; JSON both ways by `model_dump_json` and `model_validate_json`."""

    policy: PolicyFacts
    model: ModelFacts
    totals: Totals
    parameters: tuple[PlannedParameter, ...] = Field(description="the model's, then those that are added")
    sites: tuple[Site, ...] = Field((), description="where something is added to the model, in order")
    groups: tuple[PlannedGroup, ...]
    optimizer: Optimizer
    schedule: Schedule
    anchor: Anchor = Anchor()
    rules: tuple[RuleReport, ...]
    frontier: dict[str, str | None] = Field(
        description="of each tower, the name of the first part that trains: backward stops there"
    )
    estimate: Estimate
    phases: tuple[PlannedPhase, ...] = Field((), description="in order; what stands above is of all of them together")
    warnings: tuple[str, ...] = ()

    @property
    def trainable(self) -> tuple[PlannedParameter, ...]:
        """The parameters that train, in the model's order."""
        return tuple(parameter for parameter in self.parameters if parameter.trainable)

    @property
    def settings(self) -> tuple[PhaseGroup, ...]:
        """All that any group is set to: overall, then phase by phase."""
        return (*self.groups, *(group for phase in self.phases for group in phase.groups))

    def trains_in(self, phase: int | None) -> frozenset[str]:
        """Names of the parameters that train in a phase, by its index from 0; None: of all phases together."""
        groups: tuple[PhaseGroup, ...] = self.groups if phase is None else self.phases[phase].groups
        names = {group.name for group in groups}
        return frozenset(parameter.name for parameter in self.trainable if parameter.group in names)

    def __str__(self) -> str:
        from clipfreeze.plan.tables import plan_table  # the plan is a value; showing it is another matter

        return plan_table(self)
