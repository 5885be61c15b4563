"""Pictures of a data set in rows, each over its caption."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from clipfreeze.errors import DataError
from clipfreeze.stored import whole_file
from clipfreeze.train.pairs import Pair, PairSet
from clipfreeze.train.pictures import open_image

FORMATS = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG"}
_COLUMNS, _ROWS = 6, 5
_PICTURE, _GAP, _LINE, _LINES = 180, 10, 15, 3  # pixels, pixels, pixels, lines of a caption
_LETTERS = 28  # in a line


def write_contact_sheet(pairs: PairSet, path: Path) -> None:
    """Thirty pictures at equal distances in the set; broken ones are passed over. The file is whole or absent."""
    check_format(path)
    shown = list(_spread_out(pairs))
    step, height = _PICTURE + _GAP, _PICTURE + _LINES * _LINE + _GAP
    rows = -(-len(shown) // _COLUMNS) or 1
    sheet = Image.new("RGB", (_COLUMNS * step + _GAP, rows * height + _GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for place, (pair, picture) in enumerate(shown):
        left, top = _GAP + place % _COLUMNS * step, _GAP + place // _COLUMNS * height
        picture.thumbnail((_PICTURE, _PICTURE))
        sheet.paste(picture, (left + (_PICTURE - picture.width) // 2, top + (_PICTURE - picture.height) // 2))
        lines = textwrap.wrap(" / ".join(pair.captions), _LETTERS, max_lines=_LINES, placeholder=" ...")
        draw.multiline_text((left, top + _PICTURE), "\n".join(lines), "black", font, spacing=2)
    try:
        with whole_file(path) as unfinished:
            sheet.save(unfinished, FORMATS[path.suffix.lower()])
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror or error}", "give another --contact-sheet") from error


def check_format(path: Path) -> None:
    """DataError for a file that is no picture by its name."""
    if path.suffix.lower() not in FORMATS:
        raise DataError(f"{path} is no name of a picture", "--contact-sheet FILE.jpg")


def _spread_out(pairs: PairSet) -> Iterator[tuple[Pair, Image.Image]]:
    """Pictures that can be read, each taken where a thirtieth of the set begins."""
    count = min(_COLUMNS * _ROWS, len(pairs))
    for place in range(count):
        start, end = place * len(pairs) // count, (place + 1) * len(pairs) // count
        for pair in pairs.pairs[start:end]:
            try:
                picture = open_image(pair.image, pair.place)
            except DataError:
                continue
            yield pair, picture
            break
