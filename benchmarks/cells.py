"""What is compared: a strategy on a model, and what either side measured of it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks import made
from clipfreeze.plan.build import resolve
from clipfreeze.plan.value import Plan
from clipfreeze.policy.loading import load_policy
from clipfreeze.policy.schema import Schedule
from clipfreeze.train.pairs import PairSet

Gate = Callable[[], None]
"""Called before each epoch: returns when it is this side's turn."""


@dataclass(frozen=True)
class Strategy:
    """A policy with its knobs, and what it is compared with."""

    peer: str  # of peers.PEERS
    target: float  # how many times as fast as the peer it is to be, in steady state
    knobs: dict[str, Any] = field(default_factory=dict)
    objective: str = "auto"
    draws: bool = False  # factors anew on either side: the first losses alone are the same


STRATEGIES = {
    "logit_scale": Strategy("open_clip", 100),
    "projections": Strategy("open_clip", 100),
    "last_n": Strategy("open_clip", 5),
    "prompt": Strategy("CoOp", 10, objective="classes"),
    "text_only": Strategy("open_clip --lock-image", 2),
    "vision_only": Strategy("open_clip --lock-text", 2),
    # PEFT takes q, k, v and out of an attention or none of them, and has no dropout there.
    "lora": Strategy("PEFT", 1.5, {"targets": "q,k,v,out", "dropout": 0.0}, draws=True),
    "full": Strategy("open_clip", 1.3),
    "differential": Strategy("open_clip", 1.3),
    "adapter": Strategy("open_clip, adapters in", 1),
}


@dataclass(frozen=True)
class Cell:
    """One comparison: `epochs` of `batches` steps each, of which the first epoch warms up."""

    model: str
    strategy: str
    batch_size: int = 64
    batches: int = 2
    epochs: int = 4
    threads: int = 2
    settings: Mapping[str, Any] = field(default_factory=dict)  # of our fit, beside these

    @property
    def how(self) -> Strategy:
        return STRATEGIES[self.strategy]

    def pairs(self) -> PairSet:
        """The data of one epoch."""
        count = self.batch_size * self.batches
        return made.classified(count) if self.how.objective == "classes" else made.captioned(count)

    def plan(self, model: Any) -> Plan:
        """The strategy on this model, at one learning rate throughout, as open_clip's loop has it here."""
        return resolve(load_policy(self.strategy, **self.how.knobs), model).model_copy(update={"schedule": Schedule()})


@dataclass
class Side:
    """What one side of a cell took."""

    seconds: list[list[float]]  # of each step, by epoch; the first has the start of the run in it
    losses: list[float]
    trains: int  # parameters
    imported_mb: float  # the most memory before there was a model
    peak_mb: float
    flops: float = 0.0  # of a step in steady state, where counted

    @property
    def step(self) -> float:
        """Seconds in steady state: the median over all epochs but the first."""
        return statistics.median(seconds for epoch in self.seconds[1:] for seconds in epoch)

    def run(self, epochs: int) -> float:
        """Seconds of a run: those measured, and as many steady steps as are missing."""
        known = self.seconds[:epochs]
        missing = (epochs - len(known)) * len(known[0])
        return sum(map(sum, known)) + (missing * self.step if missing else 0)


class Clock:
    """Seconds of each step; it stands still while the other side has its turn."""

    def __init__(self) -> None:
        self.seconds: list[list[float]] = []

    def epoch(self, gate: Gate) -> None:
        """Wait for this side's turn, and begin another epoch."""
        _finish()
        gate()
        self.seconds.append([])
        self.since = time.perf_counter()

    def step(self) -> None:
        """A step ends here."""
        _finish()
        now = time.perf_counter()
        self.seconds[-1].append(now - self.since)
        self.since = now


def _finish() -> None:
    """A GPU works on when Python goes on."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
