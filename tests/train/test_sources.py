"""Folders, the embedded pictures, and the split."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipfreeze import demo
from clipfreeze.errors import DataError
from clipfreeze.train.pairs import Pair, PairSet, split_pairs
from clipfreeze.train.sources import demo_pairs, read_data

from hand import coloured


def fill(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(coloured("red"))
    return folder


def test_subfolders_are_classes(tmp_path: Path) -> None:
    data = read_data(fill(tmp_path, "great_auk/1.png", "great_auk/old/2.JPG", "dodo/3.webp"))
    assert data.class_names == ("dodo", "great auk")
    assert [(pair.captions, pair.label) for pair in data] == [(("dodo",), 0), (("great auk",), 1), (("great auk",), 1)]


def test_what_is_no_picture_is_ignored_and_counted(tmp_path: Path) -> None:
    data = read_data(fill(tmp_path, "a/1.png", "a/notes.txt", "a/.hidden.png", ".cache/2.png", "loose.png"))
    assert (len(data), data.ignored) == (1, 4)


def test_a_folder_without_classes_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the folder is empty"):
        read_data(tmp_path)
    with pytest.raises(DataError, match="one subfolder a class"):
        read_data(fill(tmp_path, "1.png"))


def test_a_missing_source_gets_the_nearest_name(tmp_path: Path) -> None:
    (tmp_path / "captions.csv").touch()
    with pytest.raises(DataError, match=r"did you mean .*captions.csv\?"):
        read_data(tmp_path / "caption.csv")


@pytest.mark.parametrize("split", demo.SPLITS)
def test_demo_pairs_have_a_class_each(split: str) -> None:
    data = demo_pairs(demo.TARGET_STYLE, split)
    assert all(pair.label is not None and data.class_names[pair.label] == pair.captions[0] for pair in data)


@given(
    st.lists(st.tuples(st.integers(0, 30), st.text(max_size=3)), min_size=2, max_size=40).filter(
        lambda rows: len({image for image, _ in rows}) > 1
    ),
    st.floats(0.01, 0.6),
    st.integers(0, 5),
)
def test_a_split_loses_nothing_and_never_parts_equal_pictures(
    rows: list[tuple[int, str]], share: float, seed: int
) -> None:
    pairs = tuple(Pair(b"%d" % image, (text,), "test") for image, text in rows)
    train, held_out = split_pairs(PairSet("test", pairs), share, seed)
    assert sorted(map(repr, (*train, *held_out))) == sorted(map(repr, pairs))
    assert not {pair.image for pair in train} & {pair.image for pair in held_out}
    assert train.pairs
    assert held_out.pairs


def test_a_split_depends_on_neither_order_nor_file_names(tmp_path: Path) -> None:
    pictures = [coloured("red", (8 + size, 8)) for size in range(20)]
    sides = []
    for order, folder in ((pictures, tmp_path / "a"), (pictures[::-1], tmp_path / "b")):
        folder.mkdir()
        for number, picture in enumerate(order):
            (folder / f"{number}.png").write_bytes(picture)
        pairs = tuple(Pair(file, ("x",), "test") for file in folder.iterdir())
        held_out = split_pairs(PairSet("test", pairs), 0.3)[1]
        sides.append({pair.image.read_bytes() for pair in held_out if isinstance(pair.image, Path)})
    assert sides[0] == sides[1]
    assert len(sides[0]) == 6


def test_one_picture_cannot_be_split() -> None:
    with pytest.raises(DataError, match="--val"):
        split_pairs(PairSet("test", (Pair(b"1", ("x",), "test"), Pair(b"1", ("y",), "test"))))
