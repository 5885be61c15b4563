"""Tar files for the tests of shards and streams."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping
from pathlib import Path

from hand import coloured


def write_shard(path: Path, files: Mapping[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


def samples(first: int, count: int) -> dict[str, bytes]:
    """Pictures that differ in size, each with its number as caption."""
    files = {}
    for number in range(first, first + count):
        files[f"{number:04}.png"] = coloured("red", (8 + number, 8))
        files[f"{number:04}.txt"] = f"number {number}".encode()
    return files


def write_shards(folder: Path, shards: int = 4, each: int = 5) -> list[Path]:
    return [write_shard(folder / f"{shard:05}.tar", samples(shard * each, each)) for shard in range(shards)]
