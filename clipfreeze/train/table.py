"""Pairs from a table: a column of image paths, or of pictures, and one of captions, in whatever format."""

from __future__ import annotations

from pathlib import Path

from clipfreeze.errors import DataError, Problem
from clipfreeze.train.columns import Row, Rows
from clipfreeze.train.columns import TableFormat as TableFormat
from clipfreeze.train.delimited import read_delimited
from clipfreeze.train.jsonl import read_jsonl
from clipfreeze.train.pairs import Pair, PairSet, Stored


def _read_parquet(path: Path, layout: TableFormat) -> Rows:
    from clipfreeze.train.parquet import read_parquet  # pyarrow takes 40 MB

    return read_parquet(path, layout)


_READERS = {".jsonl": read_jsonl, ".ndjson": read_jsonl, ".json": read_jsonl, ".parquet": _read_parquet}
_MOST_PROBLEMS = 10


def read_table(path: Path, layout: TableFormat | None = None) -> PairSet:
    """All rows as text, whatever it looks like; rows of the same image become one pair with several captions.

    JSONL and Parquet go by their suffix, everything else is CSV or its kin. Relative image paths start at
    `image_root`, or at the table's folder. Every file is looked for at once; none is decoded.
    """
    layout = layout or TableFormat()
    found: Rows = _READERS.get(path.suffix.lower(), read_delimited)(path, layout)
    root = path.parent if layout.image_root is None else Path(layout.image_root)
    problems = list(found.problems)
    captions: dict[tuple[Path | Stored, str | None], list[str]] = {}
    first_line: dict[tuple[Path | Stored, str | None], int] = {}
    looked_for: set[Path | Stored] = set()
    for row in found.rows:
        image = root / row.image if isinstance(row.image, str) else row.image
        problems += _faults(path, root, row, image, image in looked_for)
        looked_for.add(image)
        first_line.setdefault((image, row.split), row.line)
        captions.setdefault((image, row.split), []).extend(row.captions)
    if problems:
        raise DataError(_first_few(problems))
    if not captions:
        raise DataError(Problem("the table has a header and no rows", None, str(path)))
    pairs = (
        Pair(image, tuple(dict.fromkeys(said)), f"{path}:{first_line[image, split]}", split=split)
        for (image, split), said in captions.items()
    )
    return PairSet(path.stem, tuple(pairs))


def _faults(path: Path, root: Path, row: Row, image: Path | Stored, looked_for: bool) -> list[Problem]:
    """What is missing in a row, or on the disk."""
    faults = []
    if not row.captions or not all(row.captions):
        faults.append(Problem("the caption is empty", "write one or delete the line", str(path), row.line))
    if not row.image:
        faults.append(Problem("the image path is empty", "write one or delete the line", str(path), row.line))
    elif isinstance(image, Path) and not looked_for and not _is_file(image):
        fix = f"image paths are read from the folder {root}; another one: --image-root"
        faults.append(Problem(f"there is no file {row.image}", fix, str(path), row.line))
    return faults


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # too long a name: a caption taken for a path
        return False


def _first_few(problems: list[Problem]) -> list[Problem]:
    rest = len(problems) - _MOST_PROBLEMS
    return problems[:_MOST_PROBLEMS] + (
        [Problem(f"and {rest} more like these", None, problems[0].path, problems[_MOST_PROBLEMS].line)]
        if rest > 0
        else []
    )
