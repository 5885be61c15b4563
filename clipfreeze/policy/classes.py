"""Class names from a file."""

from __future__ import annotations

from pathlib import Path

from clipfreeze.policy.actions import distinct

CLASS_WORDS = ("imagenet", "data")
"""In place of a file: ImageNet's thousand classes as open_clip has them; the captions a run trains on."""


def read_classes(path: Path) -> tuple[str, ...]:
    """The names in a file of one a line, blank lines passed over. Raises ValueError in one line."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text") from error
    try:
        names: tuple[str, ...] = distinct([line.strip() for line in lines if line.strip()])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return names
