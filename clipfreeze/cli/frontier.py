"""The points between a base and what was trained from it, printed with the best of them."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from clipfreeze.cli.common import Format, print_json


def print_frontier(folder: Path, sets: dict[str, str], floor: float | None, form: Format) -> None:
    """Of a run's folder, on its own sets or those of `sets`: the first is the goal, the others are retained."""
    from clipfreeze.cli.results import frontier_table
    from clipfreeze.train.frontier import best_alpha, check_retain, wise_frontier
    from clipfreeze.train.runs import open_run

    run = open_run(folder, sets)
    goal, *retain = run.tests
    check_retain(retain, floor)
    found = wise_frontier(run.applied, run.start, run.metrics)
    best = best_alpha(found, goal, retain, floor)
    if form is Format.json:
        print_json({**asdict(found), "goal": goal, "retain": retain, "retain_floor": floor, "best_alpha": best})
        return
    print(frontier_table(found, best))
    print(f"\nbest alpha  {best:g}, {_why(goal, retain, floor)}")
    print(f"next        clipfreeze export {folder} --to open_clip --alpha {best:g}")


def _why(goal: str, retain: list[str], floor: float | None) -> str:
    where = "" if floor is None else f" with {100 * floor:g} % of {', '.join(retain)} kept"
    return f"the highest on {goal}{where}"
