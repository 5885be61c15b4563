"""Which parameters of a model a pattern takes."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import cached_property

from clipfreeze.anatomy.parts import ROLES, SLOTS, TAGS, TOWER_PARTS, TOWERS, Anatomy
from clipfreeze.anatomy.slots import QKV
from clipfreeze.errors import Problem, did_you_mean, nearest
from clipfreeze.policy.actions import ACTIONS
from clipfreeze.policy.loading import Policy
from clipfreeze.policy.patterns import NamePattern, PatternError, RolePattern, Slice, parse_pattern

ROLE_WORDS = (
    *(*TOWERS, *TOWER_PARTS, *(role for role in ROLES if "." not in role), "stages", *TAGS, *SLOTS, "qkv"),
    *ACTIONS,
)
"""What may stand after @ and between its dots; each word narrows the set."""

Address = tuple[int, str | None]
"""A parameter by its index, and which of its slots; None for the whole."""


def read_pattern(pattern: str) -> list[RolePattern | NamePattern]:
    """The alternatives of a pattern, which some model may have. Raises PatternError for one that none can have."""
    alternatives = parse_pattern(pattern)
    for alternative in alternatives:
        if isinstance(alternative, NamePattern):
            continue
        shown = f"@{_shown(alternative)}"
        for word, cut in alternative.words:
            if word not in ROLE_WORDS:
                raise PatternError(f"{shown}: no role {word!r}", did_you_mean(word, ROLE_WORDS))
            if cut is not None and word not in ("blocks", "stages"):
                raise PatternError(f"{shown}: {word} cannot be counted", "[...] goes after blocks or stages")
    return alternatives


class Matcher:
    """Answers patterns over one anatomy; parameters are known by their index in it."""

    def __init__(self, anatomy: Anatomy) -> None:
        self._anatomy = anatomy
        self._answers: dict[tuple[str, bool], frozenset[int]] = {}

    def select(self, pattern: str, *, lenient: bool = False) -> frozenset[int]:
        """Indices of the parameters that `pattern` takes, none if it takes none. Raises PatternError.

        `lenient` passes over the towers and paths that a slice reaches past the end of.
        """
        if (pattern, lenient) not in self._answers:
            alternatives = read_pattern(pattern)
            self._answers[pattern, lenient] = frozenset().union(*(self._one(part, lenient) for part in alternatives))
        return self._answers[pattern, lenient]

    def addresses(self, pattern: str, *, lenient: bool = False) -> frozenset[Address]:
        """As `select`, for what is put beside a product: `.attn.q` of a fused weight is its q alone."""
        taken: set[Address] = set()
        for part in read_pattern(pattern):
            if isinstance(part, NamePattern):
                taken.update((index, None) for index in self._globs(part, lenient))
                continue
            thirds = {word for word, _ in part.words} & set(QKV)
            for index in self._roles(part, lenient, fused=True):
                fused = thirds if len(self._anatomy.parameters[index].slots) > 1 else ()
                taken.update([(index, slot) for slot in fused] or [(index, None)])
        return frozenset(taken)

    def slots(self, index: int) -> tuple[str, ...]:
        """The products that a parameter carries."""
        return self._anatomy.parameters[index].slots

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
            if added := [word for word in ACTIONS if re.search(rf"[@.]{word}\b", pattern)]:
                return f"no rule of this policy adds {added[0]} there"
            return f"this model has nothing there: `clipfreeze roles {self._anatomy.model}` lists what it has"
        if re.search(r"[\\^$]", pattern):
            plain = re.sub(r"[\\^$]", "", pattern)
            plain = re.sub(r"\(([^()]*)\)", lambda found: "{" + found[1].replace("|", ",") + "}", plain)
            return "patterns are globs, not regular expressions" + self._if_it_takes(plain.replace("..*", ".*"))
        if self.select(f"{pattern}.*"):
            return f"did you mean {pattern}.*?"
        tail = re.search(r"(\.\*)?$", pattern)
        assert tail is not None
        stem = pattern[: tail.start()]
        near = nearest(stem, self._stems if tail[0] else self._names)
        if near:
            return "did you mean " + " or ".join(name + tail[0] for name in near) + "?"
        return f"`clipfreeze roles {self._anatomy.model}` lists the names"

    def _if_it_takes(self, pattern: str) -> str:
        try:
            return f": {pattern}" if self.select(pattern) else ": * is any text, ? one character, {a,b} either"
        except PatternError:
            return ": * is any text, ? one character, {a,b} either"

    @cached_property
    def _added(self) -> frozenset[int]:
        return frozenset(index for index, parameter in enumerate(self._anatomy.parameters) if parameter.role in ACTIONS)

    @cached_property
    def _by_word(self) -> dict[str, frozenset[int]]:
        found: dict[str, set[int]] = defaultdict(set)
        for index, parameter in enumerate(self._anatomy.parameters):
            place = parameter.place.split(".")
            for word in {parameter.role, *parameter.role.split("."), *place, *parameter.tags, *parameter.slots}:
                found[word].add(index)
            if set(parameter.slots) & set(QKV):
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

    def _one(self, pattern: RolePattern | NamePattern, lenient: bool) -> Iterable[int]:
        return self._roles(pattern, lenient) if isinstance(pattern, RolePattern) else self._globs(pattern, lenient)

    def _roles(self, pattern: RolePattern, lenient: bool, *, fused: bool = False) -> frozenset[int]:
        """What a role takes. Of what policies add only if it says so: `@vision` is the tower, not the LoRA in it."""
        taken = frozenset(range(len(self._anatomy.parameters)))
        if not any(word in ACTIONS for word, _ in pattern.words):
            taken -= self._added
        for word, cut in pattern.words:
            taken &= self._by_word.get(word, frozenset())
            if cut is not None:
                taken = self._cut(pattern, word, cut, taken, lenient)
            if fused or word not in QKV:
                continue
            if together := [i for i in taken if len(self._anatomy.parameters[i].slots) > 1]:
                name = self._anatomy.parameters[min(together)].name
                raise PatternError(
                    f"@{_shown(pattern)}: {word} is a third of the fused {name}, which freezes or trains as a whole",
                    "write .attn.qkv for the whole; lora alone can take one of them",
                )
        return taken

    def _cut(self, pattern: RolePattern, word: str, cut: Slice, taken: frozenset[int], lenient: bool) -> frozenset[int]:
        parameters = self._anatomy.parameters
        kept: set[int] = set()
        for tower in self._anatomy.towers:
            here = [index for index in taken if parameters[index].tower == tower.name]
            count = len(tower.blocks) if word == "blocks" else len(set(tower.stages))
            if not here:
                continue
            positions = _positions(cut, count, f"@{_shown(pattern)}: in the {tower.name} tower", lenient)
            kept.update(
                index
                for index in here
                if (parameters[index].block if word == "blocks" else parameters[index].stage) in positions
            )
        return frozenset(kept)

    def _globs(self, pattern: NamePattern, lenient: bool) -> Iterable[int]:
        if pattern.slices:
            return self._sliced(pattern, 0, "", lenient)
        start = bisect_left(self._names, pattern.prefix)
        stop = bisect_left(self._names, pattern.prefix + "\U0010ffff")
        near = [pair for pair in self._sorted[start:stop] if pair[0].endswith(pattern.suffix)]
        whole = pattern.globs[0].fullmatch
        return [index for name, index in near if whole(name)]

    def _sliced(self, pattern: NamePattern, piece: int, stem: str, lenient: bool) -> Iterator[int]:
        """What the globs and slices from number `piece` on take of the names below `stem`, which ends in a dot."""
        glob = pattern.globs[piece]
        if piece == len(pattern.slices):
            start, stop = bisect_left(self._names, stem), bisect_left(self._names, stem + "\U0010ffff")
            yield from (index for name, index in self._sorted[start:stop] if glob.fullmatch(name, len(stem)))
            return
        for path, numbers in self._numbered.items():
            if not path.startswith(stem) or not glob.fullmatch(path, len(stem)):
                continue
            positions = _positions(pattern.slices[piece], len(numbers), f"under {path}", lenient)
            for position in positions:
                yield from self._sliced(pattern, piece + 1, f"{path}.{numbers[position]}.", lenient)


def _positions(cut: Slice, count: int, where: str, lenient: bool) -> range:
    """What the slice takes of `count`; past the end it is an error that begins with `where`, or nothing if lenient."""
    try:
        return cut.indices(count)
    except PatternError as error:
        if lenient and error.out_of_range:
            return range(0)
        raise PatternError(f"{where}, {error}", error.fix) from None


def pattern_problems(policy: Policy) -> Iterator[Problem]:
    """Patterns of the rules that are on that no model can have, with their places."""
    for rule in policy.all_rules:
        for pattern in (*rule.rule.match, *rule.rule.exclude) if rule.active else ():
            try:
                read_pattern(pattern)
            except PatternError as error:
                yield Problem(str(error), error.fix, rule.path, rule.line)


def _slices(pattern: RolePattern | NamePattern) -> tuple[Slice, ...]:
    if isinstance(pattern, NamePattern):
        return pattern.slices
    return tuple(cut for _, cut in pattern.words if cut is not None)


def _shown(pattern: RolePattern) -> str:
    return ".".join(word + (f"[{cut.text}]" if cut else "") for word, cut in pattern.words)
