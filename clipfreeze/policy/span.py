"""A stretch of a run, said in steps, epochs or a share of the whole."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Unit = Literal["steps", "epochs", "share"]
_FORMS = re.compile(r"(?P<number>\d{1,12}(\.\d{1,12})?)\s*(?P<unit>%|steps?|epochs?)")


@dataclass(frozen=True, slots=True)
class Span:
    """`amount` of `unit`; a share is between 0 and 1."""

    amount: float
    unit: Unit

    def steps(self, total_steps: int, steps_per_epoch: int | None = None) -> int:
        """Optimizer steps in a run of `total_steps`; ValueError when epochs are asked and their length is unknown."""
        if self.unit == "steps":
            return round(self.amount)
        if self.unit == "share":
            return round(self.amount * total_steps)
        if steps_per_epoch is None:
            raise ValueError(f"a stretch of {self.amount:g} epochs needs steps_per_epoch")
        return round(self.amount * steps_per_epoch)


def parse_span(value: int | str) -> Span:
    """500, "500 steps", "2 epochs" or "5%"; ValueError for anything else."""
    if isinstance(value, int) and not isinstance(value, bool):
        value = f"{value} steps"
    found = _FORMS.fullmatch(value.strip()) if isinstance(value, str) else None
    if found is None:
        raise ValueError('write a number of steps, "500 steps", "2 epochs" or "5%"')
    number = float(found["number"])
    if found["unit"] == "%":
        if number > 100:
            raise ValueError(f"{number:g}% is more than the whole run")
        return Span(number / 100, "share")
    return Span(number, "epochs" if found["unit"].startswith("epoch") else "steps")
