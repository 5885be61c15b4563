"""Tiny models with what belongs to them, as `clipfreeze.models.load` gives them."""

import json
from functools import partial

import open_clip
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from clipfreeze.models import Loaded, load

import tiny

TEXT = {**tiny.TEXT, "vocab_size": 49408}
SCALES = {"mean": [0.5] * 3, "std": [0.25] * 3}


def config(vision=None, text=None, **changes):
    """A model_cfg that says no more than it must."""
    return {"embed_dim": tiny.EMBED_DIM, "vision_cfg": vision or tiny.VISION, "text_cfg": text or TEXT, **changes}


def coca(_):
    pool = {"attentional_pool": True, "attn_pooler_queries": 4, "attn_pooler_heads": 2, "output_tokens": True}
    decoder = {**TEXT, "width": tiny.EMBED_DIM, "layers": 2}
    text = {**TEXT, "width": tiny.EMBED_DIM, "embed_cls": True, "output_tokens": True}
    return config({**tiny.VISION, **pool}, text, multimodal_cfg=decoder, custom_text=True)


def hf_text(folder):
    """A BERT of our own, and a tokenizer beside open_clip's config."""
    words = ["[PAD]", "[UNK]", "a", "photo", "of", "cat", "far", "too", "many", "words"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    encoder = folder / "encoder"
    tiny.HF_CONFIGS["bert"]().save_pretrained(encoder)
    text = {"hf_model_name": str(encoder), "hf_tokenizer_name": "its/own", "context_length": tiny.CONTEXT}
    return config(text={**text, "hf_pooler_type": "mean_pooler"})


def timm(_, name, image_size=32, **settings):
    return config(tiny.timm(name, image_size, **settings))


def siglip(_):
    vision = tiny.timm("tiny_siglip", timm_pool="map", timm_proj="none")
    return config(vision, {**tiny.SIGLIP_TEXT, "vocab_size": 49408}, custom_text=True, init_logit_bias=-10.0)


CONFIGS = {
    "clip_vit": lambda _: config(),
    "custom_text": lambda _: config(custom_text=True),
    "clip_resnet": lambda _: config(tiny.RESNET),
    "clip_convnext": partial(timm, name="tiny_convnext", timm_pool="", timm_proj="linear"),
    "fastvit": partial(timm, name="tiny_fastvit", timm_pool="avg", timm_proj=None),
    "eva": partial(timm, name="tiny_eva", timm_pool="token", timm_proj=None),
    "siglip": siglip,
    "coca": coca,
    "hf_text": hf_text,
}


@pytest.fixture
def build(tmp_path):
    """Builds a Loaded from a family's name, or from a model_cfg, with lively random weights."""

    def built(family="clip_vit", model_cfg=None, **preprocess) -> Loaded:
        base = tmp_path / "base"
        base.mkdir()
        model_cfg = model_cfg or CONFIGS[family](base)
        written = {"model_cfg": model_cfg, "preprocess_cfg": {**SCALES, **preprocess}}
        (base / "open_clip_config.json").write_text(json.dumps(written), encoding="utf-8")
        torch.manual_seed(0)
        loaded = load(f"local-dir:{base}")
        tiny.lively(loaded.model)
        return loaded

    return built


@pytest.fixture
def named(build, monkeypatch):
    """Builds a Loaded by a name of open_clip's: Tiny or its twin Tiny-quickgelu; options are open_clip's."""

    def built(name="Tiny", **options) -> Loaded:
        for known, quick in (("Tiny", {}), ("Tiny-quickgelu", {"quick_gelu": True})):
            monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, known, config(**quick))
        torch.manual_seed(0)
        model, train_transform, transform = open_clip.create_model_and_transforms(name, **options)
        tokenizer = open_clip.get_tokenizer(name, context_length=options.get("force_context_length"))
        tiny.lively(model)
        return Loaded(model, tokenizer, train_transform, transform, name, None, tokenizer.context_length)

    return built
