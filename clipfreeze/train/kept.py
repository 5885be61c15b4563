"""What a frozen prefix made of each sample, kept for the next time: in memory up to a budget, and in a folder."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from clipfreeze.train.store import Store

_BLOCK = 2**22  # elements; untouched ones take no memory


@dataclass
class Budget:
    """Bytes of memory for all that is kept."""

    most: int
    used: int = 0

    def take(self, count: int) -> bool:
        """Whether there is room for so many more; then they are taken."""
        if self.used + count > self.most:
            return False
        self.used += count
        return True


@dataclass
class Memory:
    """Rows of one shape, or (l, ...) of one shape but for their length, side by side in large blocks."""

    budget: Budget
    index: dict[Hashable, int] = field(default_factory=dict)  # of a row, by key
    places: array[int] = field(default_factory=lambda: array("q"))  # where it starts, all blocks in a row
    lengths: array[int] = field(default_factory=lambda: array("q"))  # its l; -1 for one without
    blocks: list[Tensor] = field(default_factory=list)
    tail: tuple[int, ...] = ()  # its shape, without l
    bytes: int = 0
    full: bool = False
    _end: int = 0

    def get(self, key: Hashable) -> Tensor | None:
        """A view of the row."""
        number = self.index.get(key)
        if number is None:
            return None
        block, start = divmod(self.places[number], len(self.blocks[0]))
        length = self.lengths[number]
        shape = self.tail if length < 0 else (length, *self.tail)
        return self.blocks[block][start : start + math.prod(shape)].view(shape)

    def put(self, key: Hashable, row: Tensor) -> None:
        """Keep the row, unless the budget is spent."""
        if self.full or key in self.index:
            return
        if not self.blocks:
            self.tail = tuple(row.shape[1:]) if row.ndim > 1 else tuple(row.shape)
            self.blocks.append(torch.empty(max(_BLOCK, row.numel()), dtype=row.dtype))
        size = len(self.blocks[0])
        if row.numel() > size or not self.budget.take(row.numel() * row.element_size()):
            self.full = True
            return
        if self._end % size + row.numel() > size or self._end == len(self.blocks) * size:
            self._end = len(self.blocks) * size
            self.blocks.append(torch.empty(size, dtype=row.dtype))
        start = self._end % size
        self.blocks[-1][start : start + row.numel()] = row.reshape(-1)
        self.index[key] = len(self.places)
        self.places.append(self._end)
        self.lengths.append(len(row) if row.ndim > 1 else -1)
        self._end += row.numel()
        self.bytes += row.numel() * row.element_size()


@dataclass
class Kept:
    """Of one tower: memory first, then the store. `address` gives a sample's name on the store, the same in every run.

    Rows are held in `dtype`, if one is said.
    """

    memory: Memory
    dtype: torch.dtype | None = None
    store: Store | None = None
    address: Callable[[Hashable], bytes] = lambda key: b""

    def __contains__(self, key: Hashable) -> bool:
        return key in self.memory.index or (self.store is not None and self.address(key) in self.store)

    def fetch(self, keys: Sequence[Hashable | None]) -> list[Tensor | None]:
        """The row of each key; None where there is none, and for None."""
        rows = [None if key is None else self.memory.get(key) for key in keys]
        if self.store is None:
            return rows
        missing = [place for place, row in enumerate(rows) if row is None and keys[place] is not None]
        found = self.store.read([self.address(keys[place]) for place in missing]) if missing else []
        for place, row in zip(missing, found, strict=True):
            if row is not None:
                self.memory.put(keys[place], row)
                rows[place] = row
        return rows

    def put(self, keys: Sequence[Hashable | None], rows: Sequence[Tensor]) -> list[Tensor]:
        """Keep them, and give them as they will come back."""
        held = [row.detach().to("cpu", self.dtype) for row in rows]
        named = [(key, row) for key, row in zip(keys, held, strict=True) if key is not None]
        for key, row in named:
            self.memory.put(key, row)
        if self.store is not None and named:
            self.store.write([self.address(key) for key, _ in named], [row for _, row in named])
        return held

    def take_notes(self) -> list[str]:
        """What the user should know of the store."""
        return [] if self.store is None else self.store.take_notes()

    def close(self) -> None:
        """Let go of memory and files."""
        self.memory.budget.used -= self.memory.bytes
        self.memory = Memory(self.memory.budget)
        if self.store is not None:
            self.store.close()
