"""A folder and a file that open_clip itself loads, and that give the same features."""

import json
from dataclasses import replace

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from clipfreeze import models
from clipfreeze.errors import ExportError, RunError
from clipfreeze.export.open_clip import CONFIG, WEIGHTS, reload_lines, write_open_clip
from clipfreeze.export.proof import CAPTIONS

PICTURE = Image.linear_gradient("L").resize((90, 50)).convert("RGB")

FAMILIES = ("clip_vit", "custom_text", "clip_resnet", "clip_convnext", "fastvit", "eva", "siglip", "coca", "hf_text")


def features(model, transform, tokenizer):
    model.eval()
    with torch.no_grad():
        image = model.encode_image(transform(PICTURE)[None], normalize=False)
        return image, model.encode_text(tokenizer(list(CAPTIONS)), normalize=False)


def same(ours, theirs):
    return all(torch.allclose(one, other, rtol=0, atol=1e-6) for one, other in zip(ours, theirs, strict=True))


def config_in(folder):
    return json.loads((folder / CONFIG).read_text(encoding="utf-8"))


@pytest.mark.parametrize("family", FAMILIES)
def test_open_clip_loads_the_folder_with_equal_features_transform_and_tokenizer(build, tmp_path, family):
    loaded, out = build(family), tmp_path / "out"
    assert write_open_clip(loaded, out) == 0
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{out}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{out}")
    assert torch.equal(transform(PICTURE), loaded.transform(PICTURE))
    assert torch.equal(tokenizer(list(CAPTIONS)), loaded.tokenizer(list(CAPTIONS)))
    assert same(features(model, transform, tokenizer), features(loaded.model, loaded.transform, loaded.tokenizer))
    state = model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in loaded.model.state_dict().items())


def test_the_embedded_model_exports(tmp_path):
    assert write_open_clip(models.load("demo"), tmp_path / "out") == 0
    assert models.load(f"local-dir:{tmp_path / 'out'}").notes == ()


def test_a_model_of_the_hub_exports(build, tmp_path, monkeypatch):
    state, base = build().model.state_dict(), tmp_path / "base"
    save_file(state, base / WEIGHTS)
    monkeypatch.setattr(
        open_clip.factory, "download_pretrained_from_hf", lambda _, filename=WEIGHTS, **__: str(base / filename)
    )
    loaded, out = models.load("hf-hub:own/tiny"), tmp_path / "out"
    assert write_open_clip(loaded, out) == 0
    assert reload_lines(loaded, out) == [f"open_clip.create_model_and_transforms('local-dir:{out}')"]
    assert torch.equal(load_file(out / WEIGHTS)["visual.proj"], state["visual.proj"])


def test_the_config_says_what_the_model_is_not_what_it_was_built_from(build, tmp_path):
    write_open_clip(build(mean=[0.1] * 3, interpolation="bilinear", resize_mode="squash"), tmp_path / "out")
    config = config_in(tmp_path / "out")
    assert config["model_cfg"]["quick_gelu"] is False
    assert config["model_cfg"]["text_cfg"]["context_length"] == 16
    assert "init_logit_bias" not in config["model_cfg"]
    assert config["preprocess_cfg"] == {
        "size": [32, 32], "mode": "RGB", "mean": [0.1] * 3, "std": [0.25] * 3,
        "interpolation": "bilinear", "resize_mode": "squash", "fill_color": 0,
    }  # fmt: skip


def test_a_resize_mode_is_kept(build, tmp_path):
    loaded = build(resize_mode="longest")
    write_open_clip(loaded, tmp_path / "out")
    _, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'out'}")
    assert torch.equal(transform(PICTURE), loaded.transform(PICTURE))


@pytest.mark.parametrize("family", ["clip_vit", "coca"])
def test_an_activation_that_was_forced_is_in_the_folder(build, tmp_path, family):
    """B64: nothing but the model itself knows of the activation."""
    loaded = build(family)
    quick = open_clip.create_model(loaded.name, force_quick_gelu=True)
    quick.load_state_dict(loaded.model.state_dict())
    assert write_open_clip(replace(loaded, model=quick), tmp_path / "out") == 0
    assert config_in(tmp_path / "out")["model_cfg"]["quick_gelu"] is True


NAMED = {
    "as named": ({}, "'Tiny'"),
    "quick_gelu": ({"force_quick_gelu": True}, "'Tiny-quickgelu'"),
    "image size": ({"force_image_size": 48}, "force_image_size=48"),
    "oblong images": ({"force_image_size": (48, 32)}, "force_image_size=[48, 32]"),
    "context": ({"force_context_length": 20}, "force_context_length=20"),
    "logit bias": ({"init_logit_bias": -10.0}, "init_logit_bias=-10.0"),
    "preprocessing": (
        {"image_mean": (0.5,) * 3, "image_interpolation": "bilinear", "image_resize_mode": "squash"},
        "image_mean=(0.5, 0.5, 0.5), image_interpolation='bilinear', image_resize_mode='squash'",
    ),
}


