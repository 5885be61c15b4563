"""Telling one data set from another, without reading its pictures."""

from __future__ import annotations

from hashlib import blake2b
from pathlib import Path, PurePosixPath

from clipfreeze.train.pairs import PairSet
from clipfreeze.train.stream import PairStream, TrainingData


def digest_of(data: TrainingData) -> str:
    """The same for the same data, wherever they lie."""
    return _of_stream(data) if isinstance(data, PairStream) else _of_pairs(data)


def _of_stream(stream: PairStream) -> str:
    """Of its URLs, without the folders of files, and of how it is read."""
    names = [PurePosixPath(url[5:]).name if url.lower().startswith("file:") else url for url in stream.urls]
    read = (names, stream.samples_per_epoch, stream.encoding, stream.templates, stream.buffer)
    return blake2b(repr(read).encode(), digest_size=16).hexdigest()


def _of_pairs(pairs: PairSet) -> str:
    """Of captions, labels, class names and templates, and of each picture's name and size in bytes; not of folders."""
    digest = blake2b(repr((pairs.class_names, pairs.templates)).encode(), digest_size=16)
    for pair in pairs:
        image = pair.image
        if isinstance(image, bytes):
            named: object = blake2b(image, digest_size=16).digest()
        elif isinstance(image, Path):
            named = (image.name, image.stat().st_size if image.is_file() else None)
        else:
            named = image.identity()
        digest.update(repr((named, pair.captions, pair.label)).encode())
    return digest.hexdigest()
