"""The same run on 1 and on 2 ranks of this machine: seconds a step and memory, the batch over all ranks being equal.

    python -m benchmarks.ranks [last_n full] [--model ViT-B-32] [--batch-size 64]

The cores are divided over the ranks, or each has a GPU of its own. They share what they keep by a folder: without
`--cache-dir` each would work out again what only the other has seen.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile

from benchmarks.cells import Cell
from benchmarks.machine import machine, peak_mb
from benchmarks.made import MODELS
from benchmarks.ours import ours
from clipfreeze.train.distributed import everyones, rank, world_size

RANKS = (1, 2)


def measure(cell: Cell) -> None:
    """One run, on the ranks that torchrun has started; the first prints."""
    side = ours(cell, lambda: None)
    peaks = everyones(peak_mb())
    if rank() == 0:
        told = {"strategy": cell.strategy, "model": cell.model, "ranks": world_size(), "threads": cell.threads}
        measured = {"step_s": round(side.step, 4), "first_epoch_s": round(side.run(1), 3)}
        print(json.dumps({**told, **measured, "peak_mb": [round(peak) for peak in peaks]}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("strategies", nargs="*", default=["last_n", "full"])
    parser.add_argument("--model", choices=MODELS, default="ViT-B-32")
    parser.add_argument("--batch-size", type=int, default=64, help="of all ranks together")
    parser.add_argument("--cache-dir", help="a temporary one unless named")
    options = parser.parse_args()
    if ranks := int(os.environ.get("WORLD_SIZE", 0)):  # torchrun's
        threads = max(1, (os.cpu_count() or 1) // ranks)
        for strategy in options.strategies:
            settings = {"cache_dir": options.cache_dir}
            measure(Cell(options.model, strategy, options.batch_size, threads=threads, settings=settings))
        return
    print(json.dumps(machine()), flush=True)
    for ranks in RANKS:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        with tempfile.TemporaryDirectory() as folder:
            command = [*launch, "-m", "benchmarks.ranks", *sys.argv[1:]]
            subprocess.run([*command, *([] if options.cache_dir else ["--cache-dir", folder])], check=True)


if __name__ == "__main__":
    main()
