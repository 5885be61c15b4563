"""The disk tier of the cache of frozen activations: rows by key, kept over runs, shared by processes.

Each process appends to files of its own and reads those of all, so nothing is locked and a kill leaves at worst a tail
that nobody reads. A row counts only if its checksum fits: what is cut, flipped or deleted reads as not there.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from clipfreeze.train.store_folder import NAME, Use, make_folder, make_room
from clipfreeze.train.store_reader import Reader
from clipfreeze.train.store_records import RECORD, Records
from clipfreeze.train.store_segment import Segment, new_stem

_WRITERS = 16  # processes that may fill one folder at once without passing its bound


class Store:
    """The rows of one frozen prefix. Threads may use it at once."""

    def __init__(self, folder: Path, name: str, most_bytes: int) -> None:
        """`folder` holds all stores and is made if missing; `name` is a hex digest of all that the rows depend on
        beside their samples. All stores together stay under `most_bytes`: the least recently used go, but none that is
        open somewhere.

        DataError if the folder cannot be used. One that cannot be written is only read, and a note says so.
        """
        assert NAME.fullmatch(name), name
        self._path, self._most_bytes = folder / name, most_bytes
        self._lock = threading.RLock()
        self._records, self._reader = Records(), Reader(self._path)
        self._segment: Segment | None = None
        self._use: Use | None = None
        self._writes = True
        self._may_write = 0  # bytes, until the folder is looked at again
        self._notes: list[str] = []
        make_folder(folder)
        try:
            self._use = Use(self._path)
        except OSError as error:
            self._stop_writing(f"cannot be written ({error.strerror})")
        else:
            make_room(self._path, most_bytes)
        self.refresh()

    def read(self, keys: Sequence[bytes]) -> list[Tensor | None]:
        """The row of each 16-byte key, bit for bit as written and in memory of its own; None if it is not here or
        damaged."""
        with self._lock:
            places = self._records.find(keys)
        rows = []
        for key, place in zip(keys, places, strict=True):
            rows.append(None if place is None else self._reader.row(key, place))
            if place is not None and rows[-1] is None:
                with self._lock:
                    self._records.put(key, None)  # so that it is written anew
        return rows

    def __contains__(self, key: bytes) -> bool:
        with self._lock:
            return self._records.find([key])[0] is not None

    def write(self, keys: Sequence[bytes], rows: Sequence[Tensor]) -> None:
        """Keep these CPU tensors of at most 4 dimensions, one a key; a key that is here keeps its row. What the bound
        or the system does not let be written is left out, and a note says so."""
        with self._lock:
            new: dict[bytes, Tensor] = {}
            for key, row, place in zip(keys, rows, self._records.find(keys), strict=True):
                if place is None:
                    new.setdefault(key, row)
            new = self._that_fit(new)
            if not new:
                return
            try:
                places = self._own_segment().append(list(new), list(new.values()))
            except OSError as error:
                self._stop_writing(f"cannot be written ({error.strerror})")
                return
            for key, place in zip(new, places, strict=True):
                self._records.put(key, place)

    def refresh(self) -> None:
        """See what other processes have added since, and note that the store is still in use."""
        with self._lock:
            if self._use:
                try:
                    self._use.renew()
                except OSError as error:
                    self._stop_writing(f"was deleted or can no longer be written ({error.strerror})")
            self._records.add(self._reader.new_records(but=self._segment.stem if self._segment else None))

    def take_notes(self) -> list[str]:
        """What the user should know, each once."""
        notes, self._notes = self._notes, []
        return notes

    def close(self) -> None:
        """Let go of all files; from then on nothing is read or written."""
        with self._lock:
            self._writes = False
            self._records = Records()
            self._reader.close()
            if self._segment:
                self._segment.close()
            if self._use:
                self._use.end()
                self._use = None

    def _own_segment(self) -> Segment:
        """The files of this process: one that was forked off does not write into those of its parent."""
        if self._segment is None or self._segment.process != os.getpid():
            if self._segment:
                self._segment.close()
            stem = new_stem()
            self._segment = Segment(self._path, stem, self._reader.number_of(stem))
        return self._segment

    def _that_fit(self, rows: dict[bytes, Tensor]) -> dict[bytes, Tensor]:
        """The first of these rows, as far as the bound lets them be written.

        Others fill the folder too: what may be written before looking at it again is a small part of what is left, so
        that all together stay under the bound.
        """
        fitting: dict[bytes, Tensor] = {}
        taken = 0  # bytes, which the folder does not show yet
        for key, row in rows.items():
            needed = row.nbytes + RECORD.itemsize
            if self._writes and needed > self._may_write:
                left = self._most_bytes - taken
                self._may_write = (left - make_room(self._path, left - needed * _WRITERS)) // _WRITERS
                if needed > self._may_write:
                    self._stop_writing(f"is full (--cache-dir may hold {self._most_bytes / 1e9:.3g} GB)")
            if not self._writes:
                break
            fitting[key] = row
            taken += needed
            self._may_write -= needed
        return fitting

    def _stop_writing(self, why: str) -> None:
        if self._writes:
            self._notes.append(f"the cache {self._path} {why}: what it lacks is computed anew each time")
        self._writes = False
