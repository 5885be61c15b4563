"""The named traps: parameters whose names mislead, and models people build by hand."""

import json
from dataclasses import asdict

import open_clip
import pytest
import torch
from torch import nn

from clipfreeze.anatomy.partition import describe

import tiny

TRAPS = [
    ("clip_vit", "positional_embedding", "text.embed", {"embeddings"}),
    ("clip_vit", "token_embedding.weight", "text.embed", {"embeddings"}),
    ("clip_vit", "ln_final.bias", "text.norm", {"norms", "biases"}),
    ("clip_vit", "text_projection", "text.proj", {"projections"}),
    ("clip_vit", "visual.class_embedding", "vision.embed", {"embeddings"}),
    ("clip_vit", "visual.conv1.weight", "vision.embed", set()),
    ("clip_vit", "visual.ln_pre.weight", "vision.embed", {"norms"}),
    ("clip_vit", "visual.proj", "vision.proj", {"projections"}),
    ("clip_vit", "transformer.resblocks.0.mlp.c_proj.weight", "text.blocks", {"mlp"}),
    ("clip_vit", "transformer.resblocks.0.attn.in_proj_bias", "text.blocks", {"attn", "biases"}),
    ("clip_vit", "logit_scale", "logit_scale", set()),
    ("clip_resnet", "visual.conv1.weight", "vision.embed", set()),
    ("clip_resnet", "visual.layer1.0.conv1.weight", "vision.blocks", set()),
    ("clip_resnet", "visual.layer1.0.downsample.1.weight", "vision.blocks", {"norms"}),
    ("clip_resnet", "visual.bn1.weight", "vision.embed", {"norms"}),
    ("clip_resnet", "visual.attnpool.positional_embedding", "vision.pool", {"embeddings"}),
    ("clip_resnet", "visual.attnpool.v_proj.bias", "vision.pool", {"biases"}),
    ("clip_resnet", "visual.attnpool.c_proj.bias", "vision.proj", {"projections", "biases"}),
    ("clip_convnext", "visual.trunk.head.norm.weight", "vision.norm", {"norms"}),
    ("clip_convnext", "visual.trunk.stages.1.downsample.0.weight", "vision.blocks", {"norms"}),
    ("clip_convnext", "visual.trunk.stages.0.blocks.0.gamma", "vision.blocks", {"scales"}),
    ("clip_swin", "visual.trunk.layers.1.downsample.reduction.weight", "vision.blocks", set()),
    (
        "clip_swin",
        "visual.trunk.layers.0.blocks.0.attn.relative_position_bias_table",
        "vision.blocks",
        {"embeddings", "attn"},
    ),
    ("fastvit", "visual.trunk.stages.3.pos_emb.pos_enc.weight", "vision.blocks", set()),
    ("fastvit", "visual.trunk.stages.0.blocks.0.layer_scale.gamma", "vision.blocks", {"scales"}),
    ("fastvit", "visual.trunk.final_conv.conv_scale.conv.weight", "vision.pool", set()),
    ("fastvit", "visual.trunk.head.fc.weight", "vision.proj", {"projections"}),
    ("vitamin", "visual.trunk.patch_embed.backbone.stages.0.0.conv1_1x1.weight", "vision.embed", set()),
    ("mci", "visual.trunk.patch_embed.backbone.0.bn.weight", "vision.embed", {"norms"}),
    ("relpos", "visual.trunk.blocks.0.ls1.gamma", "vision.blocks", {"scales"}),
    ("eva", "visual.trunk.blocks.0.attn.norm.weight", "vision.blocks", {"norms", "attn"}),
    ("eva", "visual.trunk.blocks.0.attn.proj.weight", "vision.blocks", {"attn"}),
    ("eva", "visual.trunk.head.bias", "vision.proj", {"projections", "biases"}),
    ("pe", "visual.trunk.attn_pool.proj.weight", "vision.pool", set()),
    ("siglip", "visual.trunk.norm.weight", "vision.norm", {"norms"}),
    ("siglip", "visual.trunk.attn_pool.norm.bias", "vision.pool", {"norms", "biases", "projections"}),
    ("siglip", "visual.trunk.attn_pool.latent", "vision.pool", {"embeddings", "projections"}),
    ("siglip", "text.text_projection.bias", "text.proj", {"biases", "projections"}),
    ("siglip", "logit_bias", "logit_bias", set()),
    ("coca", "text.cls_emb", "text.embed", {"embeddings"}),
    ("coca", "visual.attn_pool.query", "vision.pool", {"embeddings"}),
    ("coca", "visual.attn_pool.ln_k.weight", "vision.pool", {"norms"}),
    ("coca", "text_decoder.text_projection", "decoder", set()),
    ("coca", "text_decoder.ln_final.weight", "decoder", {"norms"}),
    ("coca", "text_decoder.resblocks.0.attn.out_proj.weight", "decoder", set()),
    ("hf_text", "text.transformer.embeddings.LayerNorm.weight", "text.embed", {"norms"}),
    ("hf_text", "text.proj.0.weight", "text.proj", {"projections"}),
    ("hf_text", "text.proj.2.weight", "text.proj", {"projections"}),
]


