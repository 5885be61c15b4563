"""Metrics agree with scikit-learn and torchmetrics, and a model that knows nothing scores what guessing scores."""

from __future__ import annotations

import io
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.metrics import log_loss, top_k_accuracy_score
from torch import nn
from torchmetrics.retrieval import RetrievalHitRate

from clipfreeze.errors import DataError, RunError
from clipfreeze.train.batches import Tokenizer
from clipfreeze.train.evaluate import Encoder, image_features, measure, recall_at, text_features
from clipfreeze.train.pairs import PairSet

import tiny
from hand import COLOURS, Words, colour_pairs, transform


def encoder(family: str = "clip_vit") -> Encoder:
    torch.manual_seed(0)
    model = tiny.FAMILIES[family]()
    size = 64 if family == "clip_resnet" else 32
    return Encoder(model, Tokenizer(Words(), model), transform(size), batch_size=5)


@pytest.mark.parametrize("family", ["clip_vit", "siglip", "coca", "hf_text"])
def test_zero_shot_agrees_with_scikit_learn(family: str) -> None:
    judge, pairs = encoder(family), replace(colour_pairs(3, labelled=True), templates=("{}", "a {} thing"))
    metrics = measure(judge, pairs)
    judge.model.eval()
    with torch.no_grad():
        prompts = torch.stack([text_features(judge, [t.format(c) for c in COLOURS]) for t in pairs.templates])
        classes = nn.functional.normalize(prompts.mean(0), dim=-1)
        logits = judge.model.logit_scale.exp() * image_features(judge, pairs)[1] @ classes.T
    labels = [pair.label for pair in pairs]
    assert (metrics.kind, metrics.images, metrics.texts) == ("zero-shot", 24, 8)
    for k in (1, 5):
        expected = top_k_accuracy_score(labels, logits.numpy(), k=k, labels=range(8))
        assert metrics.scores[f"top{k}"].value == pytest.approx(expected)
        assert metrics.scores[f"top{k}"].error == pytest.approx((expected * (1 - expected) / 24) ** 0.5)
    probabilities = logits.double().softmax(1).numpy()
    assert metrics.scores["nll"].value == pytest.approx(log_loss(labels, probabilities, labels=range(8)), rel=1e-4)


def test_retrieval_counts_each_caption_and_each_image_of_it() -> None:
    judge = encoder()
    pairs = [replace(pair, captions=(*pair.captions, "any colour")) for pair in colour_pairs()]
    metrics = measure(judge, PairSet("test", tuple(pairs)))
    judge.model.eval()
    with torch.no_grad():
        _, images = image_features(judge, PairSet("test", tuple(pairs)))
        texts = text_features(judge, [f"{colour} 0" for colour in COLOURS] + ["any colour"])
    best_text = (images @ texts.T).argmax(1)
    best_image = (texts @ images.T).argmax(1)
    assert metrics.texts == 9
    assert metrics.scores["image_to_text_recall_at_1"].value == pytest.approx(
        np.mean([best in (row, 8) for row, best in enumerate(best_text.tolist())])
    )
    assert metrics.scores["text_to_image_recall_at_1"].value == pytest.approx(
        np.mean([text == 8 or best == text for text, best in enumerate(best_image.tolist())])
    )
    assert metrics.scores["text_to_image_recall_at_10"].value == 1


class Collapsed(nn.Module):
    """Says the same of everything."""

    vocab_size, context_length = tiny.VOCABULARY, tiny.CONTEXT
    value = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.zeros(()))

    def encode_image(self, images: torch.Tensor, normalize: bool) -> torch.Tensor:
        return torch.full((len(images), 4), 0.5 * self.value)

    encode_text = encode_image


def test_a_collapsed_encoder_scores_chance() -> None:
    judge = Encoder(Collapsed(), Tokenizer(Words(), Collapsed()), transform())
    zero_shot = measure(judge, colour_pairs(3, labelled=True)).scores
    assert zero_shot["top1"].value == pytest.approx(1 / 8)
    assert zero_shot["top5"].value == pytest.approx(5 / 8)
    assert zero_shot["nll"].value == pytest.approx(np.log(8))
    assert zero_shot["confidence"].value == pytest.approx(1 / 8)
    assert zero_shot["ece"].value == pytest.approx(0)
    retrieval = measure(judge, colour_pairs(3)).scores
    for way in ("image_to_text", "text_to_image"):
        assert [retrieval[f"{way}_recall_at_{k}"].value for k in (1, 5, 10)] == pytest.approx([1 / 24, 5 / 24, 10 / 24])


