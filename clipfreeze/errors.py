"""What can go wrong, as values: gathered, sorted by place, raised together."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Problem:
    """One fault: where it is, what is wrong, and the nearest right thing."""

    what: str
    fix: str | None = None
    path: str | None = None
    line: int | None = None

    def __str__(self) -> str:
        place = ":".join(str(part) for part in (self.path, self.line) if part is not None)
        text = f"{place}: {self.what}" if place else self.what
        return f"{text}\n  fix: {self.fix}" if self.fix else text


class ClipfreezeError(Exception):
    """Base of every error a user can cause; carries all problems found, sorted by file and line."""

    exit_code = 2

    def __init__(self, problems: Problem | str | Iterable[Problem], fix: str | None = None) -> None:
        if isinstance(problems, str):
            problems = Problem(problems, fix)
        found = (problems,) if isinstance(problems, Problem) else tuple(problems)
        self.problems = tuple(sorted(dict.fromkeys(found), key=lambda p: (p.path or "", p.line or 0)))
        super().__init__("\n".join(map(str, self.problems)))


class PolicyError(ClipfreezeError):
    """The policy file cannot be read as one."""


class ModelError(ClipfreezeError):
    """The model is unknown, cannot be built, or has parts we cannot name."""


class PlanError(ClipfreezeError):
    """The policy does not fit the model."""


class ApplyError(ClipfreezeError):
    """The plan cannot be applied to this model; the model is as it was."""


class ExportError(ClipfreezeError):
    """The format cannot hold this model."""


class DataError(ClipfreezeError):
    """The data cannot be read or does not suffice."""


class RunError(ClipfreezeError):
    """The input was right and the run failed."""

    exit_code = 1


class InterruptedRunError(RunError):
    """The user or the system stopped the run."""

    exit_code = 130


def nearest(word: str, choices: Iterable[str], count: int = 3) -> list[str]:
    """The `count` choices most like `word`, best first; case is ignored. May be empty."""
    by_lower: dict[str, str] = {}
    for choice in choices:
        by_lower.setdefault(choice.lower(), choice)
    return [by_lower[match] for match in difflib.get_close_matches(word.lower(), by_lower, count, cutoff=0.5)]


def did_you_mean(word: str, choices: Sequence[str]) -> str:
    """A `fix` line for a wrong name: the nearest names, or all of them when none is near and they are few."""
    near = nearest(word, choices)
    if near:
        return "did you mean " + " or ".join(near) + "?"
    return "one of: " + ", ".join(choices[:20]) + (", ..." if len(choices) > 20 else "")
