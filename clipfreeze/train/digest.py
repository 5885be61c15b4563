"""Telling one data set from another, without reading its pictures."""

from __future__ import annotations

from hashlib import blake2b
from pathlib import Path

from clipfreeze.train.pairs import PairSet


def digest_of_pairs(pairs: PairSet) -> str:
    """Of captions, labels, class names and templates, and of each picture's name and size in bytes; not of folders."""
    digest = blake2b(repr((pairs.class_names, pairs.templates)).encode(), digest_size=16)
    for pair in pairs:
        image = pair.image
        if isinstance(image, bytes):
            named: object = blake2b(image, digest_size=16).digest()
        elif isinstance(image, Path):
            named = (image.name, image.stat().st_size if image.is_file() else None)
        else:
            named = image
        digest.update(repr((named, pair.captions, pair.label)).encode())
    return digest.hexdigest()
