"""`clipfreeze export RUN --to FORMAT`"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clipfreeze.errors import DataError

if TYPE_CHECKING:
    from clipfreeze.changes import Applied
    from clipfreeze.models import Loaded


class Target(str, Enum):
    """What to write: a key of WRITERS."""

    open_clip = "open_clip"
    hf = "hf"


def run(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="what `clipfreeze train` or `apply --out` left")],
    to: Annotated[
        Target, typer.Option("--to", help="open_clip: for open_clip; hf: transformers' CLIPModel and CLIPProcessor")
    ],
    out: Annotated[Path | None, typer.Option(metavar="FOLDER", help="where to; else RUN/FORMAT")] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", metavar="MODEL", help="the base of what `apply --out` left")
    ] = None,
    pretrained: Annotated[str | None, typer.Option(metavar="TAG|PATH", help="likewise, its weights")] = None,
) -> None:
    """Write a tuned model as a folder that others load, proved by loading it back."""
    from clipfreeze import changes

    loaded = _base(folder, model, pretrained)
    for line in WRITERS[to](changes.load(folder, loaded.model), loaded, out or folder / to.value):
        print(line)


def _open_clip(applied: Applied, loaded: Loaded, out: Path) -> Iterator[str]:
    from clipfreeze.export.open_clip import reload_lines, write_open_clip
    from clipfreeze.export.plain import plain_model

    plain = replace(loaded, model=plain_model(applied))
    yield _wrote(out, write_open_clip(plain, out))
    yield from reload_lines(plain, out)


def _hf(applied: Applied, loaded: Loaded, out: Path) -> Iterator[str]:
    from clipfreeze.export.hf import reload_line, write_hf
    from clipfreeze.export.plain import plain_model

    yield _wrote(out, write_hf(replace(loaded, model=plain_model(applied)), out))
    yield reload_line(out)


WRITERS: dict[Target, Callable[[Applied, Loaded, Path], Iterator[str]]] = {
    Target.open_clip: _open_clip,
    Target.hf: _hf,
}
"""Each writes one format and yields what to print: what was written, and the code that loads it."""


def _wrote(out: Path, difference: float) -> str:
    return f"wrote {out}: max difference {difference:.1g} on a probe batch"


def _base(folder: Path, model: str | None, pretrained: str | None) -> Loaded:
    """The model that the folder's policy was applied to, as it was then: random weights come from the same seed."""
    import torch
    from accelerate.utils import set_seed

    from clipfreeze import models
    from clipfreeze.stored import PLAN, WEIGHTS
    from clipfreeze.train.folder import SPEC
    from clipfreeze.train.spec import read_spec

    if (folder / SPEC).is_file() or not (folder / PLAN).is_file():
        spec = read_spec(folder)
        if model or pretrained:
            raise DataError(f"{folder / SPEC} names the base model already", "leave out --model and --pretrained")
        if not (folder / WEIGHTS).is_file():
            raise DataError(f"the run in {folder} ended before its first epoch was saved", "train again")
        set_seed(spec.seed)
        return models.load(spec.model, spec.pretrained)
    if model is None:
        what = f"{folder} has no {SPEC} that names its base model"
        raise DataError(what, "say --model, and --pretrained where `clipfreeze apply` had it")
    torch.manual_seed(0)
    return models.load(model, pretrained)
