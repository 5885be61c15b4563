"""Where each row of a store lies, in 50 bytes a row: sorted arrays, and a dict of what came since.

A million rows as a dict of bytes take 150 MB and 0.9 s to build, as sorted arrays 50 MB and 0.6 s; looking 64 of them
up takes 40 us.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

KEY_BYTES, MOST_DIMS, MOST_UNSORTED = 16, 4, 4096
DTYPES = (
    *(torch.float32, torch.float16, torch.bfloat16, torch.float64),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)  # a dtype's number here is what files hold: append only

_PLACE = np.dtype(
    [
        ("offset", "<u8"),
        ("shape", "<u4", (MOST_DIMS,)),
        ("dtype", "u1"),
        ("dims", "u1"),
        ("crc", "<u4"),
        ("file", "<u4"),
    ]
)
RECORD = np.dtype([("key", f"S{KEY_BYTES}"), ("place", _PLACE)])
_PACKED, _HEAD_BYTES = struct.Struct("<Q4IBBII"), 26  # the fields of _PLACE, and those before crc
_ITEM_BYTES = np.array([dtype.itemsize for dtype in DTYPES])


def pack(key: bytes, row: Tensor, data: memoryview, offset: int, file: int) -> bytes:
    """The place of a row whose bytes are `data`. The checksum is of key, offset, shape and data together, so that a
    flipped bit in any of them shows. ValueError for a dtype or a number of dimensions that a place cannot hold."""
    if row.dtype not in DTYPES or row.ndim > MOST_DIMS or len(key) != KEY_BYTES:
        raise ValueError(f"cannot keep {row.dtype} of shape {tuple(row.shape)} under a key of {len(key)} bytes")
    shape = (*row.shape, *[1] * (MOST_DIMS - row.ndim))
    head = _PACKED.pack(offset, *shape, DTYPES.index(row.dtype), row.ndim, 0, 0)[:_HEAD_BYTES]
    return head + struct.pack("<II", checksum(key, head, data), file)


def unpack(place: bytes) -> tuple[int, list[int], torch.dtype, int, int]:
    """Offset in bytes, shape, dtype, checksum, and the number of the file."""
    offset, *shape, dtype, dims, crc, file = _PACKED.unpack(place)
    return offset, shape[:dims], DTYPES[dtype], crc, file


def checksum(key: bytes, place: bytes, data: memoryview) -> int:
    """What `unpack` gives if these are the bytes that were written under this key at this place."""
    return zlib.crc32(data, zlib.crc32(key + place[:_HEAD_BYTES]))


def read_records(tail: bytes, file: int, data_bytes: int) -> NDArray[np.void]:
    """The whole records of `tail` that lie within `data_bytes`, as a RECORD array; a cut last one is left out."""
    records = np.frombuffer(tail, RECORD, len(tail) // RECORD.itemsize).copy()
    place = records["place"]
    place["file"] = file
    known = (place["dtype"] < len(DTYPES)) & (place["dims"] <= MOST_DIMS)
    items = place["shape"].astype(float).prod(axis=1)  # floats: a flipped bit must not overflow to something small
    ends = place["offset"].astype(float) + items * _ITEM_BYTES[np.where(known, place["dtype"], 0)]
    kept: NDArray[np.void] = records[known & (ends <= data_bytes)]
    return kept


class Records:
    """The places of all rows known, by key."""

    def __init__(self) -> None:
        self._keys: NDArray[np.bytes_] = np.empty(0, f"S{KEY_BYTES}")
        self._places: NDArray[np.void] = np.empty(0, f"V{_PLACE.itemsize}")
        self._since: dict[bytes, bytes | None] = {}  # None: forgotten

    def find(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """The place of each key, or None."""
        if not keys:
            return []
        sought = np.frombuffer(b"".join(keys), self._keys.dtype)
        found: list[bytes | None] = [None] * len(keys)
        if len(self._keys):
            at = np.minimum(np.searchsorted(self._keys, sought), len(self._keys) - 1)
            here = self._keys[at] == sought
            found = [place if is_here else None for place, is_here in zip(self._places[at].tolist(), here, strict=True)]
        if self._since:
            found = [self._since.get(key, place) for key, place in zip(keys, found, strict=True)]
        return found

    def put(self, key: bytes, place: bytes | None) -> None:
        """Note a new place, or None to forget the key."""
        self._since[key] = place
        if len(self._since) > MOST_UNSORTED + len(self._keys) // 4:  # in proportion: all sorting together is n log n
            self._merge([])

    def add(self, records: Sequence[NDArray[np.void]]) -> None:
        """Take over RECORD arrays; the last of equal keys counts."""
        if any(map(len, records)):
            self._merge(records)

    def _merge(self, records: Sequence[NDArray[np.void]]) -> None:
        forgotten = [key for key, place in self._since.items() if place is None]
        if forgotten:
            gone = np.isin(self._keys, np.array(forgotten, self._keys.dtype))
            self._keys, self._places = self._keys[~gone], self._places[~gone]
        own = b"".join(key + place for key, place in self._since.items() if place is not None)
        new = [np.frombuffer(own, RECORD), *records]
        keys = np.concatenate([self._keys, *(part["key"] for part in new)])
        places = np.concatenate([self._places, *(_opaque(part["place"]) for part in new)])
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        last = np.append(keys[1:] != keys[:-1], True)
        self._keys, self._places, self._since = keys[last], places[order[last]], {}


def _opaque(places: NDArray[np.void]) -> NDArray[np.void]:
    return np.ascontiguousarray(places).view(f"V{_PLACE.itemsize}")
