"""Start values are drawn in place, and undone."""

from contextlib import ExitStack

import pytest
import torch
from torch import nn

from clipfreeze.inject.init import init_problems, overwrite, start_anew
from clipfreeze.plan.value import PlannedParameter


def one(init: float | str | None, shape: tuple[int, ...] = (40, 30)) -> tuple[nn.Module, list[PlannedParameter]]:
    model = nn.Module()
    model.w = nn.Parameter(torch.ones(shape))
    plan = PlannedParameter(name="w", shape=shape, dtype="float32", role="vision.proj", trainable=False, init=init)
    return model, [plan]


@pytest.mark.parametrize(
    ("init", "mean", "spread"),
    [
        ("zeros", 0, 0),
        (2.5, 2.5, 0),
        (-3, -3, 0),
        ("normal(0.02)", 0, 0.02),
        ("xavier", 0, (2 / 70) ** 0.5),
        (None, 1, 0),
    ],
)
def test_each_start_value_has_its_mean_and_spread(init, mean, spread):
    torch.manual_seed(0)
    model, plan = one(init)
    parameter = model.w
    start_anew(plan, model, ExitStack())
    assert model.w is parameter
    assert parameter.requires_grad
    assert parameter.mean().item() == pytest.approx(mean, abs=0.1 * spread)
    assert parameter.std().item() == pytest.approx(spread, rel=0.1)


def test_start_values_come_from_the_global_generator():
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        model, plan = one("normal(1e-2)")
        start_anew(plan, model, ExitStack())
        drawn.append(model.w.detach().clone())
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_undo_brings_the_former_values_back():
    model, plan = one("xavier")
    with ExitStack() as undo:
        start_anew(plan, model, undo)
        overwrite(model, {"w": torch.zeros(40, 30)}, undo)
        assert not model.w.any()
    assert torch.equal(model.w, torch.ones(40, 30))


@pytest.mark.parametrize(("init", "shape", "wrong"), [("xavier", (3,), 1), ("xavier", (3, 2), 0), ("zeros", (), 0)])
def test_xavier_needs_two_dimensions(init, shape, wrong):
    assert len(list(init_problems(one(init, shape)[1]))) == wrong
