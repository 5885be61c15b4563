"""The laws over every family and every action: one row an action, which inherits them all."""

import copy
from dataclasses import dataclass
from functools import partial

import open_clip
import pytest
import torch
from life import SGD, assert_same, features, loss_of, made, picture, planned, train, weights
from torch import nn

from clipfreeze import changes, models
from clipfreeze.anatomy.partition import describe
from clipfreeze.changes import Applied, apply
from clipfreeze.errors import ApplyError, PlanError
from clipfreeze.inject.addition import Addition
from clipfreeze.models import build_on_meta
from clipfreeze.plan.build import resolve
from clipfreeze.policy.loading import load_policy

import tiny


@dataclass
class Action:
    """A policy's rules, the families where they are refused, and whether the output stays at injection."""

    rules: str
    refused: tuple[str, ...] = ()
    identity: bool = True


def rule(match: str, *settings: str) -> str:
    return "\n".join(["[[rule]]", f'match = "{match}"', *settings, ""])


NO_ATTENTION = ("clip_resnet", "clip_convnext")
NO_TOKENS = (*tiny.HIERARCHICAL, "relpos")
VISUAL = "prompt = { length = 2, depth = 2 }"

ACTIONS = {
    "lora": Action(rule("@blocks", 'lora = { rank = 2, targets = "q,v,out,fc1" }')),
    "lora everywhere": Action(rule("@{vision,text}", "lora = { rank = 1, dropout = 0.0, alpha = 2.0 }")),
    "dora": Action(rule("@blocks", 'lora = { rank = 2, variant = "dora", targets = "k,v,fc2" }')),
    "pissa": Action(rule("@blocks", 'lora = { rank = 2, variant = "rslora", init = "pissa", targets = "q,out,fc1" }')),
    "adapter": Action(rule("@blocks", "adapter = { dim = 4 }")),
    "adapter after attention": Action(
        rule("@vision.blocks", 'adapter = { dim = 4, after = "attn" }'), refused=NO_ATTENTION
    ),
    "parallel adapter": Action(rule("@text.blocks", 'adapter = { dim = 4, after = "both", placement = "parallel" }')),
    "feature adapter": Action(rule("@{vision,text}", 'adapter = { after = "tower", reduction = 4, ratio = 0.2 }')),
    "prompt": Action(rule("@text", "prompt = { length = 3 }"), identity=False),
    "deep prompt": Action(rule("@text", "prompt = { length = 2, depth = 3 }"), identity=False),
    "prompt at the end": Action(rule("@text", 'prompt = { length = 2, position = "end" }'), identity=False),
    "visual prompt": Action(rule("@vision", VISUAL), refused=NO_TOKENS, identity=False),
    "coupled prompts": Action(
        rule("@text", VISUAL) + rule("@vision", "prompt = { length = 2, depth = 2, couple = true }"),
        refused=NO_TOKENS,
        identity=False,
    ),
    "head": Action(rule("@vision", 'head = { classes = ["a", "b", "c"], init = "random" }')),
}
CASES = [
    pytest.param(family, action, id=f"{name}-{family}")
    for name, action in ACTIONS.items()
    for family in tiny.FAMILIES
    if family not in action.refused
]
REFUSED = [
    pytest.param(family, action, id=f"{name}-{family}") for name, action in ACTIONS.items() for family in action.refused
]
every = pytest.mark.parametrize(("family", "action"), CASES)
core = pytest.mark.parametrize(("family", "action"), [case for case in CASES if case.values[0] in tiny.CORE])


def applied_to(model: nn.Module, action: Action, folder) -> Applied:
    return apply(planned(model, folder, action.rules + SGD), model)


def stirred(applied: Applied) -> Applied:
    """As if trained: zeros would hide what is wrong."""
    torch.manual_seed(7)
    with torch.no_grad():
        for _, addition in applied.additions:
            for parameter in addition.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return applied


