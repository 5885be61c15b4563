"""A run that goes on from a checkpoint ends as the run that never stopped, bit for bit; another run is refused."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import clipfreeze
from clipfreeze.errors import DataError, InterruptedRunError, RunError
from clipfreeze.stored import PLAN, read_plan
from clipfreeze.train import checkpoints
from clipfreeze.train.checkpoints import checkpoint_path, keep_checkpoints, read_checkpoint
from clipfreeze.train.folder import CHECKPOINTS
from clipfreeze.train.loop import Callback, Result, Run, fit
from clipfreeze.train.pairs import PairSet

import tiny
from hand import Words, colour_pairs, transform

POLICIES = {
    "full": {},
    "last_n": {"dropout": 0.5},
    "lora": {"rank": 2, "lr": 1e-2, "dropout": 0.5},
    "lp_ft": {"probe": "50%"},
}
DATA = replace(colour_pairs(2), templates=("{}", "a {} thing"))
STEPS = 8  # 4 an epoch
DECIDED: dict[str, Any] = {"ema": 0.9, "evaluate_every": "2 steps", "best": "nll"}


class StopAt(Callback):
    """As a signal does after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, run: Run, record: Any) -> None:
        if record["step"] == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def model() -> Any:
    torch.manual_seed(0)
    return tiny.FAMILIES["clip_vit"]()


def train(
    folder: Path,
    policy: str,
    stop: int | None = None,
    data: PairSet = DATA,
    callbacks: Sequence[Callback] = (),
    **settings: Any,
) -> Result:
    """Start, or go on if there is a checkpoint."""
    module = model()
    resume = read_checkpoint(folder) if (folder / CHECKPOINTS).exists() else None
    if resume is None:
        folder.mkdir(exist_ok=True)
        loaded = clipfreeze.load_policy(policy, **POLICIES.get(policy, {}))
        torch.manual_seed(1)
        applied = clipfreeze.apply(clipfreeze.resolve(loaded, module), module)
    else:
        applied = clipfreeze.load(resume.path, module)
    values: dict[str, Any] = {"epochs": 2, "batch_size": 4, "keep": 3} | settings
    return fit(
        applied,
        data,
        {"target": colour_pairs(1, labelled=True)},
        tokenizer=Words(),
        transform=transform(),
        train_transform=transform(train=True),
        folder=folder,
        callbacks=[*callbacks, *([] if stop is None else [StopAt(stop)])],
        resume=resume,
        **values,
    )


def tensors(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    found: dict[str, Tensor] = load_file(folder / "weights.safetensors")
    return found


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Without what a clock says."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    clocks = {"samples_per_s", "data_wait", "memory_mb"}
    return [{name: value for name, value in line.items() if name not in clocks} for line in lines]


def same(one: Path, other: Path) -> None:
    a, b = tensors(one), tensors(other)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert metrics(one) == metrics(other)
    states = [read_checkpoint(folder) for folder in (one, other)]
    assert states[0].state == states[1].state
    assert states[0].tensors.keys() == states[1].tensors.keys()
    assert all(torch.equal(states[0].tensors[name], states[1].tensors[name]) for name in states[0].tensors)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a policy's run without a stop."""
    folders: dict[str, Path] = {}

    def run(policy: str) -> Path:
        if policy not in folders:
            folders[policy] = tmp_path_factory.mktemp(policy)
            train(folders[policy], policy, **DECIDED)
        return folders[policy]

    return run


@pytest.mark.parametrize("step", [1, 3, 4, 5, 7])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_run_goes_on_bit_for_bit_from_every_step(
    tmp_path: Path, straight: Callable[[str], Path], policy: str, step: int
) -> None:
    with pytest.raises(InterruptedRunError, match=f"stopped by SIGTERM after step {step} of {STEPS}: step {step} is"):
        train(tmp_path / "run", policy, stop=step, **DECIDED)
    assert not (tmp_path / "run" / "results.json").exists()
    result = train(tmp_path / "run", policy, **DECIDED)
    assert result.steps == STEPS
    same(tmp_path / "run", straight(policy))


def test_a_run_may_stop_many_times_and_work_in_workers(tmp_path: Path) -> None:
    train(tmp_path / "straight", "full", num_workers=2)
    for step in (2, 4, 6):
        with pytest.raises(InterruptedRunError):
            train(tmp_path / "run", "full", stop=step, num_workers=0)
    train(tmp_path / "run", "full", num_workers=1)
    same(tmp_path / "run", tmp_path / "straight")


def test_a_kill_in_the_middle_of_a_write_leaves_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, straight: Callable[[str], Path]
) -> None:
    class Killed(BaseException):
        pass

    real = checkpoints.save_file

    def kill(values: Any, path: Path, *more: Any) -> None:
        real(values, path, *more)
        if "00000008" in str(path):
            path.write_bytes(path.read_bytes()[:100])
            raise Killed

    monkeypatch.setattr(checkpoints, "save_file", kill)
    with pytest.raises(Killed):
        train(tmp_path / "run", "lora", **DECIDED)
    half = tmp_path / "run" / "metrics.jsonl"
    half.write_text(half.read_text() + '{"step": 9, "los')
    assert list((tmp_path / "run" / CHECKPOINTS).glob(".step-*.part"))
    assert read_checkpoint(tmp_path / "run").step in (4, 6)
    monkeypatch.undo()
    train(tmp_path / "run", "lora", **DECIDED)
    assert not list((tmp_path / "run" / CHECKPOINTS).glob(".*"))
    same(tmp_path / "run", straight("lora"))


