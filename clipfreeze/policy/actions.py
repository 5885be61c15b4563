"""What a policy can add to a model, an action a data model; the effects are in `inject`."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, field_validator, model_validator


def listed(value: Any) -> Any:
    """One text is a list of one; a TOML array is a tuple."""
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


def _split(value: Any) -> Any:
    """As `listed`; a knob gives several words in one text with commas."""
    if isinstance(value, str):
        return tuple(word.strip() for word in value.split(","))
    return listed(value)


_TEXT = {"type": "string", "minLength": 1}
_TEXTS = WithJsonSchema({"anyOf": [_TEXT, {"type": "array", "items": _TEXT, "minItems": 1}]})
Words = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(_split), _TEXTS]
Texts = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(listed), _TEXTS]


def distinct(names: Any) -> Any:
    """A list of names as a tuple of at least two, no two alike; a text is left as it is."""
    if not isinstance(names, (list, tuple)):
        return names
    if wrong := [name for name in names if not isinstance(name, str)]:
        raise ValueError(f"{wrong[0]!r} is no name: write it in quotes")
    if len(names) < 2:
        raise ValueError(f"{len(names)} class{'' if len(names) == 1 else 'es'}: there is nothing to tell apart")
    if twice := [name for name, count in Counter(map(str, names)).items() if count > 1]:
        raise ValueError(f"the class {twice[0]!r} stands there twice")
    return tuple(names)


_NAME = Annotated[str, Field(min_length=1)]
Classes = Annotated[_NAME | tuple[_NAME, ...], BeforeValidator(distinct), _TEXTS]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]


class Spec(BaseModel):
    """Common ground: frozen, strict types, no unknown keys."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


class Action(Spec):
    """What every action may say of the parameters it adds; rules on @lora, @adapter, @prompt, @head say the same."""

    lr: Positive | None = Field(None, description="learning rate of what is added")
    weight_decay: NotNegative | None = Field(None, description="of the matrices that are added; biases have none")


class Lora(Action):
    """Low-rank adaptation beside a product: W x + scale B A x (arXiv 2106.09685)."""

    rank: Count = Field(4, description="columns of B, rows of A")
    alpha: Positive | None = Field(
        None, description="the sum is scaled by alpha / rank, in rslora by alpha / sqrt(rank); if not said, rank"
    )
    dropout: Share = Field(0.0, description="on the input of A while training")
    variant: Literal["lora", "rslora", "dora"] = Field(
        "lora", description="rslora: arXiv 2312.03732; dora: trains a magnitude of each output too, arXiv 2402.09353"
    )
    init: Literal["default", "gaussian", "orthogonal", "pissa"] = Field(
        "default",
        description="of A, B being zero; pissa: both from the largest singular vectors, less the start (2404.02948)",
    )
    targets: Words | None = Field(
        None, description="of what the rule matches: q, k, v, out, fc1, fc2, or names of modules; if not said, all"
    )
    lr_b_ratio: Positive | None = Field(None, description="lr of B as a multiple of A's (LoRA+, arXiv 2402.12354)")

    @model_validator(mode="after")
    def _consistent(self) -> Lora:
        if self.targets == ():
            raise ValueError("targets names nothing: leave it out for all that matches")
        if self.variant == "dora" and self.init == "pissa":
            raise ValueError("dora with pissa: say one")
        return self

    @property
    def scaling(self) -> float:
        """What B A x is multiplied by."""
        alpha = self.rank if self.alpha is None else self.alpha
        return float(alpha / (self.rank**0.5 if self.variant == "rslora" else self.rank))


