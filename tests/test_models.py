import json
import logging

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from clipfreeze import models
from clipfreeze.errors import ModelError
from clipfreeze.models import build_on_meta, canonical_name, load, load_weights, model_names

import tiny

CONFIG = {"embed_dim": tiny.EMBED_DIM, "vision_cfg": tiny.VISION, "text_cfg": {**tiny.TEXT, "vocab_size": 49408}}


def write_folder(folder, model=None, **changes):
    folder.mkdir(exist_ok=True)
    config = {"model_cfg": {**CONFIG, **changes}, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3}}
    (folder / "open_clip_config.json").write_text(json.dumps(config), encoding="utf-8")
    if model is not None:
        save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return f"local-dir:{folder}"


def build(**changes):
    return open_clip.CLIP(**{**CONFIG, **changes})


def refusal(call, *arguments):
    with pytest.raises(ModelError) as caught:
        call(*arguments)
    [problem] = caught.value.problems
    return problem


@pytest.fixture
def model():
    torch.manual_seed(0)
    return build()


# Names


def test_exact_names_and_openais_slash_are_taken():
    assert canonical_name("ViT-B-32") == "ViT-B-32"
    assert canonical_name("ViT-B/32") == "ViT-B-32"
    assert {canonical_name(name) for name in model_names()} == set(model_names())


@pytest.mark.parametrize("text", ["vit-b-32", "ViT-B-33", "vit-b/32"])
def test_wrong_names_get_the_three_nearest(text):
    problem = refusal(canonical_name, text)
    assert problem.what == f"open_clip has no model {text!r}"
    assert problem.fix.count(" or ") == 2
    assert "ViT-B-32" in problem.fix
    assert "\n" not in problem.fix


def test_demo_is_the_model_that_comes_with_us():
    name = canonical_name("demo")
    assert name.startswith("local-dir:")
    assert build_on_meta("demo").visual.conv1.weight.is_meta


def test_schemes_are_kept_and_need_a_place():
    assert canonical_name("local-dir:some/where") == "local-dir:some/where"
    assert canonical_name("hf-hub:owner/name") == "hf-hub:owner/name"
    assert "names no model" in refusal(canonical_name, "local-dir:").what


def test_a_bare_folder_is_answered_with_the_scheme(tmp_path):
    assert f"local-dir:{tmp_path}" in refusal(canonical_name, str(tmp_path)).fix


# Previews


@pytest.mark.parametrize("name", ["ViT-B-32", "RN50", "ViT-B-16-SigLIP", "coca_ViT-B-32", "convnext_base"])
def test_previews_have_no_weights_and_the_real_names(name):
    model = build_on_meta(name)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert type(model).__name__ in ("CLIP", "CustomTextCLIP", "CoCa")


def test_a_preview_of_a_folder_needs_no_weights(tmp_path):
    model = build_on_meta(write_folder(tmp_path / "model"))
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in build().named_parameters()]


def test_previews_are_silent_and_leave_logging_alone(capsys):
    handlers, disabled = list(logging.root.handlers), logging.root.manager.disable
    build_on_meta("ViT-B-32")
    assert capsys.readouterr() == ("", "")
    assert (logging.root.handlers, logging.root.manager.disable) == (handlers, disabled)


def test_folders_without_config_or_with_a_broken_one_are_refused(tmp_path):
    assert "there is no folder" in refusal(build_on_meta, f"local-dir:{tmp_path}/none").what
    assert "open_clip_config.json cannot be read" in refusal(build_on_meta, f"local-dir:{tmp_path}").what
    (tmp_path / "open_clip_config.json").write_text("{")
    assert "open_clip_config.json cannot be read" in refusal(build_on_meta, f"local-dir:{tmp_path}").what
    (tmp_path / "open_clip_config.json").write_text('{"model_cfg": {"embed_dim": 3}}')
    assert "has no model_cfg with" in refusal(build_on_meta, f"local-dir:{tmp_path}").what


def test_a_config_open_clip_cannot_build_is_refused(tmp_path):
    name = write_folder(tmp_path / "model", vision_cfg={**tiny.VISION, "layerz": 3})
    assert "layerz" in refusal(build_on_meta, name).what


