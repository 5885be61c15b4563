"""The text of a file in an encoding that is named, never guessed."""

from __future__ import annotations

import codecs
from pathlib import Path

from clipfreeze.errors import DataError, Problem


def decoded(path: Path, encoding: str) -> str:
    """The file as text. DataError with the line of the first byte that does not belong, and the setting."""
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
