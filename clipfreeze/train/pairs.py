"""Pictures with their captions, as plain data that a worker process can be sent."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

from clipfreeze.errors import DataError

_HEAD_BYTES = 65536


@dataclass(frozen=True, slots=True)
class Pair:
    """A picture, what is said of it, and its class where there are classes."""

    image: Path | bytes
    captions: tuple[str, ...]
    place: str  # for messages: "captions.csv:7", "openmoji 1F600"
    label: int | None = None


@dataclass(frozen=True, slots=True)
class PairSet:
    """One data set, or a part of one. With `class_names`, every pair has a label."""

    name: str
    pairs: tuple[Pair, ...]
    class_names: tuple[str, ...] = ()
    templates: tuple[str, ...] = ("{}",)  # prompts around a caption or class name
    ignored: int = 0  # files of the folder that are no pictures

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Pair:
        return self.pairs[index]

    def __iter__(self) -> Iterator[Pair]:
        return iter(self.pairs)


def split_pairs(pairs: PairSet, share: float = 0.1, seed: int = 0) -> tuple[PairSet, PairSet]:
    """Train and held-out part. Equal pictures share a side, under whatever name; paths and order play no role."""
    keys = [_picture_key(pair, seed) for pair in pairs]
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


def _picture_key(pair: Pair, seed: int) -> bytes:
    """Equal for equal pictures. A file's size and head suffice: two that agree in both only come on the same side."""
    if isinstance(pair.image, bytes):
        size, head = len(pair.image), pair.image[:_HEAD_BYTES]
    else:
        with pair.image.open("rb") as file:
            size, head = pair.image.stat().st_size, file.read(_HEAD_BYTES)
    return sha256(f"{seed}/{size}/".encode() + head).digest()
