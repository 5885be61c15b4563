"""A run to a folder that others load, from the command line."""

import json
import sys
from pathlib import Path

import open_clip
import pytest
import safetensors
import torch
import transformers

import clipfreeze
from clipfreeze import demo, models
from clipfreeze.cli.app import main
from clipfreeze.stored import read_plan
from clipfreeze.train.frontier import interpolating, start_values


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

    def train(policy="projections", model="demo", *more):
        data = ("--data", "data.csv", "--val", "data.csv", "--epochs", "1", "--batch-size", "6", "--out", "run")
        code, _, err = cli("train", policy, "--model", model, *data, *more)
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


@pytest.mark.parametrize(
    ("policy", "settings", "rounding"),
    [("projections", (), 0), ("lora", ("--set", "lr=0.1", "--set", "targets=q,v"), 1e-5)],
)
def test_half_of_what_was_trained_goes_to_open_clip(work, cli, policy, settings, rounding):
    work(policy, "demo", *settings)
    base = models.load("demo").model
    start = start_values(read_plan(Path("run/plan.json")), base)
    with interpolating(clipfreeze.load("run", base), start, 0.5):
        expected = encode(base)
    for alpha, features in (("0.5", expected), ("0", encode(models.load("demo").model)), ("1", encode(tuned("demo")))):
        code, out, err = cli("export", "run", "--to", "open_clip", "--alpha", alpha, "--out", f"at-{alpha}")
        assert code == 0, err
        model = eval(out.splitlines()[1], {"open_clip": open_clip})[0]
        torch.testing.assert_close(encode(model), features, rtol=rounding, atol=rounding)
    assert not torch.allclose(expected, features, rtol=0, atol=1e-4)


def test_alpha_is_for_whole_models_and_what_lies_between(work, cli):
    work("prompt", "demo", "--set", "visual=0")
    for target, alpha, said in (
        ("head", "0.5", "--alpha is for whole models, not for head"),
        ("open_clip", "0.5", "adds what has no alpha: prompt"),
        ("open_clip", "2", "an alpha of 2"),
    ):
        code, _, err = cli("export", "run", "--to", target, "--alpha", alpha)
        assert code == 2
        assert said in err