def test_a_config_that_needs_the_network_says_so(monkeypatch, tmp_path):
    from transformers import AutoConfig

    def offline(*_, **__):
        raise OSError("We couldn't connect to the hub")

    monkeypatch.setattr(AutoConfig, "from_pretrained", offline)
    problem = refusal(build_on_meta, "roberta-ViT-B-32")
    assert "the Hugging Face text tower of roberta-ViT-B-32 cannot be fetched" in problem.what
    assert "network" in problem.fix


# Loading


def test_a_folder_is_loaded_with_its_weights_transforms_and_tokenizer(tmp_path, model):
    loaded = load(write_folder(tmp_path / "model", model))
    assert all(torch.equal(value, loaded.model.state_dict()[name]) for name, value in model.state_dict().items())
    assert loaded.notes == ()
    assert loaded.context_length == tiny.CONTEXT
    assert loaded.tokenizer(["a cat"]).shape == (1, tiny.CONTEXT)
    assert loaded.transform.transforms[-1].std == [0.25] * 3
    assert loaded.train_transform is not loaded.transform


def test_the_demo_is_loaded_with_its_weights():
    loaded = load("demo")
    assert loaded.notes == ()
    assert loaded.tokenizer(["a cat"]).shape == (1, loaded.context_length)


def test_a_folder_whose_weights_do_not_fit_is_refused(tmp_path, model):
    name = write_folder(tmp_path / "model", model, embed_dim=8)
    assert "open_clip_model.safetensors does not fit the model: 2 of another shape" in refusal(load, name).what


def test_weights_of_another_activation_are_noted(monkeypatch, tmp_path, model):
    """B64: the tag was trained with QuickGELU, the config has GELU."""
    torch.save(model.state_dict(), tmp_path / "a.pt")
    monkeypatch.setattr(open_clip.factory, "get_model_config", lambda name: {**CONFIG})
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: {**CONFIG})
    monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda *_, **__: str(tmp_path / "a.pt"))
    [note] = load("ViT-B-32", "openai").notes
    assert "QuickGELU mismatch" in note
    assert note.endswith("Load ViT-B-32-quickgelu instead.")


def test_random_weights_are_said_to_be_random(tmp_path):
    loaded = load(write_folder(tmp_path / "model"))
    assert loaded.notes == (f"local-dir:{tmp_path / 'model'} has random weights: no pretrained ones were asked for",)


def test_a_file_is_loaded_over_a_named_architecture(tmp_path, model):
    torch.save({"epoch": 3, "state_dict": model.state_dict()}, tmp_path / "epoch_3.pt")
    loaded = load(write_folder(tmp_path / "model"), str(tmp_path / "epoch_3.pt"))
    assert torch.equal(loaded.model.logit_scale, model.logit_scale)
    assert torch.equal(loaded.model.visual.proj, model.visual.proj)
    assert loaded.notes == ()


def test_precision_is_that_of_open_clip(tmp_path, model):
    loaded = load(write_folder(tmp_path / "model", model), precision="bf16")
    assert loaded.model.visual.proj.dtype == torch.bfloat16


def test_unknown_tags_get_the_nearest_there_are():
    problem = refusal(load, "ViT-B-32", "laion2b_s34b_b79")
    assert problem.what == "there are no weights 'laion2b_s34b_b79' for ViT-B-32"
    assert "did you mean laion2b_s34b_b79k" in problem.fix


def test_missing_files_and_folders_are_told_apart_from_tags(tmp_path):
    assert "there is no checkpoint file" in refusal(load, "ViT-B-32", "runs/epoch_1.pt").what
    assert f"local-dir:{tmp_path}" in refusal(load, "ViT-B-32", str(tmp_path)).fix


def test_a_download_that_fails_says_so(monkeypatch):
    def offline(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(open_clip.factory, "download_pretrained", offline)
    problem = refusal(load, "RN50", "cc12m")
    assert "weights of RN50 cannot be fetched" in problem.what
    assert "no route to host" in problem.what


# Checkpoint files


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "_orig_mod.module.", "module._orig_mod."])
def test_files_of_wrapped_models_load(tmp_path, model, prefix):
    """B62: every name of a wrapped model begins with the wrapper's."""
    torch.save({prefix + name: value for name, value in model.state_dict().items()}, tmp_path / "a.pt")
    fresh = build()
    assert load_weights(fresh, tmp_path / "a.pt") == []
    assert all(torch.equal(value, fresh.state_dict()[name]) for name, value in model.state_dict().items())


