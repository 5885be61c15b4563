"""Pictures with their captions, as plain data that a worker process can be sent."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Protocol

from clipfreeze.errors import DataError

_HEAD_BYTES = 65536


class Stored(Protocol):
    """A picture inside a larger file: a small reference, hashable and picklable, whose str() names it in messages."""

    def size(self) -> int:
        """Bytes of the encoded picture."""
        ...

    def read(self, most: int = -1) -> bytes:
        """The encoded picture, or its first bytes."""
        ...

    def identity(self) -> tuple[object, ...]:
        """What tells it from others, in every process and wherever the larger file lies."""
        ...


Picture = Path | bytes | Stored


@dataclass(frozen=True, slots=True)
class Pair:
    """A picture, what is said of it, and its class where there are classes."""

    image: Picture
    captions: tuple[str, ...]
    place: str  # for messages: "captions.csv:7", "openmoji 1F600"
    label: int | None = None
    split: str | None = None  # the part that the data themselves say it belongs to: "train", "val"


@dataclass(frozen=True, slots=True)
class PairSet:
    """One data set, or a part of one. With `class_names`, every pair has a label."""

    name: str
    pairs: tuple[Pair, ...]
    class_names: tuple[str, ...] = ()
    templates: tuple[str, ...] = ("{}",)  # prompts around a caption or class name
    ignored: int = 0  # files or rows that make no pair
    ignored_names: tuple[str, ...] = ()  # the first few of them

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Pair:
        return self.pairs[index]

    def __iter__(self) -> Iterator[Pair]:
        return iter(self.pairs)


class LeftOut:
    """Counts what makes no pair, and names the first few."""

    _MOST = 20

    def __init__(self) -> None:
        self.count = 0
        self._names: list[str] = []

    def add(self, name: str) -> None:
        """Count one file or row."""
        self.count += 1
        if len(self._names) < self._MOST:
            self._names.append(name)

    @property
    def names(self) -> tuple[str, ...]:
        """The first few."""
        return tuple(self._names)

    def shown(self) -> str:
        """Count and names in words."""
        if not self.count:
            return "nothing else is there"
        return f"left out: {self.count} files, the first {', '.join(self._names[:5])}"


def split_pairs(pairs: PairSet, share: float = 0.1, seed: int = 0) -> tuple[PairSet, PairSet]:
    """Train and held-out part. Equal pictures share a side, under whatever name; paths and order play no role."""
    keys = [picture_key(pair, seed) for pair in pairs]
    distinct = sorted(set(keys))
    if len(distinct) < 2:
        raise DataError(
            f"{pairs.name}: one picture cannot be split into training and validation",
            "give other pictures as validation data: --val",
        )
    held = set(distinct[: max(1, round(share * len(distinct)))])
    parts = [
        tuple(pair for pair, key in zip(pairs, keys, strict=True) if (key in held) is side) for side in (False, True)
    ]
    return replace(pairs, name=f"{pairs.name} train", pairs=parts[0]), replace(
        pairs, name=f"{pairs.name} held out", pairs=parts[1]
    )


def picture_key(pair: Pair, seed: int = 0) -> bytes:
    """Equal for equal pictures. Their size and head suffice: two that agree in both only come on the same side."""
    size, head = _size_and_head(pair.image)
    return sha256(f"{seed}/{size}/".encode() + head).digest()


def _size_and_head(image: Picture) -> tuple[int, bytes]:
    if isinstance(image, bytes):
        return len(image), image[:_HEAD_BYTES]
    if isinstance(image, Path):
        with image.open("rb") as file:
            return image.stat().st_size, file.read(_HEAD_BYTES)
    return image.size(), image.read(_HEAD_BYTES)
