"""A run to a folder that others load, from the command line."""

import json
import sys

import open_clip
import pytest
import torch
import transformers

import clipfreeze
from clipfreeze import demo, models
from clipfreeze.cli.app import main


@pytest.fixture
def cli(monkeypatch, capsys):
    """Runs a command: its exit code and what it printed."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["clipfreeze", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        printed = capsys.readouterr()
        return stop.value.code, printed.out, printed.err

    return run


@pytest.fixture
def work(tmp_path, monkeypatch, cli):
    """A folder of our own with six pictures in data.csv, in which a run is trained for one step on request."""
    monkeypatch.chdir(tmp_path)
    rows = []
    for index, picture in enumerate(demo.load_pictures("openmoji")[:6]):
        (tmp_path / f"{index}.webp").write_bytes(picture.image)
        rows.append(f"{index}.webp,{picture.name}")
    (tmp_path / "data.csv").write_text("\n".join(["image,caption", *rows]) + "\n", encoding="utf-8")

    def train(policy="projections", model="demo"):
        data = ("--data", "data.csv", "--val", "data.csv", "--epochs", "1", "--batch-size", "6", "--out", "run")
        code, _, err = cli("train", policy, "--model", model, *data)
        assert code == 0, err

    return train


def tuned(model):
    """What the run left, loaded as `clipfreeze eval` does."""
    torch.manual_seed(0)
    loaded = models.load(model)
    clipfreeze.load("run", loaded.model)
    return loaded.model.eval()


def encode(model):
    with torch.no_grad():
        return model.eval().encode_image(torch.ones(1, 3, 64, 64))


def test_a_run_goes_to_open_clip_and_to_transformers(work, cli, tmp_path):
    work()
    expected = encode(tuned("demo"))
    assert not torch.equal(expected, encode(models.load("demo").model))

    code, out, _ = cli("export", "run", "--to", "open_clip")
    assert code == 0
    first, line = out.splitlines()
    assert first == "wrote run/open_clip: max difference 0 on a probe batch"
    assert line == "open_clip.create_model_and_transforms('local-dir:run/open_clip')"
    assert torch.equal(encode(eval(line, {"open_clip": open_clip})[0]), expected)

    code, out, err = cli("export", "run", "--to", "hf", "--out", "elsewhere/clip")
    assert code == 0, err
    first, line = out.splitlines()
    assert first.startswith("wrote elsewhere/clip: max difference ")
    model, _ = eval(line, {"transformers": transformers})
    with torch.no_grad():
        found = model(pixel_values=torch.ones(1, 3, 64, 64), input_ids=torch.tensor([[49406, 49407]])).image_embeds
    torch.testing.assert_close(found, torch.nn.functional.normalize(expected, dim=-1), rtol=0, atol=1e-5)


def test_a_run_with_quickgelu_on_random_weights_is_exported_as_it_was(work, cli, tmp_path):
    """B64, and random weights come from the run's seed."""
    config = json.loads((demo.model_dir() / "open_clip_config.json").read_text(encoding="utf-8"))
    config["model_cfg"]["quick_gelu"] = True
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "open_clip_config.json").write_text(json.dumps(config))
    work("logit_scale", "local-dir:model")
    code, out, err = cli("export", "run", "--to", "open_clip")
    assert code == 0, err
    model = eval(out.splitlines()[1], {"open_clip": open_clip})[0]
    assert torch.equal(encode(model), encode(tuned("local-dir:model")))


def test_what_apply_left_needs_the_name_of_its_model(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli("apply", "projections", "--model", "demo", "--out", "ready")[0] == 0
    code, _, err = cli("export", "ready", "--to", "open_clip")
    assert code == 2
    assert "ready has no run.toml that names its base model" in err
    assert "--model" in err
    code, out, err = cli("export", "ready", "--to", "open_clip", "--model", "demo")
    assert code == 0, err
    assert "wrote ready/open_clip" in out


def test_a_second_export_to_the_same_place_is_refused(work, cli, tmp_path):
    work("logit_scale")
    assert cli("export", "run", "--to", "open_clip")[0] == 0
    code, out, err = cli("export", "run", "--to", "open_clip")
    assert (code, out) == (2, "")
    assert "run/open_clip is not empty" in err
    assert not (tmp_path / "run" / "open_clip.part").exists()


def test_a_folder_that_is_no_run_is_refused(cli, tmp_path):
    code, _, err = cli("export", tmp_path, "--to", "open_clip")
    assert code == 2
    assert "is no run folder" in err


def test_a_run_that_names_its_model_takes_no_other(work, cli):
    work("logit_scale")
    code, _, err = cli("export", "run", "--to", "open_clip", "--model", "ViT-B-32")
    assert code == 2
    assert "names the base model already" in err


def test_a_run_without_weights_is_refused(work, cli, tmp_path):
    work("logit_scale")
    (tmp_path / "run" / "weights.safetensors").unlink()
    code, _, err = cli("export", "run", "--to", "open_clip")
    assert code == 2
    assert "ended before its first epoch was saved" in err


def test_formats_are_named_where_one_is_wrong_or_missing(cli, tmp_path):
    for arguments in (["--to", "onnx"], []):
        code, _, err = cli("export", tmp_path, *arguments)
        assert code == 2
        assert "--to" in err
    assert all(name in err or name in cli("export", "--help")[1] for name in ("open_clip", "hf"))
