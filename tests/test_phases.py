"""Phases on a model: what is frozen stands still in every way, and each lr is the plan's times the schedule."""

import math

import pytest
import torch
from life import assert_same, loss_of, made, picture, planned, weights

import clipfreeze
from clipfreeze.changes import Applied, apply
from clipfreeze.errors import ApplyError, PlanError

import tiny

RULES = """
[[rule]]
match = "*"
train = true
lr = 1e-2
weight_decay = 0.1
[[rule]]
match = "@projections"
lr = 2e-2
[[rule]]
match = "@logit_scale"
clamp = [0, 4.6052]
l2sp = 0.1
"""
PROBE = """
[[phase]]
name = "probe"
until = 3
[[phase.rule]]
match = "*"
exclude = "@projections"
freeze = true
"""
FULL = """
[[phase]]
name = "full"
warmup = 2
[[phase.rule]]
match = "@vision.projections"
lr = 4e-2
weight_decay = 0.2
"""
BACK = """
[[phase]]
name = "full"
until = 6
[[phase]]
name = "back"
[[phase.rule]]
match = ["@vision", "@logit_scale"]
freeze = true
"""
TOTAL = 10
ADAMW = '[optimizer]\nname = "adamw"\n'
OPTIMIZERS = {
    "adamw": ADAMW,
    "sgd": '[optimizer]\nname = "sgd"\nmomentum = 0.9\n',
    "lion": '[optimizer]\nname = "lion"\n',
    "foreach": ADAMW + "foreach = true\n",
    "fused": ADAMW + "fused = true\n",
    **{
        name: f'[optimizer]\nname = "{name}"\n'
        for name in ("adam", "nadam", "radam", "rmsprop", "adagrad", "lamb", "adan", "madgrad", "lars", "adamp",
                     "adabelief", "novograd", "laprop", "cadamw", "adopt", "adafactor", "mars")
    },
}  # fmt: skip


def applied_to(text: str, folder, family: str = "clip_vit") -> Applied:
    model = made(family)
    return apply(planned(model, folder, text), model)


def update(applied: Applied, optimizer: torch.optim.Optimizer) -> None:
    loss_of(applied.model).backward()
    optimizer.step()


def moved(before: dict, after: dict) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_what_a_phase_freezes_is_bit_equal_through_it_whatever_the_optimizer(optimizer, tmp_path):
    applied = applied_to(RULES + PROBE + BACK + OPTIMIZERS[optimizer], tmp_path)
    made, model = applied.optimizer(), applied.model.train()
    scheduler = applied.scheduler(made, TOTAL)
    for step in range(TOTAL):
        phase = 0 if step < 3 else 1 if step < 6 else 2
        assert applied.phase == phase
        before = weights(model)
        update(applied, made)
        assert moved(before, weights(model)) <= applied.plan.trains_in(phase)
        if step not in (0, 3, 6):  # some only begin their averages in a first step
            assert moved(before, weights(model)) & applied.plan.trains_in(phase)
        assert {name for name, p in model.named_parameters() if p.grad is not None} <= applied.plan.trains_in(phase)
        held = {id(parameter) for parameter in made.state}
        assert held <= {id(parameter) for parameter in applied.training().values()}
        scheduler.step()
        if step % 2:  # a trainer may or may not
            made.zero_grad()


@pytest.mark.parametrize("family", tiny.CORE)
def test_flags_and_modes_are_those_of_each_phase_on_every_family(family, tmp_path):
    applied = applied_to(RULES + PROBE + BACK + ADAMW, tmp_path, family)
    model, optimizer = applied.model.train(), applied.optimizer()
    for phase in (0, 1, 2, 0):
        applied.enter_phase(optimizer, phase)
        trains = applied.plan.trains_in(phase)
        assert {name for name, p in model.named_parameters() if p.requires_grad} == trains
        alone = made(family)
        rule = f"[[rule]]\nmatch = {sorted(trains)}\ntrain = true\nlr = 1\n"
        apply(planned(alone, tmp_path, rule), alone)
        alone.train()
        modes = {name: module.training for name, module in alone.named_modules()}
        assert {name: module.training for name, module in model.named_modules()} == modes


def test_a_phase_begins_in_eval_mode_where_the_model_is(tmp_path):
    applied = applied_to(RULES + PROBE + FULL + ADAMW, tmp_path)
    optimizer = applied.optimizer()
    applied.model.eval()
    applied.enter_phase(optimizer, 1)
    assert not any(module.training for module in applied.model.modules())
    applied.model.train()
    assert applied.model.visual.transformer.training


