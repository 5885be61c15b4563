"""Data sets of the Hugging Face hub, or saved in its formats, read by `datasets`; pictures stay in its files."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from clipfreeze.errors import DataError, did_you_mean
from clipfreeze.train.cells import Cell, ImageColumn
from clipfreeze.train.columns import CAPTION_COLUMNS, TableFormat, position, words_of
from clipfreeze.train.pairs import LeftOut, Pair, PairSet

HUB = "hf:"
_SAVED = ("state.json", "dataset_dict.json")  # what save_to_disk leaves


def is_hub(source: str) -> bool:
    """Whether it is hf:NAME; hf://datasets/... is a file there."""
    return source.startswith(HUB) and not source.startswith(f"{HUB}//")


def read_hub(source: str, layout: TableFormat | None = None, templates: tuple[str, ...] = ("{}",)) -> PairSet:
    """hf:NAME or hf:NAME:SPLIT, NAME being the hub's or a folder. Without SPLIT all parts, each pair saying which.

    The picture column is the one with the type of pictures. A column of classes, where no column is named and none has
    a caption's name, gives labels, with `templates` around the names. Rows without a picture or caption are left out.
    """
    layout = layout or TableFormat()
    name, split = name_and_split(source)
    parts = _parts(name, split)
    features = next(iter(parts.values())).features
    image = _image_column(name, features, layout.image_column)
    caption = _caption_column(name, features, layout.caption_column)
    class_names = tuple(" ".join(c.replace("_", " ").split()) for c in getattr(features[caption], "names", None) or ())
    left_out = LeftOut()
    pairs = tuple(
        pair
        for part, rows in parts.items()
        for pair in _pairs(rows, f"{name}:{part}", image, caption, part, class_names, left_out)
    )
    if not pairs:
        raise DataError(f"{name} has no row with a picture in {image!r} and a caption in {caption!r}", left_out.shown())
    shown = f"{Path(name).name} {split}" if split else Path(name).name
    return PairSet(shown, pairs, class_names, templates if class_names else ("{}",), left_out.count, left_out.names)


def name_and_split(source: str) -> tuple[str, str | None]:
    """The two halves of hf:NAME:SPLIT; a path that is there is all name."""
    drive, rest = os.path.splitdrive(source.removeprefix(HUB))
    if rest and Path(drive + rest).exists():
        return drive + rest, None
    name, _, split = rest.partition(":")
    if not name:
        raise DataError(f"{source!r} names no data set", "write hf:OWNER/NAME or hf:OWNER/NAME:SPLIT")
    return drive + name, split or None


def _parts(name: str, split: str | None) -> dict[str, Any]:
    """`datasets.Dataset` by part; one where a split is named."""
    import datasets

    saved = any(Path(name, file).is_file() for file in _SAVED)
    try:
        found = datasets.load_from_disk(name) if saved else datasets.load_dataset(name, split=split)
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError, ImportError) as error:
        if split is not None and not saved and (names := _split_names(name)) and split not in names:
            raise _no_split(name, split, names) from error
        first = (str(error) or type(error).__name__).splitlines()[0]
        offline = datasets.config.HF_HUB_OFFLINE or isinstance(error, ConnectionError)
        fix = "the hub cannot be reached; give a folder that save_to_disk left: hf:FOLDER" if offline else None
        raise DataError(
            f"the data set {name} cannot be loaded: {first}",
            fix or "write hf:OWNER/NAME as the hub has it, or hf:FOLDER; log in where it is gated",
        ) from error
    if isinstance(found, datasets.Dataset):
        return {split or str(found.split or "train"): found}
    if split is not None:
        if split not in found:
            raise _no_split(name, split, list(found))
        return {split: found[split]}
    return dict(found)


def _split_names(name: str) -> list[str]:
    """Of a data set that can be reached, else none."""
    import datasets

    try:
        return list(datasets.get_dataset_split_names(name))
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError, ImportError):
        return []


def _no_split(name: str, split: str, names: list[str]) -> DataError:
    return DataError(f"{name} has no split {split!r}", did_you_mean(split, names))


def _image_column(name: str, features: Mapping[str, Any], asked: str | None) -> str:
    import datasets

    pictures = [column for column, kind in features.items() if isinstance(kind, datasets.Image)]
    place = position((asked,) if asked else pictures, list(features))
    if place is not None and list(features)[place] in pictures:
        return list(features)[place]
    shown = ", ".join(f"{column} ({_kind(kind)})" for column, kind in features.items())
    near = did_you_mean(asked, pictures) if asked and pictures else "cast a column to datasets.Image() and save again"
    raise DataError(f"{name} has no column of pictures{f' {asked!r}' if asked else ''}: {shown}", near)


def _caption_column(name: str, features: Mapping[str, Any], asked: str | None) -> str:
    """The one asked for; else the first of a caption's name that holds text, or the first of classes."""
    import datasets

    header = list(features)
    if asked:
        place = position((asked,), header)
        if place is None:
            raise DataError(f"{name} has no column {asked!r}", did_you_mean(asked, header))
        return header[place]
    text = [column for column, kind in features.items() if _is_text(kind)]
    place = position(CAPTION_COLUMNS, text)
    if place is not None:
        return text[place]
    for column, kind in features.items():
        if isinstance(kind, datasets.ClassLabel):
            return column
    shown = ", ".join(f"{column} ({_kind(kind)})" for column, kind in features.items())
    raise DataError(f"{name} has no column of captions or classes: {shown}", "--caption-column NAME")


def _is_text(kind: Any) -> bool:
    inner = kind[0] if isinstance(kind, list) else getattr(kind, "feature", kind)
    return getattr(inner, "dtype", None) in ("string", "large_string")


def _kind(kind: Any) -> str:
    return type(kind).__name__ if not hasattr(kind, "dtype") else str(kind.dtype)


def _pairs(
    rows: Any, place: str, image: str, caption: str, part: str, class_names: tuple[str, ...], left_out: LeftOut
) -> Iterator[Pair]:
    pictures = ImageColumn(rows, image, place)
    there = _there(pictures)
    for row, said in enumerate(rows.select_columns([caption]).with_format(None)[:][caption]):
        at = f"{place}:{row + 1}"
        known = class_names and isinstance(said, int) and said >= 0  # -1 where a test part keeps its labels back
        captions = (class_names[said],) if known else () if class_names else words_of(said) or ()
        captions = tuple(dict.fromkeys(filter(None, captions)))
        if captions and there[row]:
            yield Pair(Cell(pictures, row), captions, at, said if known else None, part)
        else:
            left_out.add(f"{at} ({'no picture' if captions else 'no caption'})")


def _there(pictures: ImageColumn) -> list[bool]:
    """Whether each row has a picture, without reading any."""
    rows = pictures.rows.with_format("arrow")
    found: list[bool] = []
    for batch in rows.iter(1000):
        values = batch[pictures.column].combine_chunks()
        found += [
            valid and (within or bool(path))
            for valid, within, path in zip(
                values.is_valid().to_pylist(),
                values.field("bytes").is_valid().to_pylist(),
                values.field("path").to_pylist(),
                strict=True,
            )
        ]
    return found