def by_name(model):
    return {parameter.name: parameter for parameter in describe(model).parameters}


@pytest.mark.parametrize(
    ("family", "name", "role", "tags"),
    TRAPS,
    ids=lambda value: " ".join(sorted(value)) if isinstance(value, set) else value,
)
def test_names_that_mislead(family, name, role, tags):
    parameter = by_name(tiny.FAMILIES[family]())[name]
    assert parameter.role == role
    assert parameter.tags == tags


@pytest.mark.parametrize(
    ("architecture", "name", "role"),
    [
        ("m2m_100", "layer_norm.weight", "text.norm"),
        ("m2m_100", "layers.2.final_layer_norm.weight", "text.blocks"),
        ("mt5", "final_layer_norm.weight", "text.norm"),
        ("mt5", "block.0.layer.1.layer_norm.weight", "text.blocks"),
        ("mt5", "embed_tokens.weight", "text.embed"),
        ("bert", "embeddings.token_type_embeddings.weight", "text.embed"),
    ],
)
def test_norms_and_embeddings_of_hugging_face_encoders(architecture, name, role):
    assert by_name(tiny.hf_text(architecture))[f"text.transformer.{name}"].role == role


def test_pooler_of_bert_is_pool():
    assert by_name(tiny.hf_text("bert", "cls_pooler"))["text.transformer.pooler.dense.weight"].role == "text.pool"


def test_text_is_the_same_parts_on_clip_and_custom_text_clip():
    """B04: on CLIP the text tower is spread over the top level."""
    flat = {n: (p.role, p.block, p.tags) for n, p in by_name(tiny.clip_vit()).items() if p.tower == "text"}
    nested = {n: (p.role, p.block, p.tags) for n, p in by_name(tiny.custom_text()).items() if p.tower == "text"}
    assert {f"text.{name}": place for name, place in flat.items()} == nested


@pytest.mark.parametrize("family", ["custom_text", "siglip", "coca", "hf_text"])
def test_text_is_all_that_lies_below_it(family):
    parameters = by_name(tiny.FAMILIES[family]())
    assert {n for n, p in parameters.items() if p.tower == "text"} == {n for n in parameters if n.startswith("text.")}


def test_scales_inside_attention_are_not_the_logit_scale():
    settings = {"scaled_cosine_attn": True, "scale_heads": True, "scale_attn_inner": True}
    parameters = by_name(tiny.clip_vit(settings, settings))
    for name in ("logit_scale", "head_scale"):
        parameter = parameters[f"transformer.resblocks.0.attn.{name}"]
        assert (parameter.role, parameter.tags) == ("text.blocks", {"attn", "scales"})
    assert [n for n, p in parameters.items() if p.role == "logit_scale"] == ["logit_scale"]


def test_layer_scales_are_scales():
    parameters = by_name(tiny.clip_vit({"ls_init_value": 0.1}))
    assert parameters["visual.transformer.resblocks.1.ls_2.gamma"].tags == {"scales"}


@pytest.mark.parametrize("family", tiny.HIERARCHICAL)
def test_stages_count_from_zero_and_what_runs_before_a_stage_is_in_its_first_block(family):
    model = tiny.FAMILIES[family]()
    anatomy = describe(model)
    tower = anatomy.tower("vision")
    assert sorted(set(tower.stages)) == list(range(max(tower.stages) + 1))
    for parameter in anatomy.parameters:
        if parameter.role == "vision.blocks":
            assert parameter.stage == tower.stages[parameter.block]
            if not parameter.name.startswith(tower.blocks[parameter.block]):
                assert tower.stages.index(parameter.stage) == parameter.block


def test_a_pool_stands_in_for_a_missing_projection_and_a_note_says_so():
    anatomy = describe(tiny.siglip())
    stand_ins = [p for p in anatomy.parameters if "projections" in p.tags and p.tower == "vision"]
    assert {p.role for p in stand_ins} == {"vision.pool"}
    assert anatomy.notes == ("vision has no projection: its pool stands in for it in @projections",)


