"""Where the parts of a tower lie, as names of modules and parameters; each architecture answers with one `Layout`."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from torch import nn

from clipfreeze.anatomy.parts import TOWER_PARTS


@dataclass(frozen=True, slots=True)
class Block:
    """One residual block, its stage in a hierarchical tower, and what else of the stage runs with it.

    `also` holds what a stage has outside its blocks: downsampling or position encoding, run before its first block.
    """

    name: str
    stage: int | None = None
    also: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Layout:
    """The parts of a tower. Each name stands for all that lies below it, save what a longer name claims for another."""

    blocks: tuple[Block, ...]
    embed: tuple[str, ...] = ()
    norm: tuple[str, ...] = ()
    pool: tuple[str, ...] = ()
    proj: tuple[str, ...] = ()

    def within(self, prefix: str) -> Layout:
        """The same layout under names that begin with `prefix`."""

        def moved(names: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(prefix + name for name in names)

        blocks = (Block(prefix + block.name, block.stage, moved(block.also)) for block in self.blocks)
        return Layout(tuple(blocks), moved(self.embed), moved(self.norm), moved(self.pool), moved(self.proj))


@dataclass(frozen=True, slots=True)
class Place:
    """A role, and within `blocks` which block and stage. `base` is the name the place was given under."""

    role: str
    base: str
    block: int | None = None
    stage: int | None = None


def places(layout: Layout, tower: str) -> Iterator[Place]:
    """Every name of the layout with its place."""
    for part in TOWER_PARTS:
        if part == "blocks":
            for index, block in enumerate(layout.blocks):
                for name in (block.name, *block.also):
                    yield Place(f"{tower}.blocks", name, index, block.stage)
        else:
            yield from (Place(f"{tower}.{part}", name) for name in getattr(layout, part))


def base_in(name: str, known: Collection[str]) -> str | None:
    """The longest of the known names that is `name` or a module around it, so never more than one."""
    while name not in known:
        name, dot, _ = name.rpartition(".")
        if not dot:
            return None
    return name


def is_norm(module: nn.Module) -> bool:
    """Is it a normalisation? Known by its class name, as timm and transformers have their own classes for it."""
    return "norm" in type(module).__name__.lower() and any(True for _ in module.parameters(recurse=False))


def has_parameters(module: nn.Module) -> bool:
    """Has it any, itself or below?"""
    return next(module.parameters(), None) is not None


def own_parameters(module: nn.Module) -> tuple[str, ...]:
    """Names of the parameters the module holds itself."""
    return tuple(name for name, _ in module.named_parameters(recurse=False))


def numbered(container: nn.Module, name: str) -> tuple[Block, ...]:
    """The children of a list of equal blocks, which stands at `name`."""
    return tuple(Block(f"{name}.{child}") for child, _ in container.named_children())
