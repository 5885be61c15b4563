"""Ranks and workers see one order; broken pictures change neither sizes nor counts, and too many end the run."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clipfreeze.errors import DataError, RunError
from clipfreeze.train.batches import EvaluationLoader, Loaded, Steps, Tokenizer, TrainingLoader
from clipfreeze.train.broken import Broken
from clipfreeze.train.pairs import Pair, PairSet
from clipfreeze.train.pictures import open_image
from clipfreeze.train.sources import read_data
from clipfreeze.train.together import Shard

import tiny
from hand import Words, colour_pairs, coloured, transform
from shard_files import write_shards


def loader(pairs: PairSet, **settings: Any) -> TrainingLoader:
    values = {"batch_size": 3, "seed": 0, "num_workers": 0} | settings
    return TrainingLoader(pairs, transform(train=True), Tokenizer(Words(), tiny.clip_vit()), **values)


def several_captions(copies: int = 2) -> PairSet:
    pairs = (replace(pair, captions=("one", "two", "three", "four")) for pair in colour_pairs(copies))
    return PairSet("test", tuple(pairs), templates=("{}", "a {}"))


def with_broken(folder: Path, count: int = 1, good: PairSet | None = None) -> PairSet:
    bad = []
    for number in range(count):
        (folder / f"half{number}.png").write_bytes(coloured("red")[:50])
        bad.append(Pair(folder / f"half{number}.png", ("x",), f"pairs.csv:{number + 2}"))
    return PairSet("test", (*bad, *(several_captions() if good is None else good)))


def assert_equal(one: list[Loaded], other: list[Loaded]) -> None:
    assert len(one) == len(other)
    for first, second in zip(one, other, strict=True):
        assert first.broken == second.broken
        assert first.batch.keys() == second.batch.keys()
        assert all(torch.equal(first.batch[key], second.batch[key]) for key in first.batch)


@given(st.integers(0, 60), st.integers(1, 6), st.integers(1, 5), st.integers(0, 3), st.integers(0, 9))
def test_ranks_together_take_what_one_process_takes(size: int, batch: int, world: int, epoch: int, skip: int) -> None:
    def steps(batch_size: int, rank: int, world: int) -> list[list[Any]]:
        sampler = Steps(size, 7, batch_size, rank, world)
        sampler.epoch, sampler.skip = epoch, skip
        return list(sampler)

    whole = steps(batch * world, 0, 1)
    ranks = [steps(batch, rank, world) for rank in range(world)]
    assert {len(rank) for rank in ranks} == {len(whole)} == {max(0, size // (batch * world) - skip)}
    together = [[draw for rank in ranks for draw in rank[step]] for step in range(len(whole))]
    assert together == whole


def test_two_ranks_load_what_one_rank_of_twice_the_batch_loads(tmp_path: Path) -> None:
    pairs = with_broken(tmp_path, 3)
    whole = list(loader(pairs, batch_size=4).batches(1))
    halves = [list(loader(pairs, batch_size=2, rank=rank, world=2).batches(1)) for rank in range(2)]
    joined = [
        Loaded({key: torch.cat([a.batch[key], b.batch[key]]) for key in a.batch}, a.broken + b.broken)
        for a, b in zip(*halves, strict=True)
    ]
    assert_equal(joined, whole)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_skipping_gives_the_rest_of_the_same_epoch(tmp_path: Path, num_workers: int) -> None:
    batches = loader(with_broken(tmp_path, 2), num_workers=num_workers)
    whole = list(batches.batches(3))
    assert len(whole) == len(batches) == 6
    for skip in (1, 4, 6):
        assert_equal(list(batches.batches(3, skip)), whole[skip:])
    some = batches.batches(5)
    next(some)
    some.close()
    assert_equal(list(batches.batches(3)), whole)


def test_workers_started_by_spawn_give_the_same_batches(tmp_path: Path) -> None:
    pairs = with_broken(tmp_path)
    here = list(loader(pairs).batches(0))
    spawned = loader(pairs, num_workers=2)
    spawned._loader.multiprocessing_context = "spawn"
    assert_equal(here, list(spawned.batches(0)))
    pickle.loads(pickle.dumps((here, spawned._loader.dataset, spawned._loader.collate_fn)))


def test_a_broken_picture_is_named_and_another_pair_stands_in(tmp_path: Path) -> None:
    batches = loader(with_broken(tmp_path, 2))
    for epoch in range(3):
        loaded = list(batches.batches(epoch))
        assert {len(one.batch["image"]) for one in loaded} == {3}
        names = [name for one in loaded for name in one.broken]
        assert names
        assert all(name.startswith(f"{tmp_path}/half") and "(from pairs.csv:" in name for name in names)
        assert not any("\n" in name for name in names)


def test_unbroken_data_come_as_they_did_before(tmp_path: Path) -> None:
    """A stand-in changes no other sample: the rest of the epoch is as it would have been."""
    good = several_captions()
    mended = PairSet("test", (Pair(coloured("red"), ("x",), "x"), *good), templates=good.templates)
    broken = replace(with_broken(tmp_path, 1, good), templates=good.templates)
    one, other = list(loader(mended).batches(0)), list(loader(broken).batches(0))
    differ = [
        (first.batch["image"] != second.batch["image"]).flatten(1).any(1)
        for first, second in zip(one, other, strict=True)
    ]
    assert int(torch.cat(differ).sum()) <= 1


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_pictures_in_shards_and_parquet_load_in_workers(
    tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    write_shards(tmp_path, 2, 4)
    rows = [{"image": pair.image, "caption": pair.captions[0]} for pair in colour_pairs()]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pairs.parquet")
    for source in ("{00000..00001}.tar", "pairs.parquet"):
        pairs = read_data(f"{tmp_path}/{source}")
        here, workers = loader(pairs, batch_size=4), loader(pairs, batch_size=4, num_workers=1)
        workers._loader.multiprocessing_context = method
        assert_equal(list(workers.batches(0)), list(here.batches(0)))


def test_data_that_are_all_broken_end_the_run(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="20 pictures in a row are broken") as caught:
        next(loader(with_broken(tmp_path, 4, PairSet("none", ()))).batches(0))
    assert str(caught.value).count("half") == 4


def test_a_batch_of_all_ranks_must_be_filled() -> None:
    with pytest.raises(DataError, match="a batch of 9 is larger than the data") as caught:
        loader(colour_pairs(), world=3)
    assert "--batch-size 8 or less" in str(caught.value)


def test_labels_and_no_text() -> None:
    batches = TrainingLoader(
        colour_pairs(labelled=True), transform(), None, batch_size=4, seed=0, num_workers=0, labels=True
    )
    assert {tuple(loaded.batch) for loaded in batches.batches(0)} == {("image", "label")}


@pytest.mark.parametrize(
    ("found", "max_bad", "ends"),
    [
        (0, 0.0, False),
        (1, 0.0, True),
        (1, 0.01, False),
        (2, 0.01, True),
        (2, 0.1, False),
        (3, 0.1, True),
        (20, 1.0, False),
    ],
)
def test_more_than_the_share_of_the_data_ends_the_run(found: int, max_bad: float, ends: bool) -> None:
    broken = Broken(20)
    for _ in range(2):
        broken.add(f"{number}.png: the file is empty" for number in range(found))
    assert len(broken) == found
    if not ends:
        broken.check(max_bad)
        return
    with pytest.raises(RunError, match=f"{found} of 20 pictures are broken") as caught:
        broken.check(max_bad)
    assert all(name in str(caught.value) for name in broken.names)
    assert "--max-bad" in str(caught.value)


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_sees_every_picture_once_but_the_broken(tmp_path: Path, world: int, num_workers: int) -> None:
    pairs = with_broken(tmp_path, 3, colour_pairs())
    seen: dict[int, torch.Tensor] = {}
    broken = Broken(len(pairs))
    for rank in range(world):
        rows = Shard(rank, world).rows(len(pairs), 2)
        loader = EvaluationLoader(pairs, transform(), batch_size=2, num_workers=num_workers, rows=rows)
        batches = loader.batches(broken)
        for positions, images in batches:
            assert len(positions) == len(images) <= 2
            assert not set(positions.tolist()) & set(seen)
            seen.update(zip(positions.tolist(), images, strict=True))
    assert sorted(seen) == list(range(3, 11))
    assert torch.equal(seen[3], transform()(open_image(colour_pairs()[0].image, "")))
    assert len(broken) == 3
