"""Between base and trained: the ends are what they are called, and nothing is left behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import clipfreeze
from clipfreeze.changes import Applied
from clipfreeze.errors import ApplyError, DataError
from clipfreeze.policy.loading import load_policy
from clipfreeze.train.batches import Tokenizer
from clipfreeze.train.evaluate import Encoder, Metrics, Score, measure
from clipfreeze.train.frontier import (
    Frontier,
    Point,
    best_alpha,
    interpolate,
    interpolating,
    start_values,
    wise_frontier,
)

import tiny
from hand import Words, colour_pairs, transform

PAIRS = colour_pairs(2, labelled=True)
WEIGHTS = '[[rule]]\nmatch = ["@vision.blocks[-1:]", "@text.proj"]\ntrain = true\n'
LOGIT_SCALE = '[[rule]]\nmatch = "@logit_scale"\ntrain = true\n'
RESTARTED = '[[rule]]\nmatch = "@text.proj"\ntrain = true\ninit = "normal(0.1)"\n'
LORA = '[[rule]]\nmatch = "@blocks"\nlora = {{ rank = 2, variant = "{}" }}\n'
ADAPTER = '[[rule]]\nmatch = "@blocks"\nadapter = { dim = 4 }\n'
HEAD = '[[rule]]\nmatch = "@vision"\nhead = { classes = ["red", "blue"] }\n'
POLICIES = {
    "weights": WEIGHTS,
    "restarted": RESTARTED,
    "lora": LORA.format("lora"),
    "dora": LORA.format("dora"),
    "adapter": ADAPTER,
    "lora and weights": LORA.format("rslora") + LOGIT_SCALE,
}


def moved(folder: Path, rules: str) -> tuple[Applied, dict[str, Tensor]]:
    """A tiny model with a policy, all that trains shaken as by training; and the start values."""
    torch.manual_seed(0)
    model = tiny.FAMILIES["clip_vit"]()
    path = folder / "mine.toml"
    path.write_text(f'name = "mine"\n{rules}[optimizer]\nlr = 1e-2\n', encoding="utf-8")
    plan = clipfreeze.resolve(load_policy(path), model)
    start = start_values(plan, model)
    of = clipfreeze.apply(plan, model, tokenizer=Words())
    with torch.no_grad():
        for parameter in of.trainable().values():
            parameter += 0.3 * torch.randn_like(parameter)
    return of, start


def measured(of: Applied) -> dict[str, Metrics]:
    return {"colours": measure(Encoder(of.model, Tokenizer(Words(), of.model), transform()), PAIRS)}


def base_metrics() -> dict[str, Metrics]:
    torch.manual_seed(0)
    model = tiny.FAMILIES["clip_vit"]()
    return {"colours": measure(Encoder(model, Tokenizer(Words(), model), transform()), PAIRS)}


@pytest.mark.parametrize("rules", POLICIES.values(), ids=POLICIES)
def test_the_ends_are_base_and_trained_and_the_model_stays_as_it_was(tmp_path: Path, rules: str) -> None:
    of, start = moved(tmp_path, rules)
    trained, state = measured(of), {name: value.clone() for name, value in of.model.state_dict().items()}
    frontier = wise_frontier(of, start, lambda: measured(of), (0.5, 1.0))
    assert [point.alpha for point in frontier.points] == [0, 0.5, 1]
    at = {point.alpha: point.metrics for point in frontier.points}
    assert at[0] == base_metrics()
    assert at[1] == trained
    assert at[0] != at[0.5] != at[1]
    assert of.scale == 1
    assert all(torch.equal(value, state[name]) for name, value in of.model.state_dict().items())
    assert measured(of) == trained


def test_weights_lie_on_the_line_between(tmp_path: Path) -> None:
    of, start = moved(tmp_path, WEIGHTS)
    trained = {name: parameter.detach().clone() for name, parameter in of.trainable().items()}
    assert start.keys() == trained.keys()
    with interpolating(of, start, 0.25):
        for name, parameter in of.trainable().items():
            torch.testing.assert_close(parameter.detach(), 0.75 * start[name] + 0.25 * trained[name])
    interpolate(of, start, 0)
    assert all(torch.equal(parameter, start[name]) for name, parameter in of.trainable().items())


def test_a_scale_of_one_s_own_comes_back(tmp_path: Path) -> None:
    of, start = moved(tmp_path, LORA.format("lora"))
    of.set_scale(0.5)
    half = measured(of)
    with interpolating(of, start, 1):
        assert measured(of) != half
    assert (of.scale, measured(of)) == (0.5, half)


def test_what_has_no_alpha_is_refused_and_nothing_moves(tmp_path: Path) -> None:
    of, start = moved(tmp_path, HEAD + LOGIT_SCALE)
    state = {name: value.clone() for name, value in of.model.state_dict().items()}
    with pytest.raises(ApplyError, match="adds what has no alpha: head"):
        interpolate(of, start, 0.5)
    assert all(torch.equal(value, state[name]) for name, value in of.model.state_dict().items())
    of, start = moved(tmp_path, WEIGHTS)
    with pytest.raises(ApplyError, match=r"an alpha of 1.5\n  fix: 0 \(the base\) to 1"):
        wise_frontier(of, start, dict, (1.5,))


def frontier(goal: list[float], kept: list[float]) -> Frontier:
    """Points of these main scores, at alphas 0, 1/2, 1, ..."""
    return Frontier(
        tuple(
            Point(
                number / 2,
                {
                    "goal": Metrics("zero-shot", 10, 2, {"top1": Score(of_goal, 0.1)}),
                    "kept": Metrics("zero-shot", 10, 2, {"top1": Score(of_kept, 0.1)}),
                },
            )
            for number, (of_goal, of_kept) in enumerate(zip(goal, kept, strict=True))
        )
    )


def test_the_best_alpha_is_the_goal_s_under_the_floor() -> None:
    found = frontier([0.1, 0.6, 0.8], [0.5, 0.45, 0.3])
    assert best_alpha(found, "goal") == 1
    assert best_alpha(found, "goal", ["kept"], 0.6) == 1
    assert best_alpha(found, "goal", ["kept"], 0.9) == 0.5
    assert best_alpha(found, "goal", ["kept"], 1) == 0
    assert best_alpha(frontier([0.1, 0.6, 0.6], [0.5, 0.5, 0.5]), "goal") == 0.5
    with pytest.raises(DataError, match="no set beside the goal"):
        best_alpha(found, "goal", [], 0.9)
    with pytest.raises(DataError, match="it is a share"):
        best_alpha(found, "goal", ["kept"], 95)
