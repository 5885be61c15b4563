"""Which parameters of a model a pattern takes."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import cached_property

from clipfreeze.anatomy.parts import ROLES, SLOTS, TAGS, TOWER_PARTS, TOWERS, Anatomy
from clipfreeze.errors import did_you_mean, nearest
from clipfreeze.policy.patterns import NamePattern, PatternError, RolePattern, Slice, parse_pattern

ROLE_WORDS = (*TOWERS, *TOWER_PARTS, *(role for role in ROLES if "." not in role), "stages", *TAGS, *SLOTS, "qkv")
"""What may stand after @ and between its dots; each word narrows the set."""


class Matcher:
    """Answers patterns over one anatomy; parameters are known by their index in it."""

    def __init__(self, anatomy: Anatomy) -> None:
        self._anatomy = anatomy
        self._answers: dict[str, frozenset[int]] = {}

    def select(self, pattern: str) -> frozenset[int]:
        """Indices of the parameters that `pattern` takes, none if it takes none. Raises PatternError."""
        if pattern not in self._answers:
            self._answers[pattern] = frozenset().union(*map(self._one, parse_pattern(pattern)))
        return self._answers[pattern]

    def is_empty_by_count(self, pattern: str) -> bool:
        """Whether the pattern says itself that it takes nothing: a slice such as `[-0:]`."""
        return any(
            re.fullmatch(r"-0%?:|:0%?", part.text) is not None
            for alternative in parse_pattern(pattern)
            for part in _slices(alternative)
        )

    def nearest_right(self, pattern: str) -> str:
        """What to write in place of a pattern that takes nothing."""
        if pattern.startswith("@"):
            return f"this model has nothing there: `clipfreeze roles {self._anatomy.model}` lists what it has"
        if re.search(r"[\\^$]", pattern):
            plain = re.sub(r"[\\^$]", "", pattern).replace(".*", "*").rstrip("*.") + ".*"
            return f"patterns are globs, not regular expressions: {plain if self.select(plain) else 'visual.*'}"
        if self.select(f"{pattern}.*"):
            return f"did you mean {pattern}.*?"
        tail = re.search(r"(\.\*)?$", pattern)
        assert tail is not None
        stem = pattern[: tail.start()]
        near = nearest(stem, self._stems if tail[0] else self._names)
        if near:
            return "did you mean " + " or ".join(name + tail[0] for name in near) + "?"
        return f"`clipfreeze roles {self._anatomy.model}` lists the names"

    @cached_property
    def _by_word(self) -> dict[str, frozenset[int]]:
        found: dict[str, set[int]] = defaultdict(set)
        for index, parameter in enumerate(self._anatomy.parameters):
            for word in (*parameter.role.split("."), *parameter.tags, *parameter.slots):
                found[word].add(index)
            if len(parameter.slots) > 1:
                found["qkv"].add(index)
            if parameter.stage is not None:
                found["stages"].add(index)
        return {word: frozenset(indices) for word, indices in found.items()}

    @cached_property
    def _sorted(self) -> list[tuple[str, int]]:
        """All names, those of tied tensors too, with the index of their parameter."""
        return sorted(
            (name, index)
            for index, parameter in enumerate(self._anatomy.parameters)
            for name in (parameter.name, *parameter.aliases)
        )

    @cached_property
    def _names(self) -> list[str]:
        return [name for name, _ in self._sorted]

    @cached_property
    def _stems(self) -> list[str]:
        """Every module path above a parameter."""
        paths = {name[:at] for name in self._names for at, char in enumerate(name) if char == "."}
        return sorted(paths)

    @cached_property
    def _numbered(self) -> dict[str, list[int]]:
        """The numbers that stand below each path, in order."""
        found: dict[str, set[int]] = defaultdict(set)
        for name in self._names:
            parts = name.split(".")
            for at, part in enumerate(parts):
                if part.isdigit():
                    found[".".join(parts[:at])].add(int(part))
        return {path: sorted(numbers) for path, numbers in found.items()}

    def _one(self, pattern: RolePattern | NamePattern) -> Iterable[int]:
        return self._roles(pattern) if isinstance(pattern, RolePattern) else self._globs(pattern)

    def _roles(self, pattern: RolePattern) -> frozenset[int]:
        taken = frozenset(range(len(self._anatomy.parameters)))
        for word, cut in pattern.words:
            if word not in ROLE_WORDS:
                raise PatternError(f"@{_shown(pattern)}: no role {word!r}", did_you_mean(word, ROLE_WORDS))
            taken &= self._by_word.get(word, frozenset())
            if cut is not None:
                taken = self._cut(pattern, word, cut, taken)
            if word in ("q", "k", "v") and (fused := [i for i in taken if len(self._anatomy.parameters[i].slots) > 1]):
                name = self._anatomy.parameters[min(fused)].name
                raise PatternError(
                    f"@{_shown(pattern)}: {word} is a third of the fused {name}, which freezes or trains as a whole",
                    "write .attn.qkv for the whole",
                )
        return taken

    def _cut(self, pattern: RolePattern, word: str, cut: Slice, taken: frozenset[int]) -> frozenset[int]:
        parameters = self._anatomy.parameters
        if word not in ("blocks", "stages"):
            raise PatternError(f"@{_shown(pattern)}: {word} cannot be counted", "[...] goes after blocks or stages")
        kept: set[int] = set()
        for tower in self._anatomy.towers:
            here = [index for index in taken if parameters[index].tower == tower.name]
            count = len(tower.blocks) if word == "blocks" else len(set(tower.stages))
            if not here:
                continue
            try:
                positions = cut.indices(count)
            except PatternError as error:
                raise PatternError(
                    f"@{_shown(pattern)}: in the {tower.name} tower, {error}",
                    error.fix,
                    out_of_range=error.out_of_range,
                ) from None
            kept.update(
                index
                for index in here
                if (parameters[index].block if word == "blocks" else parameters[index].stage) in positions
            )
        return frozenset(kept)

    def _globs(self, pattern: NamePattern) -> Iterable[int]:
        if pattern.slices:
            return self._sliced(pattern, 0, "")
        start = bisect_left(self._names, pattern.prefix)
        stop = bisect_left(self._names, pattern.prefix + "\U0010ffff")
        near = [pair for pair in self._sorted[start:stop] if pair[0].endswith(pattern.suffix)]
        whole = pattern.globs[0].fullmatch
        return [index for name, index in near if whole(name)]

    def _sliced(self, pattern: NamePattern, piece: int, stem: str) -> Iterator[int]:
        """What the globs and slices from number `piece` on take of the names below `stem`, which ends in a dot."""
        glob = pattern.globs[piece]
        if piece == len(pattern.slices):
            start, stop = bisect_left(self._names, stem), bisect_left(self._names, stem + "\U0010ffff")
            yield from (index for name, index in self._sorted[start:stop] if glob.fullmatch(name, len(stem)))
            return
        for path, numbers in self._numbered.items():
            if not path.startswith(stem) or not glob.fullmatch(path, len(stem)):
                continue
            try:
                positions = pattern.slices[piece].indices(len(numbers))
            except PatternError as error:
                raise PatternError(f"under {path}, {error}", error.fix, out_of_range=error.out_of_range) from None
            for position in positions:
                yield from self._sliced(pattern, piece + 1, f"{path}.{numbers[position]}.")


def _slices(pattern: RolePattern | NamePattern) -> tuple[Slice, ...]:
    if isinstance(pattern, NamePattern):
        return pattern.slices
    return tuple(cut for _, cut in pattern.words if cut is not None)


def _shown(pattern: RolePattern) -> str:
    return ".".join(word + (f"[{cut.text}]" if cut else "") for word, cut in pattern.words)
