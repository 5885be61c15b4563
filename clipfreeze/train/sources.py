"""Where pairs come from: a table, a folder, shards, or the embedded pictures."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from clipfreeze import demo
from clipfreeze.errors import DataError, Problem, nearest
from clipfreeze.train.hub import is_hub, read_hub
from clipfreeze.train.pairs import LeftOut, Pair, PairSet
from clipfreeze.train.pictures import PICTURE_SUFFIXES
from clipfreeze.train.shards import SHARD_SUFFIXES, is_pattern, is_stream, read_shards, shard_paths
from clipfreeze.train.table import TableFormat, read_table

METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
TRAIN_NAMES = ("train", "training")
HELD_OUT_NAMES = ("val", "valid", "validation", "dev", "test", "testing")
_WANTED = "a table, a folder with class folders, shards, or hf:NAME"
FOLDER_TEMPLATES = ("a photo of a {}.", "a photo of the {}.", "a picture of a {}.")


def read_data(source: str | Path, layout: TableFormat | None = None) -> PairSet:
    """A table of images and captions, a folder of class folders or with metadata, shards, or hf:NAME.

    DataError where it is none, or cannot be read.
    """
    try:
        return _read(source, layout)
    except OSError as error:
        raise DataError(f"cannot read {error.filename or source}: {error.strerror or error}", _WANTED) from error


def _read(source: str | Path, layout: TableFormat | None) -> PairSet:
    if is_hub(str(source)):
        return read_hub(str(source), layout, FOLDER_TEMPLATES)
    path = Path(source)
    if is_stream(str(source)):
        what = f"shards by URL are a stream, which can be trained on and not measured, split or looked over: {source}"
        raise DataError(what, "give local shards; for a stream in training also other data to measure on: --val")
    if not str(source).strip():
        raise DataError("the data has an empty path", _WANTED)
    if path.is_dir():
        return _read_dir(path, layout)
    if path.is_file():
        return read_shards([path], path.stem, layout) if _is_shard(path) else read_table(path, layout)
    if is_pattern(str(source)):
        return read_shards(shard_paths(str(source)), str(source), layout)
    here = path.parent if path.parent.is_dir() else Path()
    near = nearest(path.name, [entry.name for entry in here.iterdir()])
    fix = "did you mean " + " or ".join(str(here / name) for name in near) + "?" if near else None
    raise DataError(f"there is no data file or folder {source}", fix or _WANTED)


def _read_dir(path: Path, layout: TableFormat | None) -> PairSet:
    name = path.resolve().name
    for metadata in (path / file for file in METADATA):
        if metadata.is_file():
            return replace(read_metadata(metadata, layout), name=name)
    entries = sorted(path.iterdir())
    if parts := _part_folders(entries):
        return _joined(name, {part.name: _read_dir(part, layout) for part in parts})
    shards = [entry for entry in entries if _is_shard(entry)]
    if shards and not any(entry.is_dir() for entry in entries):
        return read_shards(shards, name, layout)
    return read_folder(path)


def _part_folders(entries: Sequence[Path]) -> list[Path]:
    """Subfolders that are parts of the data and not classes: train and others for measuring, each with data in it."""
    folders = [entry for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
    names = {folder.name.casefold() for folder in folders}
    if not names & set(TRAIN_NAMES) or not names <= {*TRAIN_NAMES, *HELD_OUT_NAMES}:
        return []
    parts = [folder for folder in folders if _holds_data(folder)]
    return parts if {part.name.casefold() for part in parts} & set(TRAIN_NAMES) else []


def _holds_data(folder: Path) -> bool:
    return any(entry.is_dir() or entry.name in METADATA or _is_shard(entry) for entry in folder.iterdir())


def _joined(name: str, parts: Mapping[str, PairSet]) -> PairSet:
    """One set whose pairs say their part. Classes of the same name are the same class."""
    classes = tuple(sorted({name for part in parts.values() for name in part.class_names}))
    if classes and not all(part.class_names for part in parts.values()):
        shown = ", ".join(part for part, pairs in parts.items() if not pairs.class_names)
        raise DataError(f"{name} has parts with classes and others with captions: {shown}", "give them one by one")
    number = {name: label for label, name in enumerate(classes)}
    pairs = tuple(
        replace(pair, split=part, label=None if pair.label is None else number[members.class_names[pair.label]])
        for part, members in parts.items()
        for pair in members
    )
    several = list(parts.values())
    ignored_names = tuple(name for part in several for name in part.ignored_names)
    return PairSet(name, pairs, classes, several[0].templates, sum(part.ignored for part in several), ignored_names)


def _is_shard(path: Path) -> bool:
    return path.name.lower().endswith(SHARD_SUFFIXES)


def read_metadata(path: Path, layout: TableFormat | None = None) -> PairSet:
    """The table that Hugging Face's image folders have beside the pictures: `file_name` and a caption."""
    layout = layout or TableFormat()
    return read_table(path, layout.model_copy(update={"image_column": layout.image_column or "file_name"}))


def read_folder(path: Path) -> PairSet:
    """Subfolders are the classes, their names with spaces for underscores the class names, pictures at any depth."""
    pairs: list[Pair] = []
    class_names: list[str] = []
    left_out = LeftOut()
    files = sorted(Path(folder, name) for folder, _, names in os.walk(path, followlinks=True) for name in names)
    for file in files:
        parts = file.relative_to(path).parts
        if len(parts) < 2 or any(part.startswith(".") for part in parts) or file.suffix.lower() not in PICTURE_SUFFIXES:
            left_out.add(str(file))
            continue
        name = " ".join(parts[0].replace("_", " ").split())
        if name not in class_names:
            class_names.append(name)
        pairs.append(Pair(file, (name,), str(file), class_names.index(name)))
    if not pairs:
        what = f"no pictures in class folders, {len(files)} other files" if files else "the folder is empty"
        fix = "one subfolder a class with pictures in it, or a CSV of image paths and captions"
        raise DataError(Problem(what, fix, str(path)))
    return PairSet(
        path.resolve().name, tuple(pairs), tuple(class_names), FOLDER_TEMPLATES, left_out.count, left_out.names
    )


def demo_pairs(style: str, split: str) -> PairSet:
    """The embedded pictures of a style; each emoji's name is a class."""
    pictures = demo.load_pictures(style, split)
    names = tuple(dict.fromkeys(picture.name for picture in pictures))
    labels = {name: label for label, name in enumerate(names)}
    pairs = (Pair(p.image, p.captions, f"{style} {p.code}", labels[p.name]) for p in pictures)
    return PairSet(f"{style} {split}", tuple(pairs), names, demo.TEMPLATES)
