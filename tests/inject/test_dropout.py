"""Dropout on a projection's input is what one would write by hand."""

import copy
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from clipfreeze.anatomy.partition import describe
from clipfreeze.inject.dropout import drop_inputs, dropout_problems
from clipfreeze.plan.value import PlannedParameter

import tiny


class Bare(nn.Module):
    """As open_clip's towers project."""

    def __init__(self) -> None:
        super().__init__()
        self.proj: Any = nn.Parameter(torch.randn(4, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.proj


def plans(model: nn.Module, rate: float | dict[str, float]) -> list[PlannedParameter]:
    return [
        PlannedParameter(
            name=name,
            shape=tuple(parameter.shape),
            dtype="float32",
            role="vision.proj",
            trainable=True,
            dropout=rate if isinstance(rate, float) else rate.get(name),
        )
        for name, parameter in model.named_parameters()
    ]


def dropping(model: nn.Module, rate: float | dict[str, float]) -> ExitStack:
    undo = ExitStack()
    assert not list(dropout_problems(plans(model, rate), model))
    drop_inputs(plans(model, rate), model, undo)
    return undo


def test_a_bare_parameter_is_multiplied_with_what_is_left():
    model, x = Bare(), torch.randn(5, 4, requires_grad=True)
    dropping(model, 0.5)
    torch.manual_seed(0)
    out = model(x)
    torch.manual_seed(0)
    expected = functional.dropout(x, 0.5) @ model._parameters["proj"]
    assert torch.equal(out, expected)
    weight = model._parameters["proj"]
    for found, right in zip(
        torch.autograd.grad(out.sum(), [x, weight]), torch.autograd.grad(expected.sum(), [x, weight]), strict=True
    ):
        assert torch.equal(found, right)
    model.eval()
    assert torch.equal(model(x), x @ weight)


@pytest.mark.parametrize("rate", [0.5, {"0.weight": 0.5}, {"0.bias": 0.5}])
def test_a_linear_drops_once_for_weight_and_bias(rate):
    model, x = nn.Sequential(nn.Linear(4, 3)), torch.randn(5, 4)
    plain = copy.deepcopy(model)
    dropping(model, rate)
    torch.manual_seed(0)
    out = model(x)
    torch.manual_seed(0)
    assert torch.equal(out, plain(functional.dropout(x, 0.5)))
    assert torch.equal(model.eval()(x), plain(x))


def test_names_and_parameters_stay_as_they_were():
    model = Bare()
    parameter = model.proj
    with dropping(model, 0.5):
        assert dict(model.named_parameters())["proj"] is parameter
        assert list(model.state_dict()) == ["proj"]
        assert (model.proj.shape, model.proj.requires_grad) == (parameter.shape, True)
        assert torch.equal(model.proj.T, parameter.T)
        assert torch.equal(torch.add(model.proj, 1), parameter + 1)
        assert torch.equal(functional.normalize(input=model.proj), functional.normalize(parameter))
        assert not isinstance(model.proj, nn.Parameter)
        model.load_state_dict({"proj": torch.zeros(4, 3)})
        assert not model(torch.ones(2, 4)).any()
    assert isinstance(model.proj, nn.Parameter)
    assert "proj" not in vars(model)


def test_a_tower_in_eval_drops_nothing_while_the_rest_trains():
    model = tiny.clip_vit()
    undo = dropping(model, {"visual.proj": 0.9})
    model.train()
    model.visual.eval()
    images = tiny.images(model)
    quiet = model.encode_image(images)
    undo.close()
    assert torch.equal(quiet, model.encode_image(images))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_projection_of_every_family_drops(family):
    torch.manual_seed(0)
    model = tiny.FAMILIES[family]().eval()
    names = [p.name for p in describe(model).parameters if p.role.endswith(".proj") and not p.name.endswith("bias")]
    for name in names:
        encode, batch = (
            (model.encode_image, tiny.images(model)) if "visual" in name else (model.encode_text, tiny.tokens(model))
        )
        owner = model.get_submodule(name.rpartition(".")[0])
        with dropping(model, {name: 0.5}):
            quiet = encode(batch)
            owner.training = True
            assert not torch.equal(encode(batch), quiet), name
            owner.training = False
        assert torch.equal(encode(batch), quiet)


def test_weight_and_bias_that_disagree_are_refused():
    model = nn.Sequential(nn.Linear(2, 2))
    (problem,) = dropout_problems(plans(model, {"0.weight": 0.1, "0.bias": 0.2}), model)
    assert "dropout on 0.bias is 0.2, but 0.1" in problem.what


def test_what_is_no_product_is_refused():
    model = nn.Sequential(nn.LayerNorm(2))
    (problem,) = dropout_problems(plans(model, {"0.weight": 0.1}), model)
    assert "it is part of a LayerNorm, and no linear map" in problem.what


def test_dropout_compiles():
    model, x = Bare(), torch.randn(5, 4)
    dropping(model, 0.5)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.manual_seed(0)
    out = compiled(x)
    torch.manual_seed(0)
    assert torch.equal(out, model(x))