@pytest.mark.parametrize("case", NAMED)
def test_every_printed_line_loads_the_same_model(named, tmp_path, case):
    """B64, B68, B69: the weights file alone knows neither activation nor image size, nor that there is a logit_bias."""
    options, expected = NAMED[case]
    loaded, out = named(**options), tmp_path / "out"
    write_open_clip(loaded, out)
    by_folder, by_name = reload_lines(loaded, out)
    assert by_folder == f"open_clip.create_model_and_transforms('local-dir:{out}')"
    assert expected in by_name
    assert f"pretrained={str(out / WEIGHTS)!r}" in by_name
    ours = features(loaded.model, loaded.transform, loaded.tokenizer)
    for line in (by_folder, by_name):
        model, _, transform = eval(line, {"open_clip": open_clip})
        assert same(ours, features(model, transform, loaded.tokenizer)), line
        assert model.state_dict().keys() == loaded.model.state_dict().keys()


def test_a_quickgelu_name_whose_model_has_gelu_is_reloaded_by_the_bare_name(named, tmp_path):
    loaded = named("Tiny-quickgelu", quick_gelu=False)
    write_open_clip(loaded, tmp_path / "out")
    assert reload_lines(loaded, tmp_path / "out")[1].startswith("open_clip.create_model_and_transforms('Tiny', ")


def test_a_changed_image_size_is_in_the_folder(named, tmp_path):
    """B69."""
    loaded = named(force_image_size=48)
    write_open_clip(loaded, tmp_path / "out")
    config = config_in(tmp_path / "out")
    assert config["model_cfg"]["vision_cfg"]["image_size"] == 48
    assert config["preprocess_cfg"]["size"] == [48, 48]
    assert models.load(f"local-dir:{tmp_path / 'out'}").notes == ()


def test_a_timm_tower_of_another_size_cannot_be_held_and_nothing_is_left(build, tmp_path):
    """B69: open_clip builds timm towers at their own size, whatever the config says."""
    loaded = build("eva")
    loaded.model.visual.set_input_size(48)
    loaded.model.visual.image_size = (48, 48)
    resized = open_clip.transform.image_transform(48, is_train=False)
    with pytest.raises(RunError, match=r"cannot be loaded back: .*pos_embed"):
        write_open_clip(replace(loaded, transform=resized), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_logit_bias_is_kept_with_its_value(build, tmp_path):
    """B68."""
    loaded = build("siglip")
    torch.nn.init.constant_(loaded.model.logit_bias, -7.5)
    write_open_clip(loaded, tmp_path / "out")
    assert config_in(tmp_path / "out")["model_cfg"]["init_logit_bias"] == -7.5
    assert models.load(f"local-dir:{tmp_path / 'out'}").model.logit_bias.item() == -7.5


def test_towers_of_unlike_activations_are_refused(build, tmp_path):
    loaded = build()
    quick = open_clip.create_model(loaded.name, force_quick_gelu=True)
    loaded.model.visual = quick.visual
    with pytest.raises(ExportError, match="unlike activations"):
        write_open_clip(loaded, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tied_weights_are_written_under_both_names(build, tmp_path):
    loaded = build()
    first, second, _ = loaded.model.transformer.resblocks
    second.mlp.c_fc.weight = first.mlp.c_fc.weight
    assert write_open_clip(loaded, tmp_path / "out") == 0
    state = load_file(tmp_path / "out" / WEIGHTS)
    assert state.keys() == loaded.model.state_dict().keys()


def test_the_model_is_left_as_it_was(build, tmp_path):
    loaded = build("fastvit")
    loaded.model.train()
    loaded.model.visual.eval()
    modes = [module.training for module in loaded.model.modules()]
    before = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    write_open_clip(loaded, tmp_path / "out")
    assert [module.training for module in loaded.model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in loaded.model.state_dict().items())


@pytest.mark.parametrize("precision", ["bf16", "pure_fp16"])
def test_half_weights_are_compared_as_closely_as_they_can_be(build, tmp_path, precision):
    half = models.load(build().name, str(_weights(tmp_path)), precision=precision)
    assert 0 < write_open_clip(half, tmp_path / "out") < 0.1
    assert load_file(tmp_path / "out" / WEIGHTS)["visual.proj"].dtype == half.model.visual.proj.dtype


def _weights(folder):
    """Random weights of the base model in `folder`, at the scale open_clip starts with."""
    torch.manual_seed(0)
    torch.save(open_clip.create_model(f"local-dir:{folder / 'base'}").state_dict(), folder / "weights.pt")
    return folder / "weights.pt"
