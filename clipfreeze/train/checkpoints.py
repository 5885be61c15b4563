"""Checkpoints of a run: each a folder that is whole or not there, of safetensors and JSON.

`weights.safetensors` and `plan.json` are what `clipfreeze.load` takes; `training.safetensors` and `state.json` are the
rest of what the run needs to go on bit for bit.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from clipfreeze.errors import DataError, RunError
from clipfreeze.train.folder import CHECKPOINTS

STATE, TENSORS = "state.json", "training.safetensors"


@dataclass(frozen=True)
class Saved:
    """What a checkpoint holds beside the weights."""

    path: Path
    state: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return int(self.state["step"])


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where a run keeps its checkpoint of a step."""
    return folder / CHECKPOINTS / f"step-{step:08d}"


def save_checkpoint(
    folder: Path, state: Mapping[str, Any], tensors: Mapping[str, Tensor], save_weights: Callable[[Path], None]
) -> Path:
    """Write the run's checkpoint of `state["step"]`; what a killed process left half-written goes. RunError if the
    system refuses."""
    path = checkpoint_path(folder, int(state["step"]))
    unfinished = path.with_name(f".{path.name}.part")
    try:
        for left in path.parent.glob(".step-*.part"):
            shutil.rmtree(left)
        unfinished.mkdir(parents=True)
        save_weights(unfinished)
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, unfinished / TENSORS)
        (unfinished / STATE).write_text(json.dumps(state) + "\n", encoding="utf-8")
        for file in unfinished.iterdir():
            _to_disk(file)
        if path.exists():  # of a run that was resumed from an earlier step
            shutil.rmtree(path)
        unfinished.replace(path)
        _to_disk(path.parent)
    except (OSError, SafetensorError) as error:
        what = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise RunError(f"cannot write the checkpoint {path}: {what}", "make room, then resume the run") from error
    return path


def keep_checkpoints(folder: Path, newest: int, also: int | None) -> None:
    """Remove all but the `newest` checkpoints and that of the step `also`."""
    kept = _steps(folder)[-newest:]
    for step in _steps(folder):
        if step not in kept and step != also:
            with suppress(OSError):
                shutil.rmtree(checkpoint_path(folder, step))


def has_checkpoint(folder: Path) -> bool:
    """Whether a run has one that is whole."""
    return bool(_steps(folder))


def read_checkpoint(folder: Path) -> Saved:
    """The newest checkpoint of a run. DataError where it has none that can be read."""
    steps = _steps(folder)
    if not steps:
        what = f"there is no checkpoint in {folder}: the run ended before the first one"
        raise DataError(what, "give the folder that `clipfreeze train` named, or start again with another --out")
    path = checkpoint_path(folder, steps[-1])
    with _reading(path):
        return Saved(path, json.loads((path / STATE).read_text(encoding="utf-8")), load_file(path / TENSORS))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """What a checkpoint holds beside the weights and the state. DataError where it cannot be read."""
    with _reading(path):
        tensors: dict[str, Tensor] = load_file(path / TENSORS)
        return tensors


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        what = f"the checkpoint {path} cannot be read: {error}"
        raise DataError(what, "delete it to go on from the one before") from error


def _steps(folder: Path) -> list[int]:
    """Of the whole checkpoints, in order."""
    names = (path.name.removeprefix("step-") for path in (folder / CHECKPOINTS).glob("step-*"))
    return sorted(int(name) for name in names if name.isdigit())  # others are the user's


def _to_disk(path: Path) -> None:
    """A rename may reach the disk before what it names, unless that is synchronised first."""
    with suppress(OSError, AttributeError):  # folders cannot be on every system
        number = os.open(path, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)
