"""The parts of a tower in the order of a forward pass, and where something starts to be at work in it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from clipfreeze.anatomy.layout import Layout, base_in
from clipfreeze.anatomy.partition import layouts


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a tower's first part at work begins: with the first that is called of `modules`, named `part` for people.

    `modules` also holds bare parameters and modules that a tower reads without calling them; `before` are the names of
    what may stand before.
    """

    part: str
    modules: tuple[str, ...]
    before: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Course:
    """`groups` are the names of a tower's parts in order: input, each block, what comes after them, the projection.

    Normalisation and pooling come after the blocks in either order, so they are one group.
    """

    tower: str
    groups: tuple[tuple[str, ...], ...]

    @property
    def modules(self) -> tuple[str, ...]:
        """All names but those of the input."""
        return tuple(name for group in self.groups[1:] for name in group)

    def entry(self, names: Iterable[str]) -> Entry | None:
        """Where the first of these parameters is at work; None where none of them is in the tower.

        Raises ValueError where one is in the input, before which nothing stands.
        """
        found = {of: number for number, group in enumerate(self.groups) for of in group}
        places = [(found[base], base) for name in names if (base := base_in(name, found)) is not None]
        if not places:
            return None
        first = min(group for group, _ in places)
        if first == 0:
            raise ValueError(f"{self.tower}.embed")
        at_work = dict.fromkeys(name for group, name in places if group == first)
        before = tuple(name for group in self.groups[:first] for name in group)
        if first <= len(self.groups) - 3:
            return Entry(f"{self.tower}.blocks[{first - 1}]", self.groups[first], before)
        beside = tuple(name for name in self.groups[first] if name not in at_work)
        return Entry(", ".join(at_work), tuple(at_work), before + beside)


def course_of(model: nn.Module, tower: str) -> Course:
    """Of "vision" or "text"; the model may bear additions."""
    layout: Layout = layouts(model)[tower]
    blocks = tuple((*block.also, block.name) for block in layout.blocks)
    return Course(tower, (layout.embed, *blocks, layout.norm + layout.pool, layout.proj))
