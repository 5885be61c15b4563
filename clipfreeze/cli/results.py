"""Metrics as tables: a mean with its standard error, before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from clipfreeze.plan.tables import grid

if TYPE_CHECKING:
    from clipfreeze.train.evaluate import Metrics, Score


def metrics_table(found: Mapping[str, Metrics]) -> str:
    """A row for each score of each set."""
    rows = [
        (_set(name, metrics), score, _shown(score, value))
        for name, metrics in found.items()
        for score, value in metrics.scores.items()
    ]
    return grid(_once(rows), ("measured on", "", "now"))


def result_table(before: Mapping[str, Metrics], after: Mapping[str, Metrics]) -> str:
    """A row for each score of each set, before and after training."""
    rows = [
        (_set(name, metrics), score, _shown(score, value), _shown(score, after[name].scores[score]))
        for name, metrics in before.items()
        for score, value in metrics.scores.items()
    ]
    return grid(_once(rows), ("measured on", "", "before", "after"))


def _set(name: str, metrics: Metrics) -> str:
    kind = "classes" if metrics.kind == "zero-shot" else "captions"
    return f"{name}: {metrics.images} images, {metrics.texts} {kind}"


def _once(rows: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """The first column only where it changes."""
    return [("" if i and rows[i - 1][0] == row[0] else row[0], *row[1:]) for i, row in enumerate(rows)]


def _shown(name: str, score: Score) -> str:
    if name == "nll":
        return f"{score.value:.3f} ± {score.error:.3f}"
    return f"{100 * score.value:.1f} % ± {100 * score.error:.1f}"
