"""One pair of files of a store, written by one process and never changed but at its end.

`*.rows` holds the rows' bytes, `*.index` a header and a fixed-size record a row, written after the bytes that it speaks
of. Whoever dies in between leaves a tail that nobody reads.
"""

from __future__ import annotations

import io
import os
import secrets
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

import torch
from torch import Tensor

from clipfreeze.train.store_records import RECORD, pack

ROWS, INDEX = ".rows", ".index"
HEADER = f"clipfreeze rows 1 {sys.byteorder}\n".encode().ljust(RECORD.itemsize)


class Segment:
    """A pair of files that this process appends to."""

    def __init__(self, folder: Path, stem: str, number: int) -> None:
        """Make the pair of this name; the places that `append` gives bear `number`. OSError as the system says."""
        self.process, self.stem, self._number = os.getpid(), stem, number
        self._rows_end, self._index_end = 0, len(HEADER)
        with ExitStack() as files:
            self._rows = files.enter_context((folder / (stem + ROWS)).open("xb", buffering=0))
            self._index = files.enter_context((folder / (stem + INDEX)).open("xb", buffering=0))
            write_all(self._index, HEADER)
            self._files = files.pop_all()

    def append(self, keys: Sequence[bytes], rows: Sequence[Tensor]) -> list[bytes]:
        """Write these and give their places. OSError as the system says: then none of them counts, and the next call
        writes over what it left."""
        places = []
        end = self._rows_end
        try:
            self._rows.seek(end)
            self._index.seek(self._index_end)
            for key, row in zip(keys, rows, strict=True):
                data = bytes_of(row)
                places.append(pack(key, row, data, end, self._number))
                write_all(self._rows, data)
                end += len(data)
            write_all(self._index, b"".join(key + place for key, place in zip(keys, places, strict=True)))
        except OSError:
            with suppress(OSError):  # a full disk gets its room back
                self._index.truncate(self._index_end)
                self._rows.truncate(self._rows_end)
            raise
        self._rows_end, self._index_end = end, self._index_end + len(keys) * RECORD.itemsize
        return places

    def close(self) -> None:
        """Let go of the files."""
        self._files.close()


def new_stem() -> str:
    """A name for a pair of files that no other has, in any process; in the order of names the oldest come first."""
    return f"{time.time_ns():016x}-{os.getpid()}-{secrets.token_hex(4)}"


def bytes_of(row: Tensor) -> memoryview:
    """A CPU tensor's memory as (bytes,) uint8, without a copy where it is contiguous."""
    return row.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def write_all(file: io.FileIO, data: memoryview | bytes) -> None:
    """Write to the last byte: a disk that fills up takes some, and says so only at the next call."""
    left = memoryview(data)
    while len(left):
        left = left[file.write(left) :]


_position = threading.Lock()


def seek_and_read(file: io.FileIO, into: memoryview, offset: int) -> int:
    """Fill `into` from `offset` on; how many bytes there were. For systems without positioned reads."""
    with _position:
        file.seek(offset)
        return file.readinto(into) or 0


if sys.platform == "win32":
    read_at = seek_and_read
else:

    def read_at(file: io.FileIO, into: memoryview, offset: int) -> int:
        """Fill `into` from `offset` on; how many bytes there were. Safe in threads and forked processes."""
        return os.preadv(file.fileno(), [into], offset)
