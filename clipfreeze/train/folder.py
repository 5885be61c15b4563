"""The run folder on disk: claimed before training, each file whole or absent."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from clipfreeze.errors import DataError, RunError
from clipfreeze.stored import PLAN, WEIGHTS, whole_file

METRICS = "metrics.jsonl"
RESULTS = "results.json"
SPEC = "run.toml"
LOG, CHECKPOINTS, TRACKED = "run.log", "checkpoints", "clipfreeze"
LEFT_BY_RUNS = (METRICS, RESULTS, SPEC, LOG, PLAN, WEIGHTS)
FOLDERS_LEFT_BY_RUNS = (CHECKPOINTS, TRACKED)


@contextmanager
def run_folder(out: Path | None, policy: str) -> Iterator[Path]:
    """`out`, or the next free of runs/POLICY-N; as for empty_folder."""
    if out is not None:
        with empty_folder(out) as folder:
            yield folder
        return
    name = re.sub(r"[^\w.-]+", "_", policy)
    for number in count(1):
        folder = Path("runs", f"{name}-{number}")
        try:
            made = _make(folder)
        except FileExistsError:  # perhaps a run started at the same time
            continue
        with _cleared_on_failure(folder, made):
            yield folder
        return


@contextmanager
def empty_folder(out: Path) -> Iterator[Path]:
    """Make `out` or take it empty; a failure before the first step of a run leaves no trace of it.

    DataError when it holds files or cannot be written.
    """
    try:
        made = [] if out.is_dir() else _make(out)
        if any(out.iterdir()):
            raise DataError(f"{out} is not empty", "give another --out, or clear it; a run never writes over another")
        probe = out / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise _unwritable(out, error) from error
    with _cleared_on_failure(out, made):
        yield out


def _make(folder: Path) -> list[Path]:
    """Make the folder and its parents; those made, deepest first."""
    try:
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True)
    except FileExistsError:
        if folder.is_dir():
            raise
        raise DataError(f"{folder} is a file", "give another --out") from None
    except OSError as error:
        raise _unwritable(folder, error) from error
    return missing


def _unwritable(folder: Path, error: OSError) -> DataError:
    return DataError(f"cannot write to {folder}: {error.strerror}", "give another --out")


@contextmanager
def _cleared_on_failure(folder: Path, made: list[Path]) -> Iterator[None]:
    finished = False
    try:
        yield
        finished = True
    finally:
        if not finished and not (folder / METRICS).exists():
            for name in LEFT_BY_RUNS:
                (folder / name).unlink(missing_ok=True)
            for name in FOLDERS_LEFT_BY_RUNS:
                shutil.rmtree(folder / name, ignore_errors=True)
            for path in made:
                if not any(path.iterdir()):
                    path.rmdir()


def check_room(folder: Path, needed: int) -> None:
    """DataError unless the disk has `needed` bytes for this folder."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        what = f"no room for the run in {folder}: it needs {needed / 1e6:.0f} MB, {free / 1e6:.0f} MB are free"
        raise DataError(what, "make room, or give an --out on another disk")


def write_text(path: Path, text: str) -> None:
    """Replace the file at once or not at all."""
    with _writing(path), whole_file(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def append_json(path: Path, record: Mapping[str, Any]) -> None:
    """Add one line; when there is no room for all of it, none of it."""
    line = json.dumps(record).encode() + b"\n"
    with _writing(path), path.open("ab", buffering=0) as file:
        end = file.tell()
        try:
            while line:
                line = line[file.write(line) :]
        except OSError:
            file.truncate(end)
            raise


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """A failure to write is a RunError in the system's words."""
    try:
        yield
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}", "make room or give another --out") from error
