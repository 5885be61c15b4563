"""One policy file as parsed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipfreeze.errors import Problem
from clipfreeze.policy.lines import Where, line_of


@dataclass(frozen=True, slots=True)
class Document:
    """The data of a file, with the line of each key; `shown` is the name it has in messages."""

    path: Path
    shown: str
    data: dict[str, Any]
    lines: dict[Where, int]

    def problem(self, where: Where, what: str, fix: str | None = None) -> Problem:
        """One at the line of a key."""
        return Problem(what, fix, self.shown, line_of(self.lines, where))
