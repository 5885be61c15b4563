"""Comparisons as rows of plain data, and as a Markdown table between two marks of a page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.cells import Cell, Side
from clipfreeze.errors import RunError

RUNS = (1, 3, 10)
"""Epochs of the whole runs that are compared."""

BEGIN, END = "<!-- speed:begin -->", "<!-- speed:end -->"

_HEAD = (
    *("strategy", "peer", "batch", "peer s", "ours s", "ratio"),
    *(f"{n} epoch{'s' if n > 1 else ''}" for n in RUNS),
    *("peer MB", "ours MB", "floor s", "ours / floor"),
)


def losses_apart(ours: Sequence[float], peer: Sequence[float], tolerance: float) -> float:
    """The most, of steps from the same weights on the same batches. RunError where it is more than `tolerance`."""
    apart = 0.0
    for step, (one, other) in enumerate(zip(ours, peer, strict=True), start=1):
        if not abs(one - other) <= tolerance:
            raise RunError(f"the loss of step {step} is {one:.6f}, and {other:.6f} of the peer")
        apart = max(apart, abs(one - other))
    return apart


def compare(cell: Cell, ours: Side, peer: Side, rate: float, tolerance: float) -> dict[str, Any]:
    """One row. `rate` is the machine's, FLOP/s. RunError where losses differ."""
    known = 1 if cell.how.draws else len(ours.losses)
    apart = losses_apart(ours.losses[:known], peer.losses[:known], tolerance)
    floor = ours.flops / rate
    run_seconds = {str(n): (ours.run(n), peer.run(n)) for n in RUNS}  # as JSON has them
    return {
        "model": cell.model,
        "strategy": cell.strategy,
        "peer": cell.how.peer,
        "batch_size": cell.batch_size,
        "steps_per_epoch": cell.batches,
        "trains": {"ours": ours.trains, "peer": peer.trains},
        "losses": {"ours": ours.losses, "peer": peer.losses},
        "losses_apart": apart,
        "step_s": {"ours": ours.step, "peer": peer.step},
        "ratio": peer.step / ours.step,
        "target": cell.how.target,
        "run_s": {n: {"ours": own, "peer": other} for n, (own, other) in run_seconds.items()},
        "run_ratio": {n: other / own for n, (own, other) in run_seconds.items()},
        "peak_mb": {"ours": ours.peak_mb, "peer": peer.peak_mb},
        "imported_mb": {"ours": ours.imported_mb, "peer": peer.imported_mb},
        "flops": ours.flops,
        "flop_per_s": rate,
        "floor_s": floor,
        "over_floor": ours.step / floor if floor else None,
        "seconds": {"ours": ours.seconds, "peer": peer.seconds},
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [_HEAD, ("---",) * len(_HEAD), *map(_cells, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    step, peak, over = row["step_s"], row["peak_mb"], row["over_floor"]
    return (
        f"`{row['strategy']}`",
        row["peer"],
        str(row["batch_size"]),
        f"{step['peer']:.3g}",
        f"{step['ours']:.3g}",
        _times(row["ratio"]),
        *(_times(row["run_ratio"][str(n)]) for n in RUNS),
        f"{peak['peer']:.0f}",
        f"{peak['ours']:.0f}",
        f"{row['floor_s']:.2g}",
        f"{over:.2f}" if over is not None else "",
    )


def _times(ratio: float) -> str:
    return f"{ratio:.0f}x" if ratio >= 20 else f"{ratio:.1f}x" if ratio >= 2 else f"{ratio:.2f}x"


def with_block(page: str, text: str) -> str:
    """A page with `text` between its marks, in place of what stood there. RunError for a page without them."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise RunError(f"the page has no {BEGIN} followed by {END}", "put both where the table belongs")
    return f"{before}{BEGIN}\n{text.strip()}\n{END}{after}"
