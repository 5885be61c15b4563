"""The policy language as frozen, typed data; `load` reads files into it."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, field_validator, model_validator

from clipfreeze.policy.actions import (
    ACTIONS,
    Adapter,
    Head,
    Lora,
    NotNegative,
    Positive,
    Prompt,
    Share,
    Spec,
    Texts,
    listed,
)
from clipfreeze.policy.span import Span, parse_span

SCHEDULES = ("cosine", "linear", "constant")
"""Schedules of our own, with warmup; a policy may also name any of torch.optim.lr_scheduler."""

_NORMAL = re.compile(r"normal\((\d+(\.\d+)?(e-?\d+)?)\)")


def _checked_span(value: Any) -> Any:
    parse_span(value)
    return value


Patterns = Texts
_KNOB = {"type": "string", "pattern": r"^\{\w+\}$", "description": "a knob"}
Finite = Annotated[float, Field(allow_inf_nan=False)]
Range = Annotated[
    tuple[Finite, Finite],
    BeforeValidator(listed),
    WithJsonSchema(
        {"type": "array", "items": {"anyOf": [{"type": "number"}, _KNOB]}, "minItems": 2, "maxItems": 2},
    ),
]
Stretch = Annotated[int | str, BeforeValidator(_checked_span)]
"""A part of a run: 500, "500 steps", "2 epochs" or "5%"."""


class Knob(Spec):
    """A value the user may set: `--set n=4`, or `load_policy("last_n", n=4)`."""

    default: bool | int | float | str = Field(
        description='the value when nobody sets it; "{other}" takes another knob\'s'
    )
    min: int | float | None = Field(None, description="smallest number allowed")
    max: int | float | None = Field(None, description="largest number allowed")
    choices: Annotated[tuple[bool | int | float | str, ...], BeforeValidator(listed)] | None = Field(
        None, description="the words allowed; with min or max, a number in their bounds is allowed too"
    )
    help: str | None = Field(None, description="one line for the user")


class Schedule(BaseModel):
    """cosine, linear, constant, or any of torch.optim.lr_scheduler; keys beside these are its own options."""

    model_config = ConfigDict(frozen=True, strict=True, extra="allow")

    name: str = Field("constant", description="cosine and linear fall to 0 at the end of the run")
    warmup: Stretch = Field(0, description='linear from 0: a number of steps, "2 epochs" or "5%" of the run')

    @property
    def options(self) -> dict[str, Any]:
        """The scheduler's own options."""
        return dict(self.model_extra or {})

    @property
    def warmup_span(self) -> Span:
        """`warmup`, parsed."""
        return parse_span(self.warmup)


