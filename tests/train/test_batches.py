"""Samples are the same for the same seed, in this process and in workers, and broken ones keep their message."""

from __future__ import annotations

import io
import os
import pickle
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms import ToTensor

from clipfreeze.errors import DataError, RunError
from clipfreeze.train.batches import (
    Collate,
    Draw,
    Sample,
    Tokenizer,
    TrainingSamples,
    picture_loader,
    training_loader,
    unbroken,
)
from clipfreeze.train.pairs import Pair, PairSet

import tiny
from hand import Words, colour_pairs, coloured, transform


def loader(pairs: PairSet, **settings: Any) -> DataLoader[Any]:
    values = {"batch_size": 3, "seed": 0, "num_workers": 0} | settings
    return training_loader(pairs, transform(train=True), Tokenizer(Words(), tiny.clip_vit()), **values)


def several_captions() -> PairSet:
    pairs = (replace(pair, captions=("one", "two", "three", "four")) for pair in colour_pairs())
    return PairSet("test", tuple(pairs), templates=("{}", "a {}"))


def assert_equal_batches(first: list[Any], second: list[Any]) -> None:
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in ("image", "text", "concepts"))


def test_workers_started_by_spawn_give_the_same_batches() -> None:
    here = list(unbroken(loader(several_captions())))
    spawned = loader(several_captions(), num_workers=2)
    spawned.multiprocessing_context = "spawn"
    assert_equal_batches(here, list(unbroken(spawned)))


def test_what_workers_need_survives_pickling_with_open_clips_own_parts() -> None:
    model = open_clip.CLIP(16, tiny.VISION, {**tiny.TEXT, "vocab_size": 49408})
    tokenizer = Tokenizer(open_clip.get_tokenizer("ViT-B-32", context_length=16), model)
    samples = TrainingSamples(several_captions(), transform(train=True), 0)
    pickle.loads(pickle.dumps((samples, Collate(tokenizer))))


def test_batches_leave_the_dice_outside_alone() -> None:
    torch.manual_seed(1)
    random.seed(1)
    before = torch.get_rng_state(), random.getstate()
    samples = TrainingSamples(several_captions(), transform(train=True), 0)
    for epoch in range(2):
        drawn = [samples[Draw(epoch, position)] for position in range(len(samples))]
        assert len({sample.caption for sample in drawn if isinstance(sample, Sample)}) > 2
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()


def test_an_epoch_has_its_own_order_and_drops_what_fills_no_batch() -> None:
    batches = loader(colour_pairs(labelled=True))
    epochs = []
    for epoch in range(2):
        batches.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        epochs.append(torch.cat([batch["concepts"] for batch in unbroken(batches)]).tolist())
    assert [len(set(epoch)) for epoch in epochs] == [6, 6]
    assert epochs[0] != epochs[1]


def test_concepts_are_labels_or_else_equal_captions() -> None:
    labelled = next(unbroken(loader(colour_pairs(labelled=True))))["concepts"]
    assert ((labelled >= 0) & (labelled < 8)).all()
    same = PairSet("test", tuple(replace(pair, captions=("the same",)) for pair in colour_pairs()))
    assert len(next(unbroken(loader(same)))["concepts"].unique()) == 1
    assert len(next(unbroken(loader(colour_pairs())))["concepts"].unique()) == 3


def test_training_and_evaluation_see_a_photo_the_right_way_up() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    out = io.BytesIO()
    Image.new("RGB", (40, 20)).save(out, "JPEG", exif=exif)
    pairs = PairSet("test", (Pair(out.getvalue(), ("one",), "1"), Pair(out.getvalue(), ("two",), "2")))
    as_it_is = ToTensor()
    tokens = Tokenizer(Words(), tiny.clip_vit())
    training = training_loader(pairs, as_it_is, tokens, batch_size=2, seed=0, num_workers=0)
    evaluation = picture_loader(pairs, as_it_is, batch_size=2, num_workers=0)
    assert next(unbroken(training))["image"].shape == next(unbroken(evaluation)).shape == (2, 3, 40, 20)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_broken_picture_stops_with_its_path_and_row(tmp_path: Path, num_workers: int) -> None:
    broken = tmp_path / "half.png"
    broken.write_bytes(coloured("red")[:50])
    pairs = PairSet("test", (*colour_pairs().pairs, Pair(broken, ("x",), "pairs.csv:9")))
    with pytest.raises(DataError) as caught:
        list(unbroken(loader(pairs, num_workers=num_workers)))
    assert str(caught.value).startswith(f"{broken}: the picture cannot be decoded")
    assert "from pairs.csv:9" in str(caught.value)
    assert "Traceback" not in str(caught.value)


def die(picture: Image.Image) -> torch.Tensor:
    os._exit(1)


def test_a_worker_that_dies_as_in_a_script_without_a_main_guard_is_explained() -> None:
    with pytest.raises(RunError, match="a worker process ended") as caught:
        next(unbroken(picture_loader(colour_pairs(), die, batch_size=2, num_workers=1)))
    assert "__main__" in str(caught.value)


@pytest.mark.parametrize(
    ("batch_size", "words"), [(9, "a batch of 9 is larger than the data: colours has 8"), (1, "nothing to tell apart")]
)
def test_a_batch_that_cannot_be_is_an_error(batch_size: int, words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        loader(colour_pairs(), batch_size=batch_size)
    assert "--batch-size" in str(caught.value)


def test_no_data_is_an_error() -> None:
    with pytest.raises(DataError, match="has 0 pictures"):
        loader(PairSet("test", ()))


@pytest.mark.parametrize("family", ["clip_vit", "siglip", "coca", "hf_text"])
def test_another_models_tokenizer_is_an_error(family: str) -> None:
    model = tiny.FAMILIES[family]()
    Tokenizer(Words(), model)(["a caption"])
    with pytest.raises(DataError, match="makes 77 tokens"):
        Tokenizer(Words(context_length=77), model)(["a caption"])
    with pytest.raises(DataError, match="the model's vocabulary has 64"):
        Tokenizer(Words(vocabulary=100), model)(["a caption"])


def test_too_few_tokens_are_an_error_where_the_model_counts_on_its_context() -> None:
    with pytest.raises(DataError, match="makes 8 tokens, the model's context is 16"):
        Tokenizer(Words(context_length=8), tiny.siglip())(["a caption"])
    Tokenizer(Words(context_length=8), tiny.hf_text())(["a caption"])
