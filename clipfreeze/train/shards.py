"""Local webdataset shards as a set of pairs: their headers are read once, their pictures when they are asked for."""

from __future__ import annotations

import glob
import re
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from braceexpand import braceexpand

from clipfreeze.errors import DataError, Problem
from clipfreeze.train.columns import TableFormat
from clipfreeze.train.pairs import LeftOut, Pair, PairSet
from clipfreeze.train.shard_samples import CAPTION_KEYS, base_and_key, captions_of, image_key, is_metadata

SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz")
URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):")  # two letters or more: C: is a disk
_MOST_MISSING = 10


@dataclass(frozen=True, slots=True)
class Member:
    """A file in a tar, by its place there."""

    shard: Path
    name: str
    offset: int  # bytes from the start of the shard
    length: int  # bytes

    def __str__(self) -> str:
        return f"{self.shard}/{self.name}"

    def size(self) -> int:
        """Bytes of the file."""
        return self.length

    def read(self, most: int = -1) -> bytes:
        """Its bytes, or the first of them."""
        with self.shard.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.length if most < 0 else min(most, self.length))

    def identity(self) -> tuple[object, ...]:
        """Without the shard's folder."""
        return self.shard.name, self.name, self.offset, self.length


def is_stream(source: str) -> bool:
    """Whether data are named by URL: pipe:COMMAND, file:PATH, https://..., hf://...; not hf:NAME, nor a file."""
    scheme = URL.match(source)
    if scheme is None or (scheme[1].lower() == "hf" and source[3:5] != "//"):
        return False
    with suppress(OSError):  # too long for a name
        return not Path(source).exists()
    return True


def is_pattern(source: str) -> bool:
    """Whether a name may stand for several: braces, or a glob."""
    return bool(set(source) & set("{*?["))


def shard_paths(pattern: str) -> list[Path]:
    """The files that braces ("{00000..00099}.tar") or a glob name, in order. DataError for those that are not there."""
    try:
        names = list(braceexpand(pattern, escape=False))
    except ValueError as error:
        raise DataError(f"{pattern}: {error}", "write {00000..00099}.tar") from error
    paths = [Path(found) for name in names for found in (sorted(glob.glob(name)) if glob.has_magic(name) else [name])]  # noqa: PTH207 - a pattern may start at the root
    if not paths:
        raise DataError(f"no file matches {pattern}", "give the shards: FOLDER/{00000..00099}.tar")
    missing = [path for path in paths if not path.is_file()]
    if missing:
        rest = f" and {len(missing) - _MOST_MISSING} more" if len(missing) > _MOST_MISSING else ""
        shown = ", ".join(map(str, missing[:_MOST_MISSING])) + rest
        raise DataError(f"{len(missing)} of {len(paths)} shards are not there: {shown}", "name those that are")
    return paths


def read_shards(paths: Sequence[Path], name: str, layout: TableFormat | None = None) -> PairSet:
    """The samples of all shards that have a picture and a caption; other files are counted and named.

    Raises DataError for a shard that is cut off or compressed, a caption that cannot be read, and no sample at all.
    """
    left_out = LeftOut()
    encoding = (layout or TableFormat()).encoding
    pairs = tuple(pair for shard in paths for pair in _pairs(shard, encoding, left_out))
    if not pairs:
        what = f"{name}: no sample with a picture and a caption in {len(paths)} shards; {left_out.shown()}"
        raise DataError(what, "put NAME.jpg and NAME.txt side by side in a shard, with no more dots in NAME")
    return PairSet(name, pairs, ignored=left_out.count, ignored_names=left_out.names)


def _pairs(shard: Path, encoding: str, left_out: LeftOut) -> Iterator[Pair]:
    with shard.open("rb") as file:
        for _, group in groupby(_keyed(shard, left_out), lambda entry: entry[0]):
            files: dict[str, Member] = {}
            for _, key, member in group:
                if key in files:
                    left_out.add(f"{member} (a second one)")
                files.setdefault(key, member)
            image = image_key(files)
            texts: dict[str, bytes] = {}
            for key in CAPTION_KEYS:
                if image and key in files:
                    file.seek(files[key].offset)
                    texts[key] = file.read(files[key].length)
            captions = captions_of(texts, str(files[image]), encoding) if image else ()
            used = {image, *CAPTION_KEYS} if captions else {}
            for key, member in files.items():
                if key not in used:
                    alone = " (no caption)" if key == image else ""
                    left_out.add(f"{member}{alone}")
            if image and captions:
                yield Pair(files[image], captions, str(files[image]))


def _keyed(shard: Path, left_out: LeftOut) -> Iterator[tuple[str, str, Member]]:
    """Base, key and file of each member that belongs to a sample."""
    for member in _members(shard):
        if cut := base_and_key(member.name):
            yield *cut, member
        else:
            left_out.add(str(member))


def _members(shard: Path) -> Iterator[Member]:
    """The files of a tar in order; DataError where it ends too early or is none."""
    last = "its start"
    try:
        with tarfile.open(shard, "r:") as tar:
            for entry in tar:
                last = entry.name
                tar.members = []  # type: ignore[attr-defined]  # else all headers stay in memory
                if entry.isreg() and not is_metadata(entry.name):
                    yield Member(shard, entry.name, entry.offset_data, entry.size)
            end = tar.offset
        with shard.open("rb") as file:  # tarfile takes a cut or damaged header for the end
            file.seek(end)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("no end mark")
    except tarfile.CompressionError as error:
        raise _compressed(shard) from error
    except tarfile.ReadError as error:
        with shard.open("rb") as file:
            if file.read(2) == b"\x1f\x8b":
                raise _compressed(shard) from error
        what = f"the shard is cut off or damaged after {last}: {error}"
        raise DataError(Problem(what, "fetch or write it again, or leave it out", str(shard))) from error


def _compressed(shard: Path) -> DataError:
    fix = f"unpack it to a .tar, or stream it: file:{shard}"
    return DataError(Problem("a compressed shard can only be read from its start", fix, str(shard)))
