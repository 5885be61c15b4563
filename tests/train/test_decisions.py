"""What evaluations decide: the best weights, an early end, the floor under what is retained; and callbacks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import clipfreeze
from clipfreeze.errors import DataError
from clipfreeze.train import loop
from clipfreeze.train.best import Best
from clipfreeze.train.evaluate import Metrics, Score
from clipfreeze.train.loop import Callback, Result, Run, fit

import tiny
from hand import Words, colour_pairs, transform


def metrics(value: float, nll: float = 1.0) -> Metrics:
    return Metrics("zero-shot", 8, 8, {"top1": Score(value, 0.0), "nll": Score(nll, 0.0)})


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, float]]:
    """Scores to be measured, in order, the first before training; the model plays no part."""
    script: list[dict[str, float]] = []
    now: dict[str, float] = {}

    def measured(encoder: Any, pairs: Any, applied: Any) -> Metrics:
        if pairs.name not in now:
            now.update(script.pop(0) if len(script) > 1 else script[0])
        return metrics(now.pop(pairs.name))

    monkeypatch.setattr(loop, "measure_untuned", measured)
    monkeypatch.setattr(loop, "measure_tuned", measured)
    return script


class Weights(Callback):
    """The weights after each step."""

    def __init__(self) -> None:
        self.at: dict[int, dict[str, Tensor]] = {}
        self.evaluated: list[int] = []
        self.saved: list[Path] = []

    def on_step(self, run: Run, record: Mapping[str, Any]) -> None:
        self.at[record["step"]] = {name: p.detach().clone() for name, p in run.applied.trainable().items()}

    def on_evaluation(self, run: Run, metrics: Mapping[str, Metrics]) -> None:
        self.evaluated.append(run.step)

    def on_checkpoint(self, run: Run, path: Path) -> None:
        self.saved.append(path)


def train(callback: Callback, folder: Path | None = None, **settings: Any) -> tuple[Result, dict[str, Tensor]]:
    from dataclasses import replace

    torch.manual_seed(0)
    model = tiny.FAMILIES["clip_vit"]()
    applied = clipfreeze.apply(clipfreeze.resolve(clipfreeze.load_policy("projections"), model), model)
    sets = {name: replace(colour_pairs(1, labelled=True), name=name) for name in ("target", "known")}
    values: dict[str, Any] = {"epochs": 8, "batch_size": 8, "retain": "known"} | settings
    result = fit(
        applied,
        colour_pairs(),
        sets,
        tokenizer=Words(),
        transform=transform(),
        folder=folder,
        callbacks=[callback],
        **values,
    )
    return result, {name: p.detach() for name, p in applied.trainable().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def scores(*pairs: tuple[float, float]) -> list[dict[str, float]]:
    return [{"target": target, "known": known} for target, known in pairs]


def test_the_best_weights_are_kept(scripted: list[dict[str, float]], tmp_path: Path) -> None:
    scripted += scores((0.1, 1), (0.2, 1), (0.5, 1), (0.4, 1), (0.5, 1), (0.3, 1))
    seen = Weights()
    result, weights = train(seen, tmp_path, best="top1")
    assert result.kept_step == 2
    assert result.steps == 8
    assert same(weights, seen.at[2])
    assert same(load_file(tmp_path / "weights.safetensors"), seen.at[2])
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000002", "step-00000008"]
    assert seen.evaluated == list(range(1, 9))


def test_patience_ends_the_run(scripted: list[dict[str, float]]) -> None:
    scripted += scores((0.1, 1), (0.2, 1), (0.5, 1), (0.4, 1), (0.5, 1), (0.3, 1))
    seen = Weights()
    result, weights = train(seen, patience=2)
    assert (result.steps, result.kept_step) == (4, 2)
    assert any("no better top1 on target in 2 evaluations" in note for note in result.notes)
    assert same(weights, seen.at[2])


@pytest.mark.parametrize(("action", "kept"), [("rollback", 2), ("stop", 3)])
def test_a_floor_ends_the_run(scripted: list[dict[str, float]], action: str, kept: int) -> None:
    scripted += scores((0.1, 0.8), (0.2, 0.8), (0.3, 0.73), (0.4, 0.71), (0.5, 0.8))
    seen = Weights()
    result, weights = train(seen, retain_floor=0.9, on_floor=action)
    assert (result.steps, result.kept_step) == (3, kept)
    assert same(weights, seen.at[kept])
    assert any("fell to 0.710 at step 3, below 90 % of 0.800" in note for note in result.notes)


def test_a_floor_that_breaks_at_once_goes_back_to_the_start(scripted: list[dict[str, float]], tmp_path: Path) -> None:
    scripted += scores((0.1, 0.8), (0.2, 0.1))
    seen = Weights()
    result, weights = train(seen, tmp_path, retain_floor=0.9)
    assert (result.steps, result.kept_step) == (1, 0)
    assert not same(weights, seen.at[1])
    assert [path.name for path in seen.saved][:1] == ["step-00000000"]


def test_a_callback_ends_the_run_as_if_it_had_been_planned_so(tmp_path: Path) -> None:
    class Enough(Callback):
        def on_step(self, run: Run, record: Mapping[str, Any]) -> None:
            if record["step"] == 3:
                run.stop("enough")

    result, _ = train(Enough(), tmp_path)
    assert result.steps == 3
    assert any("ended after step 3 of 8: enough" in note for note in result.notes)
    assert (tmp_path / "weights.safetensors").exists()


def test_the_average_is_what_is_kept(tmp_path: Path) -> None:
    seen = Weights()
    _, weights = train(seen, tmp_path, ema=0.5)
    assert not same(weights, seen.at[8])

    assert same(load_file(tmp_path / "weights.safetensors"), weights)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("top2", "target has no score 'top2'"),
        ("tarket/top1", "no set 'tarket' is measured"),
    ],
)
def test_a_score_that_is_not_measured_is_refused(name: str, words: str) -> None:
    with pytest.raises(DataError, match=words):
        train(Weights(), best=name)


def test_nll_is_better_when_lower_and_equal_is_no_better() -> None:
    best = Best.by_name("nll", {"a": metrics(0.0)})
    assert [best.update(step, {"a": metrics(0.0, nll)}) for step, nll in enumerate((3.0, 2.0, 2.0, 4.0, 1.0))] == [
        *(True, True, False, False, True)
    ]
    assert (best.value, best.step, best.since) == (1.0, 4, 0)


def test_a_floor_needs_a_set_to_retain() -> None:
    with pytest.raises(DataError, match="a retain floor without a set"):
        train(Weights(), retain_floor=0.9, retain=None)