def test_another_run_is_refused_and_what_differs_is_named(tmp_path: Path) -> None:
    with pytest.raises(InterruptedRunError):
        train(tmp_path, "full", stop=2)
    for changed, settings, words in (
        (colour_pairs(2), {}, "training data"),
        (DATA, {"batch_size": 8}, r"pairs in a step \(4, now 8\)"),
        (DATA, {"epochs": 5}, r"steps \(8, now 20\)"),
    ):
        with pytest.raises(DataError, match=words):
            train(tmp_path, "full", data=changed, **settings)


def test_another_base_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InterruptedRunError):
        train(tmp_path, "lora", stop=1)
    torch.manual_seed(9)
    with pytest.raises(clipfreeze.ClipfreezeError, match="another base"):
        clipfreeze.load(read_checkpoint(tmp_path).path, tiny.FAMILIES["clip_vit"]())


def test_the_last_k_and_the_best_are_kept(tmp_path: Path) -> None:
    for step in range(1, 6):
        checkpoints.save_checkpoint(tmp_path, {"step": step}, {}, lambda path: None)
    keep_checkpoints(tmp_path, 2, 1)
    assert sorted(path.name for path in (tmp_path / CHECKPOINTS).iterdir()) == [
        checkpoint_path(tmp_path, step).name for step in (1, 4, 5)
    ]


def test_a_full_disk_is_told_and_leaves_the_former_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints.save_checkpoint(tmp_path, {"step": 1}, {"x": torch.ones(1)}, lambda path: None)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(RunError, match="No space left on device"):
        checkpoints.save_checkpoint(tmp_path, {"step": 2}, {}, lambda path: None)
    assert read_checkpoint(tmp_path).step == 1


def test_a_checkpoint_is_what_load_takes_and_holds_no_pickle(tmp_path: Path) -> None:
    with pytest.raises(InterruptedRunError):
        train(tmp_path, "lora", stop=3)
    path = read_checkpoint(tmp_path).path
    assert sorted(file.suffix for file in path.iterdir()) == [".json", ".json", ".safetensors", ".safetensors"]
    assert read_plan(path / PLAN).policy.name == "lora"
    assert {p.shape for p in clipfreeze.load(path, model()).trainable().values()}


def test_no_checkpoint_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no checkpoint"):
        read_checkpoint(tmp_path)


def test_a_run_killed_when_its_end_was_decided_does_not_train_on(tmp_path: Path) -> None:
    decided: dict[str, Any] = {"evaluate_every": "1 steps", "patience": 1, "best": "top1"}
    ended = train(tmp_path / "straight", "full", **decided)
    assert ended.steps < STEPS

    class Signalled(Callback):
        def on_evaluation(self, run: Run, metrics: Any) -> None:
            if run.reason is not None:
                run._save()
                raise KeyboardInterrupt  # as if it were killed while it measures for the last time

    with pytest.raises(InterruptedRunError):
        train(tmp_path / "run", "full", callbacks=[Signalled()], **decided)
    result = train(tmp_path / "run", "full", **decided)
    assert result.steps == ended.steps
    assert result.kept_step == ended.kept_step
    assert metrics(tmp_path / "run") == metrics(tmp_path / "straight")
    assert all(torch.equal(of, tensors(tmp_path / "run")[name]) for name, of in tensors(tmp_path / "straight").items())


def test_a_folder_of_another_run_is_not_written_to(tmp_path: Path) -> None:
    train(tmp_path / "run", "full")
    before = sorted(path.name for path in (tmp_path / "run" / CHECKPOINTS).iterdir())
    module = model()
    applied = clipfreeze.apply(clipfreeze.resolve(clipfreeze.load_policy("full"), module), module)
    with pytest.raises(DataError, match="holds a run"):
        fit(applied, DATA, tokenizer=Words(), transform=transform(), folder=str(tmp_path / "run"), batch_size=4)
    assert sorted(path.name for path in (tmp_path / "run" / CHECKPOINTS).iterdir()) == before


def test_other_settings_or_sets_to_measure_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InterruptedRunError):
        train(tmp_path, "full", stop=2)
    with pytest.raises(DataError, match=r"setting clip_grad \(None, now 1.0\)"):
        train(tmp_path, "full", clip_grad=1.0)
    state = tmp_path / CHECKPOINTS / "step-00000002" / "state.json"
    saved = json.loads(state.read_text())
    saved["run"]["target data"] = "of other pictures"
    state.write_text(json.dumps(saved))
    with pytest.raises(DataError, match="changed since is the target data"):
        train(tmp_path, "full")


def test_folders_of_the_user_s_beside_checkpoints_do_no_harm(tmp_path: Path) -> None:
    for step in (1, 2):
        checkpoints.save_checkpoint(tmp_path, {"step": step}, {}, lambda path: None)
    (tmp_path / CHECKPOINTS / "step-00000001.bak").mkdir()
    keep_checkpoints(tmp_path, 1, None)
    assert read_checkpoint(tmp_path).step == 2
    assert (tmp_path / CHECKPOINTS / "step-00000001.bak").exists()
