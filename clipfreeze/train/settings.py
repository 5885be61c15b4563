"""How long and how a run trains: what `fit` takes and run.toml keeps."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from accelerate.utils.modeling import convert_file_size_to_int
from pydantic import AfterValidator, Field, ValidationError, model_validator

from clipfreeze.errors import DataError, Problem, did_you_mean
from clipfreeze.policy.actions import Positive, Spec
from clipfreeze.policy.span import parse_span
from clipfreeze.train.objective import ObjectiveName

LOWER_IS_BETTER = ("nll", "ece")
FIXED = (
    "micro_batch",
    "objective",
    "clip_grad",
    "precision",
    "ema",
    "views",
    "cache_dtype",
    "evaluate_every",
    "best",
    "patience",
    "retain_floor",
    "on_floor",
    "seed",
)
"""Settings that must be the same when a run goes on."""


def _span(value: str) -> str:
    if parse_span(value).amount <= 0:
        raise ValueError("0 is no stretch of a run")
    return value


def bytes_of(size: str) -> int:
    """`4GB` -> 4e9; a bare number is of bytes. ValueError for anything else."""
    count = int(convert_file_size_to_int(int(size) if size.isdigit() else size))
    if count < 0:
        raise ValueError("a size is 0 or more")
    return count


def _size(value: str) -> str:
    bytes_of(value)
    return value


Stretch = Annotated[str, AfterValidator(_span)]
Size = Annotated[str, AfterValidator(_size)]
"""Of memory or disk: "800MB", "4GB", "0"."""


class TrainingSettings(Spec):
    """Of one run, on any number of ranks."""

    epochs: Annotated[int, Field(gt=0)] = Field(5, description="passes over the data")
    batch_size: Annotated[int, Field(gt=1)] | Literal["auto"] = Field(
        64, description='pairs in a step, over all ranks together; "auto": as many as fit'
    )
    micro_batch: Annotated[int, Field(gt=0)] | None = Field(
        None, description="pairs of a rank's batch through the encoders at once, with the batch's own gradients"
    )
    shard: bool = Field(
        False, description="split the model's weights, gradients and moments over the ranks, of which it takes several"
    )
    checkpoint_activations: bool = Field(
        False, description="blocks keep their input alone and are computed again in backward: less memory, more time"
    )
    compile: bool = Field(False, description="run the blocks that train as torch.compile makes them")
    objective: ObjectiveName = Field(
        "auto", description="contrastive, classes (cross-entropy over class prompts), or auto: as the policy asks"
    )
    clip_grad: Positive | None = Field(None, description="the gradient's largest norm")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="of autocast; auto: bf16 where the GPU has it. Trained weights are fp32 always"
    )
    ema: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="decay of an average of the trained weights, which is what is evaluated and kept"
    )
    views: Annotated[int, Field(gt=0)] | None = Field(
        None, description="of each picture where augmentation draws them, which take turns and are kept; null: no end"
    )
    cache_ram: Size | None = Field(
        None, description='for what frozen parts made of each sample: "4GB"; null: half of what is free'
    )
    cache_dir: str | None = Field(None, description="folder to keep it in too, past memory and for the next run")
    cache_disk: Size = Field("50GB", description="the most that this folder may hold")
    cache_dtype: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="it is kept in; auto: as the model computes it. Features are fp32 always"
    )
    max_bad: Annotated[float, Field(ge=0, le=1)] = Field(0.01, description="share of broken pictures to go on with")
    evaluate_every: Stretch | None = Field(
        None, description='"1 epochs", "200 steps" or "10%"; null: before and after, and each epoch where that decides'
    )
    save_every: Stretch = Field("1 epochs", description="between checkpoints, likewise")
    keep: Annotated[int, Field(gt=0)] = Field(1, description="checkpoints kept, beside the best")
    best: str | None = Field(
        None, description="score that picks the weights to keep: top1, or SET/SCORE; null: the last weights"
    )
    patience: Annotated[int, Field(gt=0)] | None = Field(
        None, description="evaluations without a better score (of `best`, else the goal's first) that end the run"
    )
    retain_floor: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="share of the first score on the retained set below which the run ends"
    )
    on_floor: Literal["stop", "rollback"] | None = Field(
        None, description="there: stop with those weights, or (null) rollback to the last ones above the floor"
    )
    trackers: tuple[str, ...] = Field((), description="tensorboard, wandb, mlflow, trackio: by accelerate")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(0, description="of shuffling, captions, views and dropout")
    num_workers: Annotated[int, Field(ge=0)] | None = Field(
        None, description="processes that decode pictures; 0: the trainer's own; null: some where a GPU waits for them"
    )

    @model_validator(mode="after")
    def _effective(self) -> TrainingSettings:
        if self.on_floor is not None and self.retain_floor is None:
            raise ValueError("on_floor without a retain_floor: nothing would read it")
        if self.batch_size == "auto" and self.micro_batch is not None:
            raise ValueError("batch_size auto finds what fits without chunks: with micro_batch, say a number")
        return self

    @property
    def evaluates(self) -> str | None:
        """`evaluate_every`, or each epoch where something is decided by it."""
        decides = self.best or self.patience or self.retain_floor
        return self.evaluate_every or ("1 epochs" if decides else None)


Settings = TypeVar("Settings", bound=TrainingSettings)


def training_settings(**values: Any) -> TrainingSettings:
    """Settings by name. DataError for an unknown name, with the nearest, or a wrong value."""
    return checked(TrainingSettings, values)


def checked(kind: type[Settings], values: dict[str, Any]) -> Settings:
    """Of these values. DataError for an unknown name, with the nearest, or a wrong value."""
    try:
        return kind(**values)
    except ValidationError as error:
        told = {str(fault["loc"][:1]): _problem(fault, kind, values) for fault in error.errors()}  # one for each name
        raise DataError(list(told.values())) from error


def _problem(fault: Any, kind: type[TrainingSettings], values: dict[str, Any]) -> Problem:
    if not fault["loc"]:  # said of several together
        return Problem(str(fault["msg"]).removeprefix("Value error, "))
    name = str(fault["loc"][0])
    if fault["type"] == "extra_forbidden":
        return Problem(f"there is no setting {name!r}", did_you_mean(name, list(kind.model_fields)))
    message = str(fault["msg"]).removeprefix("Value error, ")
    described = kind.model_fields[name].description
    return Problem(f"{name} = {values.get(name)!r}: {message[0].lower()}{message[1:]}", described)
