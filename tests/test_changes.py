"""Applying a plan: the laws over every family, transactions, and what is refused."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from life import SGD, assert_same, features, loss_of, made, picture, planned, train, weights
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from clipfreeze import changes, stored
from clipfreeze.changes import Applied, apply
from clipfreeze.errors import ApplyError, PlanError, RunError
from clipfreeze.plan.build import resolve
from clipfreeze.policy.loading import builtin_policies, load_policy

import tiny

SETS = {
    "all": '["*"]',
    "last block": '["@vision.blocks[-1:]", "@text.blocks[-1:]"]',
    "projections": '["@projections"]',
    "logit scale": '["@logit_scale"]',
    "norms": '["@norms"]',
}
"""What trains, as a match."""


def train_rule(match: str, *settings: str) -> str:
    return "\n".join(["[[rule]]", f"match = {match}", "train = true", *settings, ""])


def applied_to(model: nn.Module, folder: Path, match: str = SETS["projections"], *settings: str) -> Applied:
    return apply(planned(model, folder, train_rule(match, *settings) + SGD), model)


families = pytest.mark.parametrize("family", tiny.FAMILIES)
sets = pytest.mark.parametrize("match", SETS.values(), ids=SETS)


@sets
@families
def test_law_1_applying_never_changes_the_output(family, match, tmp_path):
    model = made(family).eval()
    with torch.no_grad():
        before = features(model)
        applied_to(model, tmp_path, match)
        after = features(model)
    assert all(map(torch.equal, before, after))


@sets
@families
def test_law_2_what_is_frozen_is_bit_equal_after_training(family, match, tmp_path):
    model = made(family)
    applied = applied_to(model, tmp_path, match)
    before = weights(model)
    train(applied)
    after = weights(model)
    trained = set(applied.trainable())
    assert_same(*({k: v for k, v in values.items() if k not in trained} for values in (before, after)))
    assert any(not torch.equal(before[name], after[name]) for name in trained)


@sets
@families
def test_law_3_each_trainable_tensor_is_in_one_group_and_law_4_as_planned(family, match, tmp_path):
    model = made(family)
    plan = planned(model, tmp_path, train_rule(match) + SGD)
    applied = apply(plan, model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    held = [names[id(tensor)] for group in applied.optimizer().param_groups for tensor in group["params"]]
    assert sorted(held) == sorted(name for name, p in model.named_parameters() if p.requires_grad)
    assert sorted(held) == sorted(parameter.name for parameter in plan.trainable)
    assert resolve(load_policy(tmp_path / "mine.toml"), model) == plan


@sets
@families
def test_law_5_remove_gives_back_the_plain_model(family, match, tmp_path):
    model = made(family)
    list(model.parameters())[3].requires_grad_(False)
    list(model.modules())[5].eval()
    flags, before = picture(model), weights(model)
    applied = applied_to(model, tmp_path, match)
    assert picture(model) != flags
    applied.optimizer()
    model.train()
    applied.remove()
    assert picture(model) == flags
    assert_same(weights(model), before)
    applied.remove()  # once more does nothing


@pytest.mark.parametrize("policy", [name for name in builtin_policies() if name != "base"])
@pytest.mark.parametrize("family", ["clip_vit", "clip_resnet"])
def test_the_built_in_policies_keep_the_laws(family, policy):
    model = made(family).eval()
    with torch.no_grad():
        before = features(model)
    flags = picture(model)
    applied = apply(resolve(load_policy(policy, **tiny.KNOBS.get(policy, {})), model), model)
    if "prompt" not in policy:
        with torch.no_grad():
            assert all(map(torch.equal, before, features(model)))
    start = weights(model)
    train(applied)
    trained = set(applied.trainable())
    assert_same(*({k: v for k, v in values.items() if k not in trained} for values in (start, weights(model))))
    applied.remove()
    assert picture(model) == flags


RICH = """
[[rule]]
match = "@projections"
train = true
init = "normal(0.02)"
dropout = 0.1
l2sp = 0.5
[[rule]]
match = "@logit_scale"
train = true
clamp = [0, 4.6052]
[optimizer]
lr = 1e-3
"""
"""Every effect there is."""


@pytest.mark.parametrize(
    "step", ["start_anew", "_copies", "set_trainable", "stand_still", "drop_inputs", "_warn_of_clamps"]
)
@pytest.mark.parametrize("late", [False, True])
def test_law_6_a_failure_at_any_step_leaves_the_model_as_it_was(step, late, tmp_path, monkeypatch):
    model = made()
    plan = planned(model, tmp_path, RICH)
    flags, before = picture(model), weights(model)
    real = getattr(changes, step)

    def failing(*args):
        if late:
            real(*args)
        raise RuntimeError("no luck")

    monkeypatch.setattr(changes, step, failing)
    with pytest.raises(RuntimeError, match="no luck"):
        apply(plan, model)
    assert picture(model) == flags
    assert_same(weights(model), before)
    monkeypatch.undo()
    apply(plan, model)


@sets
@families
def test_gradients_are_those_of_a_loop_by_hand(family, match, tmp_path):
    model = made(family).eval()
    by_hand = copy.deepcopy(model)
    trained = applied_to(model, tmp_path, match).trainable()
    for name, parameter in by_hand.named_parameters():
        parameter.requires_grad_(name in trained)
    loss_of(model).backward()
    loss_of(by_hand).backward()
    for (name, parameter), other in zip(model.named_parameters(), by_hand.parameters(), strict=True):
        assert (parameter.grad is None) == (other.grad is None), name
        assert parameter.grad is None or torch.equal(parameter.grad, other.grad), name


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")  # open_clip's call
@pytest.mark.parametrize("family", ["clip_vit", "clip_convnext", "siglip", "coca", "hf_text"])
def test_b11_checkpointing_behind_a_frozen_prefix_gives_the_same_gradients(family, tmp_path):
    grads = []
    for checkpointing in (False, True):
        model = made(family)
        applied = applied_to(model, tmp_path, SETS["last block"])
        model.set_grad_checkpointing(checkpointing)
        model.train()
        torch.manual_seed(0)
        loss_of(model).backward()
        grads.append({name: parameter.grad for name, parameter in applied.trainable().items()})
    for name, grad in grads[0].items():
        assert grad is not None
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", tiny.BATCH_NORM)
def test_b01_frozen_or_not_batch_statistics_rest(family, tmp_path):
    for match in (SETS["projections"], SETS["norms"], SETS["all"]):
        model = made(family)
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        train(applied_to(model, tmp_path, match), steps=3)
        assert_same(buffers, dict(model.named_buffers()))


def test_a_copy_of_an_applied_model_stands_still_by_itself(tmp_path):
    model = made("hf_text")
    applied_to(model, tmp_path, SETS["last block"])
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [p.requires_grad for p in other.parameters()] == [p.requires_grad for p in model.parameters()]
        assert_same(weights(other), weights(model))
        model.eval()
        other.train()
        modes = {name: module.training for name, module in other.named_modules()}
        assert modes["text"]
        assert not modes["text.transformer.embeddings.dropout"]
        assert not any(module.training for module in model.modules())
        with pytest.raises(ApplyError, match="already"):
            applied_to(other, tmp_path)


@pytest.mark.parametrize("family", ["clip_vit", "siglip", "hf_text"])
def test_copies_keep_dropout_on_their_own_projections(family, tmp_path):
    model = made(family)
    rule = train_rule('"@{vision,text}.proj"', "dropout = 0.5")
    applied = apply(planned(model, tmp_path, rule + SGD), model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        model.eval()
        other.train()
        quiet = model.encode_text(tiny.tokens(model))
        torch.manual_seed(0)
        noisy = other.encode_text(tiny.tokens(model))
        assert not torch.equal(quiet, noisy)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        assert torch.equal(model.encode_text(tiny.tokens(model)), quiet)
        assert not other.encode_text(tiny.tokens(model)).any()
    applied.remove()


# --- what is refused ---------------------------------------------------------------------------------------------


class Wrapped(nn.Module):
    def __init__(self, module: nn.Module, name: str) -> None:
        super().__init__()
        self.add_module(name, module)


@pytest.mark.parametrize("name", ["module", "_orig_mod", "_fsdp_wrapped_module"])
def test_a_wrapped_model_is_refused(name, tmp_path):
    model = made()
    plan = planned(model, tmp_path, train_rule(SETS["all"]) + SGD)
    with pytest.raises(ApplyError, match="apply to the bare model, then wrap it"):
        apply(plan, Wrapped(model, name))
    model.visual = Wrapped(model.visual, name)
    with pytest.raises(ApplyError, match=r"model\.visual is wrapped in Wrapped"):
        apply(plan, model)


def test_applying_twice_is_refused_until_removed(tmp_path):
    model = made()
    applied = applied_to(model, tmp_path)
    flags = picture(model)
    with pytest.raises(ApplyError, match=r"'mine' is applied to this model already(.|\n)*applied\.remove\(\)"):
        apply(applied.plan, model)
    assert picture(model) == flags
    applied.remove()
    with pytest.raises(ApplyError, match="was removed"):
        applied.optimizer()
    apply(applied.plan, model)


def test_another_model_is_refused_by_names_and_shapes(tmp_path):
    plan = planned(made(), tmp_path, train_rule(SETS["all"]) + SGD)
    with pytest.raises(ApplyError, match=r"missing positional_embedding, .* and \d+ more; unknown text\."):
        apply(plan, made("custom_text"))
    wider = tiny.clip_vit({"width": 48})
    with pytest.raises(ApplyError, match=r"visual.class_embedding is \(48,\), not \(32,\)"):
        apply(plan, wider)


def test_a_model_without_weights_is_refused(tmp_path):
    with torch.device("meta"):
        model = tiny.clip_vit()
    plan = planned(model, tmp_path, train_rule(SETS["all"]) + SGD)
    with pytest.raises(ApplyError, match="on the meta device"):
        apply(plan, model)
    apply(plan, made())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_b48_b53_half_precision_may_rest_but_not_train(dtype, tmp_path):
    model = made().to(dtype)
    plan = planned(model, tmp_path, train_rule('"@logit_scale"') + SGD)
    with pytest.raises(ApplyError, match="load the model in fp32"):
        apply(plan, model)
    model.logit_scale.data = model.logit_scale.data.float()
    apply(plan, model)
    assert model.visual.proj.dtype == dtype


def test_xavier_on_a_vector_is_refused_before_anything_moves(tmp_path):
    model = made("siglip")
    before, flags = weights(model), picture(model)
    rule = train_rule('"@text.proj"', 'init = "xavier"')
    with pytest.raises(ApplyError, match=r"xavier.* on text\.text_projection\.bias: it needs two dimensions"):
        apply(planned(model, tmp_path, rule + SGD), model)
    assert_same(weights(model), before)
    assert picture(model) == flags


def test_a_wrong_optimizer_is_found_before_anything_moves(tmp_path):
    model = made()
    flags = picture(model)
    text = train_rule(SETS["all"]) + '[optimizer]\nname = "adamv"\nlr = 1\n[schedule]\nname = "cosin"\n'
    with pytest.raises(PlanError, match=r"adamv(.|\n)*cosin"):
        apply(planned(model, tmp_path, text), model)
    assert picture(model) == flags


# --- training ----------------------------------------------------------------------------------------------------


def test_earlier_locks_of_the_user_give_way_and_fixed_embeddings_do_not(tmp_path):
    model = tiny.clip_vit({"pos_embed_type": "sin_cos_2d"})
    model.lock_image_tower()
    model.lock_text_tower()
    applied = applied_to(model, tmp_path, SETS["all"])
    locked = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert locked == ["visual.positional_embedding"]
    assert len(applied.trainable()) == len(list(model.parameters())) - 1


def test_b28_the_lr_in_the_group_is_the_plan_s_times_the_schedule(tmp_path):
    model = made()
    text = """
    [[rule]]
    match = "*"
    train = true
    layer_decay = 0.5
    [[rule]]
    match = "@projections"
    lr_scale = 10
    [[rule]]
    match = "@logit_scale"
    schedule = "constant"
    [optimizer]
    name = "adamw"
    lr = 1e-3
    [schedule]
    name = "linear"
    warmup = 2
    """
    applied = apply(planned(model, tmp_path, text), model)
    optimizer = applied.optimizer()
    scheduler = applied.scheduler(optimizer, 6)
    assert len(optimizer.param_groups) > 4
    for step, factor in enumerate([0.5, 1, 1, 0.75, 0.5, 0.25, 0]):
        for group, of_plan in zip(optimizer.param_groups, applied.plan.groups, strict=True):
            expected = (1 if step else 0.5) if of_plan.schedule == "constant" else factor
            assert group["lr"] == pytest.approx(of_plan.lr * expected), step
        optimizer.step()
        scheduler.step()


def test_an_sgd_step_has_the_very_size_of_the_lr(tmp_path):
    model = made()
    text = train_rule(SETS["projections"]) + train_rule('"@logit_scale"', "lr_scale = 10") + SGD
    applied = apply(planned(model, tmp_path, text), model)
    optimizer, before = applied.optimizer(), weights(model)
    loss_of(model).backward()
    optimizer.step()
    for name, parameter in applied.trainable().items():
        lr = 0.1 if name == "logit_scale" else 0.01
        assert torch.equal(parameter, torch.add(before[name], parameter.grad, alpha=-lr)), name


def test_b49_a_clamp_holds_after_every_step_on_the_same_parameter(tmp_path):
    model = made()
    model.logit_scale.data.fill_(4.59)
    same = model.logit_scale
    applied = applied_to(model, tmp_path, '"@logit_scale"', "clamp = [0, 4.6052]", "lr = 1")
    optimizer = applied.optimizer()
    for sign in (-1, -1, 1, 1, 1, 1, 1, 1):
        same.grad = torch.tensor(sign * 1.0)
        optimizer.step()
        assert model.logit_scale is same
        assert 0 <= same.item() <= 4.6052001
    applied.remove()
    same.grad = torch.tensor(9.0)
    optimizer.step()
    assert same.item() < 0


def test_a_start_outside_the_clamp_is_told_and_kept(tmp_path):
    model = made()
    model.logit_scale.data.fill_(4.77)
    with pytest.warns(UserWarning, match=r"first step will clamp logit_scale to \[0.0, 4.6052\]") as told:
        applied = applied_to(model, tmp_path, '"@logit_scale"', "clamp = [0, 4.6052]")
    assert told[0].filename == __file__
    assert model.logit_scale.item() == pytest.approx(4.77)
    train(applied, 1)
    assert model.logit_scale.item() <= 4.6052001


def test_a_frozen_scale_is_not_clamped(tmp_path):
    model = made()
    model.logit_scale.data.fill_(4.77)
    text = "[[rule]]\nmatch = '@logit_scale'\nclamp = [0, 4.6]\noptional = true\n" + train_rule(SETS["projections"])
    train(apply(planned(model, tmp_path, text + SGD), model))
    assert model.logit_scale.item() == pytest.approx(4.77)


@pytest.mark.parametrize("init", ["", 'init = "normal(0.5)"'])
def test_l2sp_is_the_gradient_of_its_penalty(init, tmp_path):
    model = made()
    applied = applied_to(model, tmp_path, SETS["projections"], "l2sp = 0.3", init)
    start = {name: parameter.detach().clone() for name, parameter in applied.trainable().items()}
    assert applied.penalty().item() == 0
    optimizer = applied.optimizer()
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(model).backward()
        own = {name: parameter.grad.clone() for name, parameter in applied.trainable().items()}
        penalty = sum(0.3 * (p - start[name]).square().sum() for name, p in applied.trainable().items())
        torch.testing.assert_close(applied.penalty(), penalty)
        pull = torch.autograd.grad(penalty, list(applied.trainable().values()))
        optimizer.step()
        for (name, parameter), expected in zip(applied.trainable().items(), pull, strict=True):
            torch.testing.assert_close(parameter.grad, own[name] + expected)
    assert applied.penalty().item() > 0


def test_groups_that_are_not_the_plan_s_are_our_own_fault(tmp_path, monkeypatch):
    applied = applied_to(made(), tmp_path)
    real = changes.param_groups

    def lossy(plan, parameters):
        (group,) = real(plan, parameters)
        return [group | {"params": group["params"][1:]}]

    monkeypatch.setattr(changes, "param_groups", lossy)
    with pytest.raises(ApplyError, match="is in 0 param groups"):
        applied.optimizer()


def test_b24_groups_are_a_partition_with_the_lr_of_the_last_rule(tmp_path):
    model = made()
    text = (
        train_rule('"visual.*"', "lr = 1e-3")
        + train_rule('"visual.transformer.*"', "lr = 1e-4")
        + train_rule('"@vision.blocks[-1:]"', "lr = 1e-5")
    )
    optimizer = apply(planned(model, tmp_path, text), model).optimizer()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    lrs = {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(lrs)
    for name, lr in lrs.items():
        last, block = "resblocks.2." in name, "visual.transformer." in name
        assert lr == (1e-5 if last else 1e-4 if block else 1e-3), name


def test_l2sp_refuses_a_closure_that_would_undo_it(tmp_path):
    optimizer = applied_to(made(), tmp_path, SETS["projections"], "l2sp = 0.3").optimizer()
    with pytest.raises(RunError, match="closure"):
        optimizer.step(lambda: 1.0)
    with pytest.raises(RunError, match="closure"):
        optimizer.step(closure=lambda: 1.0)


def test_no_penalty_without_l2sp(tmp_path):
    assert applied_to(made(), tmp_path).penalty().item() == 0


# --- save and load -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", tiny.CORE)
def test_a_saved_policy_loads_on_a_fresh_base(family, tmp_path):
    model, fresh = made(family), made(family)
    applied = applied_to(model, tmp_path, SETS["last block"])
    train(applied)
    applied.save(tmp_path / "new" / "run")
    loaded = changes.load(tmp_path / "new" / "run", fresh)
    assert loaded.plan == applied.plan
    assert_same(weights(fresh), weights(model))
    assert [p.requires_grad for p in fresh.parameters()] == [p.requires_grad for p in model.parameters()]
    assert sorted(path.name for path in (tmp_path / "new" / "run").iterdir()) == ["plan.json", "weights.safetensors"]
    assert len({path.stat().st_mode for path in (tmp_path / "new" / "run").iterdir()}) == 1
    loaded.optimizer()


def test_what_starts_anew_is_saved_and_l2sp_pulls_where_it_pulled(tmp_path):
    model = made()
    text = RICH + "[[rule]]\nmatch = 'visual.ln_pre.weight'\ninit = 'normal(0.5)'\n"
    applied = apply(planned(model, tmp_path, text), model)
    train(applied)
    applied.save(tmp_path)
    fresh = made()
    loaded = changes.load(tmp_path, fresh)
    assert_same(weights(fresh), weights(model))
    assert loaded.penalty().item() == applied.penalty().item() > 0


def test_saving_again_replaces_the_files(tmp_path):
    applied = applied_to(made(), tmp_path)
    applied.save(tmp_path)
    train(applied)
    applied.save(tmp_path)
    fresh = made()
    changes.load(tmp_path, fresh)
    assert_same(weights(fresh), weights(applied.model))


@pytest.fixture
def saved(tmp_path):
    model = made()
    applied = applied_to(model, tmp_path)
    train(applied)
    applied.save(tmp_path)
    return tmp_path


def refused(folder: Path, model: nn.Module, match: str) -> None:
    flags, before = picture(model), weights(model)
    with pytest.raises(ApplyError, match=match):
        changes.load(folder, model)
    assert picture(model) == flags
    assert_same(weights(model), before)


def test_b67_a_policy_does_not_load_on_another_base(saved):
    refused(saved, tiny.clip_vit({"width": 48}), r"visual.class_embedding is \(48,\), not \(32,\)")
    refused(saved, made(seed=1), "belongs to another base model")
    refused(saved, changes.load(saved, made()).model, "already")


def test_another_buffer_is_another_base(tmp_path):
    applied_to(made("clip_resnet"), tmp_path).save(tmp_path)
    other = made("clip_resnet")
    other.visual.bn1.running_mean += 1
    refused(tmp_path, other, "belongs to another base model")


def test_a_missing_or_broken_plan_is_refused(saved):
    plan = saved / "plan.json"
    whole = plan.read_text(encoding="utf-8")
    for broken in ("", whole[:-9], '{"version": 1}', "\x00"):
        plan.write_text(broken, encoding="utf-8")
        refused(saved, made(), r"plan\.json is no plan of this version")
    plan.write_bytes(b"\xff\xfe")
    refused(saved, made(), r"plan\.json is no plan of this version")
    plan.unlink()
    refused(saved, made(), r"cannot read .*plan\.json: No such file")
    refused(saved / "elsewhere", made(), "No such file")


def test_missing_or_broken_weights_are_refused(saved):
    path = saved / "weights.safetensors"
    whole = path.read_bytes()
    for broken in (b"", whole[:5], whole[: len(whole) // 2], whole[:-1]):
        path.write_bytes(broken)
        refused(saved, made(), r"cannot read .*weights\.safetensors")
    path.unlink()
    refused(saved, made(), r"cannot read .*weights\.safetensors: No such file")


def test_weights_that_do_not_fit_their_plan_are_refused(saved):
    path = saved / "weights.safetensors"
    with safe_open(path, "pt") as file:
        base, whole = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
    proj = whole["visual.proj"]
    for tensors, complaint in (
        ({"visual.proj": proj}, "missing text_projection"),
        (whole | {"visual.conv1.weight": proj.clone()}, r"unknown visual\.conv1\.weight"),
        (whole | {"visual.proj": proj[:5].contiguous()}, r"visual\.proj is float32 \(5, 16\), not float32 \(32, 16\)"),
        (whole | {"visual.proj": proj.half()}, r"visual\.proj is float16 \(32, 16\), not float32"),
    ):
        save_file(tensors, path, base)
        refused(saved, made(), complaint)
    save_file(whole, path)
    refused(saved, made(), "is damaged")


def test_flipped_bytes_are_found(saved):
    path = saved / "weights.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-5] ^= 1
    path.write_bytes(raw)
    refused(saved, made(), "is damaged")


def test_what_applies_a_policy_is_not_copied_but_its_model_is(tmp_path):
    applied = applied_to(made(), tmp_path)
    with pytest.raises(ApplyError, match="copy the model"):
        copy.deepcopy(applied)


def test_l2sp_follows_a_parameter_that_was_assigned_anew(tmp_path):
    model = made()
    applied = apply(planned(model, tmp_path, RICH), model)
    model.load_state_dict({name: tensor + 1 for name, tensor in model.state_dict().items()}, assign=True)
    assert applied.penalty().item() > 0


def test_a_failed_save_keeps_the_former_files_and_leaves_no_other(saved, monkeypatch):
    applied = changes.load(saved, made())
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    train(applied)

    def full(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stored, "save_file", full)
    with pytest.raises(RunError, match=r"cannot write .*weights\.safetensors: No space left on device"):
        applied.save(saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def test_a_folder_that_cannot_be_is_refused_in_the_system_s_words(saved):
    applied = changes.load(saved, made())
    with pytest.raises(RunError, match=r"cannot write .*: (File exists|Not a directory)"):
        applied.save(saved / "plan.json")
    with pytest.raises(RunError, match="Not a directory"):
        applied.save(saved / "plan.json" / "deeper")
