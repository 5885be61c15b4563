"""Frozen modules stand still, trained ones do not."""

import copy
import pickle
from contextlib import ExitStack

import pytest
import torch
from torch import nn

from clipfreeze.inject.freeze import set_trainable, stand_still

import tiny


def frozen_but(model: nn.Module, *trained: str) -> ExitStack:
    undo = ExitStack()
    names = [name for name, _ in model.named_parameters() if name.startswith(trained)]
    set_trainable(model, names, undo)
    stand_still(model, undo)
    return undo


def in_train_mode(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if module.training}


class Block(nn.Module):
    """Dropout before, between and after what has parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.drop_first = nn.Dropout(0.5)
        self.one = nn.Linear(2, 2)
        self.drop_one = nn.Sequential(nn.Dropout(0.5), nn.GELU())
        self.norm = nn.BatchNorm1d(2)
        self.two = nn.Linear(2, 2)
        self.drop_two = nn.Dropout(0.5)


class Embedding(nn.Module):
    """Dropout on a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.zeros(2))
        self.drop = nn.Dropout(0.5)
        self.after = nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("trained", "moving"),
    [
        ("one", {"", "drop_first", "one", "drop_one", "drop_one.0", "drop_one.1"}),
        ("two", {"", "two", "drop_two"}),
        ("norm", {""}),
        ("", {"", "drop_first", "one", "drop_one", "drop_one.0", "drop_one.1", "two", "drop_two"}),
    ],
)
def test_dropout_goes_with_what_it_works_on(trained, moving):
    model = Block()
    frozen_but(model, trained)
    model.train()
    assert in_train_mode(model) == moving


@pytest.mark.parametrize(("trained", "moving"), [("position", {"", "drop"}), ("after", {"", "after"})])
def test_dropout_without_a_sibling_before_it_goes_with_its_parents_parameters(trained, moving):
    model = Embedding()
    frozen_but(model, trained)
    model.train()
    assert in_train_mode(model) == moving


def test_eval_puts_all_at_rest_and_train_wakes_only_what_trains():
    model = Block()
    frozen_but(model, "one")
    model.eval()
    assert not in_train_mode(model)
    model.two.train()  # straight at the frozen part
    model.norm.train(True)
    assert not in_train_mode(model)
    assert model.one.train() is model.one
    assert in_train_mode(model) == {"one"}
    model = nn.Sequential(Block(), nn.Linear(2, 2))
    frozen_but(model, "1")
    model[0].two.train()
    model[0].drop_one[0].train()
    assert in_train_mode(model) == {"", "1"}


def test_a_frozen_module_s_own_train_is_still_called():
    class Counting(nn.Linear):
        calls = 0

        def train(self, mode: bool = True) -> nn.Module:
            Counting.calls += 1
            return super().train(mode)

    model = nn.Sequential(Counting(2, 2), nn.Linear(2, 2))
    frozen_but(model, "1")
    model.train()
    assert Counting.calls == 1
    assert in_train_mode(model) == {"", "1"}


def test_undo_restores_modes_and_a_former_train_attribute():
    model = Block()
    model.one.eval()
    own = model.two.train
    model.two.train = own
    before = in_train_mode(model)
    undo = frozen_but(model, "one")
    model.eval()
    undo.close()
    assert in_train_mode(model) == before
    assert model.two.train is own
    assert "train" not in vars(model.norm)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_stands_still_without_the_original(twin):
    model = Block()
    frozen_but(model, "one")
    model.train()
    other = twin(model)
    other.eval()
    assert "one" in in_train_mode(model)
    other.train()
    assert in_train_mode(other) == in_train_mode(model)
    assert other.two.train() is other.two


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_all_but_the_root_rests_when_a_root_scalar_trains(family):
    model = tiny.FAMILIES[family]()
    frozen_but(model, "logit_scale")
    model.train()
    assert in_train_mode(model) == {""}


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_all_but_batch_norms_moves_when_everything_trains(family):
    model = tiny.FAMILIES[family]().train()
    frozen_but(model, "")
    model.train()
    resting = {module for module in model.modules() if not module.training}
    assert resting == {
        part
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        for part in module.modules()
    }


def test_patch_dropout_of_a_frozen_stem_is_off():
    model = tiny.clip_vit({"patch_dropout": 0.5})
    frozen_but(model, "visual.transformer.resblocks.2", "visual.proj")
    model.train()
    images = tiny.images(model)
    assert model.visual.training
    assert torch.equal(model.encode_image(images), model.encode_image(images))
