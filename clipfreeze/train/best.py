"""Which evaluation was the best so far, and whether to wait for a better one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from clipfreeze.errors import DataError, did_you_mean
from clipfreeze.train.evaluate import Metrics
from clipfreeze.train.settings import LOWER_IS_BETTER


@dataclass
class Best:
    """The best value of one score of one set, the step it was at, and the evaluations since."""

    of: str
    score: str
    value: float | None = None
    step: int = 0
    since: int = 0

    @classmethod
    def by_name(cls, name: str | None, before: Mapping[str, Metrics]) -> Best:
        """`name` is SCORE (of the first set that was measured), SET/SCORE, or None: the first score of the first set.

        DataError for a set or score that is not measured.
        """
        if not before:
            raise DataError("there is no set to measure, so no best or patience", "give evaluation data")
        of, _, score = (name or "").rpartition("/")
        of = of or next(iter(before))
        if of not in before:
            raise DataError(f"best = {name!r}: no set {of!r} is measured", did_you_mean(of, list(before)))
        score = score or next(iter(before[of].scores))
        if score not in before[of].scores:
            what = f"best = {name!r}: {of} has no score {score!r}"
            raise DataError(what, did_you_mean(score, list(before[of].scores)))
        return cls(of, score)

    def update(self, step: int, metrics: Mapping[str, Metrics]) -> bool:
        """Take an evaluation in; whether it is the best so far. Equal ones are no better."""
        found = metrics[self.of].scores[self.score].value
        sign = -1 if self.score in LOWER_IS_BETTER else 1
        if self.value is None or sign * found > sign * self.value:
            self.value, self.step, self.since = found, step, 0
            return True
        self.since += 1
        return False
