"""With a head or a prompt: what a plan trains on, and by what it is measured before and after."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import clipfreeze
from clipfreeze.changes import Applied
from clipfreeze.errors import DataError
from clipfreeze.policy.loading import load_policy
from clipfreeze.train.batches import Tokenizer
from clipfreeze.train.classes import with_classes
from clipfreeze.train.evaluate import Encoder, Metrics, image_features, measure
from clipfreeze.train.loop import Result, fit
from clipfreeze.train.objective import Classification, Contrastive, clip_loss, siglip_loss, training_module
from clipfreeze.train.pairs import PairSet
from clipfreeze.train.tuned import for_training, measure_tuned, measure_untuned, unknown_notes

import tiny
from hand import COLOURS, Words, colour_pairs, transform

NAMED = replace(colour_pairs(3, labelled=True), templates=("{}", "a {} thing"))
OTHERS = PairSet("others", colour_pairs(labelled=True).pairs, ("pink", *COLOURS[1:]))
TEXT = '[[rule]]\nmatch = "@text.proj"\ntrain = true\n'
PROMPT = '[[rule]]\nmatch = "@text"\nprompt = {{ length = 2{more} }}\n'


def applied(folder: Path, rules: str, family: str = "clip_vit", data: PairSet = NAMED) -> Applied:
    torch.manual_seed(0)
    model: nn.Module = tiny.FAMILIES[family]()
    path = folder / "mine.toml"
    path.write_text(f'name = "mine"\n{rules}[optimizer]\nlr = 1e-2\nweight_decay = 0.0\n', encoding="utf-8")
    plan = clipfreeze.resolve(with_classes(load_policy(path), data), model)
    return clipfreeze.apply(plan, model, tokenizer=Words())


def head(**said: str) -> str:
    more = "".join(f', {name} = "{value}"' for name, value in said.items())
    return f'[[rule]]\nmatch = "@vision"\nhead = {{ classes = "data"{more} }}\n'


def encoder(of: Applied) -> Encoder:
    return Encoder(of.model, Tokenizer(Words(), of.model), transform())


def run(of: Applied, train: PairSet = NAMED, **settings: Any) -> Result:
    tests = {"target": train, "others": OTHERS}
    values: dict[str, Any] = {"tokenizer": Words(), "transform": transform(), "batch_size": 8, "tests": tests}
    return fit(of, train, **(values | settings))


def scores(metrics: Metrics) -> list[float]:
    return [score.value for score in metrics.scores.values()]


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_a_fresh_head_measures_as_zero_shot_does(tmp_path: Path, kind: str) -> None:
    plain = measure(encoder(applied(tmp_path, TEXT)), NAMED)
    of = applied(tmp_path, head(kind=kind))
    before, after = (how(encoder(of), NAMED, of) for how in (measure_untuned, measure_tuned))
    assert before == plain
    assert (before.kind, after.kind) == ("zero-shot", "head")
    assert (after.images, after.texts) == (before.images, before.texts)
    assert scores(after) == pytest.approx(scores(before), rel=1e-5)


@pytest.mark.parametrize("init", ["zeros", "random"])
def test_before_is_the_model_s_zero_shot_whatever_the_head_starts_as(tmp_path: Path, init: str) -> None:
    of = applied(tmp_path, head(init=init))
    assert measure_untuned(encoder(of), NAMED, of) == measure(encoder(applied(tmp_path, TEXT)), NAMED)
    if init == "zeros":
        assert scores(measure_tuned(encoder(of), NAMED, of)) == pytest.approx(
            [1 / 8, 5 / 8, math.log(8), 1 / 8, 0], abs=1e-9
        )


@pytest.mark.parametrize("family", ["clip_vit", "siglip", "coca", "hf_text"])
def test_a_head_learns_its_classes_and_moves_nothing_else(tmp_path: Path, family: str) -> None:
    of = applied(tmp_path, head(), family)
    before = {name: value.clone() for name, value in of.model.state_dict().items()}
    result = run(of, epochs=30)
    moved = {name for name, value in of.model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"head.weight", "head.bias"}
    assert result.after["target"].scores["nll"].value < 0.7 * result.before["target"].scores["nll"].value
    assert result.after["target"].kind == "head"
    assert result.after["others"] == result.before["others"]
    assert [note for note in result.notes if "no gradient" in note] == []
    assert any("others has other classes than the head" in note for note in result.notes)


def test_with_a_head_alone_no_text_is_encoded_or_tokenized_in_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = applied(tmp_path, head())

    def never(*_: Any, **__: Any) -> Tensor:
        raise AssertionError("text in training")

    monkeypatch.setattr(of.model, "encode_text", never)
    monkeypatch.setattr(Words, "__call__", never)
    run(of, tests={})


@pytest.mark.parametrize("family", ["clip_vit", "siglip"])
def test_the_loss_is_cross_entropy_and_where_texts_train_the_contrastive_loss_too(tmp_path: Path, family: str) -> None:
    of = applied(tmp_path, head(), family)
    of.model.eval()
    image, text, label = tiny.images(of.model), tiny.tokens(of.model), torch.tensor([3, 1, 0, 3])
    features = of.model.encode_image(image, normalize=True)
    expected = nn.functional.cross_entropy(of.model.head(features), label)
    module = training_module(of)
    assert isinstance(module, Classification)
    assert not module.reads_texts
    assert torch.equal(module(image=image, label=label), expected)
    both = applied(tmp_path, head() + TEXT, family)
    both.model.eval()
    module = training_module(both)
    assert module.reads_texts
    loss = siglip_loss if family == "siglip" else clip_loss
    texts = both.model.encode_text(text, normalize=True)
    expected = expected + loss(features, texts, both.model.logit_scale.exp(), both.model.logit_bias, label)
    torch.testing.assert_close(module(image=image, label=label, text=text, concepts=label), expected)
    torch.autograd.backward(expected)
    assert isinstance(training_module(applied(tmp_path, TEXT, family)), Contrastive)


def test_where_texts_train_beside_a_head_all_of_it_gets_a_gradient(tmp_path: Path) -> None:
    for family, rules in (("clip_vit", TEXT), ("siglip", TEXT.replace("text.proj", "logit_bias"))):
        of = applied(tmp_path, head() + rules, family)
        result = run(of, tests={})
        assert not any("no gradient" in note for note in result.notes)


def test_a_head_of_zeros_that_learns_nothing_is_noted(tmp_path: Path) -> None:
    of = applied(tmp_path, head(init="zeros"))
    for group in (optimizer := of.optimizer()).param_groups:
        group["lr"] = 0.0
    of.optimizer = lambda: optimizer  # type: ignore[method-assign]
    of.scheduler = lambda *_: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)  # type: ignore[method-assign]
    assert any("what guessing gives" in note for note in run(of, tests={}).notes)


def test_captions_that_are_classes_are_trained_and_measured_as_such(tmp_path: Path) -> None:
    captions = replace(NAMED, pairs=tuple(replace(pair, label=None) for pair in NAMED), class_names=())
    of = applied(tmp_path, head(), data=captions)
    result = run(of, captions)
    assert (result.before["target"].kind, result.after["target"].kind) == ("zero-shot", "head")
    assert result.after["target"].texts == 8


def test_a_caption_that_is_no_class_stops_the_run_before_its_first_step(tmp_path: Path) -> None:
    of = applied(tmp_path, head())
    with pytest.raises(DataError, match=r"none of the policy's 8 classes"):
        run(of, OTHERS)


def test_a_set_of_some_classes_is_measured_among_those_alone(tmp_path: Path) -> None:
    of = applied(tmp_path, head())
    few = PairSet("few", tuple(pair for pair in NAMED if pair.label in (0, 1)), COLOURS[:2], NAMED.templates)
    metrics = measure_tuned(encoder(of), few, of)
    of.model.eval()
    with torch.no_grad():
        logits = of.model.head(image_features(encoder(of), few)[1])
    columns = [sorted(COLOURS).index(name) for name in COLOURS[:2]]
    right = logits[:, columns].argmax(1) == torch.tensor([pair.label for pair in few])
    assert metrics.texts == 2
    assert metrics.scores["top1"].value == pytest.approx(right.float().mean().item())


def test_a_head_is_measured_on_what_can_be_read(tmp_path: Path) -> None:
    of = applied(tmp_path, head())
    mixed = replace(NAMED, pairs=(replace(NAMED[3], image=b"no picture"), *NAMED))
    assert measure_tuned(encoder(of), mixed, of) == measure_tuned(encoder(of), NAMED, of)


def test_a_prompt_takes_the_place_of_templates_and_before_is_without_it(tmp_path: Path) -> None:
    of = applied(tmp_path, PROMPT.format(more=""))
    assert for_training(NAMED, of.plan.sites).templates == ("{}",)
    before, after = (how(encoder(of), NAMED, of) for how in (measure_untuned, measure_tuned))
    assert before == measure(encoder(applied(tmp_path, TEXT)), NAMED)
    assert after.kind == "prompt"
    assert after == replace(measure(encoder(of), replace(NAMED, templates=("{}",))), kind="prompt")
    assert scores(after) != scores(before)


def test_a_class_specific_prompt_reads_bare_class_names_and_is_off_for_other_classes(tmp_path: Path) -> None:
    of = applied(tmp_path, PROMPT.format(more=', class_specific = true, classes = "data"'))
    told = for_training(NAMED, of.plan.sites)
    assert {pair.captions for pair in told} == {(colour,) for colour in COLOURS}
    result = run(of, epochs=2)
    assert result.after["target"].kind == "prompt"
    assert result.after["others"] == result.before["others"]
    assert any("others has other classes than the prompt" in note for note in result.notes)
    assert unknown_notes("target", NAMED, of.plan.sites) == []


def test_a_head_and_a_class_specific_prompt_train_together(tmp_path: Path) -> None:
    of = applied(tmp_path, head() + PROMPT.format(more=', class_specific = true, classes = "data"'))
    result = run(of)
    assert not any("no gradient" in note for note in result.notes)
    assert result.after["target"].kind == "head"
    assert measure_untuned(encoder(of), NAMED, of) == result.before["target"]
