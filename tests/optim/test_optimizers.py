"""Any optimizer by name, with its own options."""

from typing import Any

import pytest
import torch
from timm.optim import Lion, NAdamW
from torch import nn

from clipfreeze.errors import PlanError
from clipfreeze.optim.optimizers import build_optimizer
from clipfreeze.policy.schema import Optimizer


def groups(weight_decay: float = 0.0) -> list[dict[str, Any]]:
    return [{"params": [nn.Parameter(torch.ones(2, 2))], "name": "one", "lr": 0.25, "weight_decay": weight_decay}]


@pytest.mark.parametrize(
    ("name", "made"),
    [
        ("adamw", torch.optim.AdamW),
        ("SGD", torch.optim.SGD),
        ("RMSProp", torch.optim.RMSprop),
        ("lion", Lion),
        ("NAdamW", NAdamW),
    ],
)
def test_torch_then_timm_whatever_the_case(name, made):
    optimizer = build_optimizer(Optimizer(name=name), groups(0.5))
    assert type(optimizer) is made
    (group,) = optimizer.param_groups
    assert (group["lr"], group["weight_decay"], group["name"]) == (0.25, 0.5, "one")


@pytest.mark.parametrize(
    "name", ["adamw", "sgd", "adagrad", "lion", "lamb", "adan", "lars", "cadamw", "madgrad", "nesterov"]
)
def test_each_takes_a_step(name):
    optimizer = build_optimizer(Optimizer(name=name), groups(0.1))
    (parameter,) = optimizer.param_groups[0]["params"]
    parameter.grad = torch.ones(2, 2)
    optimizer.step()
    assert (parameter < 1).all()


def test_options_reach_the_optimizer_lists_as_tuples():
    (group,) = build_optimizer(Optimizer(name="adamw", betas=[0.8, 0.9], eps=1e-3), groups()).param_groups
    assert group["betas"] == (0.8, 0.9)
    assert group["eps"] == 1e-3


def test_timm_s_own_defaults_hold_and_give_way():
    (group,) = build_optimizer(Optimizer(name="cadamw"), groups()).param_groups
    assert group["caution"]
    (group,) = build_optimizer(Optimizer(name="nesterov", momentum=0.5), groups()).param_groups
    assert (group["nesterov"], group["momentum"]) == (True, 0.5)


@pytest.mark.parametrize(
    ("optimizer", "complaint"),
    [
        (Optimizer(name="adamv"), r"no optimizer 'adamv'(.|\n)*did you mean (.|\n)*AdamW"),
        (Optimizer(name="lionn"), r"no optimizer 'lionn'(.|\n)*did you mean (.|\n)*lion"),
        (Optimizer(name="qqq"), "any optimizer of"),
        (Optimizer(name="Optimizer"), "no optimizer 'Optimizer'"),
        (Optimizer(name="adamw", beta=[0.9, 0.9]), r"no option 'beta'(.|\n)*did you mean betas"),
        (Optimizer(name="sgd", params=[]), "no option 'params'"),
        (Optimizer(name="lion", betta=1), r"no option 'betta'(.|\n)*did you mean betas"),
        (Optimizer(name="adamw", betas=[0.9, 2.0]), "Invalid beta"),
        (Optimizer(name="adamw", betas=3), "does not take these options"),
        (Optimizer(name="sgd", momentum=-1.0), "Invalid momentum"),
        (Optimizer(name="LBFGS", line_search=1), "no option 'line_search'"),
        (Optimizer(name="SparseAdam"), "sparse"),
        (Optimizer(name="adahessian"), "second derivatives"),
        (Optimizer(name="bnbadam"), "cannot be used here"),
    ],
    ids=str,
)
def test_a_wrong_optimizer_is_refused_with_the_fix(optimizer, complaint):
    with pytest.raises(PlanError, match=complaint):
        build_optimizer(optimizer, groups())


def test_every_wrong_option_is_told_at_once():
    with pytest.raises(PlanError) as caught:
        build_optimizer(Optimizer(name="adamw", beta=1, epz=2), groups())
    assert len(caught.value.problems) == 2


def test_decay_that_the_optimizer_would_not_read_is_refused():
    build_optimizer(Optimizer(name="rprop"), groups())
    with pytest.raises(PlanError, match=r"rprop has no weight decay(.|\n)*weight_decay = 0\.0"):
        build_optimizer(Optimizer(name="rprop"), groups(0.1))


@pytest.mark.parametrize("name", ["adafactor", "cadafactor"])
def test_adafactor_takes_the_lr_of_the_rules(name):
    sizes = []
    for lr in (0.25, 0.125):
        optimizer = build_optimizer(Optimizer(name=name), [groups()[0] | {"lr": lr}])
        (parameter,) = optimizer.param_groups[0]["params"]
        parameter.grad = torch.ones(2, 2)
        optimizer.step()
        sizes.append(1 - parameter.detach()[0, 0].item())
    assert sizes[0] == pytest.approx(2 * sizes[1])


def stepped(optimizer: Optimizer, weight: torch.Tensor, layout: Any = torch.contiguous_format) -> torch.Tensor:
    """The weight after three steps, gradients being contiguous."""
    parameter = nn.Parameter(weight.clone(memory_format=layout))
    group = {"params": [parameter], "name": "one", "lr": 0.1, "weight_decay": 0.1}
    made = build_optimizer(optimizer, [group])
    for step in range(3):
        parameter.grad = weight.cos() * (step + 1)
        made.step()
    return parameter.detach()


@pytest.mark.parametrize("options", [{"name": "adamw"}, {"name": "adam", "amsgrad": True}, {"name": "sgd"}])
def test_a_fused_step_is_the_plain_one_to_rounding_in_any_layout(options):
    weight = torch.randn(4, 8, 3, 3, generator=torch.Generator().manual_seed(0))
    plain = stepped(Optimizer(**options, fused=False), weight)
    assert (plain - weight).abs().max() > 0.01
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.testing.assert_close(stepped(Optimizer(**options), weight, layout), plain)


def test_fused_is_the_default_where_it_can_be_and_gives_way():
    def fused(of: list[dict[str, Any]], **options: Any) -> Any:
        return build_optimizer(Optimizer(**options), of).param_groups[0].get("fused")

    assert all(fused(groups(), name=name) for name in ("adamw", "Adam", "sgd"))
    assert not any(fused(groups(), name="adamw", **{other: True}) for other in ("foreach", "capturable"))
    assert not fused(groups(), name="rmsprop")
    on_meta = [{**groups()[0], "params": [nn.Parameter(torch.ones(2, 2, device="meta"))]}]
    assert not fused(on_meta, name="adamw")
