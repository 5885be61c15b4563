"""Every config of open_clip that needs no Hugging Face config: about 134 models on the meta device, 30 seconds."""

import re
import time
from collections import Counter

import open_clip
import pytest

from clipfreeze.anatomy.partition import describe
from clipfreeze.anatomy.parts import ROLES, SLOTS, TAGS, Tokens
from clipfreeze.models import build_on_meta, model_names

OFFLINE = [name for name in model_names() if "hf_model_name" not in open_clip.get_model_config(name)["text_cfg"]]

BLOCK_CLASSES = {
    *("ResidualAttentionBlock", "Bottleneck"),
    *("Block", "EvaBlock", "EvaBlockPostNorm", "RelPosBlock"),
    *("ConvNeXtBlock", "SwinTransformerBlock", "RepMixerBlock", "AttentionBlock"),
}

EXPECTED = [
    (r"logit_scale", "logit_scale"),
    (r"logit_bias", "logit_bias"),
    (r"text_decoder\..*", "decoder"),
    (r"(text\.)?(token_embedding\.weight|positional_embedding|cls_emb)", "text.embed"),
    (r"(text\.)?transformer\.resblocks\..*", "text.blocks"),
    (r"(text\.)?ln_final\..*", "text.norm"),
    (r"(text\.)?text_projection(\.weight|\.bias)?", "text.proj"),
    (r"visual\.(conv[123]|bn[123]|ln_pre)\..*|visual\.(class_embedding|positional_embedding)", "vision.embed"),
    (r"visual\.transformer\.resblocks\..*|visual\.layer[1234]\.\d+\..*", "vision.blocks"),
    (r"visual\.ln_post\..*", "vision.norm"),
    (r"visual\.attnpool\.(positional_embedding|[qkv]_proj\..*)|visual\.attn_pool\..*", "vision.pool"),
    (r"visual\.proj|visual\.attnpool\.c_proj\..*", "vision.proj"),
    (r"visual\.trunk\.(cls_token|pos_embed|(patch_embed|stem|norm_pre)\..*)", "vision.embed"),
    (r"visual\.trunk\.(blocks\.\d+|(stages|layers)\.\d+\.(blocks|downsample|pos_emb))\..*", "vision.blocks"),
    (r"visual\.trunk\.(norm|fc_norm|head\.norm)\..*", "vision.norm"),
    (r"visual\.trunk\.(attn_pool|final_conv)\..*", "vision.pool"),
    (r"visual\.trunk\.head\.(weight|bias|fc\..*)|visual\.head\.(proj|mlp)\..*", "vision.proj"),
]
"""The contract, written a second time as patterns of whole names."""

TOKENS = {"SigLIP": (0, "id"), "mt5": (0, "id"), "xlm-v": (1, "id"), "bert": (1, "pad"), "CLIP": (1, "largest")}
"""Of each tokenizer, in this order: how many tokens start a text, and how its end is found."""


def test_all_offline_configs_are_tried():
    assert len(OFFLINE) >= 134 or not open_clip.__version__.startswith("3.3")


@pytest.mark.parametrize("name", OFFLINE)
def test_every_parameter_has_the_role_the_contract_gives_it(name):
    model = build_on_meta(name)
    anatomy = describe(model, name)

    assert [(p.name, p.shape) for p in anatomy.parameters] == [(n, tuple(p.shape)) for n, p in model.named_parameters()]
    for parameter in anatomy.parameters:
        matching = [role for pattern, role in EXPECTED if re.fullmatch(pattern, parameter.name)]
        assert matching == [parameter.role], parameter.name
        assert parameter.role in ROLES
        assert parameter.tags <= set(TAGS)
        assert set(parameter.slots) <= set(SLOTS)
        assert (parameter.block is not None) == parameter.role.endswith(".blocks")

    config = open_clip.get_model_config(name)
    modules = dict(model.named_modules())
    vision, text = anatomy.tower("vision"), anatomy.tower("text")
    assert len(text.blocks) == config["text_cfg"].get("layers", 12)
    layers = config["vision_cfg"].get("layers")
    in_tower = Counter(type(m).__name__ for n, m in modules.items() if n.startswith("visual."))
    assert len(vision.blocks) == sum(in_tower[kind] for kind in BLOCK_CLASSES)
    if layers:
        assert len(vision.blocks) == (sum(layers) if isinstance(layers, list) else layers)
    for tower in (vision, text):
        indices = {p.block for p in anatomy.parameters if p.role == f"{tower.name}.blocks"}
        assert indices == set(range(len(tower.blocks)))
        assert all(type(modules[block]).__name__ in BLOCK_CLASSES for block in tower.blocks)
        assert list(tower.stages) == sorted(tower.stages)
        assert len(tower.stages) in (0, len(tower.blocks))
    assert isinstance(vision.tokens, Tokens) == (not vision.stages and "relpos" not in name)
    assert isinstance(text.tokens, Tokens)
    tokenizer = config["text_cfg"].get("hf_tokenizer_name", "CLIP")
    start, end = next(tokens for written, tokens in TOKENS.items() if written in tokenizer)
    cls = config["text_cfg"].get("embed_cls", False)
    assert (text.tokens.first, text.tokens.end) == (start, "last" if cls else end)
    assert text.tokens.context == config["text_cfg"]["context_length"]
    slots = {slot for p in anatomy.parameters if p.role == "text.blocks" for slot in p.slots}
    assert slots == set(SLOTS)
    stands_in = [p.role for p in anatomy.parameters if "projections" in p.tags and not p.role.endswith(".proj")]
    siglip = config["vision_cfg"].get("timm_proj") == "none"
    assert set(stands_in) == ({"vision.pool"} if siglip else set())
    assert len(anatomy.notes) == siglip + ("i18n-256" in name and "SO400M" in name) + name.startswith("coca")


def test_the_largest_model_is_described_at_once():
    model = build_on_meta("ViT-bigG-14")
    start = time.perf_counter()
    describe(model)
    assert time.perf_counter() - start < 0.3
