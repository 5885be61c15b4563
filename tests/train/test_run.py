"""A run from its spec to its folder, and back from the folder to the same numbers."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import clipfreeze
from clipfreeze import demo, models
from clipfreeze.errors import ClipfreezeError, DataError, InterruptedRunError
from clipfreeze.plan.value import Plan
from clipfreeze.train.loop import Callback, Run
from clipfreeze.train.parts import read_parts
from clipfreeze.train.runs import eval_run, resume_run, run_data, run_policy, train_run
from clipfreeze.train.spec import RunSpec, read_spec
from clipfreeze.train.table import TableFormat

from hand import COLOURS, coloured, save_tiny


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three pictures each of eight colours in class folders, and a table of them."""
    folder = tmp_path_factory.mktemp("pictures")
    rows = ["image;caption"]
    for colour in COLOURS:
        (folder / "classes" / colour).mkdir(parents=True)
        for number in range(3):
            name = f"classes/{colour}/{number}.png"
            (folder / name).write_bytes(coloured(colour, (32 + number, 32)))
            rows += [f"{name};{colour}", f"{name};a {colour} thing, number {number}"]
    (folder / "pairs.csv").write_text("\n".join(rows))
    return folder


def planned(spec: RunSpec) -> Plan:
    plan: Plan = clipfreeze.resolve(run_policy(spec), models.load(spec.model).model)
    return plan


@pytest.mark.parametrize(
    ("source", "policy", "kind"), [("classes", "last_n", "zero-shot"), ("pairs.csv", "full", "retrieval")]
)
def test_a_run_leaves_a_folder_that_gives_the_same_numbers(
    tmp_path: Path, tiny_model: str, pictures: Path, source: str, policy: str, kind: str
) -> None:
    spec = RunSpec(policy=policy, model=tiny_model, data=str(pictures / source), epochs=2, batch_size=4)
    result = train_run(spec, planned(spec), tmp_path / "run")
    assert result.after["target"].kind == kind
    assert result.after["target"].images == 2
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        *("checkpoints", "metrics.jsonl", "plan.json", "results.json", "run.log", "run.toml", "weights.safetensors"),
    ]
    assert read_spec(tmp_path / "run") == spec
    assert eval_run(tmp_path / "run") == result.after
    assert result.after != result.before
    whole = eval_run(tmp_path / "run", {"whole": str(pictures / source), "classes": str(pictures / "classes")})
    assert {name: metrics.images for name, metrics in whole.items()} == {"whole": 24, "classes": 24}
    assert (whole["whole"].kind, whole["classes"].kind) == (kind, "zero-shot")


@pytest.mark.parametrize(
    ("source", "policy", "params"),
    [
        ("classes", "head", {"classes": "data", "lr": 0.1}),
        ("classes", "prompt", {"class_specific": True}),
        ("classes", "prompt", {}),
        ("pairs.csv", "prompt", {"init": "random"}),
    ],
)
def test_heads_and_prompts_come_back_from_their_folder(
    tmp_path: Path, tiny_model: str, pictures: Path, source: str, policy: str, params: dict[str, bool | float | str]
) -> None:
    spec = RunSpec(policy=policy, params=params, model=tiny_model, data=str(pictures / source), epochs=2, batch_size=4)
    result = train_run(spec, planned(spec), tmp_path / "run")
    assert result.after["target"].kind == policy
    assert result.after["target"].scores != result.before["target"].scores
    assert eval_run(tmp_path / "run") == result.after
    assert read_spec(tmp_path / "run").params == params


def test_a_head_of_the_data_has_the_names_of_the_class_folders(tiny_model: str, pictures: Path) -> None:
    spec = RunSpec(policy="head", params={"classes": "data"}, model=tiny_model, data=str(pictures / "classes"))
    (site,) = planned(spec).sites
    assert site.classes == tuple(sorted(COLOURS))  # type: ignore[union-attr]


