"""The floor: a share of the score before, the last step above it, and what is said of a fall."""

from __future__ import annotations

import pytest

from clipfreeze.errors import DataError
from clipfreeze.train.retain import RetainFloor


def test_a_score_at_the_floor_is_kept_and_one_below_is_not() -> None:
    floor = RetainFloor(0.5, "stop", before=0.75)
    assert floor.bound == 0.375
    assert [floor.check(step, value) for step, value in ((0, 0.75), (10, 0.375), (20, 0.9))] == [True] * 3
    assert (floor.kept, floor.fell, floor.notes()) == (20, None, [])
    assert not floor.check(30, 0.374)
    assert (floor.kept, floor.fell) == (20, (30, 0.374))


@pytest.mark.parametrize(
    ("action", "steps", "words"),
    [
        ("stop", [(10, 0.5)], "fell to 0.100 at step 20, below 95 % of 0.500: stopped; last above it was step 10"),
        ("rollback", [(10, 0.5)], "fell to 0.100 at step 20, below 95 % of 0.500: rolled back to step 10"),
        ("rollback", [], "fell to 0.100 at step 20, below 95 % of 0.500: rolled back to the start"),
    ],
)
def test_a_fall_is_told_with_what_was_done(action: str, steps: list[tuple[int, float]], words: str) -> None:
    floor = RetainFloor(0.95, action, before=0.5)  # type: ignore[arg-type]
    assert all(floor.check(*each) for each in steps)
    assert not floor.check(20, 0.1)
    assert floor.notes() == [f"the retain set {words}"]


def test_no_number_is_below_and_nothing_is_below_zero() -> None:
    assert not RetainFloor(0.9, "stop", before=0.5).check(1, float("nan"))
    assert RetainFloor(0.9, "stop", before=0.0).check(1, 0.0)
    assert RetainFloor(1, "stop", before=0.5).check(1, 0.5)


@pytest.mark.parametrize("share", [0.0, -2.0, 95.0, float("nan")])
def test_a_floor_is_a_share(share: float) -> None:
    with pytest.raises(DataError, match=r"it is a share.*\n  fix: --retain-floor 0.95"):
        RetainFloor(share, "stop", before=0.5)
