"""What an optimizer knows, by name: a run that goes on from it is the run that never stopped, bit for bit."""

import json

import pytest
import torch
from life import assert_same, loss_of, made, planned, weights
from safetensors.torch import load, save

from clipfreeze.changes import Applied, apply
from clipfreeze.errors import ApplyError
from clipfreeze.optim.state import OptimizerState, load_optimizer_state, optimizer_state

RULES = """
[[rule]]
match = "*"
train = true
lr = 1e-2
weight_decay = 0.1
[schedule]
name = "cosine"
warmup = 1
"""
PHASES = """
[[phase]]
until = 2
[[phase.rule]]
match = "*"
exclude = "@projections"
freeze = true
[[phase]]
until = 4
warmup = 1
[[phase]]
[[phase.rule]]
match = "@vision"
freeze = true
"""
OPTIMIZERS = {
    "adamw": 'name = "adamw"\n',
    "not fused": 'name = "adamw"\nfused = false\n',
    "foreach": 'name = "adamw"\nforeach = true\n',
    "sgd": 'name = "sgd"\nmomentum = 0.9\n',
    "plain sgd": 'name = "sgd"\n',
    "lion": 'name = "lion"\n',
    "lamb": 'name = "lamb"\n',
    "adan": 'name = "adan"\n',
    "adafactorbv": 'name = "adafactorbv"\n',
    "nadam": 'name = "nadam"\n',
    "radam": 'name = "radam"\n',
}
STEPS = 6


class Run:
    """One under way, its optimizer and scheduler included."""

    def __init__(self, text: str, folder, saved: dict | None = None) -> None:
        self.model = made()
        self.applied: Applied = apply(planned(self.model, folder, text), self.model)
        self.model.train()
        self.optimizer = self.applied.optimizer()
        self.scheduler = self.applied.scheduler(self.optimizer, STEPS)
        if saved is not None:
            self.model.load_state_dict(saved["weights"])
            state = OptimizerState(load(saved["tensors"]), json.loads(saved["plain"]))
            self.applied.load_optimizer_state(self.optimizer, state)
            self.scheduler.load_state_dict(json.loads(saved["scheduler"]))

    def step(self) -> None:
        loss_of(self.model).backward()
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()

    def saved(self) -> dict:
        tensors, plain = self.applied.optimizer_state(self.optimizer)
        scheduler = json.dumps(self.scheduler.state_dict())
        return {
            "weights": weights(self.model),
            "tensors": save(tensors),
            "plain": json.dumps(plain),
            "scheduler": scheduler,
        }


def comparable(saved: dict) -> tuple:
    return saved["tensors"], json.loads(saved["plain"]), json.loads(saved["scheduler"])


