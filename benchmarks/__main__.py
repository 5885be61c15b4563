"""Every strategy beside its peer: seconds a step, whole runs, memory, and the floor that the arithmetic sets.

    python -m benchmarks                        # ViT-B-32: benchmarks/results/speed.json and the README's table
    python -m benchmarks full lora              # these rows anew, the others as they are
    python -m benchmarks --model RN50           # benchmarks/results/speed-RN50.json
    python -m benchmarks --quick full lora      # fewer and smaller steps of some, printed and not kept

Both sides run in a process each, with as many threads, on the same batches from the same weights, an epoch at a time in
turns. The losses of all steps must agree, but for LoRA, whose factors each side draws: there those of the first. A step
is the median over all epochs but the first, loading its pictures included. Whole runs of 1 and 3 epochs are the first
ones of a longer run, in which what we keep is filled; of 10, six epochs are steady steps.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.cells import STRATEGIES, Cell
from benchmarks.machine import device, machine
from benchmarks.made import MODELS
from benchmarks.table import compare, table, with_block
from benchmarks.turns import in_turns
from clipfreeze.errors import RunError

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parents[1] / "README.md"
LEFT_OUT = {("ViT-B-16-SigLIP", "prompt")}
"""A prompt of words needs the model's own tokenizer, which would have to be downloaded."""


def measure(cell: Cell) -> dict[str, Any]:
    """One row. RunError where a side fails or losses differ."""
    ours, peer, rate = in_turns(cell)
    tolerance = 1e-3 if device().type == "cpu" else 0.05  # bf16 logits on the peer's side
    return compare(cell, ours, peer, rate, tolerance)


def shown(kept: dict[str, Any]) -> str:
    """What stands in the README."""
    facts, rows = kept["machine"], kept["rows"]
    machine = f"{facts['threads']} threads of {facts['cpu']}" if facts["gpu"] is None else facts["gpu"]
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
    return f"{rows[0]['model']}, {machine}, torch {facts['torch']}, commit {commits}:\n\n{table(rows)}"


def with_row(kept: dict[str, Any] | None, facts: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    """What is kept with this row in it: beside those that the same machine has measured of other strategies."""
    rows = {old["strategy"]: old for old in kept["rows"]} if kept is not None and kept["machine"] == facts else {}
    rows[row["strategy"]] = row
    return {"machine": facts, "rows": sorted(rows.values(), key=lambda row: list(STRATEGIES).index(row["strategy"]))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("strategies", nargs="*", help=f"of {', '.join(STRATEGIES)}; all unless named")
    parser.add_argument("--model", choices=MODELS, default="ViT-B-32")
    parser.add_argument("--batch-size", type=int, help="64 on ViT-B-32, else 8")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if unknown := set(options.strategies) - set(STRATEGIES):
        parser.error(f"no strategy {min(unknown)!r}: {', '.join(STRATEGIES)}")
    torch.set_num_threads(options.threads)
    usual = options.model == "ViT-B-32"
    facts, failed = machine(), []
    commit = facts.pop("commit")
    path = RESULTS / ("speed.json" if usual else f"speed-{options.model}.json")
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() and not options.quick else None
    for strategy in options.strategies or STRATEGIES:
        if (options.model, strategy) in LEFT_OUT:
            continue
        size = options.batch_size or (64 if usual and not options.quick else 8)
        cell = Cell(options.model, strategy, size, epochs=3 if options.quick else 4, threads=options.threads)
        try:
            row = {**measure(cell), "commit": commit}
        except RunError as error:
            failed.append(f"{strategy}: {error}")
            continue
        print(table([row]).splitlines()[-1], file=sys.stderr, flush=True)
        if row["ratio"] < row["target"]:
            print(f"below its target of {row['target']}x: {strategy}", file=sys.stderr)
        kept = with_row(kept, facts, row)
        if options.quick:
            continue
        RESULTS.mkdir(exist_ok=True)
        path.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
        if usual:
            README.write_text(with_block(README.read_text(encoding="utf-8"), shown(kept)), encoding="utf-8")
    if kept:
        print(shown(kept))
    if failed:
        sys.exit("\n".join(failed))


if __name__ == "__main__":
    main()
