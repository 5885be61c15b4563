"""Every built-in policy on the embedded task: what it gains, what it forgets, how long it takes.

    python -m benchmarks.strategies [--seeds 1] [--out benchmarks/results/strategies.json]

Rates are those of `clipfreeze.demo.KNOBS`, chosen on the validation cut; these numbers are of the test cut.
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import Any

from benchmarks.machine import machine
from clipfreeze import changes, demo, models
from clipfreeze.plan.build import resolve
from clipfreeze.policy.loading import builtin_policies
from clipfreeze.train.evaluate import Metrics
from clipfreeze.train.loop import fit
from clipfreeze.train.runs import run_data, run_policy
from clipfreeze.train.spec import RunSpec

SHOWN = {"target": ("top1", "top5", "nll"), "forgotten": ("top1", "nll")}


def measure(policy: str, seed: int) -> dict[str, Any]:
    """One run of the embedded task."""
    loaded = models.load("demo")
    spec = RunSpec(policy=policy, params=demo.KNOBS.get(policy, {}))
    plan = resolve(run_policy(spec), loaded.model)
    data = run_data(spec, plan.sites)
    result = fit(
        changes.apply(plan, loaded.model, tokenizer=loaded.tokenizer),
        data.train,
        data.tests,
        tokenizer=loaded.tokenizer,
        transform=loaded.transform,
        epochs=demo.EPOCHS,
        batch_size=demo.BATCH_SIZE,
        seed=seed,
    )
    return {
        "policy": policy,
        "seed": seed,
        "trainable": plan.totals.trainable,
        "seconds": round(result.seconds, 1),
        "before": scores(result.before),
        "after": scores(result.after),
    }


def scores(found: dict[str, Metrics]) -> dict[str, dict[str, tuple[float, float]]]:
    """Value and standard error by set and score."""
    return {
        name: {score: (found[name].scores[score].value, found[name].scores[score].error) for score in shown}
        for name, shown in SHOWN.items()
    }


def row(name: str, trainable: str, found: dict[str, dict[str, tuple[float, float]]], seconds: str) -> str:
    """One line of the README's table."""
    cells = [
        f"{value:.2f} ± {error:.2f}" if score == "nll" else f"{100 * value:.1f} ± {100 * error:.1f}"
        for part in SHOWN
        for score in SHOWN[part]
        for value, error in [found[part][score]]
    ]
    return f"| {name} | {trainable} | {' | '.join(cells)} | {seconds} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/strategies.json"))
    args = parser.parse_args()
    logging.basicConfig(level=logging.ERROR)
    runs = [
        measure(policy, seed) for policy in builtin_policies() if policy in demo.KNOBS for seed in range(args.seeds)
    ]
    print("| policy | trains | top-1 % | top-5 % | NLL | known style top-1 % | its NLL | seconds |")
    print("|---|---|---|---|---|---|---|---|")
    before = None
    for run in sorted(runs, key=lambda run: bool(run["before"] != runs[0]["before"])):
        if run["before"] != before:  # a head is measured on other pictures, of the classes it has
            before = run["before"]
            print(row("before" if run is runs[0] else f"before `{run['policy']}`", "", before, ""))
        print(row(f"`{run['policy']}`", f"{run['trainable']:,}", run["after"], f"{run['seconds']:.0f}"))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"machine": machine(), "runs": runs}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