@pytest.mark.parametrize("phases", ["", PHASES], ids=["without phases", "phases"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_law_9_resuming_at_any_step_is_the_uninterrupted_run(optimizer, phases, tmp_path):
    text = RULES + phases + "[optimizer]\n" + OPTIMIZERS[optimizer]
    straight = Run(text, tmp_path)
    kept = [straight.saved()]
    for _ in range(STEPS):
        straight.step()
        kept.append(straight.saved())
    for stop in range(STEPS):
        resumed = Run(text, tmp_path, kept[stop])
        for step in range(stop, STEPS):
            again = resumed.saved()
            assert comparable(again) == comparable(kept[step]), (stop, step)
            resumed.step()
        assert_same(weights(resumed.model), kept[STEPS]["weights"])
        assert resumed.applied.phase == straight.applied.phase


@pytest.mark.parametrize("first", ["optimizer", "scheduler", "optimizer before the scheduler is made"])
def test_b55_the_order_of_loading_does_not_matter(first, tmp_path):
    text = RULES + PHASES + "[optimizer]\nname = 'adamw'\n"
    straight = Run(text, tmp_path)
    for _ in range(3):
        straight.step()
    kept, resumed = straight.saved(), Run(text, tmp_path)
    resumed.model.load_state_dict(kept["weights"])
    state = OptimizerState(load(kept["tensors"]), json.loads(kept["plain"]))
    if first == "scheduler":
        resumed.scheduler.load_state_dict(json.loads(kept["scheduler"]))
    resumed.applied.load_optimizer_state(resumed.optimizer, state)
    if "made" in first:
        resumed.scheduler = resumed.applied.scheduler(resumed.optimizer, STEPS)
    resumed.scheduler.load_state_dict(json.loads(kept["scheduler"]))
    assert resumed.applied.phase == 1
    for run in (straight, resumed):
        run.step()
    assert_same(weights(straight.model), weights(resumed.model))


def test_b58_another_length_of_the_run_is_refused_with_both_rates(tmp_path):
    straight = Run(RULES + "[optimizer]\nname = 'adamw'\n", tmp_path)
    for _ in range(3):
        straight.step()
    longer = straight.applied.scheduler(straight.optimizer, 2 * STEPS)
    with pytest.raises(
        ApplyError, match=r"has 6 steps and at step 3 lr 0.00655; this one has 12 steps and there lr 0.00921"
    ):
        longer.load_state_dict(straight.scheduler.state_dict())


def one(tmp_path, text: str, name: str = "adamw") -> tuple[Applied, torch.optim.Optimizer]:
    model = made()
    applied = apply(planned(model, tmp_path, text + f'[optimizer]\nname = "{name}"\nlr = 1e-3\n'), model)
    optimizer = applied.optimizer()
    loss_of(model).backward()
    optimizer.step()
    return applied, optimizer


HEADS = '[[rule]]\nmatch = "@projections"\ntrain = true\n'
SCALE = '[[rule]]\nmatch = "@logit_scale"\ntrain = true\n'


@pytest.mark.parametrize(
    ("text", "name", "complaint"),
    [
        (HEADS + SCALE, "adamw", "logit_scale trains here and did not there"),
        (HEADS.replace("@projections", "visual.proj"), "adamw", "text_projection trained there and does not here"),
        (HEADS, "sgd", "is of the optimizer adamw, and this is sgd"),
        (HEADS + '[[rule]]\nmatch = "visual.proj"\nlr = 1\n', "adamw", "its param groups are others"),
        (HEADS + "[[phase]]\nuntil = 3\n", "adamw", "with other phases"),
    ],
)
def test_the_state_of_another_run_is_refused(text, name, complaint, tmp_path):
    applied, optimizer = one(tmp_path, HEADS)
    state = applied.optimizer_state(optimizer)
    other, its = one(tmp_path, text, name)
    before = other.optimizer_state(its)
    with pytest.raises(ApplyError, match=complaint):
        other.load_optimizer_state(its, state)
    after = other.optimizer_state(its)
    assert before.plain == after.plain
    assert all(torch.equal(before.tensors[name], after.tensors[name]) for name in before.tensors)


def test_tensors_that_are_missing_unknown_or_of_another_shape_are_refused(tmp_path):
    applied, optimizer = one(tmp_path, HEADS)
    tensors, plain = applied.optimizer_state(optimizer)
    first, *_ = tensors
    for wrong, words in (
        ({name: tensor for name, tensor in tensors.items() if name != first}, f"{first} is missing"),
        ({**tensors, "x/y": torch.zeros(1)}, "x/y is unknown"),
    ):
        with pytest.raises(ApplyError, match=words):
            applied.load_optimizer_state(optimizer, OptimizerState(wrong, plain))
    shapes = plain | {"shapes": plain["shapes"] | {"visual.proj": [1, 2]}}
    with pytest.raises(ApplyError, match=r"visual.proj is \(32, 16\) here and was \(1, 2\)"):
        applied.load_optimizer_state(optimizer, OptimizerState(tensors, shapes))


def test_how_steps_are_computed_is_not_part_of_the_state(tmp_path):
    applied, optimizer = one(tmp_path, HEADS)
    plain, its = one(tmp_path, HEADS, 'adamw"\nfused = false\n#')
    plain.load_optimizer_state(its, applied.optimizer_state(optimizer))
    assert [group["fused"] for group in (*optimizer.param_groups, *its.param_groups)] == [True, False]


def test_a_state_is_a_copy(tmp_path):
    applied, optimizer = one(tmp_path, HEADS)
    tensors, _ = applied.optimizer_state(optimizer)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    optimizer.step()
    assert all(torch.equal(before[name], tensors[name]) for name in before)


def test_what_cannot_be_named_or_saved_is_told():
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    with pytest.raises(ApplyError, match=r"shape \(2,\) that the policy does not train"):
        optimizer_state(optimizer, {})
    optimizer.state[parameter] = {"queue": [torch.ones(1)]}
    with pytest.raises(ApplyError, match="queue of it cannot be saved"):
        optimizer_state(optimizer, {"it": parameter})


def test_names_are_what_counts_not_the_order_of_the_model():
    one, other = (torch.nn.Parameter(torch.ones(size)) for size in (2, 3))
    optimizer = torch.optim.SGD([{"params": [one, other]}], lr=1.0, momentum=0.9)
    one.grad, other.grad = torch.ones(2), torch.ones(3)
    optimizer.step()
    names = {"b": other, "a": one}
    load_optimizer_state(optimizer, {"a": one, "b": other}, optimizer_state(optimizer, names))
    assert torch.equal(optimizer.state[other]["momentum_buffer"], torch.ones(3))
