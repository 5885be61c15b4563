"""Training from the command line for real: embedded pictures, a table, a folder; what is left, and what it is worth."""

import json
import os
import signal
import sys

import pytest
import torch
from PIL import Image

import clipfreeze
from clipfreeze import demo, models
from clipfreeze.cli.app import main


@pytest.fixture
def cli(monkeypatch, capsys, tmp_path):
    """Runs a command that must succeed, in an empty folder: its stdout."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["clipfreeze", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        printed = capsys.readouterr()
        assert stop.value.code == 0, printed.err
        return printed.out

    return run


def scores(text: str) -> list[str]:
    """The numbers of the last column of a table of metrics."""
    return [line.rsplit("  ", 1)[1].strip() for line in text.splitlines() if "±" in line]


def test_train_then_eval_gives_the_same_numbers_and_learns(cli, tmp_path):
    out = cli("train", "last_n", "--epochs", "1", "--batch-size", "252")
    assert "last_n on demo" in out
    assert "next        clipfreeze eval runs/last_n-1" in out
    folder = tmp_path / "runs" / "last_n-1"
    assert {file.name for file in folder.iterdir()} == {
        *("checkpoints", "metrics.jsonl", "plan.json", "results.json", "run.log", "run.toml", "weights.safetensors"),
    }
    result = json.loads((folder / "results.json").read_text())
    top5 = {when: result[when]["target"]["scores"]["top5"]["value"] for when in ("before", "after")}
    assert top5["after"] > top5["before"]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert scores(cli("eval", "runs/last_n-1")) == scores(out)


def test_a_head_s_table_says_what_measured(cli, tmp_path):
    out = cli("train", "head", *class_folders(tmp_path))
    assert "target: 24 images, 12 classes, zero-shot, then by the head" in out
    assert "a photo of a" not in next(line for line in out.splitlines() if line.startswith("target"))
    assert "and 9 more" in out
    again = cli("eval", "runs/head-1")
    assert "target: 24 images, 12 classes, by the head" in again
    assert scores(again) == scores(out)


def test_a_run_repeats_from_its_spec_bit_for_bit(cli, tmp_path):
    for name in ("one", "two"):
        cli("train", "logit_scale", *few(tmp_path), "--seed", "3", "--out", name)
    one, two = ((tmp_path / name / "weights.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two
    assert (tmp_path / "one" / "run.toml").read_text() == (tmp_path / "two" / "run.toml").read_text()


def test_logit_scale_moves_nll_and_no_rank(cli):
    out = cli("train", "logit_scale", "--epochs", "1", "--batch-size", "504")
    rows = [line.split("  ") for line in out.splitlines() if "±" in line]
    for row in rows:
        cells = [cell.strip() for cell in row if cell.strip()]
        name, before, after = cells[-3:]
        assert (before == after) == name.startswith("top"), cells


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--retain-floor", "0.9"), "add --frontier"),
        (("--frontier", "--plot", "a.svg"), "leave out one of them"),
        (("--plot", "a.png"), "written as SVG"),
        (("--data", "="), "write --data PATH or --data NAME=PATH"),
    ],
)
def test_options_of_eval_that_do_not_go_together(monkeypatch, capsys, tmp_path, arguments, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["clipfreeze", "eval", "run", *arguments])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert said in capsys.readouterr().err


def pictures(folder, count=12):
    for index, picture in enumerate(demo.load_pictures("noto")[:count]):
        path = folder / f"{index}.webp"
        path.write_bytes(picture.image)
        yield path, picture.name


def few(folder):
    """Options of a short run on twelve of the embedded pictures: two steps an epoch."""
    rows = [f"{path.name};{name}" for path, name in pictures(folder)]
    (folder / "data.csv").write_text("\n".join(["image;caption", *rows]) + "\n")
    return ("--data", "data.csv", "--val", "data.csv", "--epochs", "1", "--batch-size", "6")


def test_a_table_of_captions(cli, tmp_path):
    out = cli("train", "projections", *few(tmp_path))
    assert "12 captions" in out
    assert "recall" in out
    assert "captions" in cli("eval", "runs/projections-1")
    sets = ("--data", "data.csv", "--data", "b=data.csv")
    found = json.loads(cli("eval", "runs/projections-1", *sets, "--format", "json"))
    assert list(found) == ["data", "b"]
    assert found["data"] == found["b"]
    out = cli("eval", "runs/projections-1", *sets, "--frontier", "--retain-floor", "0.5")
    assert len(out.splitlines()) == 2 + 11 + 3
    assert out.split("\n")[0].split() == [
        "alpha", "data:", "image_to_text_recall_at_1", "b:", "image_to_text_recall_at_1"]  # fmt: skip
    frontier = json.loads(cli("eval", "runs/projections-1", *sets, "--frontier", "--format", "json"))
    assert frontier["points"][10]["metrics"] == found
    assert (frontier["goal"], frontier["retain"]) == ("data", ["b"])
    assert f"next        clipfreeze export runs/projections-1 --to open_clip --alpha {frontier['best_alpha']:g}" in out


def class_folders(folder):
    """Options of a short run on twelve class folders of two pictures each."""
    for path, name in pictures(folder):
        of_class = folder / "data" / name.replace(" ", "_")
        of_class.mkdir(parents=True)
        for copy in range(2):
            Image.open(path).save(of_class / f"{copy}.png")
    return ("--data", "data", "--val", "data", "--epochs", "1", "--batch-size", "8")


def test_a_folder_of_classes(cli, tmp_path):
    out = cli("train", "vision_only", *class_folders(tmp_path), "--set", "last=1")
    assert "24 images, 12 classes" in out
    assert scores(cli("eval", "runs/vision_only-1", "--plot", "sure.svg")) == scores(out)
    assert "target: 24 images" in (tmp_path / "sure.svg").read_text()


def test_apply_out_leaves_a_folder_for_any_trainer(cli, tmp_path):
    cli("apply", "last_n", "--model", "demo", "--out", "ready")
    model = models.load("demo").model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    applied = clipfreeze.load(tmp_path / "ready", model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(applied.trainable())
    applied.optimizer()


def test_apply_out_says_what_was_proved(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        sys, "argv", ["clipfreeze", "apply", "norm_bias", "--model", "demo", "--out", "ready", "--format", "json"]
    )
    with pytest.raises(SystemExit, match="0"):
        main()
    out, err = capsys.readouterr()
    plan = json.loads(out)
    trained = sum(parameter["trainable"] for parameter in plan["parameters"])
    assert f"hold each of {trained} tensors once" in err
    assert "one forward and backward" in err


def test_what_starts_anew_starts_from_the_seed(cli, tmp_path):
    for name in ("one", "two"):
        cli("train", "projections", "--set", "reinit=xavier", *few(tmp_path), "--out", name)
    one, two = ((tmp_path / name / "metrics.jsonl").read_text().splitlines()[0] for name in ("one", "two"))
    assert json.loads(one)["loss"] == json.loads(two)["loss"]


def test_a_run_on_random_weights_can_be_evaluated(cli, tmp_path):
    rows = [f"{path.name},{name}" for path, name in pictures(tmp_path)]
    (tmp_path / "data.csv").write_text("\n".join(["image,caption", *rows]) + "\n")
    config = json.loads((demo.model_dir() / "open_clip_config.json").read_text())
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "open_clip_config.json").write_text(json.dumps(config))
    common = ("--model", "local-dir:model", "--data", "data.csv", "--val", "data.csv")
    out = cli("train", "logit_scale", *common, "--epochs", "1", "--batch-size", "6")
    assert scores(cli("eval", "runs/logit_scale-1")) == scores(out)


def test_a_policy_of_one_s_own_keeps_its_rates_on_the_embedded_model(cli, tmp_path):
    (tmp_path / "full.toml").write_text('name = "full"\n[[rule]]\nmatch = "@logit_scale"\ntrain = true\nlr = 1e-2\n')
    assert "lr=0.01" in cli("train", "full.toml", *few(tmp_path))


def test_an_interrupted_run_says_what_is_left(monkeypatch, tmp_path, capsys):
    from clipfreeze.train.engine import Engine

    monkeypatch.chdir(tmp_path)
    real = Engine.update

    def interrupted(engine, batch, step, *more):
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return real(engine, batch, step, *more)

    monkeypatch.setattr(Engine, "update", interrupted)
    monkeypatch.setattr(sys, "argv", ["clipfreeze", "train", "logit_scale", *few(tmp_path), "--epochs", "2"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 130
    said = (
        "stopped by SIGINT after step 2 of 4: step 2 is saved, go on with clipfreeze train --resume runs/logit_scale-1"
    )
    assert said in capsys.readouterr().err
    monkeypatch.setattr(Engine, "update", real)
    for wrong, words in (
        (["logit_scale", "--epochs", "3"], "it takes no epochs, policy"),
        (["--shard"], "shard splits the model over several ranks"),
        ([], "clipfreeze eval runs/logit_scale-1"),
    ):
        monkeypatch.setattr(sys, "argv", ["clipfreeze", "train", *wrong, "--resume", "runs/logit_scale-1"])
        with pytest.raises(SystemExit) as stop:
            main()
        printed = capsys.readouterr()
        assert stop.value.code == (2 if wrong else 0)
        assert words in printed.out + printed.err
    lines = (tmp_path / "runs" / "logit_scale-1" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]
