"""Rows and their places out of the files of a store, whoever writes them.

Rows are read into memory of their own and not mapped: a mapped file that somebody truncates kills the process, and all
processes share the system's cache of a file either way. Of 64 warm rows of 150 KB, reading with checksum takes 6.0 ms
of one core, mapping and copying 6.4 (copying alone 3.0); of 2 KB, 0.8 ms both.
"""

from __future__ import annotations

import io
import math
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clipfreeze.train.store_records import RECORD, checksum, read_records, unpack
from clipfreeze.train.store_segment import HEADER, INDEX, ROWS, read_at

_MOST_OPEN = 128  # files kept open; many systems allow a process 1024


@dataclass
class _Pair:
    """One pair of files: how far its index was read, in bytes, and its rows once they were asked for."""

    stem: str
    index_end: int = len(HEADER)
    rows: io.FileIO | None = None


class Reader:
    """All pairs of files of one store, numbered as they are met. Threads may read rows at once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._pairs: list[_Pair] = []
        self._numbers: dict[str, int] = {}
        self._open = 0
        self._lock = threading.Lock()

    def number_of(self, stem: str) -> int:
        """The number of the pair of this name, which places bear."""
        if stem not in self._numbers:
            self._numbers[stem] = len(self._pairs)
            self._pairs.append(_Pair(stem))
        return self._numbers[stem]

    def new_records(self, but: str | None) -> list[NDArray[np.void]]:
        """What was added to each index since the last call, the oldest pair first, without the pair named `but`."""
        try:
            stems = sorted(path.stem for path in self._folder.iterdir() if path.suffix == INDEX)
        except OSError:
            return []
        found = []
        for stem in stems:
            if stem != but:
                with suppress(OSError):  # it was deleted, or is not for us to read
                    found.append(self._tail(self.number_of(stem)))
        return found

    def _tail(self, number: int) -> NDArray[np.void]:
        pair = self._pairs[number]
        with (self._folder / (pair.stem + INDEX)).open("rb") as index:
            whole = index.read(len(HEADER)) == HEADER
            index.seek(pair.index_end)
            tail = index.read() if whole else b""
        # The size after the index was read: it covers every row that the index speaks of, unless somebody cut it.
        records = read_records(tail, number, (self._folder / (pair.stem + ROWS)).stat().st_size)
        pair.index_end += len(tail) // RECORD.itemsize * RECORD.itemsize
        return records

    def row(self, key: bytes, place: bytes) -> Tensor | None:
        """The row of this key at this place; None if it is not as it was written."""
        offset, shape, dtype, crc, number = unpack(place)
        data = np.empty(math.prod(shape) * dtype.itemsize, np.uint8)
        into = data.data
        try:
            there = self._read(self._pairs[number], into, offset)
        except OSError:
            return None
        if there != len(into) or checksum(key, place, into) != crc:
            return None
        return torch.frombuffer(data, dtype=dtype).view(shape) if there else torch.empty(shape, dtype=dtype)

    def _read(self, pair: _Pair, into: memoryview, offset: int) -> int:
        if pair.rows is None:
            self._keep_open(pair)
        if pair.rows is not None:
            return read_at(pair.rows, into, offset)
        with self._open_rows(pair) as rows:
            return read_at(rows, into, offset)

    def _keep_open(self, pair: _Pair) -> None:
        with self._lock:
            if pair.rows is None and self._open < _MOST_OPEN:
                pair.rows = self._open_rows(pair)
                self._open += 1

    def _open_rows(self, pair: _Pair) -> io.FileIO:
        return (self._folder / (pair.stem + ROWS)).open("rb", buffering=0)

    def close(self) -> None:
        """Let go of the files."""
        for pair in self._pairs:
            if pair.rows is not None:
                pair.rows.close()