def test_classes_of_the_data_and_the_data_are_read_once(
    tmp_path: Path, tiny_model: str, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def counted(*arguments: Any) -> Any:
        calls.append(arguments[0])
        return read_parts(*arguments)

    monkeypatch.setattr("clipfreeze.train.runs.read_parts", counted)
    data = str(pictures / "classes")
    spec = RunSpec(policy="head", params={"classes": "data"}, model=tiny_model, data=data, epochs=1, batch_size=4)
    train_run(spec, planned(spec), tmp_path / "run")
    assert calls == [data]
    for read_again in (run_data, run_policy, run_policy):
        read_again(spec)
    assert calls == [data] * 4


def test_what_makes_no_pair_is_counted_and_named(
    tmp_path: Path, tiny_model: str, pictures: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(pictures / "classes", tmp_path / "data")
    for number in range(7):
        (tmp_path / "data" / f"note{number}.txt").touch()
    spec = RunSpec(policy="logit_scale", model=tiny_model, data=str(tmp_path / "data"), epochs=1, batch_size=4)
    train_run(spec, planned(spec), tmp_path / "run")
    assert f"7 files or rows of {tmp_path}/data make no pair: {tmp_path}/data/note0.txt; " in caplog.text
    assert "note4.txt" in caplog.text
    assert "note5.txt" not in caplog.text


def test_the_same_spec_gives_the_same_weights(tmp_path: Path, tiny_model: str, pictures: Path) -> None:
    spec = RunSpec(policy="last_n", params={"dropout": 0.5}, model=tiny_model, data=str(pictures / "classes"))
    short = spec.model_copy(update={"epochs": 1, "batch_size": 8})
    weights = []
    for name in ("one", "two"):
        train_run(short, planned(short), tmp_path / name)
        weights.append(load_file(tmp_path / name / "weights.safetensors"))
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_run_repeats_from_another_folder(
    tmp_path: Path, tiny_model: str, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the working folder has a folder of the name of a part."""
    (tmp_path / "data" / "test").mkdir(parents=True)
    rows = [f"{colour}/{n}.png,{colour},{'test' if n else 'train'}" for colour in COLOURS for n in range(2)]
    (tmp_path / "data" / "pairs.csv").write_text("\n".join(["image,caption,split", *rows]))
    monkeypatch.chdir(tmp_path / "data")
    root = os.path.relpath(pictures / "classes")
    spec = RunSpec(policy="full", model=tiny_model, data="pairs.csv", val="test", epochs=1, batch_size=4)
    spec = spec.model_copy(update={"table": TableFormat(image_root=root)})
    result = train_run(spec, planned(spec), tmp_path / "one")
    monkeypatch.chdir(tmp_path)
    assert eval_run(tmp_path / "one") == result.after
    again = read_spec(tmp_path / "one")
    assert train_run(again, planned(again), tmp_path / "two").after == result.after
    assert read_spec(tmp_path / "two") == again
    one, two = (load_file(tmp_path / name / "weights.safetensors") for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"data": "nothing.csv"}, "no data file or folder"),
        ({"batch_size": 64}, "larger than the data"),
        ({"model": "local-dir:nothing"}, "no folder"),
        ({"val": "nothing.csv"}, "no data file or folder"),
    ],
)
def test_wrong_input_leaves_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tiny_model: str,
    pictures: Path,
    change: dict[str, str | int],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    spec = RunSpec(policy="last_n", model=tiny_model, data=str(pictures / "classes"), batch_size=4)
    plan = planned(spec)
    with pytest.raises(ClipfreezeError, match=words) as caught:
        train_run(spec.model_copy(update=change), plan)
    assert caught.value.exit_code == 2
    assert not list(tmp_path.iterdir())


def test_the_embedded_data_have_a_goal_and_what_may_be_forgotten() -> None:
    data = run_data(RunSpec(policy="last_n"))
    assert list(data.tests) == ["target", "forgotten"]
    assert not {pair.image for pair in data.train} & {pair.image for part in data.tests.values() for pair in part}
    assert not set(data.train.class_names) & set(data.tests["target"].class_names)


def test_a_head_on_the_embedded_data_is_measured_on_other_drawings_of_its_classes() -> None:
    spec = RunSpec(policy="head", params={"classes": "data"})
    plan = planned(spec)
    data = run_data(spec, plan.sites)
    assert data.tests["target"].name.startswith(demo.CLOSED_STYLE)
    assert data.train.class_names == data.tests["target"].class_names
    assert not {pair.image for pair in data.train} & {pair.image for part in data.tests.values() for pair in part}
    with pytest.raises(DataError, match="--val without --data"):
        run_data(RunSpec(policy="last_n", val="x.csv"))


def test_only_the_embedded_model_is_asked_what_it_forgot(tiny_model: str, pictures: Path) -> None:
    source = str(pictures / "pairs.csv")
    assert list(run_data(RunSpec(policy="last_n", data=source)).tests) == ["target", "forgotten"]
    apart = run_data(RunSpec(policy="last_n", data=source, val=str(pictures / "classes"), model=tiny_model))
    assert {name: len(pairs) for name, pairs in apart.tests.items()} == {"target": 24}
    assert len(apart.train) == 24


class StopAt(Callback):
    """As a signal does after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, run: Run, record: Mapping[str, Any]) -> None:
        if record["step"] == self.step:
            run.stopping.asked = "SIGTERM"


def test_a_run_is_resumed_from_its_folder_alone_and_another_one_is_refused(
    tmp_path: Path, tiny_model: str, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = tmp_path / "mine.toml"
    text = 'name = "mine"\n[[rule]]\nmatch = "@projections"\ntrain = true\nlr = 1e-3\n'
    policy.write_text(text)
    data = tmp_path / "data"
    shutil.copytree(pictures / "classes", data)
    spec = RunSpec(policy=str(policy), model=tiny_model, data=str(data), epochs=2, batch_size=4)
    straight = train_run(spec, planned(spec), tmp_path / "straight")
    with pytest.raises(InterruptedRunError, match="go on with clipfreeze train --resume"):
        train_run(spec, planned(spec), tmp_path / "run", [StopAt(4)])
    monkeypatch.chdir(tmp_path / "run")

    anew = resume_run(_before_its_first_checkpoint(tmp_path / "run", tmp_path / "early"))
    assert anew.after == straight.after

    policy.write_text(text.replace("1e-3", "2e-3"))
    with pytest.raises(DataError, match=r"visual.proj: lr 0.001 is now 0.002"):
        resume_run(tmp_path / "run")
    policy.write_text("# moved down\n\n" + text)  # says the same
    extra = data / "red" / "another.png"
    extra.write_bytes(coloured("red", (50, 50)))
    with pytest.raises(DataError, match="changed since is the training data"):
        resume_run(tmp_path / "run")
    extra.unlink()
    result = resume_run(tmp_path / "run")
    assert result.after == straight.after
    assert result.before == straight.before
    weights = [load_file(tmp_path / name / "weights.safetensors") for name in ("straight", "run")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    with pytest.raises(DataError, match="is finished"):
        resume_run(tmp_path / "run")
    with pytest.raises(DataError, match="no run folder"):
        resume_run(tmp_path)


def _before_its_first_checkpoint(run: Path, copy: Path) -> Path:
    """As a kill would leave it."""
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "checkpoints")
    return copy


def test_what_is_retained_is_measured_beside_the_goal(tmp_path: Path, tiny_model: str, pictures: Path) -> None:
    known = str(pictures / "classes")
    spec = RunSpec(
        policy="projections", model=tiny_model, data=str(pictures / "pairs.csv"), retain=known, epochs=1, batch_size=4
    )
    result = train_run(spec, planned(spec), tmp_path / "run")
    assert list(result.after) == ["target", "retained"]
    assert eval_run(tmp_path / "run") == result.after