def test_remove_gives_back_the_plain_model_from_any_phase(tmp_path):
    model = made()
    list(model.parameters())[3].requires_grad_(False)
    list(model.modules())[5].eval()
    flags, before = picture(model), weights(model)
    applied = apply(planned(model, tmp_path, RULES + PROBE + FULL + ADAMW), model)
    applied.enter_phase(applied.optimizer(), 1)
    applied.remove()
    assert picture(model) == flags
    assert_same(weights(model), before)


def test_what_trains_again_starts_afresh(tmp_path):
    text = RULES + PROBE.replace('"*"', '"@blocks"').replace("until = 3", "until = 6")
    text = RULES + "[[phase]]\nuntil = 3\n" + text.removeprefix(RULES) + "[[phase]]\n" + OPTIMIZERS["lamb"]
    applied = applied_to(text, tmp_path)
    optimizer = applied.optimizer()
    block = applied.trainable()["transformer.resblocks.0.mlp.c_fc.weight"]
    scale = applied.trainable()["logit_scale"]
    scheduler = applied.scheduler(optimizer, TOTAL)
    for _ in range(6):
        update(applied, optimizer)
        scheduler.step()
        optimizer.zero_grad()
    assert applied.phase == 2
    assert block not in optimizer.state
    assert scale in optimizer.state
    fresh = next(group for group in optimizer.param_groups if any(p is block for p in group["params"]))
    assert "step" not in fresh
    update(applied, optimizer)
    assert int(fresh["step"]) == 1


