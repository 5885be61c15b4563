"""Law 8: what is frozen runs once, texts are cut and equal ones encoded once, and neither loss nor gradients change."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from clipfreeze.changes import Applied, apply
from clipfreeze.plan.build import resolve
from clipfreeze.policy.loading import load_policy
from clipfreeze.train import given as given_module
from clipfreeze.train import texts
from clipfreeze.train.accumulate import backward_in_chunks
from clipfreeze.train.batches import Draw, Loaded
from clipfreeze.train.engine import make_accelerator
from clipfreeze.train.objective import training_module
from clipfreeze.train.settings import training_settings
from clipfreeze.train.texts import FEWEST, length_groups, unique
from clipfreeze.train.thrift import Thrift

import tiny

STRATEGIES = (
    *("full", "text_only", "vision_only", "projections", "last_n", "prompt", "lora", "adapter", "differential"),
    *("logit_scale", "norm_bias", "lora_prompt", "head", "first_n"),
)
SIZE = 6


def applied_to(family: str, policy: str, **knobs: object) -> Applied:
    torch.manual_seed(0)
    model = tiny.FAMILIES[family]()
    if policy == "last_n":
        knobs = {"n": 1, **knobs}
    if policy == "head":
        knobs = {"classes": str(Path(__file__).parent / "three_classes.txt"), **knobs}
    plan = resolve(load_policy(policy, **{**tiny.KNOBS.get(policy, {}), **knobs}), model)
    applied = apply(plan, model)
    for parameter in applied.trainable().values():  # what is added starts as nothing
        if not parameter.detach().any():
            nn.init.normal_(parameter, std=0.1)
    return applied


def batch_of(applied: Applied) -> dict[str, torch.Tensor]:
    """Six pairs, of which two say the same."""
    module = training_module(applied)
    batch = {"image": tiny.images(applied.model, SIZE)}
    if module.reads_texts:
        text = tiny.tokens(applied.model, SIZE)
        text[3] = text[0]
        batch |= {"text": text, "concepts": torch.tensor([0, 1, 2, 0, 4, 5])}
    if module.reads_labels:
        batch["label"] = torch.arange(SIZE) % 3
    return batch


def loaded_of(batch, seen=range(SIZE)) -> Loaded:
    left = {name: value for name, value in batch.items() if name != "image"}
    if len(seen):
        left["image"] = batch["image"][list(seen)]
    return Loaded(left, (), tuple(Draw(0, row) for row in range(SIZE)), tuple(seen))


class Still:
    """Pictures that never change."""

    random = False

    def __init__(self, images: torch.Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def view(self, draw: Draw) -> int:
        return 0

    def picture(self, draw: Draw) -> torch.Tensor:
        return self.images[draw.position]


def thrifty(applied: Applied, batch, **settings) -> Thrift:
    wanted = training_settings(epochs=3, **settings)
    pictures = Still(batch["image"])
    module = training_module(applied).eval()
    return Thrift(applied, module, make_accelerator("fp32"), wanted, pictures, lambda images: images)


def learnt(applied: Applied, module, batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    module.zero_grad()
    loss = module(**batch)
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in applied.training().items() if p.grad is not None}


def assert_equal(found, expected) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)
    assert found[1].keys() == expected[1].keys()
    largest = max(gradient.abs().max() for gradient in expected[1].values())
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-3, atol=float(largest) * 2e-5, msg=name)


@pytest.mark.parametrize("policy", STRATEGIES)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_loss_and_gradients_are_those_of_the_plain_forward(family, policy):
    applied = applied_to(family, policy)
    batch = batch_of(applied)
    thrift = thrifty(applied, batch)
    plain = learnt(applied, thrift.module, batch)
    loaded = loaded_of(batch)
    thrift.enter(loaded)
    for pictures in (loaded, loaded_of(batch, seen=()), loaded_of(batch, seen=(0, 4))):
        assert_equal(learnt(applied, thrift.module, thrift.prepare(pictures)), plain)
    thrift.close()
    assert_equal(learnt(applied, thrift.module, batch), plain)


@pytest.fixture
def small_groups(monkeypatch) -> list[int]:
    """Texts are told apart by two tokens, however few there are: the lengths of all groups."""
    found: list[int] = []

    def groups(lengths, longest):
        for length, rows in length_groups(lengths, longest, fewest=1):
            found.append(length)
            yield length, rows

    monkeypatch.setattr(texts, "STEP", 2)
    monkeypatch.setattr(given_module, "length_groups", groups)
    return found


@pytest.mark.parametrize("policy", ["full", "prompt", "last_n"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_many_groups_of_texts_have_the_loss_and_gradients_of_the_batch(family, policy, small_groups):
    applied = applied_to(family, policy)
    batch = batch_of(applied)
    thrift = thrifty(applied, batch)
    plain = learnt(applied, thrift.module, batch)
    thrift.enter(loaded_of(batch))
    assert_equal(learnt(applied, thrift.module, thrift.prepare(loaded_of(batch))), plain)
    assert (len(small_groups) > 1) == (not thrift.text.whole)


class Tables(TorchDispatchMode):
    """Counts the gradients that were made of whole tables."""

    made = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.made += function is torch.ops.aten.embedding_dense_backward.default and args[2] == tiny.VOCABULARY
        return function(*args, **(kwargs or {}))


def test_the_token_table_gets_one_gradient_for_all_groups(small_groups):
    applied = applied_to("clip_vit", "full")
    thrift = thrifty(applied, batch_of(applied))
    loaded = loaded_of(batch_of(applied))
    thrift.enter(loaded)
    with Tables() as tables:
        learnt(applied, thrift.module, thrift.prepare(loaded))
    assert len(small_groups) > 1
    assert tables.made == 1


@pytest.mark.parametrize("policy", ["last_n", "lora", "prompt"])
def test_pieces_of_a_batch_have_its_gradients(policy):
    applied = applied_to("clip_vit", policy)
    batch = batch_of(applied)
    thrift = thrifty(applied, batch)
    plain = learnt(applied, thrift.module, batch)
    thrift.enter(loaded_of(batch))
    thrift.module.zero_grad()
    loss = backward_in_chunks(thrift.module, thrift.prepare(loaded_of(batch)), 2)
    assert_equal((loss, {n: p.grad for n, p in applied.training().items() if p.grad is not None}), plain)


def test_dropout_behind_the_cut_falls_as_in_the_plain_forward():
    applied = applied_to("clip_vit", "lora", towers="vision", dropout=0.5)
    batch = batch_of(applied)
    thrift = thrifty(applied, batch)
    thrift.module.train()
    torch.manual_seed(1)
    plain = learnt(applied, thrift.module, batch)
    thrift.enter(loaded_of(batch))
    for seed, same in ((1, True), (2, False)):
        torch.manual_seed(seed)
        found = learnt(applied, thrift.module, thrift.prepare(loaded_of(batch, seen=())))
        assert torch.allclose(found[0], plain[0], atol=1e-6) == same
    assert not thrift.take_notes()[0].startswith("vision tower: all of it")


def test_a_tower_that_draws_numbers_encodes_equal_texts_each_by_itself():
    applied = applied_to("clip_vit", "lora", towers="text", dropout=0.5)
    batch = batch_of(applied)
    thrift = thrifty(applied, batch)
    for training in (True, False):
        thrift.module.train(training)
        thrift.enter(loaded_of(batch))
        features = thrift.prepare(loaded_of(batch))["text"].features()
        assert torch.equal(features[0], features[3]) == (not training)


def test_prompts_of_all_classes_are_prepared_once():
    applied = applied_to("clip_vit", "vision_only")
    thrift = thrifty(applied, batch_of(applied))
    thrift.module.reads_classes = True
    loaded = loaded_of(batch_of(applied))
    thrift.enter(loaded)
    assert thrift.prepare(loaded)["text"] is thrift.prepare(loaded)["text"]


def test_what_the_model_checkpoints_itself_is_not_cut():
    applied = applied_to("clip_vit", "last_n")
    applied.model.set_grad_checkpointing()
    batch = batch_of(applied)
    thrift = thrifty(applied, batch)
    plain = learnt(applied, thrift.module, batch)
    thrift.enter(loaded_of(batch))
    assert_equal(learnt(applied, thrift.module, thrift.prepare(loaded_of(batch))), plain)
    assert all("checkpointing" in note for note in thrift.take_notes())


@given(st.lists(st.integers(1, 77), min_size=1, max_size=40))
def test_groups_hold_every_row_once_and_cut_none(lengths):
    found = list(length_groups(lengths, 77))
    assert sorted(row for _, rows in found for row in rows) == list(range(len(lengths)))
    for size, rows in found:
        assert max(lengths[row] for row in rows) <= size <= 77
    assert len(found) == 1 or all(len(rows) >= FEWEST for _, rows in found[:-1])


@given(st.lists(st.integers(0, 3), min_size=1, max_size=12))
def test_unique_rows_stand_for_all(values):
    ids = torch.tensor(values)[:, None].expand(-1, 3)
    first, places = unique(ids)
    assert len(first) == len(set(values))
    assert torch.equal(ids[first][places], ids)
