"""A run on a stream: from its spec to its folder, and on from a checkpoint with the batches it would have had."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import clipfreeze
from clipfreeze import models
from clipfreeze.errors import DataError, InterruptedRunError
from clipfreeze.train.checkpoints import read_checkpoint
from clipfreeze.train.loop import Callback, Run
from clipfreeze.train.runs import eval_run, resume_run, run_data, run_policy, train_run
from clipfreeze.train.spec import RunSpec

from hand import colour_pairs, save_tiny
from shard_files import write_shard, write_shards


class StopAt(Callback):
    """As a signal does after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, run: Run, record: Any) -> None:
        if record["step"] == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four shards of five pictures, and one to measure on."""
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder, 4, 5)
    write_shard(
        folder / "val.tar",
        {
            name: content
            for n, pair in enumerate(colour_pairs())
            for name, content in ((f"{n}.png", bytes(pair.image)), (f"{n}.txt", pair.captions[0].encode()))
        },
    )
    return folder


def spec_of(shards: Path, model: str, **values: Any) -> RunSpec:
    common = {"policy": "full", "model": model, "val": str(shards / "val.tar"), "epochs": 2, "batch_size": 4}
    stream = {"data": f"pipe:cat {shards}/{{00000..00003}}.tar", "samples_per_epoch": 12}
    return RunSpec(**{**common, **stream, **values})


def train(spec: RunSpec, folder: Path, stop: int | None = None) -> Any:
    plan = clipfreeze.resolve(run_policy(spec), models.load(spec.model).model)
    return train_run(spec, plan, folder, [] if stop is None else [StopAt(stop)])


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_run_on_a_stream_goes_on_with_the_batches_it_would_have_had(
    tmp_path: Path, shards: Path, tiny_model: str, num_workers: int
) -> None:
    spec = spec_of(shards, tiny_model, num_workers=num_workers)
    result = train(spec, tmp_path / "straight")
    assert (result.steps, result.after["target"].images) == (6, 8)
    assert eval_run(tmp_path / "straight") == result.after
    with pytest.raises(InterruptedRunError, match="step 4 is saved"):
        train(spec, tmp_path / "run", stop=4)
    again = resume_run(tmp_path / "run")
    assert losses(tmp_path / "run") == losses(tmp_path / "straight")
    assert len(set(losses(tmp_path / "run"))) == 6
    one, two = (load_file(tmp_path / name / "weights.safetensors") for name in ("straight", "run"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not any("another order" in note for note in again.notes)


def test_a_run_says_so_when_its_stream_goes_on_in_another_order(tmp_path: Path, shards: Path, tiny_model: str) -> None:
    spec = spec_of(shards, tiny_model, data=f"file:{shards}/{{00000..00003}}.tar")
    with pytest.raises(InterruptedRunError):
        train(spec, tmp_path / "run", stop=2)
    text = (tmp_path / "run" / "run.toml").read_text()
    (tmp_path / "run" / "run.toml").write_text(f"num_workers = 2\n{text}")
    assert any("another order" in note for note in resume_run(tmp_path / "run").notes)


def test_a_run_on_a_stream_goes_on_from_another_folder(
    tmp_path: Path, shards: Path, tiny_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(shards)
    with pytest.raises(InterruptedRunError):
        train(spec_of(shards, tiny_model, data="file:{00000..00003}.tar", val="val.tar"), tmp_path / "run", stop=2)
    monkeypatch.chdir(tmp_path)
    assert resume_run(tmp_path / "run").broken == ()


def test_another_stream_is_refused(tmp_path: Path, shards: Path, tiny_model: str) -> None:
    with pytest.raises(InterruptedRunError):
        train(spec_of(shards, tiny_model), tmp_path / "run", stop=1)
    assert read_checkpoint(tmp_path / "run").state["readers"] == [1, 1]
    text = (tmp_path / "run" / "run.toml").read_text()
    (tmp_path / "run" / "run.toml").write_text(text.replace("{00000..00003}", "{00000..00002}"))
    with pytest.raises(DataError, match="the training data"):
        resume_run(tmp_path / "run")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"val": None}, "a stream, of which nothing can be held out"),
        ({"val": "5%"}, "nothing can be held out: --val 5%"),
        ({"samples_per_epoch": None}, "--samples-per-epoch N"),
        ({"data": "s3://bucket/a.tar"}, "no way to stream s3"),
        ({"data": "val.tar"}, "--samples-per-epoch is for a stream, and val.tar has an end"),
        ({"data": None, "val": None}, "--samples-per-epoch without --data"),
        ({"objective": "classes"}, "needs data with classes"),
        ({"policy": "head", "params": {"classes": "data"}}, "a stream, whose classes are not known"),
        (
            {"policy": "head", "params": {"classes": "imagenet"}},
            "a stream of captions, and the policy trains on classes",
        ),
        ({"batch_size": 16}, "larger than the data"),
    ],
)
def test_what_a_stream_cannot_be_is_said_before_anything_is_left(
    tmp_path: Path,
    shards: Path,
    tiny_model: str,
    monkeypatch: pytest.MonkeyPatch,
    values: dict[str, Any],
    words: str,
) -> None:
    monkeypatch.chdir(shards)
    with pytest.raises(DataError, match=words):
        train(spec_of(shards, tiny_model, **values), tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_a_file_whose_name_is_like_a_url_is_a_file(
    tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my:data.tar").write_bytes((shards / "val.tar").read_bytes())
    assert len(run_data(RunSpec(policy="full", data="my:data.tar", val="my:data.tar")).train) == 8


def test_a_shared_prompt_trains_on_a_stream_without_templates(tmp_path: Path, shards: Path, tiny_model: str) -> None:
    spec = spec_of(shards, tiny_model, policy="prompt", params={"init": "random"}, epochs=1)
    assert train(spec, tmp_path / "run").after["target"].kind == "prompt"
