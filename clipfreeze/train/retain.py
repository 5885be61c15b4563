"""A floor under what a model must not forget while it learns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from clipfreeze.errors import DataError

FloorAction = Literal["stop", "rollback"]


def check_floor(share: float) -> None:
    """DataError unless it is a share of a score."""
    if not 0 < share <= 1:
        fix = "--retain-floor 0.95 keeps at least 95 % of the score before training"
        raise DataError(f"a retain floor of {share:g}: it is a share, above 0 and at most 1", fix)


@dataclass
class RetainFloor:
    """The retain set's main score must stay at `share` of what it was before training, or above.

    Where it does not, the run ends: "stop" keeps the weights as they are then, "rollback" takes those of step `kept`,
    the last that was measured above the floor (0: the start).
    """

    share: float
    action: FloorAction
    before: float
    kept: int = field(default=0, init=False)
    fell: tuple[int, float] | None = field(default=None, init=False)  # the step, and the score there

    def __post_init__(self) -> None:
        check_floor(self.share)

    @property
    def bound(self) -> float:
        """The lowest score allowed."""
        return self.share * self.before

    def check(self, step: int, value: float) -> bool:
        """Whether the score after `step` steps is still above the floor; false also for one that is no number."""
        if value >= self.bound:
            self.kept = step
            return True
        self.fell = (step, value)
        return False

    def notes(self) -> list[str]:
        """What the user should know of a run that fell below."""
        if self.fell is None:
            return []
        step, value = self.fell
        back = "the start" if self.kept == 0 else f"step {self.kept}"
        ended = f"rolled back to {back}" if self.action == "rollback" else f"stopped; last above it was {back}"
        what = f"the retain set fell to {value:.3f} at step {step}, below {100 * self.share:g} % of {self.before:.3f}"
        return [f"{what}: {ended}"]
