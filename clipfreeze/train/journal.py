"""What a run tells while it goes on: a bar or lines, metrics.jsonl, run.log, trackers; by rank 0 alone."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate.tracking import filter_trackers
from tqdm import tqdm

from clipfreeze.errors import DataError
from clipfreeze.train.distributed import rank
from clipfreeze.train.evaluate import Metrics
from clipfreeze.train.folder import LOG, METRICS, TRACKED, append_json, write_text

TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")

log = logging.getLogger("clipfreeze")


def check_trackers(names: tuple[str, ...]) -> None:
    """DataError for a tracker that is not known or not installed."""
    for name in names:
        if name not in TRACKERS:
            raise DataError(f"there is no tracker {name!r}", f"one of {', '.join(TRACKERS)}")
        if not filter_trackers([name], logging_dir="."):
            raise DataError(f"the tracker {name} is not installed", f"pip install {name}")


class Journal:
    """Of one run; a context. Ranks other than 0 stay silent."""

    def __init__(self, accelerator: Any, folder: Path | None, steps: int, done: int, trackers: tuple[str, ...]) -> None:
        self.accelerator, self.trackers = accelerator, trackers
        self.speaks = rank() == 0
        self.folder = folder if self.speaks else None
        self.bar: Any = tqdm(
            total=steps, initial=done, unit="step", file=sys.stderr, dynamic_ncols=True,
            disable=None if self.speaks else True,  # None: where there is no terminal, which gets lines instead
        )  # fmt: skip
        self._file: logging.Handler | None = None

    def __enter__(self) -> Journal:
        if self.folder is not None:
            self._file = logging.FileHandler(self.folder / LOG, encoding="utf-8")
            self._file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
            log.addHandler(self._file)
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()
        if self._file is not None:
            log.removeHandler(self._file)
            self._file.close()
        if self.trackers:
            self.accelerator.end_training()

    def step(self, record: Mapping[str, Any]) -> None:
        """One optimizer step."""
        self._keep(record)
        self.bar.set_postfix_str(shown(record), refresh=False)
        self.bar.update()

    def epoch(self, record: Mapping[str, Any]) -> None:
        """The last step of an epoch: into run.log, and to people where there is no bar."""
        line = f"epoch {record['epoch']}: {shown(record)}"
        self.note(line)
        if self.speaks and self.bar.disable:
            print(line, file=sys.stderr, flush=True)

    def evaluation(self, step: int, found: Mapping[str, Metrics]) -> None:
        """Scores under way."""
        values = {of: {name: score.value for name, score in metrics.scores.items()} for of, metrics in found.items()}
        self._keep({"step": step, "evaluation": values})
        scores = (f"{of} {next(iter(value))} {next(iter(value.values())):.3f}" for of, value in values.items())
        self.say(f"step {step}: {', '.join(scores)}")

    def say(self, line: str) -> None:
        """A line to people and to run.log."""
        self.note(line)
        if self.speaks:
            self.bar.write(line, file=sys.stderr)

    def warn(self, note: str) -> None:
        """A note that the result repeats."""
        if self.speaks:
            log.warning(note)

    def note(self, line: str) -> None:
        """Into run.log alone: what a program prints is for it to say."""
        if self._file is not None:
            self._file.emit(log.makeRecord("clipfreeze", logging.INFO, "", 0, line, (), None))

    def _keep(self, record: Mapping[str, Any]) -> None:
        if self.folder is not None:
            append_json(self.folder / METRICS, record)
        if self.trackers:
            values = dict(_flat(record))
            self.accelerator.log(values, step=values.pop("step"))


def start_trackers(accelerator: Any, names: tuple[str, ...], folder: Path | None, settings: Mapping[str, Any]) -> None:
    """Open them on rank 0, each where the run's folder is."""
    if not names:
        return
    accelerator.project_configuration.set_directories(str(folder or "."))
    accelerator.log_with = filter_trackers(list(names), logging_dir=str(folder or "."))
    plain = {name: value for name, value in settings.items() if isinstance(value, (bool, int, float, str))}
    accelerator.init_trackers(TRACKED, config=plain)


def cut_metrics(folder: Path, step: int) -> None:
    """Leave in metrics.jsonl what was recorded up to `step`: a run that is resumed records the rest again."""
    path = folder / METRICS
    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n")]  # a killed process may leave a piece
    write_text(path, "".join(line for line in whole if json.loads(line)["step"] <= step))


def memory_mb(device: torch.device) -> float:
    """The most that the device has held, or what the process holds now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    return float(psutil.Process().memory_info().rss) / 1e6


def shown(record: Mapping[str, Any]) -> str:
    """A step's record in a line."""
    return (
        f"loss {record['loss']:.3f}, lr {max(record['lr'].values()):.1e}, {record['samples_per_s']:.0f} pictures/s, "
        f"{record['data_wait']:.0%} waiting, {record['memory_mb'] / 1000:.1f} GB"
    )


def _flat(record: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    flat: list[tuple[str, Any]] = []
    for name, value in record.items():
        flat += _flat(value, f"{prefix}{name}/") if isinstance(value, Mapping) else [(prefix + name, value)]
    return flat
