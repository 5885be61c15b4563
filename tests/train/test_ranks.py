"""Several ranks do what one does: the gradients of the whole batch, the same loss curve, and none waits for ever."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ranked
import torch

from clipfreeze.errors import DataError, InterruptedRunError
from clipfreeze.policy.schema import Optimizer
from clipfreeze.stored import WEIGHTS, read_weights
from clipfreeze.train.settings import training_settings
from clipfreeze.train.sharding import check_sharding

HERE = Path(__file__).parent
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node", "{}")
ACCELERATE = (
    *("accelerate.commands.launch", "--cpu", "--num_processes", "{}", "--num_machines", "1"),
    *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
)


def launch(world: int, *arguments: str, by: tuple[str, ...] = TORCHRUN) -> str:
    """Run a script, or after "-m" a module, in `world` processes: what they wrote."""
    ways = [HERE, HERE.parent, HERE.parents[1], os.environ.get("PYTHONPATH", "")]
    settings = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, ways)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *(part.format(world) for part in by), *arguments]
    done = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def scores(folder: Path) -> Any:
    return [json.loads((folder / "results.json").read_text())["after"][name]["scores"] for name in ("target", "pairs")]


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_gradients_are_those_of_one_process_on_the_whole_batch(tmp_path: Path, world: int) -> None:
    launch(world, str(HERE / "ranked.py"), "gradients", str(tmp_path))
    ranked.task_gradients(tmp_path)
    pairs = [(path, path.with_name(path.name.replace(" 1.pt", f" {world}.pt"))) for path in tmp_path.glob("* 1.pt")]
    assert len(pairs) == 12
    for one, several in pairs:
        expected, found = torch.load(one), torch.load(several)
        assert found["loss"] == pytest.approx(expected["loss"], abs=1e-5)
        assert found["gradients"].keys() == expected["gradients"].keys()
        for name, gradient in expected["gradients"].items():
            torch.testing.assert_close(
                found["gradients"][name], gradient, rtol=1e-3, atol=2e-5, msg=f"{one.name} {name}"
            )


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_run_on_several_ranks_has_the_loss_curve_of_one(tmp_path: Path, world: int) -> None:
    launch(world, str(HERE / "ranked.py"), "training", str(tmp_path))
    ranked.task_training(tmp_path)
    for name in ("full", "lp_ft", "micro", "closed", "broken"):
        one, several = (tmp_path / f"{name} {number}" for number in (1, world))
        assert losses(several) == pytest.approx(losses(one), abs=1e-5)
        assert len(losses(one)) == (4 if name == "closed" else 8)
        for expected, found in zip(scores(one), scores(several), strict=True):
            assert {key: value["value"] for key, value in found.items()} == pytest.approx(
                {key: value["value"] for key, value in expected.items()}, abs=1e-4
            )
    assert json.loads((tmp_path / f"broken {world}.json").read_text()) == ["red 0: not a picture Pillow can read"]


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of the same runs, split over two ranks and whole in one process, some begun by the one or the other."""
    folder = tmp_path_factory.mktemp("split")
    ranked.task_sharded(folder)
    launch(2, str(HERE / "ranked.py"), "split", "sharded", "sharded_resume", str(folder))
    ranked.task_sharded_resume(folder)
    return folder


@pytest.mark.parametrize("policy", ranked.SPLIT)
def test_a_split_model_learns_what_a_whole_one_does(split: Path, policy: str) -> None:
    one, two = split / f"{policy} 1", split / f"{policy} 2"
    assert losses(two) == pytest.approx(losses(one), abs=1e-5)
    assert len(losses(one)) == 4
    expected, base, _ = read_weights(one / WEIGHTS)
    found, of, whole = read_weights(two / WEIGHTS)
    assert (base, True) == (of, whole)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("begun_by", [1, 2])
def test_a_run_goes_on_split_or_whole(split: Path, begun_by: int) -> None:
    one, resumed = split / "full 1", split / f"begun by {begun_by}"
    assert losses(resumed) == pytest.approx(losses(one), abs=1e-5)
    torch.testing.assert_close(read_weights(resumed / WEIGHTS)[0], read_weights(one / WEIGHTS)[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "options", "match"),
    [
        ({"batch_size": "auto"}, {}, "batch_size auto"),
        ({}, {"name": "lamb"}, "the optimizer lamb"),
        ({}, {"fused": True}, "the option fused"),
        ({"compile": True}, {}, "compile does not go with shard"),
    ],
)
def test_what_does_not_go_with_a_split_model_is_refused(
    settings: dict[str, Any], options: dict[str, Any], match: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clipfreeze.train.sharding.world_size", lambda: 2)
    whole = SimpleNamespace(scaler=None)
    check_sharding(training_settings(shard=True), Optimizer(), whole)
    with pytest.raises(DataError, match=match):
        check_sharding(training_settings(shard=True, **settings), Optimizer(**options), whole)
    with pytest.raises(DataError, match="fp16"):
        check_sharding(training_settings(shard=True), Optimizer(), SimpleNamespace(scaler=object()))


def test_one_process_cannot_split_a_model(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="this is the only one"):
        ranked.training(tmp_path / "run", "full", shard=True)


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_ranks(tmp_path: Path) -> None:
    ranked.training(tmp_path / "straight", "full")
    with pytest.raises(InterruptedRunError, match="after step 3"):
        ranked.training(tmp_path / "run", "full", callbacks=[ranked.StopAt(3)])
    launch(2, str(HERE / "ranked.py"), "resume", str(tmp_path), by=ACCELERATE)
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "straight"), abs=1e-5)


@pytest.mark.slow
def test_the_command_line_runs_under_torchrun_and_prints_once(tmp_path: Path) -> None:
    arguments = ("train", "logit_scale", "--batch-size", "504", "--epochs", "1", "--out")
    said = launch(2, "-m", "clipfreeze", *arguments, str(tmp_path / "two"))
    assert said.count("run folder") == said.count("logit_scale on demo") == 1
    launch(1, "-m", "clipfreeze", *arguments, str(tmp_path / "one"))
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    assert launch(2, "-m", "clipfreeze", "eval", str(tmp_path / "two")).count("measured on") == 1


def test_a_batch_that_ranks_cannot_share_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("clipfreeze.train.loop.world_size", lambda: 3)
    with pytest.raises(ranked.clipfreeze.ClipfreezeError, match="a batch of 8 does not divide by 3 ranks"):
        ranked.training(tmp_path / "run", "full")
