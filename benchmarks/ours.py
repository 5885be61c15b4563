"""Our side of a cell: `clipfreeze.fit`, watched by a callback."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch

import clipfreeze
from benchmarks import made
from benchmarks.cells import Cell, Clock, Gate, Side
from benchmarks.machine import device, peak_mb
from clipfreeze.train.loop import Callback, Run

if TYPE_CHECKING:
    from torch.utils.flop_counter import FlopCounterMode


def ours(cell: Cell, gate: Gate) -> Side:
    """Train as the cell says, and a step more, in which operations are counted and not seconds."""
    torch.set_num_threads(cell.threads)
    imported = peak_mb()
    model = made.build(cell.model).to(device())
    words = made.tokenizer(model)
    applied = clipfreeze.apply(cell.plan(model), model, tokenizer=words)
    pairs, transform = cell.pairs(), made.transform(model)
    with ExitStack() as counting:
        watch = _Watch(cell, gate, counting)
        watch.clock.epoch(gate)
        clipfreeze.fit(
            applied,
            pairs,
            tokenizer=words,
            transform=transform,
            batch_size=cell.batch_size,
            epochs=cell.epochs + 1,
            objective=cell.how.objective,
            num_workers=0,
            callbacks=[watch],
            **cell.settings,
        )
    flops = watch.counter.get_total_flops() if watch.counter else 0.0
    trains = applied.plan.totals.trainable
    return Side(watch.clock.seconds[: cell.epochs], watch.losses, trains, imported, watch.peak_mb, flops)


class _Watch(Callback):
    """Notes when each step ends, and gives way to the other side after each epoch."""

    def __init__(self, cell: Cell, gate: Gate, counting: ExitStack) -> None:
        self.cell, self.gate, self.counting = cell, gate, counting
        self.clock = Clock()
        self.counter: FlopCounterMode | None = None
        self.losses: list[float] = []
        self.peak_mb = 0.0

    def on_step(self, run: Run, record: Mapping[str, Any]) -> None:
        if self.counter is not None:
            run.stop("all is counted")
            return
        self.clock.step()
        self.losses.append(record["loss"])
        if run.step % self.cell.batches:
            return
        done = run.step // self.cell.batches
        if done == self.cell.epochs:
            self.peak_mb = peak_mb()
        if run.step == run.total_steps:
            return
        self.clock.epoch(self.gate)
        if done == self.cell.epochs:
            from benchmarks.floor import flop_counter  # which takes memory that the peer does not need

            self.counter = self.counting.enter_context(flop_counter())
