"""Patterns over parameter names and roles: globs, braces, slices. Syntax only; `plan.match` meets them with a model."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

_SLICE = re.compile(r"-?\d+%?|(-?\d+%?)?:(-?\d+%?)?(:-?\d+)?")
_FORGOTTEN_DOT = re.compile(r"\[(-\d+%?|-?\d*%?:[-:\d%]*)\]")
_ROLE_WORD = re.compile(r"(?P<word>\w+)(\[(?P<slice>[^\]]*)\])?")


MOST_ALTERNATIVES = 1000
"""Braces multiply."""


class PatternError(ValueError):
    """A pattern that cannot be read, or a slice `out_of_range`; `fix` says what would be right."""

    def __init__(self, what: str, fix: str | None = None, *, out_of_range: bool = False) -> None:
        super().__init__(what)
        self.fix = fix
        self.out_of_range = out_of_range


@dataclass(frozen=True, slots=True)
class Slice:
    """`[3]`, `[-2:]`, `[::2]` as Python counts, or by share: `[-25%:]` takes the last quarter, rounded up.

    Unlike Python, a bound past either end is an error, and -0 counts from the end: `[-0:]` is empty.
    """

    text: str

    def indices(self, count: int) -> range:
        """The positions taken of `count`; raises PatternError when the slice reaches past them."""
        if ":" not in self.text:
            at = self._bound(self.text, count)
            if at >= count:
                raise self._past(count)
            return range(at, at + 1)
        start, stop, step = (*self.text.split(":"), "")[:3]
        first = self._bound(start, count) if start else None
        last = self._bound(stop, count) if stop else None
        if step and int(step) == 0:
            raise PatternError(f"[{self.text}] has step 0")
        return range(*slice(first, last, int(step) if step else None).indices(count))

    def _bound(self, text: str, count: int) -> int:
        number = text.rstrip("%").lstrip("-")
        distance = math.ceil(round(count * int(number) / 100, 9)) if text.endswith("%") else int(number)
        if distance > count:
            raise self._past(count)
        return count - distance if text.startswith("-") else distance

    def _past(self, count: int) -> PatternError:
        there = f"there are {count}, [0] to [{count - 1}]" if count else "there are none"
        return PatternError(
            f"[{self.text}] is out of range: {there}", "count within them, or by share: [-50%:]", out_of_range=True
        )


@dataclass(frozen=True, slots=True)
class RolePattern:
    """`@vision.blocks[-2:].attn.q`: words that each narrow the set, some with a slice."""

    words: tuple[tuple[str, Slice | None], ...]


@dataclass(frozen=True, slots=True)
class NamePattern:
    """Globs with a slice between each two: `visual.transformer.resblocks.[-2:].*` is two globs and one slice.

    `prefix` and `suffix` are the literal ends of a pattern without slices, by which most names are ruled out.
    """

    globs: tuple[re.Pattern[str], ...]
    slices: tuple[Slice, ...]
    prefix: str
    suffix: str


def parse_pattern(text: str) -> list[RolePattern | NamePattern]:
    """The alternatives of a pattern, braces expanded; raises PatternError."""
    alternatives = []
    for part in _expand_braces(text):
        alternatives.append(_parse_role(part) if part.startswith("@") else _parse_name(part))
        if len(alternatives) > MOST_ALTERNATIVES:
            raise PatternError(
                f"pattern {text!r} stands for more than {MOST_ALTERNATIVES} patterns", "take out some braces"
            )
    return alternatives


def _expand_braces(text: str) -> Iterator[str]:
    """`a.{b,c{d,e}}.f` -> a.b.f, a.cd.f, a.ce.f"""
    depth, start, cuts = 0, 0, list[int]()
    for at, char in enumerate(text):
        if char == "{":
            if depth == 0:
                start, cuts = at, [at]
            depth += 1
        elif char == "," and depth == 1:
            cuts.append(at)
        elif char == "}":
            depth -= 1
            if depth < 0:
                break
            if depth == 0:
                cuts.append(at)
                options = [text[cut + 1 : end] for cut, end in pairwise(cuts)]
                for option in options:
                    yield from _expand_braces(text[:start] + option + text[at + 1 :])
                return
    if depth:
        raise PatternError(f"pattern {text!r} has a brace without its partner", "write {a,b}")
    yield text


def _parse_role(text: str) -> RolePattern:
    words = []
    at = 1
    while at < len(text):
        found = _ROLE_WORD.match(text, at)
        if not found or (found.end() < len(text) and text[found.end()] != "."):
            raise PatternError(
                f"{text!r} is no role", "write words with dots between, such as @vision.blocks[-2:].attn"
            )
        if found["slice"] is not None and not _is_slice(found["slice"]):
            raise PatternError(f"[{found['slice']}] in {text!r} is no slice", "write [3], [-2:], [::2] or [-25%:]")
        words.append((found["word"], Slice(found["slice"]) if found["slice"] is not None else None))
        at = found.end() + 1
    if not words or text.endswith("."):
        raise PatternError(
            f"{text!r} is no role", "write a word after the @ and after each dot, such as @vision.blocks"
        )
    return RolePattern(tuple(words))


def _is_slice(text: str) -> bool:
    return bool(text) and _SLICE.fullmatch(text) is not None


def _parse_name(text: str) -> NamePattern:
    globs, slices, components = [], list[Slice](), list[str]()
    for component in text.split("."):
        inner = component[1:-1]
        leading_zero = len(inner) > 1 and inner.isdigit() and inner[0] == "0"
        if component[:1] == "[" and component[-1:] == "]" and _is_slice(inner) and not leading_zero:
            globs.append(".".join(components))
            slices.append(Slice(inner))
            components = []
        elif forgotten := _FORGOTTEN_DOT.search(component):
            fix = f"write {component.replace(forgotten[0], f'{forgotten[0]}.')}" if component != forgotten[0] else None
            raise PatternError(f"in pattern {text!r}, the slice {forgotten[0]} is no component by itself", fix)
        else:
            components.append(component)
    globs.append(".".join(components))
    if slices and not globs[0]:
        raise PatternError(f"pattern {text!r} begins with a slice", f"write what it counts before it, such as *.{text}")
    special = [at for at, char in enumerate(text) if char in "*?["]
    prefix = text[: special[0]] if special else text
    last = max(text.rfind("*"), text.rfind("?"), text.rfind("]"))
    suffix = "" if slices else text[last + 1 :]
    return NamePattern(tuple(re.compile(_regex(glob)) for glob in globs), tuple(slices), prefix, suffix)


def _regex(glob: str) -> str:
    """As `fnmatch.translate` but for `fullmatch`, the same on every Python and system."""
    parts, at = list[str](), 0
    while at < len(glob):
        char = glob[at]
        at += 1
        if char == "*":
            if parts[-1:] != [".*"]:
                parts.append(".*")
        elif char == "?":
            parts.append(".")
        elif char == "[" and (end := glob.find("]", at + (2 if glob[at : at + 1] == "!" else 1))) > 0:
            parts.append(_character_class(glob[at:end]))
            at = end + 1
        else:
            parts.append(re.escape(char))
    return "(?s:" + "".join(parts) + ")"


def _character_class(inner: str) -> str:
    """`[!a-z]` without its brackets as a regular expression; an empty range, `z-a`, takes nothing."""
    negated = inner.startswith("!")
    parts, at = list[str](), int(negated)
    while at < len(inner):
        low, high = inner[at], inner[at]
        if inner[at + 1 : at + 2] == "-" and at + 2 < len(inner):
            high = inner[at + 2]
            at += 2
        at += 1
        if low <= high:
            parts.append(f"{re.escape(low)}-{re.escape(high)}")
    if not parts:
        return "." if negated else "(?!)"
    return f"[{'^' * negated}{''.join(parts)}]"
