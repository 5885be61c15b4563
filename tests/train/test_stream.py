"""Streams: the samples of the shards, divided over ranks and workers, as many batches everywhere, and in one order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

from clipfreeze.errors import DataError
from clipfreeze.train.batches import Loaded
from clipfreeze.train.shards import is_stream
from clipfreeze.train.sources import read_data
from clipfreeze.train.stream import PairStream, StreamLoader, read_stream

from hand import coloured
from shard_files import samples, write_shard, write_shards


class Sizes:
    """The picture's width, which is its number plus 8, in place of its pixels."""

    def __call__(self, picture: Any) -> torch.Tensor:
        return torch.full((3, 1, 1), picture.width - 8)


def loader(stream: PairStream, **settings: Any) -> StreamLoader:
    values = {"batch_size": 2, "seed": 0, "num_workers": 0} | settings
    return StreamLoader(stream, Sizes(), None, **values)


def numbers(batches: Iterator[Loaded]) -> list[list[int]]:
    return [loaded.batch["image"].flatten(1)[:, 0].int().tolist() for loaded in batches]


def flat(batches: list[list[int]]) -> list[int]:
    return list(chain.from_iterable(batches))


@pytest.fixture
def urls(tmp_path: Path) -> str:
    write_shards(tmp_path, 4, 5)
    return f"pipe:cat {tmp_path}/{{00000..00003}}.tar"


@pytest.mark.parametrize("scheme", ["pipe:cat ", "file:"])
def test_an_epoch_is_the_samples_of_the_shards(tmp_path: Path, scheme: str) -> None:
    write_shards(tmp_path, 4, 5)
    stream = read_stream(f"{scheme}{tmp_path}/{{00000..00003}}.tar", 20)
    epochs = [flat(numbers(loader(stream).batches(epoch))) for epoch in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(20))
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_order_is_the_seed_s_and_skipping_gives_the_rest(urls: str, num_workers: int) -> None:
    batches = loader(read_stream(urls, 20), num_workers=num_workers)
    whole = numbers(batches.batches(1))
    assert len(whole) == len(batches) == 10
    for skip in (0, 1, 4, 10):
        assert numbers(batches.batches(1, skip)) == whole[skip:]
    assert numbers(loader(read_stream(urls, 20), seed=1, num_workers=num_workers).batches(1)) != whole


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(("world", "steps"), [(1, 15), (2, 7), (3, 5), (7, 2)])
def test_every_rank_yields_as_many_batches_whatever_it_reads(
    urls: str, world: int, steps: int, num_workers: int
) -> None:
    """More samples an epoch than there are, a shard that is missing, more ranks than shards."""
    stream = read_stream(urls.replace("3}", "4}"), 30)
    for rank in range(world):
        batches = loader(stream, rank=rank, world=world, num_workers=num_workers)
        loaded = numbers(batches.batches(0))
        assert len(loaded) == len(batches) == steps
        assert {len(batch) for batch in loaded} == {2}


def test_ranks_and_workers_read_other_shards(urls: str) -> None:
    stream = read_stream(urls, 20)
    seen = [set(flat(numbers(loader(stream, rank=rank, world=2).batches(0)))) for rank in range(2)]
    assert seen[0] | seen[1] == set(range(20))
    assert not seen[0] & seen[1]
    parallel = flat(numbers(loader(stream, num_workers=2, batch_size=5).batches(0)))
    assert sorted(parallel) == list(range(20))


def test_a_broken_picture_s_place_goes_to_another_of_its_batch(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "a.tar", {**samples(0, 5), "9.jpg": b"no picture", "9.txt": b"x"})
    batches = loader(read_stream(f"file:{shard}", 6), batch_size=6)
    (loaded,) = batches.batches(0)
    assert len(loaded.batch["image"]) == 6
    assert set(numbers(iter([loaded]))[0]) == set(range(5))
    assert loaded.broken == (f"file:{shard}/9.jpg: not a picture Pillow can read",)
    all_broken = write_shard(tmp_path / "b.tar", {"9.jpg": b"no picture", "9.txt": b"x"})
    with pytest.raises(DataError, match=r"a whole batch of 2 is broken\n  file:"):
        list(loader(read_stream(f"file:{all_broken}", 6)).batches(0))


def test_what_is_no_sample_is_passed_over_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = {**samples(0, 4), "8.png": coloured("red"), "9.txt": b"x", "img.v2.png": coloured("red")}
    stream = read_stream(f"file:{write_shard(tmp_path / 'a.tar', files)}", 4)
    assert Counter(flat(numbers(loader(stream).batches(0)))) == Counter(range(4))
    assert "samples without a picture or a caption" in caplog.text
    assert "/9" in caplog.text


@pytest.mark.parametrize("num_workers", [0, 1])
def test_shards_without_a_sample_are_an_error(tmp_path: Path, num_workers: int) -> None:
    shard = write_shard(tmp_path / "a.tar", {"1.txt": b"x"})
    with pytest.raises(DataError, match="no sample with a picture and a caption in 1 shards"):
        list(loader(read_stream(f"file:{shard}", 4), num_workers=num_workers).batches(0))
    with pytest.raises(DataError, match=r"in 2 shards; pipe:cat .*none[01].tar: the shard cannot be read"):
        list(loader(read_stream(f"pipe:cat {tmp_path}/none{{0..1}}.tar", 4), num_workers=num_workers).batches(0))


def test_a_cut_shard_is_named_and_its_whole_samples_are_taken(tmp_path: Path) -> None:
    (shard,) = write_shards(tmp_path, 1, 5)
    shard.write_bytes(shard.read_bytes()[:-12000])
    loaded = list(loader(read_stream(f"file:{shard}", 6)).batches(0))
    assert len(loaded) == 3
    names = [name for one in loaded for name in one.broken]
    assert names
    assert all(name.startswith(f"file:{shard}: the shard cannot be read to its end") for name in names)


@pytest.mark.parametrize(
    ("source", "streams"),
    [
        ("pipe:cat a.tar", True),
        ("https://host/{0..9}.tar", True),
        ("hf://datasets/a/b.tar", True),
        ("s3://bucket/a.tar", True),
        ("hf:a/b", False),
        ("C:/data/a.tar", False),
        ("data/{0..9}.tar", False),
    ],
)
def test_what_is_a_stream(source: str, streams: bool) -> None:
    assert is_stream(source) == streams


def test_streams_that_cannot_be_are_errors() -> None:
    with pytest.raises(DataError, match="no way to stream s3") as caught:
        read_stream("s3://bucket/a.tar", 10)
    assert "pipe:aws s3 cp" in str(caught.value)
    with pytest.raises(DataError, match="are a stream"):
        read_data("https://host/a.tar")
    with pytest.raises(DataError, match="--samples-per-epoch"):
        read_stream("pipe:cat a.tar", 0)
    with pytest.raises(DataError, match="larger than the data"):
        loader(read_stream("pipe:cat a.tar", 1))
    with pytest.raises(DataError, match="captions and no classes"):
        loader(read_stream("pipe:cat a.tar", 9), labels=True)
