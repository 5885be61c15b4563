"""Time and memory against the size of the data: pairs held and shuffled, cached rows filled and read.

    python -m benchmarks.growth [--most 1000000]

Each size in a process of its own. The rows are a frozen tower's features, made up; reading asks for them by 64 in
random order, as training does. Then a whole run with its cache in RAM beside one with its cache past RAM.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from benchmarks import made
from benchmarks.cells import Cell
from benchmarks.machine import machine, peak_mb
from benchmarks.ours import ours
from clipfreeze.train.batches import TrainingLoader
from clipfreeze.train.pairs import Pair, PairSet
from clipfreeze.train.store import Store

WIDTH = 512
BATCH = 64
MOST_READS = 1000


class Cache(Protocol):
    """What keeps rows by key."""

    def write(self, keys: Sequence[bytes], rows: Sequence[Tensor]) -> None: ...

    def read(self, keys: Sequence[bytes]) -> list[Tensor | None]: ...


def fill(cache: Cache, count: int) -> None:
    """`count` rows of (WIDTH,) fp32, a batch at a time."""
    for start in range(0, count, BATCH):
        numbers = range(start, min(start + BATCH, count))
        cache.write([_key(number) for number in numbers], list(torch.randn(len(numbers), WIDTH)))


def read_shuffled(cache: Cache, count: int) -> Iterator[float]:
    """Seconds of each batch, of at most MOST_READS. AssertionError where a row is missing."""
    order = list(range(count))
    random.Random(0).shuffle(order)
    for start in range(0, min(count - BATCH + 1, MOST_READS * BATCH), BATCH):
        keys = [_key(number) for number in order[start : start + BATCH]]
        started = time.perf_counter()
        rows = cache.read(keys)
        yield time.perf_counter() - started
        assert all(row is not None for row in rows)


def cached(count: int) -> dict[str, Any]:
    """Rows on disk."""
    before = peak_mb()
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        store = Store(Path(folder), "ab" * 16, 10**12)
        fill(store, count)
        store.close()
        filled = time.perf_counter() - started
        started = time.perf_counter()
        store = Store(Path(folder), "ab" * 16, 10**12)
        opened = time.perf_counter() - started
        times = sorted(read_shuffled(store, count))
        store.close()
    return {
        "what": "rows cached on disk",
        "count": count,
        "fill_us_a_row": round(filled / count * 1e6, 1),
        "open_s": round(opened, 3),
        f"read_{BATCH}_ms": round(times[len(times) // 2] * 1e3, 2),
        "memory_mb": round(peak_mb() - before),
    }


def held(count: int) -> dict[str, Any]:
    """Pairs in memory: one picture, each with a caption of its own; and the first batch of an epoch."""
    before = peak_mb()
    picture = made.jpeg(np.random.default_rng(0), 224, 224)
    started = time.perf_counter()
    pairs = PairSet("made", tuple(Pair(picture, (f"picture {n} of some thing",), f"{n}") for n in range(count)))
    built = time.perf_counter() - started
    transform = made.transform(made.build("tiny"))
    loader = TrainingLoader(pairs, transform, None, batch_size=BATCH, seed=0, num_workers=0)
    started = time.perf_counter()
    next(loader.batches(0))
    return {
        "what": "pairs held and shuffled",
        "count": count,
        "build_s": round(built, 3),
        "first_batch_s": round(time.perf_counter() - started, 3),
        "memory_mb": round(peak_mb() - before),
    }


def run_in_ram_or_past_it(past: bool) -> dict[str, Any]:
    """`last_n` on a ViT-B-32, its cache in RAM or all of it in a folder."""
    with tempfile.TemporaryDirectory() as folder:
        settings = {"cache_ram": "0MB", "cache_dir": folder} if past else {}
        side = ours(Cell("ViT-B-32", "last_n", BATCH, settings=settings), lambda: None)
    return {
        "what": "last_n, cache past RAM" if past else "last_n, cache in RAM",
        "step_s": round(side.step, 3),
        "first_epoch_s": round(side.run(1), 2),
        "peak_mb": round(side.peak_mb),
    }


def alone(what: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """In a process of its own, whose memory is that of this alone."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(what)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--most", type=int, default=1_000_000)
    most = parser.parse_args().most
    print(json.dumps(machine()), flush=True)
    counts = [10**power for power in range(3, 10) if 10**power <= most]
    for what in (held, cached):
        for count in counts:
            print(json.dumps(alone(partial(what, count))), flush=True)
    for past in (False, True):
        print(json.dumps(alone(partial(run_in_ram_or_past_it, past))), flush=True)


def _key(number: int) -> bytes:
    return blake2b(number.to_bytes(8, "big"), digest_size=16).digest()


if __name__ == "__main__":
    main()
