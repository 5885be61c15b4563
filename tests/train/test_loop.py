"""The loop takes the steps a hand-written loop takes, repeats itself, and says what goes wrong."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor, nn

import clipfreeze
from clipfreeze.errors import DataError, RunError
from clipfreeze.train.batches import Tokenizer, TrainingLoader
from clipfreeze.train.loop import Result, Run, fit
from clipfreeze.train.pairs import PairSet

import tiny
from hand import ByHand, Words, colour_pairs, transform

NAMES = ("visual.proj", "text_projection", "transformer.resblocks.2.mlp.c_fc.weight", "logit_scale")


def model(family: str = "clip_vit") -> nn.Module:
    torch.manual_seed(0)
    return tiny.FAMILIES[family]()


def run(applied: Any, train: PairSet | None = None, **settings: Any) -> Result:
    values: dict[str, Any] = {"tokenizer": Words(), "transform": transform(), "batch_size": 4, "epochs": 1} | settings
    return fit(applied, colour_pairs() if train is None else train, **values)


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def bits(tensor: Tensor) -> bytes:
    """To compare: CoCa's decoder has a weight that nobody initialises, which may be nan."""
    return tensor.numpy().tobytes()


@pytest.mark.parametrize("names", [NAMES, ()])
def test_steps_equal_a_hand_written_loop(names: tuple[str, ...]) -> None:
    applied = ByHand(model(), names)
    run(applied, epochs=2)

    twin: Any = model()
    for name, parameter in twin.named_parameters():
        parameter.requires_grad_(not names or name in names)
    trained = [parameter for parameter in twin.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0, eps=1e-5)
    loader = TrainingLoader(colour_pairs(), transform(), Tokenizer(Words(), twin), batch_size=4, seed=0, num_workers=0)
    for step, batch in enumerate(loaded.batch for epoch in range(2) for loaded in loader.batches(epoch)):
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - step / 4)
        optimizer.zero_grad()
        image, text, scale = twin(batch["image"], batch["text"])
        torch.autograd.backward(open_clip.ClipLoss()(image, text, scale))
        optimizer.step()
    for name, value in weights(twin).items():
        found = applied.model.state_dict()[name]
        if name.endswith("in_proj_bias"):  # a key's bias has no gradient, and Adam makes steps of its rounding
            (found, _, _), (value, _, _) = found.chunk(3), value.chunk(3)
        torch.testing.assert_close(found, value, rtol=1e-5, atol=2e-5, msg=name)  # a fiftieth of Adam's step


def test_what_is_frozen_stays_bit_equal_and_what_trains_moves() -> None:
    applied = ByHand(model(), NAMES)
    before = weights(applied.model)
    run(applied)
    moved = {name for name, value in weights(applied.model).items() if not torch.equal(value, before[name])}
    assert moved == set(NAMES)


def test_the_same_seed_gives_the_same_weights_and_another_gives_others() -> None:
    pairs = replace(colour_pairs(2), templates=("{}", "a {}"))
    results = []
    for seed, workers in ((3, 0), (3, 1), (4, 0)):
        applied = ByHand(model("hf_text"))  # has dropout
        run(applied, pairs, epochs=2, seed=seed, train_transform=transform(train=True), num_workers=workers)
        results.append(weights(applied.model))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    assert not torch.equal(results[0]["logit_scale"], results[2]["logit_scale"])


def test_a_run_lowers_the_loss_and_leaves_its_numbers(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    applied = ByHand(model())
    tests = {"target": colour_pairs(2, labelled=True), "pairs": colour_pairs()}
    result = run(applied, colour_pairs(2, labelled=True), tests=tests, epochs=20, batch_size=8, folder=tmp_path)
    assert result.after["target"].scores["nll"].value < 0.6 * result.before["target"].scores["nll"].value
    assert result.after["target"].scores["top1"].value > 0.9
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, result.steps + 1)) == list(range(1, 41))
    assert (lines[0]["epoch"], lines[-1]["epoch"]) == (1, 20)
    assert lines[0]["lr"] == {"all": pytest.approx(1e-3)}
    assert lines[20]["lr"] == {"all": pytest.approx(5e-4)}
    saved = json.loads((tmp_path / "results.json").read_text())
    assert saved["after"]["target"]["scores"]["top1"]["value"] == result.after["target"].scores["top1"].value
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("checkpoints", "metrics.jsonl", "results.json", "run.log", "weights.safetensors"),
    ]
    out, err = capfd.readouterr()
    assert out == ""
    assert "epoch 20: loss" in err


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family_trains(family: str) -> None:
    applied = ByHand(model(family), ("logit_scale",))
    size = tiny.images(applied.model).shape[-1]
    result = run(applied, transform=transform(size), tests={"target": colour_pairs(labelled=True)})
    assert math.isfinite(result.loss)
    assert result.notes == () or "what guessing gives" in result.notes[0]


