"""The lr of each step is the plan's times the schedule's factor."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim import lr_scheduler

from clipfreeze.errors import PlanError
from clipfreeze.optim.schedules import build_scheduler, warmup_steps
from clipfreeze.policy.schema import Schedule


def optimizer(*lrs: float, **settings: Any) -> torch.optim.Optimizer:
    groups = [
        {"params": [nn.Parameter(torch.zeros(1))], "name": f"group {i}", "lr": lr} for i, lr in enumerate(lrs or (1.0,))
    ]
    return torch.optim.SGD(groups, lr=1.0, **settings)


def factors(made: torch.optim.Optimizer, scheduler: Any, steps: int) -> list[list[float]]:
    found = []
    for _ in range(steps):
        found.append([group["lr"] for group in made.param_groups])
        made.step()
        scheduler.step()
    return found


def single(schedule: Schedule, total: int, **settings: Any) -> list[float]:
    made = optimizer(**settings)
    return [lr for (lr,) in factors(made, build_scheduler(schedule, made, total), total + 1)]


@pytest.mark.parametrize(
    ("name", "warmup", "expected"),
    [
        ("constant", 0, [1, 1, 1, 1, 1]),
        ("constant", 2, [0.5, 1, 1, 1, 1]),
        ("linear", 0, [1, 0.75, 0.5, 0.25, 0]),
        ("Linear", 2, [0.5, 1, 1, 0.5, 0]),
        ("cosine", 0, [1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2, 0]),
        ("COSINE", "50%", [0.5, 1, 1, 0.5, 0]),
        ("linear", 4, [0.25, 0.5, 0.75, 1, 1]),
        ("linear", 8, [0.125, 0.25, 0.375, 0.5, 0.625]),
    ],
)
def test_our_own_schedules_by_hand(name, warmup, expected):
    assert single(Schedule(name=name, warmup=warmup), 4) == pytest.approx(expected)


@given(st.sampled_from(["cosine", "linear", "constant"]), st.integers(0, 30), st.integers(1, 30), st.floats(1e-6, 1.0))
def test_factors_rise_to_one_then_never_rise_and_end_at_zero(name, warmup, total, lr):
    made = optimizer(lr)
    rates = [
        rate / lr
        for (rate,) in factors(made, build_scheduler(Schedule(name=name, warmup=warmup), made, total), total + 1)
    ]
    assert rates[: warmup + 1] == sorted(rates[: warmup + 1])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    assert max(rates) == pytest.approx(1 if warmup <= total + 1 else (total + 1) / warmup)
    if name != "constant" and warmup < total:
        assert rates[-1] == pytest.approx(0, abs=1e-12)


def test_groups_have_their_own_schedule_and_lr():
    made = optimizer(1.0, 10.0, 100.0)
    scheduler = build_scheduler(Schedule(name="linear", warmup=2), made, 4, by_group={"group 1": "constant"})
    ours, constant, last = zip(*factors(made, scheduler, 5), strict=True)
    assert ours == pytest.approx([0.5, 1, 1, 0.5, 0])
    assert constant == pytest.approx([5, 10, 10, 10, 10])
    assert last == pytest.approx([50, 100, 100, 50, 0])


def test_a_schedule_resumes_from_its_state():
    made = optimizer()
    scheduler = build_scheduler(Schedule(name="cosine", warmup=2), made, 10)
    factors(made, scheduler, 4)
    again = optimizer()
    resumed = build_scheduler(Schedule(name="cosine", warmup=2), again, 10)
    again.load_state_dict(made.state_dict())
    resumed.load_state_dict(scheduler.state_dict())
    assert factors(made, scheduler, 6) == factors(again, resumed, 6)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("steplr", {"step_size": 3}),
        ("MultiStepLR", {"milestones": [2, 5], "gamma": 0.5}),
        ("exponentiallr", {"gamma": 0.9}),
        ("CosineAnnealingLR", {"T_max": 7, "eta_min": 0.1}),
        ("CosineAnnealingWarmRestarts", {"T_0": 3}),
        ("PolynomialLR", {"total_iters": 7, "power": 2.0}),
    ],
)
@pytest.mark.parametrize("warmup", [0, 1, 4])
def test_any_schedule_of_torch_follows_the_warmup(name, options, warmup):
    by_hand = optimizer()
    scheduler = next(c for n, c in vars(lr_scheduler).items() if n.lower() == name.lower())(by_hand, **options)
    expected = [lr for (lr,) in factors(by_hand, scheduler, 11 - warmup)]
    rise = [(step + 1) / warmup for step in range(warmup)]
    found = single(Schedule(name=name, warmup=warmup, **options), 10)
    assert found == pytest.approx(rise + expected)


def test_the_length_of_the_run_is_filled_in():
    by_hand = optimizer()
    expected = factors(by_hand, lr_scheduler.CosineAnnealingLR(by_hand, 8), 9)
    assert single(Schedule(name="CosineAnnealingLR", warmup=2), 10)[2:] == pytest.approx([lr for (lr,) in expected])


def test_a_polynomial_lasts_as_long_as_the_run():
    by_hand = optimizer()
    expected = factors(by_hand, lr_scheduler.PolynomialLR(by_hand, 8), 9)
    assert single(Schedule(name="PolynomialLR", warmup=2), 10)[2:] == pytest.approx([lr for (lr,) in expected])


def test_a_group_of_the_user_s_own_needs_no_name():
    made = optimizer()
    made.add_param_group({"params": [torch.zeros(1, requires_grad=True)], "lr": 3.0})
    rates = factors(made, build_scheduler(Schedule(name="linear"), made, 10), 10)
    assert [own / first for first, own in rates] == pytest.approx([3.0] * 10)


def test_the_peak_of_onecycle_is_the_lr_of_each_group():
    made = optimizer(1.0, 10.0, momentum=0.9)
    rates = factors(made, build_scheduler(Schedule(name="OneCycleLR"), made, 20), 20)
    assert [max(group) for group in zip(*rates, strict=True)] == pytest.approx([1, 10], rel=1e-2)
    assert [rate[1] / rate[0] for rate in rates] == pytest.approx([10] * 20)


@pytest.mark.parametrize(
    ("schedule", "complaint"),
    [
        (Schedule(name="cosin"), r"no schedule 'cosin'(.|\n)*did you mean cosine"),
        (Schedule(name="StepLr", step_size=2, gama=1), r"StepLR has no option 'gama'(.|\n)*did you mean gamma"),
        (Schedule(name="StepLR"), "StepLR needs step_size"),
        (Schedule(name="MultiStepLR", milestones=3), "does not take these options"),
        (Schedule(name="cosine", warmpu=3), r"cosine has no option 'warmpu'(.|\n)*did you mean warmup"),
        (Schedule(name="ReduceLROnPlateau"), "waits for a metric"),
        (Schedule(name="LambdaLR"), "takes a function"),
        (Schedule(name="SequentialLR"), "takes other schedulers"),
        (Schedule(name="LRScheduler"), "no schedule 'LRScheduler'"),
        (Schedule(name="OneCycleLR", max_lr=0.1), "max_lr of OneCycleLR is the lr of each rule"),
        (Schedule(name="OneCycleLR", warmup="5%"), r"rises by itself(.|\n)*warmup = 0"),
        (Schedule(name="constant", warmup="1 epochs"), "needs steps_per_epoch"),
    ],
    ids=str,
)
def test_a_wrong_schedule_is_refused_with_the_fix(schedule, complaint):
    with pytest.raises(PlanError, match=complaint):
        build_scheduler(schedule, optimizer(), 10)


def test_a_schedule_of_torch_goes_with_others():
    made = optimizer(1.0, 10.0)
    step = Schedule(name="StepLR", step_size=2)
    scheduler = build_scheduler(step, made, 4, by_group={"group 1": "linear"})
    one, other = zip(*factors(made, scheduler, 5), strict=True)
    assert one == pytest.approx([1, 1, 0.1, 0.1, 0.01])
    assert other == pytest.approx([10, 7.5, 5, 2.5, 0])


def test_onecycle_moves_the_momentum_too():
    by_hand, made = optimizer(momentum=0.9), optimizer(momentum=0.9)
    theirs = lr_scheduler.OneCycleLR(by_hand, 1.0, 10)
    ours = build_scheduler(Schedule(name="OneCycleLR"), made, 10)
    for _ in range(9):
        assert made.param_groups[0]["momentum"] == by_hand.param_groups[0]["momentum"]
        for each, schedule in ((by_hand, theirs), (made, ours)):
            each.step()
            schedule.step()


def test_a_run_without_steps_is_refused():
    with pytest.raises(PlanError, match="a run of 0 steps"):
        build_scheduler(Schedule(), optimizer(), 0)


def test_warmup_in_steps_shares_and_epochs():
    assert warmup_steps(Schedule(warmup=7), 100) == 7
    assert warmup_steps(Schedule(warmup="5%"), 100) == 5
    assert warmup_steps(Schedule(warmup="2 epochs"), 100, 20) == 40