class Adapter(Action):
    """A bottleneck beside or behind part of a block (arXiv 1902.00751), or behind a tower (arXiv 2110.04544)."""

    dim: Count | None = Field(None, description="width of the bottleneck; if not said, 64")
    act: Literal["gelu", "quick_gelu", "relu", "silu", "tanh"] = Field("gelu", description="between down and up")
    scale: Positive | None = Field(None, description="of what is added; if not said, 1")
    dropout: Share = Field(0.0, description="before the up projection while training")
    after: Literal["attn", "mlp", "both", "tower"] = Field(
        "mlp", description="which part of each block, or once behind the tower"
    )
    placement: Literal["sequential", "parallel"] = Field(
        "sequential", description="reads what the part gives, or what it is given (arXiv 2110.04366)"
    )
    reduction: Count | None = Field(None, description="behind a tower: dim is its width divided by this")
    ratio: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="behind a tower: share of the adapter in the feature; scale is ratio / (1 - ratio)"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Adapter:
        if self.after != "tower" and (self.reduction or self.ratio):
            raise ValueError('reduction and ratio are for after = "tower"')
        if self.after == "tower" and self.placement == "parallel":
            raise ValueError('nothing is parallel to a tower: take placement out, or after = "mlp"')
        if self.dim and self.reduction:
            raise ValueError("dim and reduction together: say one")
        if self.scale and self.ratio:
            raise ValueError("scale and ratio together: say one")
        return self

    @property
    def factor(self) -> float:
        """What the up projection is multiplied by."""
        if self.ratio is not None:
            return self.ratio / (1 - self.ratio)
        return 1.0 if self.scale is None else self.scale


class Prompt(Action):
    """Learnable vectors among the tokens of a tower: CoOp (arXiv 2109.01134), VPT (2203.12119), MaPLe (2210.03117)."""

    length: Count = Field(4, description="vectors")
    init: str = Field("random", description="random, or words, whose embeddings the last vectors start as; text only")
    std: Positive = Field(0.02, description="of random vectors")
    position: Literal["front", "middle", "end"] = Field(
        "front", description="of a text: after its start, in half before and after its words, before its end"
    )
    depth: Count = Field(1, description="fresh vectors replace the former ones before each of the first blocks")
    class_specific: bool = Field(False, description="vectors of its own for each of `classes`")
    classes: Classes | None = Field(None, description="names, a file of one a line, imagenet, or data")
    couple: bool = Field(False, description="vision: a learned map of the text prompt, which must be as long and deep")
    truncate: bool = Field(True, description="cut the words of a text that no longer fits; false refuses it")

    @model_validator(mode="after")
    def _consistent(self) -> Prompt:
        if self.class_specific and self.classes is None:
            raise ValueError('class_specific needs classes: names, a file of one a line, "imagenet" or "data"')
        if self.classes is not None and not self.class_specific:
            raise ValueError("classes without class_specific = true: nothing would read them")
        if self.depth > 1 and self.position != "front":
            raise ValueError('depth > 1 replaces vectors at fixed places: position = "front" is the only one')
        if self.depth > 1 and self.class_specific:
            raise ValueError("depth > 1 with class_specific: say one")
        if self.couple and self.class_specific:
            raise ValueError("couple with class_specific: say one")
        return self


class Head(Action):
    """A classifier on the image features; the model's own encoders stay as they are."""

    classes: Classes = Field(description="names, a file of one a line, imagenet, or data (what a run trains on)")
    init: Literal["zero-shot", "zeros", "random"] = Field(
        "zero-shot", description="zero-shot: the text features of the classes in `templates` (arXiv 2109.01903)"
    )
    kind: Literal["linear", "cosine"] = Field(
        "linear", description="cosine: normalised rows, without bias, times the model's logit scale"
    )
    templates: Texts = Field(("a photo of a {}.",), description="captions, with {} for the class, of zero-shot")

    @field_validator("templates")
    @classmethod
    def _with_place(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if wrong := [text for text in value if text.count("{}") != 1]:
            raise ValueError(f"{wrong[0]!r} needs {{}} once, for the class")
        return value


ACTIONS: dict[str, type[Action]] = {"lora": Lora, "adapter": Adapter, "prompt": Prompt, "head": Head}
"""Actions by their setting; each adds parameters whose role is its name."""
