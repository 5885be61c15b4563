"""Parquet: image paths, or the pictures themselves, as bytes or as Hugging Face's struct of bytes and path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from clipfreeze.errors import DataError, Problem
from clipfreeze.train.cells import Cell, ImageColumn
from clipfreeze.train.columns import (
    CAPTION_COLUMNS,
    IMAGE_COLUMNS,
    SPLIT_COLUMN,
    Row,
    Rows,
    TableFormat,
    column_of,
    not_text,
    position,
    words_of,
)
from clipfreeze.train.pairs import Stored


def read_parquet(path: Path, layout: TableFormat) -> Rows:
    """The rows of a Parquet file, numbered from 1. Pictures in it stay on the disk; null is missing."""
    try:
        file = pq.ParquetFile(path)
        return _read(path, file, layout)
    except (pa.ArrowException, OSError) as error:
        what = f"not a whole Parquet file: {str(error).splitlines()[0]}"
        raise DataError(Problem(what, "write or fetch it again", str(path))) from error


def _read(path: Path, file: pq.ParquetFile, layout: TableFormat) -> Rows:
    schema = file.schema_arrow
    header = list(schema.names)
    image = column_of(path, header, layout.image_column, IMAGE_COLUMNS, "image")
    caption = column_of(path, header, layout.caption_column, CAPTION_COLUMNS, "caption")
    split = position((SPLIT_COLUMN,), header)
    parts = [None] * file.metadata.num_rows if split is None else _values(file, header[split])
    images: list[str | Stored]
    if _is_embedded(schema.field(image).type):
        images = _embedded(path, file, image)
    else:
        paths = _values(file, image)
        if any(not isinstance(value, (str, type(None))) for value in paths):
            fix = "a column of paths, of bytes, or of structs of bytes and path"
            raise DataError(Problem(f"column {image!r} holds no pictures: {schema.field(image).type}", fix, str(path)))
        images = [(value or "").strip() for value in paths]
    found = Rows()
    for number, (picture, value, part) in enumerate(zip(images, _values(file, caption), parts, strict=True), 1):
        words = words_of(value)
        if words is None:
            found.problems.append(not_text(path, number, "caption"))
        else:
            found.rows.append(Row(number, picture, words, None if part is None else str(part)))
    return found


def _values(file: pq.ParquetFile, column: str) -> list[Any]:
    """A column as Python's values; bytes without a type are text."""
    values = file.read([column]).column(column)
    if pa.types.is_binary(values.type) or pa.types.is_large_binary(values.type):
        values = values.cast(pa.string())
    found: list[Any] = values.to_pylist()
    return found


def _is_embedded(kind: Any) -> bool:
    if pa.types.is_struct(kind):
        return bool(kind.get_field_index("bytes") >= 0)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _embedded(path: Path, file: pq.ParquetFile, column: str) -> list[str | Stored]:
    """References to the pictures; the path where a struct has nothing else."""
    from datasets import Dataset

    pictures = ImageColumn(Dataset.from_parquet(str(path.resolve()), columns=[column]), column, str(path))
    images: list[str | Stored] = []
    for batch in file.iter_batches(columns=[column], batch_size=256):
        values = batch.column(0)
        if not pa.types.is_struct(values.type):
            within, paths = values.is_valid().to_pylist(), [""] * len(values)
        else:
            within = values.field("bytes").is_valid().to_pylist()
            named = values.type.get_field_index("path") >= 0
            paths = values.field("path").to_pylist() if named else [""] * len(values)
        for bytes_there, name in zip(within, paths, strict=True):
            images.append(Cell(pictures, len(images)) if bytes_there else name or "")
    return images
