"""transformers' own CLIPModel says the same as the model that was exported; what it cannot hold is named."""

import json
import sys
from dataclasses import replace

import pytest
import torch
import transformers
from PIL import Image
from torch import nn
from transformers import CLIPModel, CLIPProcessor

from clipfreeze import models
from clipfreeze.errors import ExportError, RunError
from clipfreeze.export import files, hf
from clipfreeze.export.hf import reload_line, write_hf
from clipfreeze.export.proof import CAPTIONS, probe_pictures

import tiny

TEXT = {**tiny.TEXT, "vocab_size": 49408}
CLIP = {"embed_dim": tiny.EMBED_DIM, "vision_cfg": tiny.VISION, "text_cfg": TEXT}


def vision(**changes):
    return {**CLIP, "vision_cfg": {**tiny.VISION, **changes}}


def text(**changes):
    return {**CLIP, "text_cfg": {**TEXT, **changes}}


TANH = {"act_kwargs": {"approximate": "tanh"}}
EPS = {"norm_kwargs": {"eps": 1e-3}}
HELD = {
    "gelu": CLIP,
    "quick_gelu": {**CLIP, "quick_gelu": True},
    "CustomTextCLIP": {**CLIP, "custom_text": True},
    "tanh": {**CLIP, "vision_cfg": {**tiny.VISION, **TANH}, "text_cfg": {**TEXT, **TANH}},
    "eps": {**CLIP, "vision_cfg": {**tiny.VISION, **EPS}, "text_cfg": {**TEXT, **EPS}},
    "heads": {**CLIP, "vision_cfg": {**tiny.VISION, "head_width": 8}, "text_cfg": {**TEXT, "heads": 4}},
    "mlp": {**CLIP, "vision_cfg": {**tiny.VISION, "mlp_ratio": 2.0}, "text_cfg": {**TEXT, "mlp_ratio": 3.0}},
    "norm after pooling": vision(final_ln_after_pool=True),
    "patch dropout": vision(patch_dropout=0.5),
    "blocks of open_clip's own": vision(block_type="custom"),
    "eos pooling": text(pool_type="eos", eos_id=49407),
    "scale of one dimension": {**CLIP, "nonscalar_logit_scale": True},
}


@pytest.mark.parametrize("case", HELD)
def test_transformers_gives_the_same_features_and_similarities(build, tmp_path, case):
    loaded, out = build(model_cfg=HELD[case]), tmp_path / "out"
    assert write_hf(loaded, out) < 1e-5
    theirs, processor = CLIPModel.from_pretrained(out), CLIPProcessor.from_pretrained(out)
    pictures = probe_pictures(32, 32)
    inputs = processor(text=list(CAPTIONS), images=pictures, return_tensors="pt", padding=True, truncation=True)
    ours = loaded.model.eval()
    with torch.no_grad():
        pixels = torch.stack([loaded.transform(picture) for picture in pictures])
        expected, _ = ours.get_logits(pixels, loaded.tokenizer(list(CAPTIONS)))
        torch.testing.assert_close(theirs(**inputs).logits_per_image, expected, rtol=1e-5, atol=1e-4)
        features = theirs.get_image_features(pixel_values=inputs["pixel_values"])
        features = getattr(features, "pooler_output", features)  # transformers before 5 gives the tensor
        torch.testing.assert_close(features, ours.encode_image(pixels), rtol=0, atol=1e-5)


def test_the_embedded_model_exports_and_the_printed_line_loads_it(tmp_path):
    assert write_hf(models.load("demo"), tmp_path / "out") < 1e-4
    model, processor = eval(reload_line(tmp_path / "out"), {"transformers": transformers})
    assert model.config.vision_config.hidden_act == "gelu"
    assert processor.tokenizer.model_max_length == 16


def test_a_text_projection_that_is_a_linear_is_held(build, tmp_path):
    loaded = build(model_cfg={**CLIP, "custom_text": True})
    linear = nn.Linear(32, tiny.EMBED_DIM, bias=False)
    with torch.no_grad():
        linear.weight.copy_(loaded.model.text.text_projection.T)
    del loaded.model.text.text_projection
    loaded.model.text.text_projection = linear
    assert write_hf(loaded, tmp_path / "out") < 1e-5


@pytest.mark.parametrize("resize_mode", ["shortest", "squash"])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_pictures_are_resized_alike_to_two_grey_levels(build, tmp_path, resize_mode, interpolation):
    loaded = build(resize_mode=resize_mode, interpolation=interpolation)
    write_hf(loaded, tmp_path / "out")
    processor = CLIPProcessor.from_pretrained(tmp_path / "out")
    picture = Image.linear_gradient("L").resize((90, 50)).convert("RGB")
    theirs = processor.image_processor(picture, return_tensors="pt")["pixel_values"][0]
    assert (theirs - loaded.transform(picture)).abs().max() <= 2.01 / 255 / 0.25


