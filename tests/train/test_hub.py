"""A data set in the hub's formats: columns found by type, pictures left in its files, parts by name."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import datasets
import pytest

from clipfreeze.errors import DataError
from clipfreeze.train.cells import Cell
from clipfreeze.train.columns import TableFormat
from clipfreeze.train.hub import name_and_split
from clipfreeze.train.pictures import open_image
from clipfreeze.train.sources import FOLDER_TEMPLATES, read_data

from hand import coloured


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


def dataset(count: int = 3, image: str = "picture", **columns: tuple[list[Any], Any]) -> datasets.Dataset:
    pictures = [{"bytes": coloured("red", (8 + number, 8)), "path": None} for number in range(count)]
    features = datasets.Features({image: datasets.Image(), **{name: kind for name, (_, kind) in columns.items()}})
    return datasets.Dataset.from_dict(
        {image: pictures, **{name: values for name, (values, _) in columns.items()}}, features
    )


TEXT = datasets.Value("string")


def saved(folder: Path, data: datasets.Dataset | datasets.DatasetDict) -> str:
    data.save_to_disk(str(folder / "saved"))
    return f"hf:{folder / 'saved'}"


def test_the_picture_column_is_found_by_type_and_stays_on_the_disk(tmp_path: Path) -> None:
    source = saved(tmp_path, dataset(image="anything", id=([7, 8, 9], datasets.Value("int64")), text=(["a"] * 3, TEXT)))
    pairs = pickle.loads(pickle.dumps(read_data(source)))
    assert [pair.captions for pair in pairs] == [("a",)] * 3
    assert all(isinstance(pair.image, Cell) for pair in pairs)
    assert [open_image(pair.image, pair.place).size for pair in pairs] == [(8, 8), (9, 8), (10, 8)]
    assert len(pickle.dumps(pairs[0])) < 5000


@pytest.mark.parametrize("word", ["None", "NA", "007"])
def test_words_stay_words(tmp_path: Path, word: str) -> None:
    assert read_data(saved(tmp_path, dataset(1, caption=([word], TEXT)))).pairs[0].captions == (word,)


def test_a_list_is_several_captions(tmp_path: Path) -> None:
    kind = datasets.Features({"x": [TEXT]})["x"]
    source = saved(tmp_path, dataset(2, caption=([["a", "b", "a"], []], kind)))
    pairs = read_data(source)
    assert [pair.captions for pair in pairs] == [("a", "b")]
    assert pairs.ignored == 1
    assert pairs.ignored_names[0].endswith("saved:train:2 (no caption)")


def test_a_column_of_classes_gives_labels(tmp_path: Path) -> None:
    kind = datasets.ClassLabel(names=["great_auk", "dodo"])
    pairs = read_data(saved(tmp_path, dataset(3, label=([1, 0, -1], kind))))
    assert pairs.class_names == ("great auk", "dodo")
    assert pairs.templates == FOLDER_TEMPLATES
    assert [(pair.captions, pair.label) for pair in pairs] == [(("dodo",), 1), (("great auk",), 0)]
    assert pairs.ignored == 1


def test_a_caption_goes_before_a_class_unless_the_class_is_asked_for(tmp_path: Path) -> None:
    kind = datasets.ClassLabel(names=["dodo"])
    source = saved(tmp_path, dataset(1, label=([0], kind), caption=(["a bird"], TEXT)))
    assert read_data(source).pairs[0].captions == ("a bird",)
    assert read_data(source, TableFormat(caption_column="Label")).class_names == ("dodo",)


def test_rows_without_a_picture_are_left_out(tmp_path: Path) -> None:
    features = datasets.Features({"image": datasets.Image(), "text": TEXT})
    data = datasets.Dataset.from_dict({"image": [None, {"bytes": coloured("red")}], "text": ["a", "b"]}, features)
    pairs = read_data(saved(tmp_path, data))
    assert [pair.captions for pair in pairs] == [("b",)]
    assert pairs.ignored_names[0].endswith(":1 (no picture)")


def test_each_pair_says_its_part_and_a_part_can_be_named(tmp_path: Path) -> None:
    parts = {"train": dataset(3, text=(list("abc"), TEXT)), "validation": dataset(1, text=(["d"], TEXT))}
    source = saved(tmp_path, datasets.DatasetDict(parts))
    assert [pair.split for pair in read_data(source)] == ["train"] * 3 + ["validation"]
    assert [pair.captions for pair in read_data(f"{source}:validation")] == [("d",)]
    with pytest.raises(DataError, match=r"no split 'validaton'\n  fix: did you mean validation"):
        read_data(f"{source}:validaton")


def test_a_folder_the_hub_would_read_is_loaded_as_it_loads_it(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    dataset(2, text=(["a", "b"], TEXT)).to_parquet(str(tmp_path / "set" / "train-00000-of-00001.parquet"))
    dataset(1, text=(["c"], TEXT)).to_parquet(str(tmp_path / "set" / "test-00000-of-00001.parquet"))
    pairs = read_data(f"hf:{tmp_path / 'set'}")
    assert [(pair.split, pair.captions) for pair in pairs] == [
        ("train", ("a",)), ("train", ("b",)), ("test", ("c",)),
    ]  # fmt: skip
    assert len(read_data(f"hf:{tmp_path / 'set'}:train[:1]")) == 1
    with pytest.raises(DataError, match=r"no split 'tests'\n  fix: did you mean test"):
        read_data(f"hf:{tmp_path / 'set'}:tests")


def test_columns_that_are_not_there_are_errors_that_show_those_that_are(tmp_path: Path) -> None:
    source = saved(tmp_path, dataset(1, words=(["a"], TEXT), size=([1], datasets.Value("int32"))))
    with pytest.raises(DataError, match=r"no column of captions or classes: .*words \(string\), size"):
        read_data(source)
    with pytest.raises(DataError, match="did you mean words"):
        read_data(source, TableFormat(caption_column="word"))
    with pytest.raises(DataError, match=r"no column of pictures 'pictur'.*\n.*did you mean picture"):
        read_data(source, TableFormat(image_column="pictur", caption_column="words"))
    assert read_data(source, TableFormat(caption_column="size")).pairs[0].captions == ("1",)


def test_a_name_that_cannot_be_loaded_is_one_error() -> None:
    with pytest.raises(DataError, match="the data set nobody/nothing cannot be loaded") as caught:
        read_data("hf:nobody/nothing:train")
    assert "hf:FOLDER" in str(caught.value)
    with pytest.raises(DataError, match="names no data set"):
        read_data("hf:")


@pytest.mark.parametrize(
    ("source", "name", "split"),
    [("hf:a/b", "a/b", None), ("hf:b:test", "b", "test"), ("hf:a/b:train[:10%]", "a/b", "train[:10%]")],
)
def test_name_and_split(source: str, name: str, split: str | None) -> None:
    assert name_and_split(source) == (name, split)