def test_the_decoder_is_noted():
    assert "the contrastive loss does not reach the decoder" in describe(tiny.coca()).notes


def test_a_tower_without_projection_and_pool_is_noted():
    anatomy = describe(tiny.custom_text(text={"proj_type": "none", "width": tiny.EMBED_DIM}))
    assert "text has no projection: nothing stands in for it in @projections" in anatomy.notes
    assert not [p for p in anatomy.parameters if p.role == "text.proj"]


def test_families_are_named_for_people():
    names = {family: describe(build()).family for family, build in tiny.FAMILIES.items()}
    assert names["clip_vit"] == "CLIP + VisionTransformer"
    assert names["siglip"] == "CustomTextCLIP + timm vit_base_patch16_siglip_224"
    assert names["coca"] == "CoCa + VisionTransformer"
    assert names["hf_text"] == "CustomTextCLIP + VisionTransformer + Hugging Face RobertaModel"


def test_the_users_name_of_the_model_is_kept():
    assert describe(tiny.clip_vit(), "ViT-tiny").model == "ViT-tiny"
    assert describe(tiny.clip_vit()).model == "CLIP"


# Fixed parameters


@pytest.fixture
def sin_cos():
    return tiny.clip_vit({"pos_embed_type": "sin_cos_2d"})


def fixed(model):
    return [p.name for p in describe(model).parameters if p.fixed]


def test_sin_cos_position_embeddings_are_fixed(sin_cos):
    assert fixed(sin_cos) == ["visual.positional_embedding"]
    assert fixed(sin_cos.to(torch.bfloat16)) == ["visual.positional_embedding"]
    assert describe(sin_cos).notes == ("visual.positional_embedding is a fixed sin-cos embedding: no policy trains it",)


def test_sin_cos_position_embeddings_are_fixed_on_meta():
    with torch.device("meta"):
        model = tiny.clip_vit({"pos_embed_type": "sin_cos_2d"})
    assert fixed(model) == ["visual.positional_embedding"]


def test_a_tower_the_user_locked_is_not_fixed(sin_cos):
    model = tiny.clip_vit()
    model.requires_grad_(False)
    assert fixed(model) == []
    sin_cos.requires_grad_(False)
    assert fixed(sin_cos) == ["visual.positional_embedding"]


# Models built by hand


class Mine(open_clip.CLIP):
    """A subclass, as people write them."""


class Pair(nn.Module):
    """open_clip towers under a root of one's own."""

    def __init__(self):
        super().__init__()
        made = tiny.custom_text()
        self.visual, self.text, self.logit_scale = made.visual, made.text, made.logit_scale


def test_a_subclass_of_clip_is_described_like_clip():
    model = Mine(tiny.EMBED_DIM, tiny.VISION, tiny.TEXT)
    assert describe(model).parameters == describe(tiny.clip_vit()).parameters


def test_a_root_of_ones_own_is_described_like_custom_text_clip():
    pair, made = by_name(Pair()), by_name(tiny.custom_text())
    assert pair == made


def test_clip_without_text_projection():
    model = tiny.clip_vit()
    model.text_projection = None
    anatomy = describe(model)
    assert "text.proj" not in {p.role for p in anatomy.parameters}


def test_a_logit_scale_of_one_dimension_and_a_logit_bias():
    parameters = by_name(tiny.clip_vit(nonscalar_logit_scale=True, init_logit_bias=-10.0))
    assert parameters["logit_scale"].shape == (1,)
    assert parameters["logit_bias"].role == "logit_bias"


def test_tied_tensors_are_one_parameter_with_aliases():
    model = tiny.clip_vit()
    model.visual.proj = model.text_projection
    anatomy = describe(model)
    tied = [p for p in anatomy.parameters if p.aliases]
    assert [(p.name, p.aliases) for p in tied] == [("text_projection", ("visual.proj",))]
    assert "text_projection is tied: the same tensor as visual.proj" in anatomy.notes


def test_dtype_and_size_are_those_of_the_tensor():
    parameter = by_name(tiny.clip_vit().half())["visual.conv1.weight"]
    assert parameter.dtype == "float16"
    assert parameter.size == 32 * 3 * 16 * 16


def test_meta_and_real_models_have_one_anatomy():
    with torch.device("meta"):
        meta = describe(tiny.clip_vit())
    assert meta == describe(tiny.clip_vit())


def test_describing_changes_nothing():
    model = tiny.clip_resnet()
    model.visual.conv1.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    describe(model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert flags == [p.requires_grad for p in model.parameters()]
    assert model.training


def test_an_anatomy_is_plain_data():
    assert json.dumps(asdict(describe(tiny.coca())), default=sorted)
