"""Planning: describe and plan the largest open_clip model, also by 1,000 rules; resolve 10,000 names against as many.

python -m benchmarks.planning
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from clipfreeze.anatomy.partition import describe
from clipfreeze.anatomy.parts import Anatomy, Parameter
from clipfreeze.models import build_on_meta
from clipfreeze.plan.build import resolve
from clipfreeze.policy.loading import Policy, load_policy

REPEATS = 5


def median_seconds(run: Callable[[], Any]) -> float:
    """Of REPEATS runs, after one to warm up."""
    run()
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def large() -> Anatomy:
    """10,000 parameters in 1,000 blocks."""
    parameters = [
        Parameter(f"visual.blocks.{i // 10}.part{i % 10}.weight", (4, 4), "float32", "vision.blocks", i // 10)
        for i in range(10_000)
    ]
    return Anatomy("large", "made", tuple(parameters), ())


def long() -> Policy:
    """1,001 rules of every kind of pattern."""
    rules = '[[rule]]\nmatch = "*"\ntrain = true\nlr = 1e-5\n' + "".join(
        f'[[rule]]\nmatch = "{pattern}"\nlr_scale = 0.5\noptional = true\n'
        for i in range(250)
        for pattern in (f"visual.blocks.{i}.*", f"*.{i}.part3.weight", f"visual.*.{i}.part[45].*", f"*.blocks.[{i}].*")
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "large.toml")
        path.write_text(rules, encoding="utf-8")
        return load_policy(path)


def main() -> None:
    model = build_on_meta("ViT-bigG-14")
    last_n, rules, anatomy = load_policy("last_n"), long(), large()
    measured = {
        "describe and plan ViT-bigG-14 (under 1 s)": lambda: resolve(last_n, describe(model)),
        "describe and plan ViT-bigG-14 by 1,001 rules": lambda: resolve(rules, describe(model)),
        "resolve 10,000 names x 1,001 rules (under 2 s)": lambda: resolve(rules, anatomy),
    }
    for name, run in measured.items():
        print(json.dumps({"what": name, "seconds": round(median_seconds(run), 3)}))


if __name__ == "__main__":
    main()
