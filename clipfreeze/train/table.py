"""Pairs from a table: CSV and its kin with a column of image paths and one of captions."""

from __future__ import annotations

import codecs
import csv
import io
from pathlib import Path

from pydantic import Field

from clipfreeze.errors import DataError, Problem, did_you_mean
from clipfreeze.policy.actions import Spec
from clipfreeze.train.pairs import Pair, PairSet

SEPARATORS = {",": "comma", "\t": "tab", ";": "semicolon", "|": "pipe"}
IMAGE_COLUMNS = ("filepath", "image", "image_path", "path", "file", "filename", "file_name")
CAPTION_COLUMNS = ("caption", "title", "text", "label", "class")
_MOST_PROBLEMS = 10


class TableFormat(Spec):
    """How to read a table; what is null is found from its header."""

    image_column: str | None = Field(None, description=f"default: the first of {', '.join(IMAGE_COLUMNS)}")
    caption_column: str | None = Field(None, description=f"default: the first of {', '.join(CAPTION_COLUMNS)}")
    separator: str | None = Field(None, description="a character or its name: comma, tab, semicolon, pipe")
    encoding: str = Field("utf-8", description="of the file; a UTF-8 byte order mark does no harm")


def read_table(path: Path, layout: TableFormat | None = None) -> PairSet:
    """All rows as text, whatever it looks like; rows of the same image become one pair with several captions.

    Relative image paths start at the table's folder. Every file is looked for at once; none is decoded.
    """
    layout = layout or TableFormat()
    text = _decoded(path, layout.encoding)
    separator = _separator(text, layout)
    rows = _rows(path, text, separator)
    if not rows:
        raise DataError(Problem("the table is empty", "write a header line and one line an image", str(path)))
    header = [name.strip() for name in rows[0][1]]
    image = _column(path, header, separator, layout.image_column, IMAGE_COLUMNS, "image")
    caption = _column(path, header, separator, layout.caption_column, CAPTION_COLUMNS, "caption")

    problems: list[Problem] = []
    captions: dict[Path, list[str]] = {}
    first_line: dict[Path, int] = {}
    for line, row in rows[1:]:
        if len(row) != len(header):
            what = f"{len(row)} fields where the header has {len(header)}"
            fix = f"put quotes around a field that contains a {_separator_name(separator)}"
            problems.append(Problem(what, fix, str(path), line))
            continue
        file, words = path.parent / row[image].strip(), row[caption].strip()
        if not words:
            problems.append(Problem("the caption is empty", "write one or delete the line", str(path), line))
        if not row[image].strip():
            problems.append(Problem("the image path is empty", "write one or delete the line", str(path), line))
        elif file not in first_line and not _is_file(file):
            fix = f"image paths are read from the folder {path.parent}"
            problems.append(Problem(f"there is no file {row[image].strip()}", fix, str(path), line))
        first_line.setdefault(file, line)
        captions.setdefault(file, []).append(words)
    if problems:
        raise DataError(_first_few(problems))
    if not captions:
        raise DataError(Problem("the table has a header and no rows", None, str(path)))
    pairs = (Pair(file, tuple(dict.fromkeys(said)), f"{path}:{first_line[file]}") for file, said in captions.items())
    return PairSet(path.stem, tuple(pairs))


def _decoded(path: Path, encoding: str) -> str:
    raw = path.read_bytes()
    setting = "name the file's encoding: --encoding cp1252 (saved by an office tool) or --encoding utf-16"
    try:
        name = codecs.lookup(encoding).name
    except LookupError as error:
        raise DataError(f"there is no encoding {encoding!r}", setting) from error
    if name == "utf-8" and raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(Problem("the file is UTF-16, not UTF-8", "--encoding utf-16", str(path), 1))
    try:
        text = raw.decode("utf-8-sig" if name == "utf-8" else encoding)
    except LookupError as error:  # rot13 and the like
        raise DataError(f"{encoding!r} is no encoding of text", setting) from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        what = f"byte 0x{error.object[error.start]:02x} is not {encoding}"
        raise DataError(Problem(what, setting, str(path), line)) from error
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise DataError(Problem("a zero byte in the text", setting, str(path), line))
    return text


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
        return sum(_position(header, names) is not None for names in choices), len(header)

    return max(SEPARATORS, key=wanted_columns)


def _rows(path: Path, text: str, separator: str) -> list[tuple[int, list[str]]]:
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
    position = _position(header, (asked,) if asked else usual)
    if position is not None:
        return position
    wanted = repr(asked) if asked else " or ".join(usual)
    shown = f"the header, read with the separator {_separator_name(separator)}, is {', '.join(map(repr, header))}"
    near = did_you_mean(asked, header) + " Else: " if asked else ""
    raise DataError(
        Problem(
            f"no {kind} column {wanted}; {shown}",
            f"{near}--{kind}-column NAME, or --separator where the columns are not cut right",
            str(path),
            1,
        )
    )


def _position(header: list[str], names: tuple[str, ...]) -> int | None:
    """Of the first of `names` that is in the header; the exact spelling goes before another case."""
    folded = [name.casefold() for name in header]
    for name in names:
        if name in header:
            return header.index(name)
        if name.casefold() in folded:
            return folded.index(name.casefold())
    return None


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # too long a name: a caption taken for a path
        return False


def _separator_name(separator: str) -> str:
    return SEPARATORS.get(separator, repr(separator))


def _first_few(problems: list[Problem]) -> list[Problem]:
    rest = len(problems) - _MOST_PROBLEMS
    return problems[:_MOST_PROBLEMS] + (
        [Problem(f"and {rest} more like these", None, problems[0].path, problems[_MOST_PROBLEMS].line)]
        if rest > 0
        else []
    )
