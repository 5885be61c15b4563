"""Products inside blocks and pools, by name."""

import pytest

from clipfreeze.anatomy.partition import describe

import tiny

QKV = ("q", "k", "v")
SLOTS = [
    ("clip_vit", "visual.transformer.resblocks.0.attn.in_proj_weight", QKV, "attn"),
    ("clip_vit", "visual.transformer.resblocks.0.attn.in_proj_bias", QKV, "attn"),
    ("clip_vit", "transformer.resblocks.2.attn.out_proj.weight", ("out",), "attn"),
    ("clip_vit", "transformer.resblocks.2.mlp.c_fc.bias", ("fc1",), "mlp"),
    ("clip_vit", "transformer.resblocks.2.mlp.c_proj.weight", ("fc2",), "mlp"),
    ("clip_vit", "transformer.resblocks.2.ln_1.weight", (), None),
    ("siglip", "visual.trunk.blocks.0.attn.qkv.weight", QKV, "attn"),
    ("siglip", "visual.trunk.blocks.0.attn.proj.weight", ("out",), "attn"),
    ("siglip", "visual.trunk.attn_pool.q.weight", ("q",), None),
    ("siglip", "visual.trunk.attn_pool.kv.bias", ("k", "v"), None),
    ("siglip", "visual.trunk.attn_pool.proj.weight", ("out",), None),
    ("siglip", "visual.trunk.attn_pool.mlp.fc1.weight", ("fc1",), None),
    ("siglip", "visual.trunk.attn_pool.latent", (), None),
    ("siglip", "visual.trunk.attn_pool.norm.weight", (), None),
    ("eva", "visual.trunk.blocks.0.attn.q_proj.weight", ("q",), "attn"),
    ("eva", "visual.trunk.blocks.0.attn.k_proj.weight", ("k",), "attn"),
    ("eva", "visual.trunk.blocks.0.attn.norm.weight", (), "attn"),
    ("eva", "visual.trunk.blocks.0.mlp.fc1_g.weight", ("fc1",), "mlp"),
    ("eva", "visual.trunk.blocks.0.mlp.fc1_x.weight", ("fc1",), "mlp"),
    ("eva", "visual.trunk.blocks.0.mlp.norm.weight", (), "mlp"),
    ("vitamin", "visual.trunk.blocks.0.mlp.w0.weight", ("fc1",), "mlp"),
    ("vitamin", "visual.trunk.blocks.0.mlp.w2.weight", ("fc2",), "mlp"),
    ("clip_resnet", "visual.layer1.0.conv1.weight", (), None),
    ("clip_resnet", "visual.attnpool.q_proj.weight", ("q",), None),
    ("clip_resnet", "visual.attnpool.c_proj.weight", (), None),
    ("clip_convnext", "visual.trunk.stages.0.blocks.0.mlp.fc1.weight", ("fc1",), "mlp"),
    ("fastvit", "visual.trunk.stages.3.blocks.0.token_mixer.qkv.weight", QKV, "attn"),
    ("fastvit", "visual.trunk.stages.0.blocks.0.token_mixer.layer_scale.gamma", (), None),
    ("fastvit", "visual.trunk.stages.3.downsample.proj.0.se.fc1.weight", (), None),
    ("fastvit", "visual.trunk.final_conv.se.fc1.weight", (), None),
    ("relpos", "visual.trunk.blocks.0.attn.rel_pos.mlp.fc1.weight", (), "attn"),
    ("coca", "visual.attn_pool.attn.k_proj_weight", ("k",), None),
    ("coca", "visual.attn_pool.attn.in_proj_bias", QKV, None),
    ("coca", "text_decoder.cross_attn.1.attn.in_proj_weight", QKV, None),
    ("coca", "text_decoder.resblocks.1.mlp.c_fc.weight", ("fc1",), None),
    ("coca", "text_decoder.text_projection", (), None),
]
HF_SLOTS = [
    ("roberta", "encoder.layer.1.attention.self.query.weight", ("q",), "attn"),
    ("roberta", "encoder.layer.1.attention.output.dense.bias", ("out",), "attn"),
    ("roberta", "encoder.layer.1.attention.output.LayerNorm.weight", (), None),
    ("roberta", "encoder.layer.1.intermediate.dense.weight", ("fc1",), "mlp"),
    ("roberta", "encoder.layer.1.output.dense.weight", ("fc2",), "mlp"),
    ("roberta", "encoder.layer.1.output.LayerNorm.weight", (), None),
    ("mt5", "block.0.layer.0.SelfAttention.v.weight", ("v",), "attn"),
    ("mt5", "block.0.layer.0.SelfAttention.o.weight", ("out",), "attn"),
    ("mt5", "block.0.layer.0.SelfAttention.relative_attention_bias.weight", (), "attn"),
    ("mt5", "block.0.layer.1.DenseReluDense.wi_0.weight", ("fc1",), "mlp"),
    ("mt5", "block.0.layer.1.DenseReluDense.wo.weight", ("fc2",), "mlp"),
    ("m2m_100", "layers.0.self_attn.k_proj.bias", ("k",), "attn"),
    ("m2m_100", "layers.0.self_attn_layer_norm.weight", (), None),
    ("m2m_100", "layers.0.fc2.weight", ("fc2",), "mlp"),
]


def check(model, name, slots, kind):
    parameter = next(p for p in describe(model).parameters if p.name == name)
    assert parameter.slots == slots
    assert parameter.tags & {"attn", "mlp"} == ({kind} if kind else set())


@pytest.mark.parametrize(("family", "name", "slots", "kind"), SLOTS, ids=lambda value: str(value))
def test_slots(family, name, slots, kind):
    check(tiny.FAMILIES[family](), name, slots, kind)


@pytest.mark.parametrize(("architecture", "name", "slots", "kind"), HF_SLOTS, ids=lambda value: str(value))
def test_slots_of_hugging_face_encoders(architecture, name, slots, kind):
    check(tiny.hf_text(architecture), f"text.transformer.{name}", slots, kind)


@pytest.mark.parametrize("family", tiny.VIT_LIKE)
def test_every_block_of_a_vit_has_each_slot(family):
    anatomy = describe(tiny.FAMILIES[family]())
    for tower in anatomy.towers:
        for index in range(len(tower.blocks)):
            inside = [p for p in anatomy.parameters if p.role == f"{tower.name}.blocks" and p.block == index]
            weights = [slot for p in inside if len(p.shape) == 2 for slot in p.slots]
            assert set(weights) == {"q", "k", "v", "out", "fc1", "fc2"}
            assert all(weights.count(slot) == 1 for slot in ("q", "k", "v", "out", "fc2"))


def test_another_attention_class_of_the_same_names_has_the_same_slots():
    """open_clip has its own `Attention` beside nn.MultiheadAttention; open_clip 4 uses it everywhere."""
    torch_blocks = describe(tiny.clip_vit())
    own_blocks = describe(tiny.clip_vit({"block_type": "custom"}, {"block_type": "custom"}))
    assert torch_blocks.parameters == own_blocks.parameters
