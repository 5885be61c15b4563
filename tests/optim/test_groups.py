"""Groups are a partition of what trains, proved."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from clipfreeze.anatomy.partition import describe
from clipfreeze.errors import ApplyError
from clipfreeze.optim.groups import param_groups, prove_groups
from clipfreeze.plan.build import resolve
from clipfreeze.plan.value import Plan
from clipfreeze.policy.loading import load_policy

import tiny

MODEL = tiny.clip_vit()
PARAMETERS = dict(MODEL.named_parameters())
ANATOMY = describe(MODEL)


def plan_of(settings: dict[str, tuple[float, float]], folder) -> Plan:
    """Of each trained parameter, lr and weight decay."""
    rules = [
        f'[[rule]]\nmatch = "{name}"\ntrain = true\nlr = {lr!r}\nweight_decay = {decay!r}\n'
        for name, (lr, decay) in settings.items()
    ]
    path = folder / "mine.toml"
    path.write_text("".join(rules), encoding="utf-8")
    return resolve(load_policy(path), ANATOMY)


def made(plan: Plan) -> torch.optim.Optimizer:
    for parameter in plan.parameters:
        PARAMETERS[parameter.name].requires_grad_(parameter.trainable)
    return torch.optim.SGD(param_groups(plan, PARAMETERS), lr=1.0)


@settings(max_examples=25)
@given(
    st.dictionaries(
        st.sampled_from(sorted(PARAMETERS)),
        st.tuples(st.sampled_from([1e-5, 1e-4, 1.00000001e-4]), st.sampled_from([0.0, 0.1])),
        min_size=1,
        max_size=12,
    )
)
def test_any_choice_of_parameters_is_partitioned_with_its_own_settings(tmp_path_factory, chosen):
    plan = plan_of(chosen, tmp_path_factory.mktemp("policy"))
    optimizer = made(plan)
    prove_groups(optimizer, plan, PARAMETERS)
    names = {id(parameter): name for name, parameter in PARAMETERS.items()}
    found = {
        names[id(tensor)]: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for tensor in group["params"]
    }
    assert found == chosen
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(chosen)


@pytest.fixture
def plan(tmp_path):
    return plan_of({"visual.proj": (1e-4, 0.1), "text_projection": (1e-5, 0.1), "logit_scale": (1e-5, 0.0)}, tmp_path)


def test_the_proof_finds_a_tensor_in_two_groups(plan):
    optimizer = made(plan)
    optimizer.param_groups[0]["params"].append(optimizer.param_groups[1]["params"][0])
    with pytest.raises(ApplyError, match="is in 2 param groups"):
        prove_groups(optimizer, plan, PARAMETERS)


def test_the_proof_finds_a_tensor_in_no_group(plan):
    optimizer = made(plan)
    optimizer.param_groups[0]["params"].clear()
    with pytest.raises(ApplyError, match="is in 0 param groups"):
        prove_groups(optimizer, plan, PARAMETERS)


def test_the_proof_finds_a_frozen_tensor(plan):
    optimizer = made(plan)
    optimizer.param_groups[0]["params"].append(PARAMETERS["visual.conv1.weight"])
    with pytest.raises(ApplyError, match=r"visual\.conv1\.weight is in 1 param groups"):
        prove_groups(optimizer, plan, PARAMETERS)
    optimizer = made(plan)
    PARAMETERS["logit_scale"].requires_grad_(False)
    with pytest.raises(ApplyError, match="logit_scale has requires_grad=False"):
        prove_groups(optimizer, plan, PARAMETERS)


def test_the_proof_finds_a_stranger(plan):
    optimizer = made(plan)
    optimizer.param_groups[0]["params"].append(nn.Parameter(torch.zeros(1)))
    with pytest.raises(ApplyError, match="1 tensors in param groups are not of the model"):
        prove_groups(optimizer, plan, PARAMETERS)


@pytest.mark.parametrize("setting", ["lr", "weight_decay", "name"])
def test_the_proof_finds_another_setting(plan, setting):
    optimizer = made(plan)
    optimizer.param_groups[0][setting] = 0.5
    with pytest.raises(ApplyError, match="is in group"):
        prove_groups(optimizer, plan, PARAMETERS)


def test_a_tied_tensor_counts_once(tmp_path):
    model = tiny.clip_vit()
    model.visual.tied = model.visual.proj
    path = tmp_path / "mine.toml"
    path.write_text('[[rule]]\nmatch = "@projections"\ntrain = true\nlr = 1e-4\n', encoding="utf-8")
    plan = resolve(load_policy(path), model)
    parameters = dict(model.named_parameters())
    for parameter in plan.parameters:
        parameters[parameter.name].requires_grad_(parameter.trainable)
    optimizer = torch.optim.SGD(param_groups(plan, parameters))
    prove_groups(optimizer, plan, parameters)
    held = [tensor for group in optimizer.param_groups for tensor in group["params"]]
    assert [tensor is model.visual.tied for tensor in held].count(True) == 1
