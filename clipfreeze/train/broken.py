"""Pictures that cannot be read: counted by name, and too many of them end the run."""

from __future__ import annotations

from collections.abc import Iterable

from clipfreeze.errors import DataError, Problem, RunError

_MOST_SHOWN = 100


def reason(error: DataError) -> str:
    """A broken picture in one line: its name and what is wrong with it."""
    (problem, *_) = error.problems
    return str(Problem(problem.what, None, problem.path, problem.line))


def none_whole(what: str, names: Iterable[str]) -> DataError:
    """The error for pictures of which none could be read, each in a line."""
    return DataError("\n  ".join([what, *dict.fromkeys(names)]), "mend or remove them: clipfreeze data PATH names all")


class Broken:
    """The broken pictures met so far, each once."""

    def __init__(self, total: int) -> None:
        """`total` is the number of pictures of the data."""
        self.total = total
        self._found: dict[str, None] = {}

    def __len__(self) -> int:
        return len(self._found)

    @property
    def names(self) -> tuple[str, ...]:
        """What `Loaded.broken` held, in the order in which it was found."""
        return tuple(self._found)

    def add(self, names: Iterable[str]) -> None:
        """Note these; those known already change nothing."""
        self._found.update(dict.fromkeys(names))

    def check(self, max_bad: float) -> None:
        """RunError with the list when more than this share of all the data's pictures is broken.

        The share is of the data, not of what was seen, so that it does not depend on which come first; and a single
        broken picture ends a run only if none is allowed.
        """
        allowed = max(1.0, max_bad * self.total) if max_bad > 0 else 0.0
        if len(self._found) <= allowed:
            return
        shown = list(self._found)[:_MOST_SHOWN]
        rest = [f"and {len(self._found) - len(shown)} more"] if len(self._found) > len(shown) else []
        what = f"{len(self._found)} of {self.total} pictures are broken, more than {max_bad:.3g} of them"
        raise RunError("\n  ".join([what, *shown, *rest]), "mend or remove them, or allow more: --max-bad")