UNHELD = {
    "resnet": ({**CLIP, "vision_cfg": tiny.RESNET}, "the vision tower is a ResNet"),
    "layer scale": (vision(ls_init_value=0.1), "vision_cfg.ls_init_value is 0.1; CLIPModel knows only None"),
    "text layer scale": (text(ls_init_value=0.1), "text_cfg.ls_init_value is 0.1"),
    "attention pool": (vision(attentional_pool=True, attn_pooler_heads=2), "vision_cfg.attentional_pool is True"),
    "average pool": (vision(pool_type="avg"), "vision_cfg.pool_type is 'avg'; CLIPModel knows only tok"),
    "no first norm": (vision(no_ln_pre=True), "vision_cfg.no_ln_pre is True"),
    "fixed positions": (vision(pos_embed_type="sin_cos_2d"), "vision_cfg.pos_embed_type is 'sin_cos_2d'"),
    "norms in attention": (vision(qk_norm=True), "vision_cfg.qk_norm is True"),
    "scaled heads": (text(scale_fc=True), "text_cfg.scale_fc is True"),
    "oblong images": (vision(image_size=[48, 32]), r"vision_cfg.image_size is \[48, 32\]; CLIPModel has squares only"),
    "other norm": (text(norm_kwargs={"bias": False}), r"text_cfg.norm_kwargs is \{'bias': False\}"),
    "all see all": (text(no_causal_mask=True), "text_cfg.no_causal_mask is True"),
    "last pool": (text(pool_type="last"), "text_cfg.pool_type is 'last'; CLIPModel knows only argmax and eos"),
    "other end": (text(pool_type="eos", eos_id=2), "text_cfg.eos_id is 2, which the tokenizer never ends with"),
    "biased projection": (text(proj_bias=True), "text_cfg.proj_bias is True"),
    "no projection": (text(proj_type="none", width=16), "text_cfg.proj_type is 'none'"),
    "tokenizer options": (text(tokenizer_kwargs={"clean": "canonicalize"}), "the tokenizer is SimpleTokenizer of"),
    "logit bias": ({**CLIP, "init_logit_bias": -10.0}, "the model has a logit_bias"),
}


@pytest.mark.parametrize("case", UNHELD)
def test_what_clipmodel_cannot_hold_is_named_and_nothing_is_written(build, tmp_path, case):
    model_cfg, words = UNHELD[case]
    with pytest.raises(ExportError, match=words) as caught:
        write_hf(build(model_cfg=model_cfg), tmp_path / "out")
    assert len(caught.value.problems) == 1
    assert caught.value.problems[0].fix == "export it with --to open_clip, which holds every model"
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("siglip", ["timm's tiny_siglip", "no_causal_mask", "proj_bias", "pool_type", "logit_bias"]),
        ("coca", ["attentional_pool", "embed_cls", "captioning decoder"]),
        ("hf_text", ["the text tower is "]),
        ("eva", ["timm's tiny_eva"]),
    ],
)
def test_all_that_clipmodel_cannot_hold_is_said_at_once(build, tmp_path, family, words):
    with pytest.raises(ExportError) as caught:
        write_hf(build(family), tmp_path / "out")
    problems = [problem.what for problem in caught.value.problems]
    assert all(any(word in what for what in problems) for word in words), problems


def test_a_padding_resize_is_refused(build, tmp_path):
    with pytest.raises(ExportError, match="CLIPProcessor cannot pad"):
        write_hf(build(resize_mode="longest"), tmp_path / "out")


def test_a_tokenizer_of_another_kind_is_refused(build, tmp_path):
    loaded = replace(build(), tokenizer=lambda texts: torch.zeros(len(texts), tiny.CONTEXT, dtype=torch.long))
    with pytest.raises(ExportError, match="the tokenizer is function"):
        write_hf(loaded, tmp_path / "out")


def test_weights_without_a_place_are_refused(build, tmp_path):
    loaded = build()
    loaded.model.extra = nn.Linear(2, 2)
    with pytest.raises(ExportError, match=r"CLIPModel has no place for extra\.weight, extra\.bias"):
        write_hf(loaded, tmp_path / "out")


def test_a_parameter_inside_a_block_without_a_place_is_refused(build, tmp_path):
    loaded = build()
    loaded.model.visual.transformer.resblocks[0].attn.gate = nn.Parameter(torch.zeros(1))
    with pytest.raises(ExportError, match=r"no place for visual\.transformer\.resblocks\.0\.attn\.gate"):
        write_hf(loaded, tmp_path / "out")


def test_without_transformers_the_error_says_so(build, tmp_path, monkeypatch):
    loaded = build()
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ExportError, match="pip install transformers"):
        write_hf(loaded, tmp_path / "out")


def test_a_lost_weight_is_noticed_and_nothing_is_left(build, tmp_path, monkeypatch):
    def forgetful(path, tensors):
        files.write_tensors(path, {name: value for name, value in tensors.items() if "pre_layrnorm" not in name})

    monkeypatch.setattr(hf, "write_tensors", forgetful)
    with pytest.raises(RunError, match="cannot be loaded back"):
        write_hf(build(), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_another_activation_is_noticed_and_nothing_is_left(build, tmp_path, monkeypatch):
    """B64."""

    def careless(path, value):
        files.write_json(path, json.loads(json.dumps(value).replace('"gelu"', '"quick_gelu"')))

    monkeypatch.setattr(hf, "write_json", careless)
    with pytest.raises(RunError, match="features differ by"):
        write_hf(build(), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
