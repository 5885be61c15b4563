"""The anatomy against what really runs: which parameters the value at the edge of each part depends on."""

from functools import partial

import pytest
import torch

from clipfreeze.anatomy.partition import describe

import tiny

MODELS = {
    **tiny.FAMILIES,
    **{f"hf_{name}": partial(tiny.hf_text, name, "mean_pooler", "mlp") for name in tiny.HF_CONFIGS},
    **{f"hf_{name}_cls": partial(tiny.hf_text, name, "cls_pooler", "linear") for name in tiny.HF_CONFIGS},
    "coca_parallel": partial(
        tiny.custom_text, {"attentional_pool": "parallel", "attn_pooler_heads": 2, "width": tiny.EMBED_DIM}
    ),
    "convnext_own_head": partial(tiny.custom_timm, "tiny_convnext", timm_pool="avg", timm_proj=None),
    "convnext_mlp": partial(tiny.custom_timm, "tiny_convnext", timm_pool="", timm_proj="mlp"),
    "swin_own_head": partial(tiny.custom_timm, "tiny_swin", timm_pool="avg", timm_proj=None),
    "custom_attention": partial(tiny.clip_vit, {"qk_norm": True, "scale_attn": True, "scale_fc": True}),
    "no_ln_pre": partial(tiny.clip_vit, {"no_ln_pre": True, "ls_init_value": 0.1}),
}


def first_tensor(values):
    while not isinstance(values, torch.Tensor):
        values = values[0]
    return values


@pytest.mark.parametrize("tower", ["vision", "text"])
@pytest.mark.parametrize("family", MODELS)
def test_parts_are_what_the_forward_pass_makes_of_them(family, tower):
    """The input of block 0 depends on exactly `embed`, the output of block i on the blocks up to i as well,
    the feature on the whole tower."""
    torch.manual_seed(0)
    model = MODELS[family]().eval()  # M2M100 skips blocks at random in training
    anatomy = describe(model)
    blocks = anatomy.tower(tower).blocks
    values, fired = {}, []

    def entered(name, module, args, kwargs):
        fired.append(name)
        values.setdefault("embed", first_tensor([*args, *kwargs.values()]))

    def left(name, module, args, output):
        values[name] = first_tensor(output)

    for name in blocks:
        model.get_submodule(name).register_forward_pre_hook(partial(entered, name), with_kwargs=True)
        model.get_submodule(name).register_forward_hook(partial(left, name))
    encode, batch = {
        "vision": (model.encode_image, tiny.images(model)),
        "text": (model.encode_text, tiny.tokens(model)),
    }[tower]
    feature = encode(batch)

    assert fired == list(blocks)
    tensors = dict(model.named_parameters())

    def upstream(value):
        if not value.requires_grad:
            return set()
        gradients = torch.autograd.grad(value.sum(), tensors.values(), allow_unused=True, retain_graph=True)
        return {name for name, gradient in zip(tensors, gradients, strict=True) if gradient is not None}

    def planned(*roles, block=-1):
        return {
            p.name
            for p in anatomy.parameters
            if p.role in {f"{tower}.{role}" for role in roles} or (p.role == f"{tower}.blocks" and p.block <= block)
        }

    assert upstream(values["embed"]) == planned("embed")
    for index, name in enumerate(blocks):
        assert upstream(values[name]) == planned("embed", block=index)
    everything = planned("embed", "norm", "pool", "proj", block=len(blocks))
    # CoCa's pool for the decoder is outside the contrastive path when it has a second one.
    idle = {name for name in everything if family == "coca_parallel" and name.startswith("visual.attn_pool.")}
    assert upstream(feature) == everything - idle
    assert everything == {p.name for p in anatomy.parameters if p.tower == tower}