@pytest.mark.parametrize("policy", ["last_n", "full", "vision_only"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_policy_moves_what_it_trains_and_nothing_else(family: str, policy: str) -> None:
    applied = clipfreeze.apply(clipfreeze.resolve(clipfreeze.load_policy(policy), module := model(family)), module)
    before = weights(module)
    size = tiny.images(module).shape[-1]
    result = run(applied, transform=transform(size), train_transform=transform(size, train=True), epochs=2)
    moved = {name for name, value in weights(module).items() if bits(value) != bits(before[name])}
    assert moved
    assert moved <= set(applied.trainable())
    decoder_trains = any(name.startswith("text_decoder.") for name in applied.trainable())
    assert any("no gradient" in note for note in result.notes) == decoder_trains


def test_trained_parameters_the_loss_does_not_reach_are_named(caplog: pytest.LogCaptureFixture) -> None:
    applied = ByHand(model("coca"), ("logit_scale", "text_decoder.text_projection"))
    with caplog.at_level(logging.WARNING):
        result = run(applied)
    assert any("no gradient" in note and "text_decoder.text_projection" in note for note in result.notes)
    assert "text_decoder.text_projection" in caplog.text


def test_a_loss_that_is_no_number_stops_with_step_and_lr(tmp_path: Path) -> None:
    applied = ByHand(model(), lr=1e30)
    with pytest.raises(RunError, match=r"step 2 \(lr: all 7.5e\+29\)|weights are not finite|loss is nan at step 2"):
        run(applied, epochs=2, folder=tmp_path)
    assert not (tmp_path / "weights.safetensors").exists()


def test_weights_that_are_no_numbers_are_never_saved(tmp_path: Path) -> None:
    class Breaking(ByHand):
        def optimizer(self) -> torch.optim.Optimizer:
            made = super().optimizer()
            made.register_step_post_hook(self.spoil)
            return made

        def spoil(self, *_: Any) -> None:
            self.trainable()["visual.proj"].data.fill_(float("nan"))

    with pytest.raises(RunError, match=r"after step 1: visual\.proj"):
        run(Breaking(model(), NAMES), batch_size=8, folder=tmp_path)
    assert not (tmp_path / "weights.safetensors").exists()


def test_a_gradient_that_is_no_number_is_named() -> None:
    applied = ByHand(model(), NAMES)
    parameter: Any = applied.trainable()["visual.proj"]
    parameter.register_hook(lambda grad: grad * float("inf"))
    with pytest.raises(RunError, match=r"no finite gradient in the first step: visual\.proj"):
        run(applied)


def test_a_warmup_as_long_as_the_run_is_noted() -> None:
    assert any("warmup of 10000 steps" in note for note in run(ByHand(model(), NAMES, warmup=10000)).notes)
    assert not any("warmup" in note for note in run(ByHand(model(), NAMES, warmup="50%")).notes)


def test_a_loss_stuck_at_guessing_is_noted() -> None:
    applied = ByHand(model(), NAMES, lr=1e-9)
    assert not run(applied).notes
    applied.trainable()["logit_scale"].data.fill_(-5)  # all logits are near 0
    assert any("what guessing gives" in note for note in run(applied).notes)


def test_a_goal_that_fell_is_noted() -> None:
    applied = ByHand(model())
    goal = colour_pairs(8, labelled=True)
    assert not run(applied, goal, tests={"target": goal}, epochs=8, batch_size=16).notes
    applied.lr = 0.3
    notes = run(applied, goal, tests={"target": goal}, batch_size=16).notes
    assert any("top1 on target fell" in note for note in notes)


def test_no_epochs_and_no_room_are_input_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="epochs = 0"):
        run(ByHand(model()), epochs=0)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10})())
    with pytest.raises(DataError, match="no room for the run"):
        run(ByHand(model()), folder=tmp_path)
    assert not list(tmp_path.iterdir())


def test_losses_that_are_read_a_step_late_are_those_read_at_once(tmp_path, monkeypatch) -> None:
    def lines(folder: Path, **settings: Any) -> list[dict[str, Any]]:
        run(ByHand(model(), NAMES), colour_pairs(2), epochs=2, folder=folder, save_every="3 steps", **settings)
        told = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [{name: line[name] for name in ("step", "epoch", "loss", "lr")} for line in told]

    at_once = lines(tmp_path / "at once")
    monkeypatch.setattr(Run, "late_devices", ("cpu",))
    late: list[int] = []
    read = Run._read

    def noting(self: Run) -> None:
        if self._unread is not None:
            late.append(self.step - self._unread[1]["step"])
        read(self)

    monkeypatch.setattr(Run, "_read", noting)
    assert lines(tmp_path / "late") == at_once
    assert late == [0, 1, 0, 0, 1, 0, 1, 0]  # the first, those before a checkpoint and an epoch's last are asked for


def test_a_loss_that_is_read_late_stops_the_run_with_its_own_step(monkeypatch) -> None:
    monkeypatch.setattr(Run, "late_devices", ("cpu",))
    spoiled = ByHand(model(), NAMES, lr=1e30)
    with pytest.raises(RunError, match=r"loss is nan at step 2"):
        run(spoiled, colour_pairs(4), epochs=1)
