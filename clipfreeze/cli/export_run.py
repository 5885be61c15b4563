"""`clipfreeze export RUN --to FORMAT`"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clipfreeze.errors import DataError, ExportError

if TYPE_CHECKING:
    from clipfreeze.changes import Applied
    from clipfreeze.models import Loaded


class Target(str, Enum):
    """What to write: a key of WRITERS."""

    open_clip = "open_clip"
    hf = "hf"
    peft = "peft"
    head = "head"


@dataclass(frozen=True)
class Job:
    """What to export, where to, and the classes of a classifier, if they are said."""

    applied: Applied
    loaded: Loaded
    out: Path
    classes: tuple[str, ...] | None


def run(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="RUN", help="what `clipfreeze train` or `apply --out` left, or a LoRA of PEFT or CLIP-LoRA"
        ),
    ],
    to: Annotated[
        Target,
        typer.Option(
            "--to",
            help="open_clip: a folder and weights for open_clip; hf: transformers' CLIPModel and CLIPProcessor; "
            "peft: a LoRA folder for PEFT; head: a linear classifier from a head or a prompt",
        ),
    ],
    out: Annotated[Path | None, typer.Option(metavar="FOLDER", help="where to; else RUN/FORMAT")] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", metavar="MODEL", help="the base of what `apply --out` or others left")
    ] = None,
    pretrained: Annotated[str | None, typer.Option(metavar="TAG|PATH", help="likewise, its weights")] = None,
    classes: Annotated[
        str | None,
        typer.Option(metavar="FILE|imagenet|data", help="head: class names for a prompt; data: those of the run's"),
    ] = None,
    alpha: Annotated[
        float | None,
        typer.Option(
            metavar="ALPHA",
            help="open_clip, hf: so far from the base (0) to what was trained (1); see `clipfreeze eval --frontier`",
        ),
    ] = None,
) -> None:
    """Write a tuned model as a folder that others load, proved by loading it back."""
    if classes is not None and to is not Target.head:
        raise ExportError(f"--classes is for --to head, not for {to.value}", "leave it out")
    if alpha is not None and to not in (Target.open_clip, Target.hf):
        raise ExportError(f"--alpha is for whole models, not for {to.value}", "--to open_clip or --to hf")
    names = None if classes is None else _classes(classes, folder)
    loaded = _base(folder, model, pretrained)
    place = folder.parent if folder.is_file() else folder
    for line in WRITERS[to](Job(_applied(folder, loaded, alpha), loaded, out or place / to.value, names)):
        print(line)


def _applied(folder: Path, loaded: Loaded, alpha: float | None) -> Applied:
    """The folder's policy on its base: as trained, or at alpha."""
    from clipfreeze import changes
    from clipfreeze.foreign.reading import is_foreign
    from clipfreeze.stored import PLAN, read_plan
    from clipfreeze.train.frontier import interpolate, start_values

    if alpha is None:
        return changes.load(folder, loaded.model)
    start = {} if is_foreign(folder) else start_values(read_plan(folder / PLAN), loaded.model)  # others left LoRA alone
    applied = changes.load(folder, loaded.model)
    interpolate(applied, start, alpha)
    return applied


def _open_clip(job: Job) -> Iterator[str]:
    from clipfreeze.export.open_clip import reload_lines, write_open_clip
    from clipfreeze.export.plain import plain_model

    plain = replace(job.loaded, model=plain_model(job.applied))
    yield _wrote(job, write_open_clip(plain, job.out))
    yield from reload_lines(plain, job.out)


def _hf(job: Job) -> Iterator[str]:
    from clipfreeze.export.hf import reload_line, write_hf
    from clipfreeze.export.plain import plain_model

    yield _wrote(job, write_hf(replace(job.loaded, model=plain_model(job.applied)), job.out))
    yield reload_line(job.out)


def _peft(job: Job) -> Iterator[str]:
    from clipfreeze.export.peft import peft_notes, reload_line, write_peft

    yield _wrote(job, write_peft(job.applied, job.loaded, job.out))
    yield from (f"note: {note}" for note in peft_notes(job.applied.plan.sites, job.loaded))
    yield reload_line(job.loaded, job.out)


def _head(job: Job) -> Iterator[str]:
    from clipfreeze.export.head import changes_vision, reload_lines, write_head

    yield _wrote(job, write_head(job.applied, job.loaded, job.out, job.classes))
    if changes_vision(job.applied):
        yield "note: the image features are those of the tuned vision tower, not of the base"
    yield from reload_lines(job.out)


WRITERS: dict[Target, Callable[[Job], Iterator[str]]] = {
    Target.open_clip: _open_clip,
    Target.hf: _hf,
    Target.peft: _peft,
    Target.head: _head,
}
"""Each writes one format and yields what to print: what was written, and the code that loads it."""


def _wrote(job: Job, difference: float) -> str:
    return f"wrote {job.out}: max difference {difference:.1g} on a probe batch"


def _classes(said: str, folder: Path) -> tuple[str, ...]:
    """Names from a file or by a word, as a policy has them."""
    from clipfreeze.plan.classes import class_names
    from clipfreeze.policy.classes import CLASS_WORDS, read_classes

    if said == "data":
        from clipfreeze.train.classes import classes_of
        from clipfreeze.train.runs import run_data
        from clipfreeze.train.spec import read_spec

        return classes_of(run_data(read_spec(folder)).train)
    if said in CLASS_WORDS:
        return class_names(said)
    try:
        return read_classes(Path(said))
    except ValueError as error:
        raise ExportError(f"--classes: {error}", "a file of one a line, imagenet, or data") from error


def _base(folder: Path, model: str | None, pretrained: str | None) -> Loaded:
    """The model that the folder's policy was applied to, as it was then: random weights come from the same seed."""
    import torch
    from accelerate.utils import set_seed

    from clipfreeze import models
    from clipfreeze.foreign.reading import is_foreign
    from clipfreeze.stored import PLAN, WEIGHTS
    from clipfreeze.train.folder import SPEC
    from clipfreeze.train.spec import read_spec

    if (folder / SPEC).is_file() or not ((folder / PLAN).is_file() or is_foreign(folder)):
        spec = read_spec(folder)
        if model or pretrained:
            raise DataError(f"{folder / SPEC} names the base model already", "leave out --model and --pretrained")
        if not (folder / WEIGHTS).is_file():
            raise DataError(f"the run in {folder} ended before its first epoch was saved", "train again")
        set_seed(spec.seed)
        return models.load(spec.model, spec.pretrained)
    if model is None:
        what = f"nothing in {folder} names its base model"
        raise DataError(what, "say --model, and --pretrained where `clipfreeze apply` had it")
    torch.manual_seed(0)
    return models.load(model, pretrained)
