"""JSONL: an object a line. Numbers stay as they are written: 007 cannot be, "007" can."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from clipfreeze.errors import DataError, Problem
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
from clipfreeze.train.encoded import decoded


def read_jsonl(path: Path, layout: TableFormat) -> Rows:
    """The rows of a JSONL file; the first line's keys are the header. A list of captions is several captions."""
    text = decoded(path, layout.encoding)
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise DataError(Problem("the table is empty", "write a line an image", str(path)))
    found = Rows()
    objects: list[tuple[int, dict[str, Any]]] = []
    for number, line in lines:
        try:
            value = json.loads(line, parse_int=str, parse_float=str, parse_constant=str)
        except (json.JSONDecodeError, RecursionError) as error:
            found.problems.append(Problem(f"not valid JSON: {error}", "one object a line", str(path), number))
            continue
        if isinstance(value, dict):
            objects.append((number, value))
        else:
            what = f"a {type(value).__name__} where a row is an object"
            found.problems.append(Problem(what, 'write {"image": "a.jpg", "caption": "..."}', str(path), number))
    if not objects:
        return found
    header = list(objects[0][1])
    image = column_of(path, header, layout.image_column, IMAGE_COLUMNS, "image")
    caption = column_of(path, header, layout.caption_column, CAPTION_COLUMNS, "caption")
    split = position((SPLIT_COLUMN,), header)
    for number, row in objects:
        words, file = words_of(row.get(caption)), row.get(image) or ""
        part = None if split is None else (words_of(row.get(header[split])) or (None,))[0]
        if words is None:
            found.problems.append(not_text(path, number, "caption"))
        elif not isinstance(file, str):
            found.problems.append(not_text(path, number, "image path"))
        else:
            found.rows.append(Row(number, file.strip(), words, part))
    return found