def test_features_that_are_no_numbers_are_an_error_and_no_score() -> None:
    broken = Collapsed()
    broken.value = float("nan")
    with pytest.raises(RunError, match="not finite"):
        measure(Encoder(broken, Tokenizer(Words(), broken), transform()), colour_pairs())


@given(st.lists(st.integers(0, 3), min_size=1, max_size=5), st.data())
def test_ties_count_as_the_mean_over_all_orders_of_what_is_equal(scores: list[int], data: st.DataObject) -> None:
    right = data.draw(st.lists(st.booleans(), min_size=len(scores), max_size=len(scores)).filter(any))
    k = data.draw(st.integers(1, 10))
    orders = [sorted(order, key=lambda place: -scores[place]) for order in permutations(range(len(scores)))]
    expected = np.mean([any(right[place] for place in order[:k]) for order in orders])
    found = recall_at(torch.tensor([scores], dtype=torch.float), torch.tensor([right]), k)
    assert found.item() == pytest.approx(expected)


def png(picture: Image.Image) -> bytes:
    out = io.BytesIO()
    picture.save(out, "PNG")
    return out.getvalue()


def test_recall_agrees_with_torchmetrics() -> None:
    judge = encoder()
    dice = np.random.default_rng(0)
    pictures = [Image.fromarray(dice.integers(0, 256, (32, 32, 3), np.uint8)) for _ in range(24)]
    told = (
        replace(pair, image=png(picture), captions=(*pair.captions, pair.place.split()[0]))  # one that three share
        for pair, picture in zip(colour_pairs(3), pictures, strict=True)
    )
    pairs = PairSet("test", tuple(told))
    texts = list(dict.fromkeys(caption for pair in pairs for caption in pair.captions))
    metrics = measure(judge, pairs)
    judge.model.eval()
    with torch.no_grad():
        scores = image_features(judge, pairs)[1] @ text_features(judge, texts).T
    right = torch.tensor([[text in pair.captions for text in texts] for pair in pairs])
    for way, queries, answers in (("image_to_text", scores, right), ("text_to_image", scores.T, right.T)):
        rows = torch.arange(len(queries))[:, None].expand_as(queries).flatten()
        for k in (1, 5, 10):
            expected = RetrievalHitRate(top_k=k)(queries.flatten(), answers.flatten(), indexes=rows)
            assert metrics.scores[f"{way}_recall_at_{k}"].value == pytest.approx(expected.item())


def test_modes_are_as_before_and_metrics_do_not_depend_on_the_batch_size() -> None:
    judge = encoder("clip_resnet")
    judge.model.train()
    judge.model.visual.bn1.eval()
    state = {name: value.clone() for name, value in judge.model.state_dict().items()}
    modes = [module.training for module in judge.model.modules()]
    first = measure(judge, colour_pairs())
    assert modes == [module.training for module in judge.model.modules()]
    assert all(torch.equal(value, state[name]) for name, value in judge.model.state_dict().items())
    assert measure(replace(judge, batch_size=8), colour_pairs()) == first


def test_an_empty_set_is_an_error() -> None:
    with pytest.raises(DataError, match="nothing to evaluate on"):
        measure(encoder(), PairSet("test", ()))


@pytest.mark.parametrize("labelled", [True, False])
def test_broken_pictures_are_left_out_with_their_pairs_and_told_once(
    labelled: bool, caplog: pytest.LogCaptureFixture
) -> None:
    judge, good = encoder(), colour_pairs(3, labelled)
    bad = [replace(pair, image=b"no picture", place=f"row {row}") for row, pair in enumerate(good.pairs[:6])]
    if not labelled:
        bad = [replace(pair, captions=("said of nothing else",)) for pair in bad]
    mixed = replace(good, pairs=(*good.pairs[:9], *bad, *good.pairs[9:]))
    found, whole = measure(judge, mixed), measure(judge, good)
    assert (found.kind, found.images, found.texts) == (whole.kind, whole.images, whole.texts)
    for name, score in whole.scores.items():
        assert found.scores[name].value == pytest.approx(score.value, rel=1e-4)
    (record,) = caplog.records
    assert record.getMessage().startswith("6 of 30 pictures of colours are broken and left out: ")
    assert "row 4" in record.getMessage()
    assert "row 5" not in record.getMessage()


def test_a_set_of_broken_pictures_is_an_error() -> None:
    bad = replace(colour_pairs(), pairs=tuple(replace(pair, image=b"no picture") for pair in colour_pairs()))
    with pytest.raises(DataError, match="no picture of colours can be read: red 0: not a picture"):
        measure(encoder(), bad)