@every
def test_law_1_nothing_changes_at_injection_and_nothing_is_left_when_off(family, action, tmp_path):
    model = made(family).eval()
    close = (
        partial(torch.allclose, atol=1e-5) if family == "relpos" else torch.equal
    )  # its kernel: does the bias train?

    def both() -> list[torch.Tensor]:
        """Without gradients, on torch's fused path; with them, without it, unless nothing trains any more."""
        with torch.no_grad():
            found = list(features(model))
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            return [*found, *(feature.detach() for feature in features(model))]
        finally:
            torch.backends.mha.set_fastpath_enabled(True)

    before = both()
    applied = applied_to(model, action, tmp_path)
    assert applied.additions
    assert not action.identity or all(map(close, before, both()))
    stirred(applied)
    with applied.disabled():
        assert all(map(close, before, both()))


@every
def test_laws_2_3_and_7_the_base_rests_while_all_that_was_added_learns(family, action, tmp_path):
    model = made(family)
    base = weights(model)
    applied = stirred(applied_to(model, action, tmp_path))
    optimizer = applied.optimizer()
    model.train()
    loss_of(model).backward()
    assert all(p.grad is not None for p in applied.trainable().values())
    optimizer.step()
    added = {f"{site.path}.{name}" for site, part in applied.additions for name in part.state_dict()}
    assert_same(base, {name: tensor for name, tensor in weights(model).items() if name not in added})
    for module in model.modules():
        if isinstance(module, Addition):
            assert module.training
        elif not any(isinstance(inner, Addition) for inner in module.modules()) and any(
            True for _ in module.parameters()
        ):
            inside = any(module is inner for _, part in applied.additions for inner in part.modules())
            assert module.training == inside


@every
def test_law_4_the_plan_is_what_apply_does(family, action, tmp_path):
    model = made(family)
    plan = planned(model, tmp_path, action.rules + SGD)
    apply(plan, model)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert {p.name: p.shape for p in plan.parameters} == shapes
    assert {p.name for p in plan.trainable} == {name for name, p in model.named_parameters() if p.requires_grad}
    assert plan.totals.injected == sum(p.size for p in plan.parameters if p.origin != "model") > 0
    assert type(plan).model_validate_json(plan.model_dump_json()) == plan


@every
def test_law_5_remove_gives_back_the_plain_model(family, action, tmp_path):
    model = made(family)
    before, state = picture(model), weights(model)
    applied = applied_to(model, action, tmp_path)
    model.eval()
    features(model)
    applied.remove()
    model.train()
    assert picture(model) == before
    assert_same(state, weights(model))


@pytest.mark.parametrize("family", tiny.CORE)
@pytest.mark.parametrize("name", ["lora everywhere", "dora", "pissa"])
def test_law_5_merging_gives_a_plain_model_with_the_same_features(name, family, tmp_path):
    model = made(family).eval()
    kinds = [type(module) for module in model.modules()]
    state = weights(model)
    applied = stirred(applied_to(model, ACTIONS[name], tmp_path))
    adapted = [feature.detach() for feature in features(model)]
    held = weights(model)
    assert applied.merge() < 1e-4
    assert list(model.state_dict()) == list(state)
    assert [type(module) for module in model.modules()] == kinds
    for ours, merged in zip(adapted, features(model), strict=True):
        torch.testing.assert_close(merged, ours, rtol=1e-4, atol=1e-5 * float(ours.abs().max()))
    applied.unmerge()
    assert_same(held, weights(model))
    assert all(map(torch.equal, adapted, features(model)))


@pytest.mark.parametrize("action", ACTIONS.values(), ids=ACTIONS)
def test_law_6_a_failure_after_everything_was_added_leaves_the_model_as_it_was(action, tmp_path, monkeypatch):
    model = made()
    plan = planned(model, tmp_path, action.rules + SGD)
    before, state = picture(model), weights(model)

    def fail(*_: object) -> None:
        raise RuntimeError("late")

    monkeypatch.setattr(changes, "drop_inputs", fail)
    with pytest.raises(RuntimeError, match="late"):
        apply(plan, model)
    assert picture(model) == before
    assert_same(state, weights(model))


