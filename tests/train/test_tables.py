"""JSONL, Parquet and metadata files say the same as a CSV of the same rows, faults included."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clipfreeze.errors import DataError
from clipfreeze.train.columns import TableFormat
from clipfreeze.train.pairs import Stored, split_pairs
from clipfreeze.train.pictures import open_image
from clipfreeze.train.sources import read_data
from clipfreeze.train.table import read_table

from hand import coloured


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def write(folder: Path, form: str, rows: list[dict[str, Any]]) -> Path:
    for name in ("a.png", "b.png"):
        (folder / name).write_bytes(coloured("red"))
    path = folder / f"pairs.{form}"
    if form == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif form == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        fields = [list(rows[0]), *(list(row.values()) for row in rows)]
        path.write_text("".join(",".join(map(str, row)) + "\n" for row in fields), encoding="utf-8")
    return path


FORMS = ("csv", "jsonl", "parquet")


@pytest.mark.parametrize("form", FORMS)
def test_all_formats_give_the_same_pairs(tmp_path: Path, form: str) -> None:
    rows = [("a.png", "None"), ("b.png", "007"), ("a.png", "NA"), ("a.png", "None")]
    path = write(tmp_path, form, [{"image": image, "caption": caption} for image, caption in rows])
    pairs = read_data(path)
    assert [(pair.image, pair.captions) for pair in pairs] == [
        (tmp_path / "a.png", ("None", "NA")),
        (tmp_path / "b.png", ("007",)),
    ]
    assert pairs.name == "pairs"


@pytest.mark.parametrize("form", FORMS)
def test_all_formats_name_the_row_of_a_fault(tmp_path: Path, form: str) -> None:
    rows = [
        {"image": image, "caption": caption}
        for image, caption in (("a.png", "one"), ("no.png", "two"), ("a.png", ""), ("", "three"))
    ]
    with pytest.raises(DataError) as caught:
        read_table(write(tmp_path, form, rows))
    header = form == "csv"
    assert [(p.line, p.what) for p in caught.value.problems] == [
        (2 + header, "there is no file no.png"),
        (3 + header, "the caption is empty"),
        (4 + header, "the image path is empty"),
    ]
    assert "--image-root" in str(caught.value)


@pytest.mark.parametrize("form", FORMS)
def test_all_formats_give_the_nearest_column(tmp_path: Path, form: str) -> None:
    path = write(tmp_path, form, [{"picture": "a.png", "words": "one"}])
    with pytest.raises(DataError, match="did you mean picture"):
        read_table(path, TableFormat(image_column="pictur", caption_column="words"))
    with pytest.raises(DataError, match="no caption column caption or"):
        read_table(path, TableFormat(image_column="picture"))


@pytest.mark.parametrize("form", FORMS)
def test_paths_start_at_the_image_root(tmp_path: Path, form: str) -> None:
    (tmp_path / "tables").mkdir()
    path = write(tmp_path, form, [{"image": "a.png", "caption": "one"}]).rename(tmp_path / "tables" / f"p.{form}")
    with pytest.raises(DataError, match="there is no file"):
        read_table(path)
    assert read_table(path, TableFormat(image_root=str(tmp_path))).pairs[0].image == tmp_path / "a.png"


@pytest.mark.parametrize("form", FORMS)
def test_a_split_column_says_where_a_row_belongs(tmp_path: Path, form: str) -> None:
    rows = [{"image": f"{name}.png", "caption": "one", "split": part} for name, part in (("a", "train"), ("b", "test"))]
    assert [pair.split for pair in read_table(write(tmp_path, form, rows))] == ["train", "test"]


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_lists_are_several_captions_and_null_is_none(tmp_path: Path, form: str) -> None:
    path = write(tmp_path, form, [{"image": "a.png", "caption": ["one", "two"]}])
    assert read_table(path).pairs[0].captions == ("one", "two")
    for empty in (None, [], ["one", ""]):
        rows = [{"image": "a.png", "caption": ["one"]}, {"image": "b.png", "caption": empty}]
        with pytest.raises(DataError, match=r":2: the caption is empty"):
            read_table(write(tmp_path, form, rows))


@pytest.mark.parametrize("number", ["7", "1e5", "7.0", "-0", "true", "NaN"])
def test_a_number_in_jsonl_is_a_caption_as_written(tmp_path: Path, number: str) -> None:
    path = write(tmp_path, "jsonl", [])
    path.write_text('{"image": "a.png", "caption": ' + number + "}\n", encoding="utf-8")
    assert read_table(path).pairs[0].captions == (number,)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{'image': 1}", "not valid JSON"),
        ("[1]", "a list where a row is an object"),
        ('{"image": "a.png", "caption": {"en": "one"}}', "the caption is no text"),
        ('{"image": ["a.png"], "caption": "one"}', "the image path is no text"),
    ],
)
def test_a_line_that_is_no_row_is_named(tmp_path: Path, line: str, words: str) -> None:
    path = write(tmp_path, "jsonl", [{"image": "a.png", "caption": "one"}])
    path.write_text(path.read_text(encoding="utf-8") + "\n" + line, encoding="utf-8")
    with pytest.raises(DataError, match=f"pairs.jsonl:3: {words}"):
        read_table(path)


def test_parquet_numbers_and_categories_are_text(tmp_path: Path) -> None:
    path = write(tmp_path, "parquet", [{"image": "a.png", "caption": 7}])
    assert read_table(path).pairs[0].captions == ("7",)
    column = pa.array(["one", "two"]).dictionary_encode()
    pq.write_table(pa.table({"image": ["a.png", "b.png"], "caption": column}), path)
    assert [pair.captions for pair in read_table(path)] == [("one",), ("two",)]


def embedded(folder: Path, structs: bool) -> Path:
    pictures = [coloured("red"), coloured("blue", (40, 20))]
    values = [{"bytes": picture, "path": f"{i}.png"} for i, picture in enumerate(pictures)] if structs else pictures
    return write(folder, "parquet", [{"image": v, "caption": c} for v, c in zip(values, ("one", "two"), strict=True)])


@pytest.mark.parametrize("structs", [False, True])
def test_pictures_in_parquet_stay_there_until_they_are_asked_for(tmp_path: Path, structs: bool) -> None:
    pairs = pickle.loads(pickle.dumps(read_table(embedded(tmp_path, structs))))
    assert not any(isinstance(pair.image, (bytes, Path)) for pair in pairs)
    assert [pair.captions for pair in pairs] == [("one",), ("two",)]
    assert open_image(pairs[1].image, pairs[1].place).size == (40, 20)
    assert {len(part) for part in split_pairs(pairs)} == {1}
    assert str(pairs[1].image).endswith("pairs.parquet:2")


def test_a_struct_without_bytes_is_a_path(tmp_path: Path) -> None:
    rows = [
        {"image": {"bytes": coloured("blue"), "path": None}, "caption": "one"},
        {"image": {"bytes": None, "path": "b.png"}, "caption": "two"},
    ]
    first, second = read_table(write(tmp_path, "parquet", rows))
    assert not isinstance(first.image, Path)
    assert second.image == tmp_path / "b.png"
    rows.append({"image": None, "caption": "three"})
    with pytest.raises(DataError, match=":3: the image path is empty"):
        read_table(write(tmp_path, "parquet", rows))


def test_a_broken_picture_in_parquet_is_named_by_its_row(tmp_path: Path) -> None:
    path = write(tmp_path, "parquet", [{"image": b"no picture", "caption": "one"}])
    (pair,) = read_table(path)
    with pytest.raises(DataError, match=r"pairs.parquet:1: not a picture"):
        open_image(pair.image, pair.place)


def test_a_cut_parquet_file_is_an_error(tmp_path: Path) -> None:
    path = embedded(tmp_path, structs=True)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"pairs.parquet: not a whole Parquet file"):
        read_table(path)


def test_a_picture_column_of_numbers_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="column 'image' holds no pictures: int64"):
        read_table(write(tmp_path, "parquet", [{"image": 7, "caption": "one"}]))


@pytest.mark.parametrize("form", FORMS)
def test_a_folder_with_metadata_is_that_table(tmp_path: Path, form: str) -> None:
    rows = [{"image": "no.png", "file_name": "a.png", "text": "one"}]
    write(tmp_path, form, rows).rename(tmp_path / f"metadata.{form}")
    pairs = read_data(tmp_path)
    assert [(pair.image, pair.captions) for pair in pairs] == [(tmp_path / "a.png", ("one",))]
    assert pairs.name == tmp_path.name


def test_a_stored_picture_is_what_the_protocol_says(tmp_path: Path) -> None:
    image: Any = read_table(embedded(tmp_path, structs=False)).pairs[0].image
    stored: Stored = image
    assert stored.read() == coloured("red")
    assert stored.read(4) == coloured("red")[:4]
    assert stored.size() == len(coloured("red"))
    assert hash(stored) == hash(stored)