def test_names_that_contain_a_wrappers_word_are_left_alone(tmp_path, model):
    model.module_head = torch.nn.Linear(2, 2)
    torch.save(model.state_dict(), tmp_path / "a.pt")
    assert (
        "2 unexpected (module_head.weight; module_head.bias)" in refusal(load_weights, build(), tmp_path / "a.pt").what
    )
    torch.save({"module_head.weight": torch.zeros(1), **build().state_dict()}, tmp_path / "b.pt")
    assert "1 unexpected (module_head.weight)" in refusal(load_weights, build(), tmp_path / "b.pt").what


def test_a_file_of_another_model_is_refused_and_changes_nothing(tmp_path, model):
    wider = build(embed_dim=8)
    torch.save(wider.state_dict(), tmp_path / "a.pt")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    problem = refusal(load_weights, model, tmp_path / "a.pt")
    assert "2 of another shape (text_projection is (32, 8), the model's (32, 16); visual.proj is" in problem.what
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_missing_names_are_counted(tmp_path, model):
    partial = {name: value for name, value in model.state_dict().items() if not name.startswith("visual.")}
    torch.save(partial, tmp_path / "a.pt")
    assert "44 missing (visual." in refusal(load_weights, model, tmp_path / "a.pt").what


def test_a_file_without_logit_bias_leaves_similarities_as_they_were(tmp_path, model):
    """B68."""
    torch.save(model.state_dict(), tmp_path / "a.pt")
    biased = build(init_logit_bias=-10.0)
    [note] = load_weights(biased, tmp_path / "a.pt")
    assert "no logit_bias" in note
    assert biased.logit_bias.item() == 0


def test_a_logit_bias_is_never_dropped(tmp_path, model):
    """B68."""
    torch.save(build(init_logit_bias=-10.0).state_dict(), tmp_path / "a.pt")
    problem = refusal(load_weights, model, tmp_path / "a.pt")
    assert "1 unexpected (logit_bias)" in problem.what
    assert "init_logit_bias" in problem.fix


def test_a_file_of_clip_loads_into_custom_text_clip(tmp_path, model):
    torch.save(model.state_dict(), tmp_path / "a.pt")
    custom = open_clip.CustomTextCLIP(**CONFIG)
    load_weights(custom, tmp_path / "a.pt")
    assert torch.equal(custom.text.text_projection, model.text_projection)


def test_position_embeddings_of_another_image_size_are_resized_and_noted(tmp_path, model):
    torch.save(model.state_dict(), tmp_path / "a.pt")
    larger = build(vision_cfg={**tiny.VISION, "image_size": 48})
    [note] = load_weights(larger, tmp_path / "a.pt")
    assert note.startswith("visual.positional_embedding of ")
    assert note.endswith("was resized from 5 to 10 positions")


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors", "a.bin"])
@pytest.mark.parametrize("content", [b"", b"not a checkpoint at all, but a text"])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, model, name, content):
    (tmp_path / name).write_bytes(content)
    assert "cannot be read as a checkpoint" in refusal(load_weights, model, tmp_path / name).what


def test_a_file_of_something_else_is_refused(tmp_path, model):
    torch.save([1, 2, 3], tmp_path / "a.pt")
    assert "holds no state dict" in refusal(load_weights, model, tmp_path / "a.pt").what


def test_what_a_file_will_fill_is_not_drawn_first():
    before = torch.random.get_rng_state()
    with models._Undrawn():
        layers = [nn.Linear(3, 3), nn.Conv2d(3, 3, 1), nn.Embedding(3, 3), nn.MultiheadAttention(4, 2)]
        nn.init.trunc_normal_(layers[0].weight)
        nn.init.normal_(layers[1].weight)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert layers[3].in_proj_bias.eq(0).all()  # constants stand: buffers may be such
    nn.Linear(3, 3)
    assert not torch.equal(torch.random.get_rng_state(), before)
