"""Samples are the same for the same seed, in this process and in workers, and broken ones keep their message."""

from __future__ import annotations

import io
import os
import pickle
import random
from dataclasses import replace
from typing import Any

import open_clip
import pytest
import torch
from PIL import Image
from torchvision.transforms import ToTensor

from clipfreeze.errors import DataError, RunError
from clipfreeze.train.batches import (
    Collate,
    Draw,
    EvaluationLoader,
    Sample,
    Tokenizer,
    TrainingLoader,
    TrainingSamples,
)
from clipfreeze.train.broken import Broken
from clipfreeze.train.pairs import Pair, PairSet

import tiny
from hand import Words, colour_pairs, transform


def loader(pairs: PairSet, **settings: Any) -> TrainingLoader:
    values = {"batch_size": 3, "seed": 0, "num_workers": 0} | settings
    return TrainingLoader(pairs, transform(train=True), Tokenizer(Words(), tiny.clip_vit()), **values)


def several_captions() -> PairSet:
    pairs = (replace(pair, captions=("one", "two", "three", "four")) for pair in colour_pairs())
    return PairSet("test", tuple(pairs), templates=("{}", "a {}"))


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
    epochs = [torch.cat([loaded.batch["concepts"] for loaded in batches.batches(epoch)]).tolist() for epoch in range(2)]
    assert [len(set(epoch)) for epoch in epochs] == [6, 6]
    assert epochs[0] != epochs[1]


def test_concepts_are_labels_or_else_equal_captions() -> None:
    def concepts(pairs: PairSet) -> torch.Tensor:
        return next(loader(pairs).batches(0)).batch["concepts"]

    labelled = concepts(colour_pairs(labelled=True))
    assert ((labelled >= 0) & (labelled < 8)).all()
    same = PairSet("test", tuple(replace(pair, captions=("the same",)) for pair in colour_pairs()))
    assert len(concepts(same).unique()) == 1
    assert len(concepts(colour_pairs()).unique()) == 3


def test_training_and_evaluation_see_a_photo_the_right_way_up() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    out = io.BytesIO()
    Image.new("RGB", (40, 20)).save(out, "JPEG", exif=exif)
    pairs = PairSet("test", (Pair(out.getvalue(), ("one",), "1"), Pair(out.getvalue(), ("two",), "2")))
    as_it_is = ToTensor()
    tokens = Tokenizer(Words(), tiny.clip_vit())
    training = TrainingLoader(pairs, as_it_is, tokens, batch_size=2, seed=0, num_workers=0)
    evaluation = EvaluationLoader(pairs, as_it_is, batch_size=2, num_workers=0)
    (loaded,), ((_, images),) = training.batches(0), evaluation.batches(Broken(2))
    assert loaded.batch["image"].shape == images.shape == (2, 3, 40, 20)


def die(picture: Image.Image) -> torch.Tensor:
    os._exit(1)


def test_a_worker_that_dies_as_in_a_script_without_a_main_guard_is_explained() -> None:
    with pytest.raises(RunError, match="a worker process ended") as caught:
        next(EvaluationLoader(colour_pairs(), die, batch_size=2, num_workers=1).batches(Broken(8)))
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
