"""CSV and its kin: the separator is found, everything is text, quotes and lines are counted right."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from clipfreeze.errors import DataError, Problem
from clipfreeze.train.columns import (
    CAPTION_COLUMNS,
    IMAGE_COLUMNS,
    SPLIT_COLUMN,
    Row,
    Rows,
    TableFormat,
    no_column,
    position,
)
from clipfreeze.train.encoded import decoded

SEPARATORS = {",": "comma", "\t": "tab", ";": "semicolon", "|": "pipe"}


def read_delimited(path: Path, layout: TableFormat) -> Rows:
    """The rows of a CSV or TSV. Raises DataError where header or quotes cannot be read."""
    text = decoded(path, layout.encoding)
    separator = _separator(text, layout)
    lines = _lines(path, text, separator)
    if not lines:
        raise DataError(Problem("the table is empty", "write a header line and one line an image", str(path)))
    header = [name.strip() for name in lines[0][1]]
    image = _column(path, header, separator, layout.image_column, IMAGE_COLUMNS, "image")
    caption = _column(path, header, separator, layout.caption_column, CAPTION_COLUMNS, "caption")
    split = position((SPLIT_COLUMN,), header)

    found = Rows()
    for line, row in lines[1:]:
        if len(row) != len(header):
            what = f"{len(row)} fields where the header has {len(header)}"
            fix = f"put quotes around a field that contains a {_separator_name(separator)}"
            found.problems.append(Problem(what, fix, str(path), line))
            continue
        part = None if split is None else row[split].strip() or None
        found.rows.append(Row(line, row[image].strip(), (row[caption].strip(),), part))
    return found


def _separator(text: str, layout: TableFormat) -> str:
    """The one asked for, or the one under which the header names most of the columns wanted, then most columns."""
    if layout.separator is not None:
        named = {name: separator for separator, name in SEPARATORS.items()} | {"\\t": "\t"}
        separator = named.get(layout.separator.lower(), layout.separator)
        if len(separator) != 1 or separator in '"\r\n':
            names = [*named][:-1]
            raise DataError(f"no separator {layout.separator!r}", f"one character, or {', '.join(names)}")
        return separator

    def wanted_columns(separator: str) -> tuple[int, int]:
        header = [name.strip() for name in next(csv.reader(text.lstrip().splitlines()[:1], delimiter=separator), [])]
        choices = (
            (layout.image_column,) if layout.image_column else IMAGE_COLUMNS,
            (layout.caption_column,) if layout.caption_column else CAPTION_COLUMNS,
        )
        return sum(position(names, header) is not None for names in choices), len(header)

    return max(SEPARATORS, key=wanted_columns)


def _lines(path: Path, text: str, separator: str) -> list[tuple[int, list[str]]]:
    """Line number and fields of each row that is not blank."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True, strict=True)
    rows: list[tuple[int, list[str]]] = []
    line = 1
    try:
        for row in reader:
            if any(field.strip() for field in row):
                rows.append((line, row))
            line = reader.line_num + 1
    except csv.Error as error:
        what = f"a row that starts here cannot be read: {error}"
        fix = 'a quote inside a quoted field is written twice: ""'
        raise DataError(Problem(what, fix, str(path), line)) from error
    return rows


def _column(path: Path, header: list[str], separator: str, asked: str | None, usual: tuple[str, ...], kind: str) -> int:
    place = position((asked,) if asked else usual, header)
    if place is None:
        cut = f", read with the separator {_separator_name(separator)},"
        raise no_column(path, header, asked, usual, kind, cut)
    return place


def _separator_name(separator: str) -> str:
    return SEPARATORS.get(separator, repr(separator))