SCHEDULES = {
    "cosine": lambda step: (1 + math.cos(math.pi * step / TOTAL)) / 2,
    "linear": lambda step: 1 - step / TOTAL,
    "constant": lambda step: 1.0,
    "StepLR": lambda step: 0.1 ** (step // 4),
}


@pytest.mark.parametrize(("warmup", "warm_start"), [(0, 0), (2, 0), (0, 2), (2, 4)])
@pytest.mark.parametrize("other", SCHEDULES)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_b29_the_lr_of_each_group_at_each_step_is_the_plan_s_times_the_schedule(
    schedule, other, warmup, warm_start, tmp_path
):
    options = {"StepLR": "step_size = 4"}
    own = f'[[rule]]\nmatch = "@logit_scale"\nschedule = {{ name = "{other}", {options.get(other, "warmup = 1")} }}\n'
    own += "[[rule]]\nmatch = '@logit_scale'\nlr = 1.0\n"
    run = f'[schedule]\nname = "{schedule}"\nwarmup = {warmup}\n{options.get(schedule, "")}\n'
    applied = applied_to(RULES + own + PROBE + FULL + ADAMW + f"warm_start = {warm_start}\n" + run, tmp_path)
    optimizer = applied.optimizer()
    scheduler = applied.scheduler(optimizer, TOTAL)
    names = {id(parameter): name for name, parameter in applied.trainable().items()}
    length = TOTAL - warm_start

    def factor(name: str, step: int, rise: int) -> float:
        at = step - warm_start
        if at < 0:
            return 0.0
        if at < rise:
            return (at + 1) / rise
        if name == "StepLR":
            return SCHEDULES[name](at - rise)
        return SCHEDULES[name]((at - rise) * TOTAL / (length - rise))

    for step in range(TOTAL):
        lrs = {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
        run_wide = factor(schedule, step, warmup)
        start = max(3, warm_start)
        entry = min(1.0, (step - start + 1) / 2)
        expected = {
            "visual.proj": (2e-2 if step < 3 else 4e-2) * run_wide,
            "text_projection": 2e-2 * run_wide,
            "visual.class_embedding": 0.0 if step < 3 else 1e-2 * run_wide * entry,
            "logit_scale": 0.0 if step < 3 else factor(other, step, warmup if other == "StepLR" else 1) * entry,
        }
        for name, lr in expected.items():
            assert lrs[name] == pytest.approx(lr), (step, name)
        assert scheduler.get_last_lr() == [group["lr"] for group in optimizer.param_groups]
        update(applied, optimizer)
        scheduler.step()
        optimizer.zero_grad()


def test_weight_decay_is_that_of_the_phase(tmp_path):
    applied = applied_to(RULES + PROBE + FULL + ADAMW, tmp_path)
    optimizer = applied.optimizer()

    def decay(name: str) -> float:
        parameter = applied.trainable()[name]
        return next(g["weight_decay"] for g in optimizer.param_groups if any(p is parameter for p in g["params"]))

    assert (decay("visual.proj"), decay("visual.class_embedding")) == (0.1, 0.0)
    applied.enter_phase(optimizer, 1)
    assert (decay("visual.proj"), decay("visual.class_embedding")) == (0.2, 0.1)


def test_entering_a_phase_twice_keeps_lr_and_moments(tmp_path):
    applied = applied_to(RULES + PROBE + FULL + ADAMW + '[schedule]\nname = "linear"\n', tmp_path)
    optimizer = applied.optimizer()
    scheduler = applied.scheduler(optimizer, TOTAL)
    for step in range(5):
        applied.enter_phase(optimizer, int(step >= 3))  # as a trainer may, before or after the scheduler does
        update(applied, optimizer)
        if step == 2:
            applied.enter_phase(optimizer, 1)
        scheduler.step()
    held, lrs = len(optimizer.state), scheduler.get_last_lr()
    applied.enter_phase(optimizer, 1)
    assert (len(optimizer.state), [group["lr"] for group in optimizer.param_groups]) == (held, lrs)


def test_a_warm_start_fills_moments_and_moves_nothing(tmp_path):
    model = made()
    text = RULES.replace("clamp = [0, 4.6052]\n", "") + ADAMW + "warm_start = 3\n"
    applied = apply(planned(model, tmp_path, text), model)
    optimizer, before = applied.optimizer(), weights(model)
    scheduler = applied.scheduler(optimizer, TOTAL)
    for step in range(4):
        assert bool(moved(before, weights(model))) is False
        update(applied, optimizer)
        scheduler.step()
        assert len(optimizer.state) == len(applied.trainable()), step
    assert moved(before, weights(model))


def test_starts_count_steps_epochs_and_shares(tmp_path):
    text = RULES + "".join(f"[[phase]]\nuntil = {end}\n" for end in ("'10%'", "'2 epochs'", "300"))
    applied = applied_to(text + ADAMW, tmp_path)
    assert applied.phase_starts(1000, 125) == [0, 100, 250, 300]
    with pytest.raises(PlanError, match="needs steps_per_epoch"):
        applied.phase_starts(1000)
    with pytest.raises(PlanError, match=r"'2' ends at step 80 (.|\n)*shares"):
        applied.phase_starts(1000, 40)
    with pytest.raises(PlanError, match=r"'3' ends at step 300 (.|\n)*a run of 300 steps"):
        applied.phase_starts(300, 40)
    assert applied_to(RULES + ADAMW, tmp_path).phase_starts(10) == [0]


def test_a_phase_that_is_not_there_and_a_warm_start_past_the_end_are_refused(tmp_path):
    applied = applied_to(RULES + PROBE + FULL + ADAMW + "warm_start = '100%'\n", tmp_path)
    optimizer = applied.optimizer()
    with pytest.raises(ApplyError, match=r"no phase 2(.|\n)*has 2"):
        applied.enter_phase(optimizer, 2)
    with pytest.raises(PlanError, match="warm start of 10 steps is as long as the run"):
        applied.scheduler(optimizer, TOTAL)


def test_a_clamp_and_a_pull_leave_alone_what_a_phase_freezes(tmp_path):
    model = made()
    model.logit_scale.data.fill_(4.77)
    with pytest.warns(UserWarning, match="clamp"):
        applied = apply(planned(model, tmp_path, RULES + PROBE + FULL + ADAMW), model)
    optimizer = applied.optimizer()
    model.logit_scale.data.fill_(4.8)  # away from its start
    assert applied.penalty().item() == 0
    update(applied, optimizer)
    assert model.logit_scale.item() == pytest.approx(4.8)
    applied.enter_phase(optimizer, 1)
    assert applied.penalty().item() > 0
    update(applied, optimizer)
    assert model.logit_scale.item() <= 4.6052001


def test_a_group_of_the_user_s_own_trains_in_every_phase(tmp_path):
    applied = applied_to(RULES + PROBE + FULL + ADAMW + '[schedule]\nname = "linear"\n', tmp_path)
    optimizer = applied.optimizer()
    own = torch.nn.Parameter(torch.ones(1))
    optimizer.add_param_group({"params": [own], "lr": 0.5, "weight_decay": 0.3})
    scheduler = applied.scheduler(optimizer, TOTAL)
    for step in range(5):
        assert optimizer.param_groups[-1]["lr"] == pytest.approx(0.5 * (1 - step / TOTAL))
        own.grad = torch.ones(1)
        update(applied, optimizer)
        scheduler.step()
    assert own in optimizer.state


def test_a_saved_policy_with_phases_loads_in_its_first(tmp_path):
    applied = applied_to(RULES + PROBE + FULL + ADAMW, tmp_path)
    optimizer = applied.optimizer()
    update(applied, optimizer)
    applied.enter_phase(optimizer, 1)
    update(applied, optimizer)
    applied.save(tmp_path / "run")
    fresh = made()
    loaded = clipfreeze.load(tmp_path / "run", fresh)
    assert loaded.phase == 0
    assert loaded.plan == applied.plan
    assert_same(weights(fresh), weights(applied.model))