@core
def test_a_saved_policy_gives_the_same_features_on_a_fresh_base(family, action, tmp_path):
    model = made(family)
    applied = stirred(applied_to(model, action, tmp_path))
    train(applied, 1) if not any(site.kind == "head" for site, _ in applied.additions) else None
    applied.save(tmp_path / "saved")
    fresh = made(family)
    changes.load(tmp_path / "saved", fresh)
    assert all(map(torch.equal, features(model.eval()), features(fresh.eval())))
    assert_same(weights(model), weights(fresh))
    with pytest.raises(ApplyError, match="already"):
        changes.load(tmp_path / "saved", fresh)


@core
def test_a_copy_works_with_its_own_parts(family, action, tmp_path):
    model = made(family)
    applied = stirred(applied_to(model, action, tmp_path))
    model.eval()
    twin = copy.deepcopy(model)
    kept = [feature.detach() for feature in features(model)]
    assert all(map(torch.equal, kept, features(twin)))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, Addition):
                for parameter in module.parameters():
                    parameter.zero_()
    assert all(map(torch.equal, kept, features(twin)))
    applied.remove()
    assert all(map(torch.equal, kept, features(twin)))


@pytest.mark.parametrize(("family", "action"), REFUSED)
def test_where_an_action_does_not_apply_the_error_has_its_place(family, action, tmp_path):
    model = made(family)
    with pytest.raises(PlanError) as caught:
        planned(model, tmp_path, action.rules + SGD)
    for problem in caught.value.problems:
        assert problem.path is not None
        assert problem.path.endswith("mine.toml")
        assert problem.line is not None
        assert problem.fix


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")  # open_clip's call
@pytest.mark.parametrize("family", ["clip_vit", "clip_resnet", "siglip", "coca", "hf_text"])
@pytest.mark.parametrize("name", ["lora", "adapter", "deep prompt", "coupled prompts"])
def test_checkpointing_changes_no_gradient(name, family, tmp_path):
    if family in ACTIONS[name].refused:
        pytest.skip("refused on this family")
    gradients = []
    for checkpointing in (False, True):
        model = made(family)
        applied = stirred(applied_to(model, ACTIONS[name], tmp_path))
        model.train()
        model.set_grad_checkpointing(checkpointing)
        loss_of(model).backward()
        gradients.append({name: p.grad for name, p in applied.trainable().items()})
    for of, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][of], gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo looks at what it compiles
@pytest.mark.parametrize("name", ["lora everywhere", "coupled prompts"])  # the others: tests/inject
def test_compiled_it_computes_the_same(name, tmp_path):
    torch.manual_seed(0)
    model = tiny.clip_vit({"layers": 2}, {"layers": 2})
    stirred(applied_to(model, ACTIONS[name], tmp_path))
    model.eval()
    compiled = torch.compile(model, backend="aot_eager")
    images, tokens = tiny.images(model), tiny.tokens(model)
    for ours, theirs in zip(compiled(images, tokens), model(images, tokens), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["ViT-S-32", "RN50", "MobileCLIP-S1", "EVA02-B-16", "ViT-B-16-SigLIP", "coca_ViT-B-32"]
)
def test_law_4_on_real_models_the_plan_made_without_weights_is_what_apply_does(name):
    anatomy = describe(build_on_meta(name), name)
    with models._Undrawn():
        model = open_clip.create_model(name)
    keys = list(model.state_dict())
    for policy, knobs in (("lora", {}), ("adapter", {}), ("prompt", {"init": "random"})):
        plan = resolve(load_policy(policy, **knobs), anatomy)
        applied = apply(plan, model)
        shapes = {p.name: p.shape for p in plan.trainable}
        assert {n: tuple(p.shape) for n, p in model.named_parameters() if p.requires_grad} == shapes
        groups = {group["name"]: sum(p.numel() for p in group["params"]) for group in applied.optimizer().param_groups}
        assert groups == {group.name: group.parameters for group in plan.groups}
        applied.remove()
        assert list(model.state_dict()) == keys
