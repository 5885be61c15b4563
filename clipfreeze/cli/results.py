"""Metrics as tables: a mean with its standard error, before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from clipfreeze.plan.tables import grid

if TYPE_CHECKING:
    from clipfreeze.train.evaluate import Metrics, Score
    from clipfreeze.train.frontier import Frontier


def metrics_table(found: Mapping[str, Metrics]) -> str:
    """A row for each score of each set."""
    plain = _plain(found)
    rows = [
        (_set(name, metrics, "" if plain else _HOW[metrics.kind]), score, _shown(score, value))
        for name, metrics in found.items()
        for score, value in metrics.scores.items()
    ]
    return grid(_once(rows), ("measured on", "", "now"))


def result_table(before: Mapping[str, Metrics], after: Mapping[str, Metrics]) -> str:
    """A row for each score of each set, before and after training."""
    plain = _plain(after)
    rows = [
        (
            _set(name, metrics, "" if plain else _both(metrics, after[name])),
            score,
            _shown(score, value),
            _shown(score, after[name].scores[score]),
        )
        for name, metrics in before.items()
        for score, value in metrics.scores.items()
    ]
    return grid(_once(rows), ("measured on", "", "before", "after"))


def frontier_table(frontier: Frontier, best: float) -> str:
    """A row for each alpha with the main score of each set; a star at the best."""
    sets = frontier.points[0].metrics
    heads = [f"{name}: {next(iter(metrics.scores))}" for name, metrics in sets.items()]
    rows = [
        (
            f"{point.alpha:g}{' *' if point.alpha == best else ''}",
            *(_shown("", metrics.main) for metrics in point.metrics.values()),
        )
        for point in frontier.points
    ]
    return grid(rows, ("alpha", *heads))


_HOW = {
    "zero-shot": "zero-shot",
    "retrieval": "by the encoders",
    "head": "by the head",
    "prompt": "with the prompt",
}


def _plain(found: Mapping[str, Metrics]) -> bool:
    """Whether all is measured as an untuned model is."""
    return all(metrics.kind in ("zero-shot", "retrieval") for metrics in found.values())


def _both(before: Metrics, after: Metrics) -> str:
    return _HOW[after.kind] if before.kind == after.kind else f"{_HOW[before.kind]}, then {_HOW[after.kind]}"


def _set(name: str, metrics: Metrics, how: str) -> str:
    kind = "captions" if any("recall" in score for score in metrics.scores) else "classes"
    return f"{name}: {metrics.images} images, {metrics.texts} {kind}" + (f", {how}" if how else "")


def _once(rows: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """The first column only where it changes."""
    return [("" if i and rows[i - 1][0] == row[0] else row[0], *row[1:]) for i, row in enumerate(rows)]


def _shown(name: str, score: Score) -> str:
    if name == "nll":
        return f"{score.value:.3f} ± {score.error:.3f}"
    return f"{100 * score.value:.1f} % ± {100 * score.error:.1f}"
