"""How a table is to be read, and what each of its formats gives: rows of image, captions and part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import Field

from clipfreeze.errors import DataError, Problem, did_you_mean
from clipfreeze.policy.actions import Spec
from clipfreeze.train.pairs import Stored

IMAGE_COLUMNS = ("filepath", "image", "image_path", "path", "file", "filename", "file_name")
CAPTION_COLUMNS = ("caption", "captions", "title", "text", "label", "class")
SPLIT_COLUMN = "split"


class TableFormat(Spec):
    """How to read a table; what is null is found from its header."""

    image_column: str | None = Field(None, description=f"default: the first of {', '.join(IMAGE_COLUMNS)}")
    caption_column: str | None = Field(None, description=f"default: the first of {', '.join(CAPTION_COLUMNS)}")
    separator: str | None = Field(None, description="a character or its name: comma, tab, semicolon, pipe")
    encoding: str = Field("utf-8", description="of the file; a UTF-8 byte order mark does no harm")
    image_root: str | None = Field(None, description="folder that relative image paths start at; null: the table's")


@dataclass(frozen=True, slots=True)
class Row:
    """A row as text; what is missing in it is empty."""

    line: int  # of the file; in formats without lines the number of the row, from 1
    image: str | Stored
    captions: tuple[str, ...]
    split: str | None = None  # the part it belongs to, where the table says


@dataclass(slots=True)
class Rows:
    """What a file holds, and what is wrong with rows that could not be cut into columns."""

    rows: list[Row] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def column_of(path: Path, header: Sequence[str], asked: str | None, usual: tuple[str, ...], kind: str) -> str:
    """The name in the header of the column asked for, or of the first usual one. DataError shows the header."""
    place = position((asked,) if asked else usual, header)
    if place is not None:
        return header[place]
    raise no_column(path, header, asked, usual, kind)


def no_column(
    path: Path, header: Sequence[str], asked: str | None, usual: tuple[str, ...], kind: str, cut: str = ""
) -> DataError:
    """The error for a column that is not there; `cut` tells how the header was cut into columns."""
    wanted = repr(asked) if asked else " or ".join(usual)
    near = did_you_mean(asked, header) + " Else: " if asked else ""
    hint = ", or --separator where the columns are not cut right" if cut else ""
    return DataError(
        Problem(
            f"no {kind} column {wanted}; the header{cut} is {', '.join(map(repr, header))}",
            f"{near}--{kind}-column NAME{hint}",
            str(path),
            1,
        )
    )


def position(names: Sequence[str], header: Sequence[str]) -> int | None:
    """Of the first of `names` that is in the header; the exact spelling goes before another case."""
    folded = [name.casefold() for name in header]
    for name in names:
        if name in header:
            return header.index(name)
        if name.casefold() in folded:
            return folded.index(name.casefold())
    return None


def words_of(value: object) -> tuple[str, ...] | None:
    """The captions in a field: text as it is, a list of them, nothing for null; None for what is no text."""
    if value is None:
        return ()
    if isinstance(value, (list, tuple)):
        several = [words_of(entry) for entry in value]
        return None if None in several else tuple(text for texts in several if texts for text in texts)
    if isinstance(value, bool):
        return ("true" if value else "false",)
    return (str(value).strip(),) if isinstance(value, (str, int, float)) else None


def not_text(path: Path, line: int, kind: str) -> Problem:
    """The fault of a field that should be text and is an object, bytes, or a date."""
    fix = "write text, a number, or for captions a list of texts"
    return Problem(f"the {kind} is no text", fix, str(path), line)
