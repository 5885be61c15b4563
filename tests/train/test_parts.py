"""Training and validation data: by name, by share, or two sets; equal pictures never on both sides unless told so."""

from __future__ import annotations

import logging
import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clipfreeze.errors import DataError
from clipfreeze.train.pairs import PairSet
from clipfreeze.train.parts import read_parts, shared_pictures
from clipfreeze.train.sources import read_data

from hand import coloured
from shard_files import samples, write_shard


def table(folder: Path, parts: list[str | None], header: bool = True) -> str:
    lines = ["image,caption" + ",split" * header]
    for number, part in enumerate(parts):
        (folder / f"{number}.png").write_bytes(coloured("red", (8 + number, 8)))
        lines.append(f"{number}.png,number {number}" + f",{part or ''}" * header)
    (folder / "pairs.csv").write_text("\n".join(lines), encoding="utf-8")
    return str(folder / "pairs.csv")


def fill(folder: Path, *names: str) -> str:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(coloured("red", (8 + number, 8)))
    return str(folder)


def numbers(pairs: PairSet) -> list[int]:
    return [int(pair.captions[0].split()[-1]) for pair in pairs]


def test_a_split_column_divides_and_the_rest_is_in_neither(tmp_path: Path) -> None:
    data = table(tmp_path, ["train", "val", "test", "train", ""])
    assert list(map(numbers, read_parts(data))) == [[0, 3], [1]]
    assert list(map(numbers, read_parts(data, "test"))) == [[0, 3], [2]]
    train, held_out = read_parts(data, "50%")
    assert sorted(numbers(train) + numbers(held_out)) == [0, 3]


def test_without_a_training_part_what_is_not_for_measuring_trains(tmp_path: Path) -> None:
    data = table(tmp_path, ["a", "val", "test", "b"])
    assert list(map(numbers, read_parts(data))) == [[0, 3], [1]]
    assert list(map(numbers, read_parts(data, "b"))) == [[0], [3]]


def test_a_set_that_is_all_one_part_is_divided_by_share(tmp_path: Path) -> None:
    assert [len(part) for part in read_parts(table(tmp_path, ["test"] * 10))] == [9, 1]
    with pytest.raises(DataError, match="no part but test"):
        read_parts(str(tmp_path / "pairs.csv"), "test")


def test_a_part_that_is_not_there_gets_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no part 'tesst'\n  fix: did you mean test\? Or a share"):
        read_parts(table(tmp_path, ["train", "test"]), "tesst")
    with pytest.raises(DataError, match="there is no data file or folder"):
        read_parts(table(tmp_path, [None] * 4, header=False), "tesst")


@pytest.mark.parametrize("name", ["val", "valid", "validation", "dev", "Test"])
def test_subfolders_are_parts_with_one_numbering_of_classes(tmp_path: Path, name: str) -> None:
    data = fill(tmp_path, "train/b/1.png", "train/c/2.png", f"{name}/a/3.png", f"{name}/b/4.png", "notes/.x")
    (tmp_path / "notes" / ".x").unlink()
    (tmp_path / "notes").rmdir()
    train, held_out = read_parts(data)
    assert train.class_names == held_out.class_names == ("a", "b", "c")
    assert [(pair.captions[0], pair.label) for pair in (*train, *held_out)] == [("b", 1), ("c", 2), ("a", 0), ("b", 1)]


def test_validation_goes_before_test(tmp_path: Path) -> None:
    train, held_out = read_parts(fill(tmp_path, "train/a/1.png", "test/a/2.png", "val/a/3.png"))
    assert [len(train), len(held_out), held_out.name] == [1, 1, f"{tmp_path.name} val"]


def test_train_among_classes_is_a_class(tmp_path: Path) -> None:
    assert read_data(fill(tmp_path / "a", "train/1.png", "bus/2.png")).class_names == ("bus", "train")
    assert read_data(fill(tmp_path / "b", "train/old/1.png", "bus/2.png")).class_names == ("bus", "train")
    assert read_data(fill(tmp_path / "c", "train/1.png", "test/2.png")).class_names == ("test", "train")


def test_parts_may_be_shards_or_metadata(tmp_path: Path) -> None:
    for part, first in (("train", 0), ("val", 5)):
        (tmp_path / part).mkdir()
        write_shard(tmp_path / part / "0.tar", samples(first, 5))
    assert list(map(numbers, read_parts(str(tmp_path)))) == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]


def test_parts_of_two_kinds_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "val").mkdir()
    write_shard(tmp_path / "val" / "0.tar", samples(0, 1))
    with pytest.raises(DataError, match="parts with classes and others with captions: val"):
        read_parts(fill(tmp_path, "train/a/1.png"))


def test_other_data_are_taken_whole_and_shared_pictures_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "other").mkdir()
    data, other = table(tmp_path, [None] * 4, header=False), table(tmp_path / "other", [None] * 6, header=False)
    with caplog.at_level(logging.WARNING):
        train, held_out = read_parts(data, other)
    assert (len(train), len(held_out)) == (4, 6)
    assert "4 of 6 pictures of pairs are in the training data too" in caplog.text
    assert shared_pictures(train, held_out) == 4


@pytest.mark.parametrize("val", ["0%", "100%", "250 %"])
def test_a_share_that_leaves_a_side_empty_is_an_error(tmp_path: Path, val: str) -> None:
    with pytest.raises(DataError, match="leaves one side empty"):
        read_parts(table(tmp_path, [None] * 4), val)


@given(st.integers(2, 12), st.integers(1, 99), st.integers(0, 3), st.randoms(use_true_random=False))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
def test_a_share_does_not_depend_on_the_order_of_rows(
    tmp_path: Path, size: int, percent: int, seed: int, dice: random.Random
) -> None:
    data = Path(table(tmp_path, [None] * size, header=False))
    header, *rows = data.read_text(encoding="utf-8").split("\n")
    before = read_parts(str(data), f"{percent}%", seed=seed)
    dice.shuffle(rows)
    data.write_text("\n".join([header, *rows]), encoding="utf-8")
    after = read_parts(str(data), f"{percent}%", seed=seed)
    assert [sorted(numbers(part)) for part in before] == [sorted(numbers(part)) for part in after]
    assert not set(numbers(after[0])) & set(numbers(after[1]))
