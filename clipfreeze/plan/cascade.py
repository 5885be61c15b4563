"""The cascade: each setting of each parameter is decided by itself, by the last rule that speaks of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple


class Word(NamedTuple):
    """What one rule says of one setting; `rule` counts from 1, 0 is the policy's default."""

    value: Any
    rule: int


Decisions = dict[str, list[Word]]
"""All words on each setting of one parameter, in order: the last is the one that counts."""


@dataclass(frozen=True, slots=True)
class Speech:
    """One rule: its number, what it says, and of which parameters (by index)."""

    rule: int
    says: Mapping[str, Any]
    of: Iterable[int]


def decide(count: int, speeches: Sequence[Speech]) -> list[Decisions]:
    """Of each of `count` parameters, all that is said of it, losers too. `freeze` is `train` said with False."""
    decisions: list[Decisions] = [{} for _ in range(count)]
    for speech in speeches:
        words = [
            ("train", Word(setting == "train", speech.rule))
            if setting in ("train", "freeze")
            else (setting, Word(value, speech.rule))
            for setting, value in speech.says.items()
        ]
        for index in speech.of:
            for setting, word in words:
                decisions[index].setdefault(setting, []).append(word)
    return decisions


def winner(decisions: Decisions, setting: str) -> Word | None:
    """The word that counts, if any. An lr_scale said before the lr that counts was of another lr: it does not."""
    words = decisions.get(setting)
    if not words:
        return None
    if setting == "lr_scale" and "lr" in decisions and words[-1].rule < decisions["lr"][-1].rule:
        return None
    return words[-1]
