"""Pictures in a column of a Hugging Face data set, read from its memory-mapped files when they are asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any


class ImageColumn:
    """The encoded pictures of a data set; the same object serves all its cells."""

    def __init__(self, dataset: Any, column: str, name: str) -> None:
        """`dataset` is a `datasets.Dataset`, `column` one of its features that holds pictures."""
        from datasets import Image

        self.rows = dataset.select_columns([column]).with_format(None).cast_column(column, Image(decode=False))
        self.column, self.name = column, name

    def encoded(self, row: int) -> bytes:
        """The picture of a row; empty where there is none."""
        value = self.rows[row][self.column] or {}
        if value.get("bytes") is not None:
            return bytes(value["bytes"])
        return Path(value["path"]).read_bytes() if value.get("path") else b""


@dataclass(frozen=True, slots=True)
class Cell:
    """One of them."""

    pictures: ImageColumn
    row: int

    def __str__(self) -> str:
        return f"{self.pictures.name}:{self.row + 1}"

    def size(self) -> int:
        """Bytes of the encoded picture."""
        return len(self.pictures.encoded(self.row))

    def read(self, most: int = -1) -> bytes:
        """The encoded picture, or its first bytes."""
        encoded = self.pictures.encoded(self.row)
        return encoded if most < 0 else encoded[:most]

    def identity(self) -> tuple[object, ...]:
        """Its place among the rows."""
        return len(self.pictures.rows), self.pictures.column, self.row