class Settings(Spec):
    """What a rule can say of the parameters it matches."""

    freeze: Literal[True] | None = Field(None, description="do not train")
    train: Literal[True] | None = Field(None, description="train")
    lr: Positive | None = Field(None, description="learning rate at the peak of the schedule")
    lr_scale: Positive | None = Field(
        None, description="times the learning rate that stands so far; of several, the last alone"
    )
    layer_decay: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="times the learning rate: once for the last block of a tower, once more for each one below"
    )
    weight_decay: NotNegative | None = Field(None, description="decoupled or L2, as the optimizer has it")
    schedule: str | Schedule | None = Field(
        None, description="in place of the policy's: a name, or a table of name, options and warmup"
    )
    init: Finite | str | None = Field(None, description='start value: "zeros", "xavier", "normal(0.02)" or a number')
    clamp: Range | None = Field(None, description="[low, high], kept after every optimizer step")
    l2sp: NotNegative | None = Field(
        None, description="pull towards the start values: adds l2sp * |w - w0|^2 to the loss (arXiv 1802.01483)"
    )
    dropout: Share | None = Field(None, description="on the input of a projection while training")
    lora: Lora | None = Field(None, description="low-rank factors beside the products that matched")
    adapter: Adapter | None = Field(None, description="bottlenecks in the blocks that matched, or behind their tower")
    prompt: Prompt | None = Field(None, description="learnable vectors among the tokens of the tower that matched")
    head: Head | None = Field(None, description="a classifier on the image features")

    @field_validator("init")
    @classmethod
    def _known_init(cls, value: float | str | None) -> float | str | None:
        if isinstance(value, str) and value not in ("zeros", "xavier") and not _NORMAL.fullmatch(value):
            raise ValueError('write "zeros", "xavier", "normal(0.02)" or a number')
        return value

    @field_validator("schedule")
    @classmethod
    def _named_schedule(cls, value: str | Schedule | None) -> str | Schedule | None:
        if isinstance(value, Schedule) and "name" not in value.model_fields_set:
            raise ValueError('write its name too: { name = "StepLR", step_size = 100 }')
        return value

    @field_validator("clamp")
    @classmethod
    def _ordered_clamp(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and value[0] >= value[1]:
            raise ValueError("write [low, high] with low < high")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Settings:
        pairs = (("freeze", "train"), ("lr", "lr_scale"))
        if both := [pair for pair in pairs if all(getattr(self, name) is not None for name in pair)]:
            raise ValueError("; ".join(f"{one} and {other} together: say one" for one, other in both))
        if self.freeze and (idle := [name for name in TRAINING_SETTINGS if getattr(self, name) is not None]):
            raise ValueError(f"{', '.join(idle)} on what this rule freezes: nothing would read it")
        return self

    def said(self) -> dict[str, Any]:
        """The settings this rule speaks of, in the language's order."""
        return {name: value for name in SETTINGS if (value := getattr(self, name)) is not None}


SETTINGS = tuple(Settings.model_fields)
TRAINING_SETTINGS = tuple(name for name in SETTINGS if name not in ("freeze", "train", "init", *ACTIONS))
"""Settings that mean something only where the parameter trains."""

WHOLE_RUN = ("init", "clamp", "l2sp", "dropout")
"""Settings that no phase changes."""


class Rule(Settings):
    """Patterns, and what is said of the parameters they match."""

    match: Patterns = Field(description="parameter-name globs and roles; a parameter matches if any does")
    exclude: Patterns = Field((), description="taken out of what matched")
    when: str | None = Field(
        None, description='switches the rule: "{knob}", "not {knob}", "{knob} == x", "{knob} != x"'
    )
    optional: bool = Field(False, description="silent when it matches or decides nothing")

    @field_validator("match")
    @classmethod
    def _some_pattern(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            raise ValueError("write at least one pattern")
        return value


class PhaseRule(Rule):
    """A rule of a phase: what trains in it, and how fast. What holds for the whole run stands outside of phases."""

    @field_validator(*ACTIONS, *WHOLE_RUN)
    @classmethod
    def _of_the_run(cls, value: Any) -> Any:
        if value is not None:
            raise ValueError("it holds for the whole run: write it in a [[rule]] above the phases")
        return value


class Phase(Spec):
    """A stretch of the run, with rules behind the policy's own: the cascade goes on."""

    name: str | None = Field(None, description="its number if not said")
    until: Stretch | None = Field(
        None, description='its end: "20%" of the run, "2 epochs", "500 steps"; the last may leave it out'
    )
    warmup: Stretch = Field(
        0, description="linear from 0 for what did not train in the phase before; a share is of the run"
    )
    when: str | None = Field(None, description="switches the phase, as a rule's does")
    rule: Annotated[tuple[PhaseRule, ...], BeforeValidator(listed)] = Field((), description="in order; later ones win")

    @field_validator("until")
    @classmethod
    def _some_length(cls, value: int | str | None) -> int | str | None:
        if value is not None and not parse_span(value).amount:
            raise ValueError("a phase of no length")
        return value


class Optimizer(BaseModel):
    """Any torch or timm optimizer by name; keys beside these are its own options (betas, eps, momentum, ...)."""

    model_config = ConfigDict(frozen=True, strict=True, extra="allow")

    name: str = Field("adamw", description="as torch.optim or timm.optim calls it; case does not matter")
    lr: Positive | None = Field(None, description="for what trains and has no rule with an lr")
    weight_decay: NotNegative = Field(0.0, description="for what has no rule with a weight_decay")
    warm_start: Stretch = Field(
        0, description="the run begins with so many steps at lr 0, which fill the moments alone (arXiv 2601.09859)"
    )

    @property
    def options(self) -> dict[str, Any]:
        """The optimizer's own options."""
        return dict(self.model_extra or {})

    @property
    def warm_start_span(self) -> Span:
        """`warm_start`, parsed."""
        return parse_span(self.warm_start)


class Anchor(Spec):
    """A pull of features to what the model gave at the start, on the training data themselves.

    Adds strength * mean |f - f0|^2 to the loss, f normalised (as LDIFS, arXiv 2308.13320, with the last features
    alone): the towers may change, what they say of a picture less so.
    """

    vision: NotNegative = Field(0.0, description="strength, of image features")
    text: NotNegative = Field(0.0, description="strength, of text features")


class PolicyFile(Spec):
    """A policy file, its knobs put in."""

    name: str | None = Field(None, description="the file's name if not said")
    summary: str = Field("", description="one line for `clipfreeze list`")
    default: Literal["freeze", "train"] | None = Field(None, description="what a parameter is when no rule speaks")
    extends: str | Patterns | None = Field(None, description="policies to build on, by name or path: their rules first")
    params: dict[str, Knob] = Field({}, description="knobs")
    rule: Annotated[tuple[Rule, ...], BeforeValidator(listed)] = Field((), description="in order; later ones win")
    optimizer: Optimizer | None = None
    schedule: Schedule | None = None
    anchor: Anchor | None = None
    phase: Annotated[tuple[Phase, ...], BeforeValidator(listed)] = Field(
        (), description="stretches of the run, in order; a file's own take the place of those it inherits"
    )


def policy_schema() -> dict[str, Any]:
    """The JSON schema of a policy file for editors: any setting may be a knob in braces."""
    schema = PolicyFile.model_json_schema()
    for name in (*ACTIONS, *WHOLE_RUN):
        del schema["$defs"]["PhaseRule"]["properties"][name]
    models = (
        "Rule",
        "PhaseRule",
        "Phase",
        "Optimizer",
        "Schedule",
        "Anchor",
        *(action.__name__ for action in ACTIONS.values()),
    )
    for model in models:
        properties = schema["$defs"][model]["properties"]
        for name, setting in properties.items():
            if name not in ("match", "exclude", "when", "optional", "rule"):
                said = {key: setting.pop(key) for key in ("description", "default", "title") if key in setting}
                properties[name] = {**said, "anyOf": [*setting.get("anyOf", [setting]), _KNOB]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
