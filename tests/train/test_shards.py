"""Shards give the samples webdataset gives, name what they leave out, and hold no pictures in memory."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from webdataset.tariterators import group_by_keys, tar_file_expander

from clipfreeze.errors import DataError
from clipfreeze.train.columns import TableFormat
from clipfreeze.train.pairs import split_pairs
from clipfreeze.train.pictures import open_image
from clipfreeze.train.shards import Member
from clipfreeze.train.sources import read_data

from hand import coloured
from shard_files import samples, write_shard, write_shards

PICTURE = coloured("red")


def test_braces_globs_and_folders_name_the_same_samples(tmp_path: Path) -> None:
    write_shards(tmp_path)
    sources = ("{00000..00003}.tar", "*.tar", "0000[0-3].tar", "")
    found = [[(str(pair.image), pair.captions) for pair in read_data(f"{tmp_path}/{source}")] for source in sources]
    assert len(found[0]) == 20
    assert all(one == found[0] for one in found)


def test_a_picture_is_a_place_in_a_file_until_it_is_asked_for(tmp_path: Path) -> None:
    (shard,) = write_shards(tmp_path, 1)
    pairs = pickle.loads(pickle.dumps(read_data(shard)))
    assert [open_image(pair.image, pair.place).size for pair in pairs] == [(8 + number, 8) for number in range(5)]
    (first, *_) = pairs
    assert isinstance(first.image, Member)
    assert first.image.read(8) == PICTURE[:8]
    assert first.image.size() == len(first.image.read())
    assert [len(part) for part in split_pairs(pairs, 0.2)] == [4, 1]


def test_dots_in_names_lose_no_sample_unseen(tmp_path: Path) -> None:
    shard = write_shard(
        tmp_path / "a.tar",
        {
            "img.v2.jpg": PICTURE,
            "img.v2.txt": b"lost",
            "train.v1/0001.jpg": PICTURE,
            "train.v1/0001.txt": b"one",
            "0002.JPG": PICTURE,
            "0002.Txt": b"two",
            "0003.png": PICTURE,
            "0004.png": PICTURE,
            "0004.txt": b"  ",
            "README": b"",
            "__info__": b"",
        },
    )
    pairs = read_data(shard)
    assert [pair.captions for pair in pairs] == [("one",), ("two",)]
    assert pairs.ignored == 6
    assert f"{shard}/img.v2.jpg" in pairs.ignored_names
    assert f"{shard}/0003.png (no caption)" in pairs.ignored_names


@pytest.mark.parametrize(
    ("files", "captions"),
    [
        ({"txt": b"\xef\xbb\xbfNone\n"}, ("None",)),
        ({"caption": b"one"}, ("one",)),
        ({"json": b'{"text": 7}'}, ("7",)),
        ({"json": b'{"caption": ["one", "two", "one"], "text": "three"}'}, ("one", "two")),
        ({"json": b'{"width": 5}', "txt": b"one"}, ("one",)),
        ({"json": b'{"caption": "two"}', "txt": b""}, ("two",)),
    ],
)
def test_captions_come_from_text_or_json(tmp_path: Path, files: dict[str, bytes], captions: tuple[str, ...]) -> None:
    shard = write_shard(tmp_path / "a.tar", {"1.jpg": PICTURE, **{f"1.{key}": text for key, text in files.items()}})
    (pair,) = read_data(shard)
    assert pair.captions == captions


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"1.jpg": PICTURE, "1.txt": b"it\x92s"}, r"1.jpg: byte 0x92 of the txt is not utf-8"),
        ({"1.jpg": PICTURE, "1.json": b"{"}, r"1.jpg: the json is not valid"),
        ({"1.jpg": PICTURE, "2.txt": b"one"}, r"no sample with a picture and a caption in 1 shards; left out: 2 files"),
        ({}, r"no sample .* nothing else is there"),
    ],
)
def test_what_gives_no_captions_is_an_error_with_its_place(tmp_path: Path, files: dict[str, bytes], words: str) -> None:
    with pytest.raises(DataError, match=words):
        read_data(write_shard(tmp_path / "a.tar", files))


def test_a_named_encoding_is_used(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "a.tar", {"1.jpg": PICTURE, "1.txt": b"it\x92s"})
    assert read_data(shard, TableFormat(encoding="cp1252"))[0].captions == ("it\u2019s",)


@given(st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_shard_cut_anywhere_before_its_end_mark_is_an_error(tmp_path: Path, data: st.DataObject) -> None:
    (shard,) = write_shards(tmp_path, 1)
    whole = shard.read_bytes()
    end = max(whole.rindex(b"number 4"), 0)
    shard.write_bytes(whole[: data.draw(st.integers(0, end))])
    with pytest.raises(DataError, match=r"00000.tar: the shard is cut off or damaged after"):
        read_data(shard)


def test_a_compressed_shard_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="stream it: file:"):
        read_data(write_shard(tmp_path / "a.tar.gz", samples(0, 1), "w:gz"))


def test_missing_shards_are_named(tmp_path: Path) -> None:
    write_shards(tmp_path, 2)
    with pytest.raises(DataError, match=r"1 of 3 shards are not there: .*00002.tar"):
        read_data(f"{tmp_path}/{{00000..00002}}.tar")
    with pytest.raises(DataError, match="no file matches"):
        read_data(f"{tmp_path}/*.tat")


names = st.from_regex(r"[a-c./]{0,3}[a-c]{1,2}\.(jpg|PNG|txt|json|v2\.jpg)", fullmatch=True)


@given(st.lists(names, unique=True, max_size=12))
@example(["a.txt", ".a.jpg", "a.jpg"])
@example(["a.txt", "b.txt", "a.jpg"])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_samples_are_webdataset_s(tmp_path: Path, files: list[str]) -> None:
    def content(name: str) -> bytes:
        return json.dumps({"caption": name}).encode() if name.endswith("json") else name.encode()

    # webdataset refuses two files of one name and key; we leave the second out
    files = list({name.lower(): name for name in files}.values())
    shard = write_shard(tmp_path / "a.tar", {name: content(name) for name in files})
    with shard.open("rb") as file:
        found = list(group_by_keys(tar_file_expander([{"url": "", "stream": file}])))
    theirs = [
        next(value for key, value in sample.items() if key in ("jpg", "png"))
        for sample in found
        if {"jpg", "png"} & set(sample) and {"txt", "json"} & set(sample)
    ]
    try:
        ours = [pair.image.read() for pair in read_data(shard) if isinstance(pair.image, Member)]
    except DataError:
        ours = []
    assert ours == theirs