def test_what_apply_left_needs_the_name_of_its_model(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli("apply", "projections", "--model", "demo", "--out", "ready")[0] == 0
    code, _, err = cli("export", "ready", "--to", "open_clip")
    assert code == 2
    assert "nothing in ready names its base model" in err
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


def said_of_classes(model, names):
    """Logits of the tuned model itself for one picture."""
    tokens = open_clip.get_tokenizer(models.load("demo").name)(list(names))
    with torch.no_grad():
        image = model.encode_image(torch.ones(1, 3, 64, 64), normalize=True)
        return model.logit_scale.exp() * image @ model.encode_text(tokens, normalize=True).T


def layer_of(lines):
    """As the three printed lines make and use it."""
    names = {"torch": torch, "safetensors": safetensors}
    exec("\n".join(lines[:2]), names)
    return lambda model, images: eval(lines[2], {**names, "model": model, "images": images})


def assert_layer_says(lines, folder, model, classes):
    assert json.loads((folder / "head.json").read_text(encoding="utf-8"))["classes"] == list(classes)
    with torch.no_grad():
        found = layer_of(lines)(model, torch.ones(1, 3, 64, 64))
    torch.testing.assert_close(found, said_of_classes(model, classes), rtol=0, atol=1e-4)


def test_a_lora_run_goes_to_peft(work, cli):
    peft = pytest.importorskip("peft")
    work("lora", "demo", "--set", "lr=0.1", "--set", "targets=q,v", "--set", "dropout=0.1")
    expected = encode(tuned("demo"))
    assert not torch.allclose(expected, encode(models.load("demo").model), rtol=0, atol=1e-3)
    code, out, err = cli("export", "run", "--to", "peft")
    assert code == 0, err
    first, note, line = out.splitlines()
    assert first.startswith("wrote run/peft: max difference ")
    assert note.startswith("note: PEFT's attention applies no dropout")
    adapted = eval(line, {"open_clip": open_clip, "peft": peft})
    torch.testing.assert_close(encode(adapted.base_model.model), expected, rtol=0, atol=1e-5)


def test_a_prompt_run_goes_to_a_classifier_of_its_data_or_of_a_file(work, cli, tmp_path):
    work("prompt", "demo", "--set", "lr=0.1", "--set", "visual=0")
    model = tuned("demo")
    code, out, err = cli("export", "run", "--to", "head", "--classes", "data")
    assert code == 0, err
    first, *lines = out.splitlines()
    assert first.startswith("wrote run/head: max difference ")
    captions = [line.split(",")[1] for line in (tmp_path / "data.csv").read_text(encoding="utf-8").splitlines()[1:]]
    assert_layer_says(lines, tmp_path / "run" / "head", model, sorted(set(captions)))

    (tmp_path / "classes.txt").write_text("red cat\nblue dog\n\ncow\n", encoding="utf-8")
    code, out, err = cli("export", "run", "--to", "head", "--classes", "classes.txt", "--out", "other")
    assert code == 0, err
    assert_layer_says(out.splitlines()[1:], tmp_path / "other", model, ("red cat", "blue dog", "cow"))

    code, out, err = cli("export", "run", "--to", "head")
    assert (code, out) == (2, "")
    assert "which ones the classifier shall tell apart" in err


def test_a_classifier_of_a_tuned_vision_tower_says_so(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "classes.txt").write_text("cat\ndog\n", encoding="utf-8")
    assert cli("apply", "lora_prompt", "--model", "demo", "--out", "ready")[0] == 0
    code, out, err = cli("export", "ready", "--to", "head", "--model", "demo", "--classes", "classes.txt")
    assert code == 0, err
    assert out.splitlines()[1].startswith("note: the image features are those of the tuned vision tower")


@pytest.mark.parametrize("target", ["open_clip", "hf", "peft"])
def test_classes_are_for_a_classifier_alone(cli, tmp_path, target):
    code, _, err = cli("export", tmp_path, "--to", target, "--classes", "imagenet")
    assert code == 2
    assert f"--classes is for --to head, not for {target}" in err


@pytest.mark.parametrize(
    ("written", "said"),
    [(None, "cannot read"), ("cat\n", "nothing to tell apart"), ("cat\ncat\n", "stands there twice")],
    ids=["missing", "one", "twice"],
)
def test_a_file_of_no_classes_is_refused(cli, tmp_path, written, said):
    if written is not None:
        (tmp_path / "classes.txt").write_text(written, encoding="utf-8")
    code, _, err = cli("export", tmp_path, "--to", "head", "--classes", tmp_path / "classes.txt")
    assert code == 2
    assert "--classes: " in err
    assert said in err


def test_classes_of_the_data_need_a_run(cli, tmp_path):
    code, _, err = cli("export", tmp_path, "--to", "head", "--classes", "data")
    assert code == 2
    assert "is no run folder" in err


def test_lora_of_peft_goes_to_open_clip(cli, tmp_path, monkeypatch):
    peft = pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    theirs = peft.get_peft_model(models.load("demo").model, peft.LoraConfig(target_modules=r".*\.(attn|c_fc)"))
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    theirs.save_pretrained("theirs")
    expected = encode(theirs.base_model.model)
    code, out, err = cli("export", "theirs", "--model", "demo", "--to", "open_clip")
    assert code == 0, err
    assert "wrote theirs/open_clip: " in out
    model = eval(out.splitlines()[1], {"open_clip": open_clip})[0]
    torch.testing.assert_close(encode(model), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(expected, encode(models.load("demo").model), rtol=0, atol=1e-3)

    code, _, err = cli("export", "theirs", "--to", "open_clip")
    assert code == 2
    assert "nothing in theirs names its base model" in err


def test_a_file_of_clip_lora_goes_to_a_folder_beside_it(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    loaded = models.load("demo").model
    attention = [block.attn for block in loaded.visual.transformer.resblocks]
    layers = {}
    for number, module in enumerate(attention):
        pair = {"w_lora_A": torch.ones(1, module.embed_dim) / 100, "w_lora_B": torch.ones(module.embed_dim, 1)}
        layers[f"layer_{number}"] = {"proj": pair}
        with torch.no_grad():
            module.out_proj.weight += 2 / 100
    metadata = {"r": 1, "alpha": 2, "encoder": "vision", "params": ["o"], "position": "all"}
    torch.save({"weights": layers, "metadata": metadata}, tmp_path / "lora_weights.pt")
    code, out, err = cli("export", "lora_weights.pt", "--model", "demo", "--to", "open_clip")
    assert code == 0, err
    assert "wrote open_clip: " in out
    model = eval(out.splitlines()[1], {"open_clip": open_clip})[0]
    torch.testing.assert_close(encode(model), encode(loaded), rtol=1e-5, atol=1e-5)


def test_formats_are_named_where_one_is_wrong_or_missing(cli, tmp_path):
    for arguments in (["--to", "onnx"], []):
        code, _, err = cli("export", tmp_path, *arguments)
        assert code == 2
        assert "--to" in err
    assert all(name in err or name in cli("export", "--help")[1] for name in ("open_clip", "hf", "peft", "head"))
