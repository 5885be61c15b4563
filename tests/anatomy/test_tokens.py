"""The rows of tokens that towers work on, where the model alone must tell; configs are in test_configs."""

import math
from functools import partial

import pytest
import torch

from clipfreeze.anatomy.partition import describe, find_tower
from clipfreeze.anatomy.parts import Tokens

import tiny

TEXTS = {
    **tiny.FAMILIES,
    **{f"hf_{name}": partial(tiny.hf_text, name) for name in tiny.HF_CONFIGS},
    "nllb": partial(tiny.hf_text, "m2m_100", "cls_pooler", "linear"),
}


@pytest.mark.parametrize("tower", ["vision", "text"])
@pytest.mark.parametrize("family", TEXTS)
def test_tokens_are_what_the_first_block_is_given(family, tower):
    model = TEXTS[family]().eval()
    found = find_tower(model, tower)
    assert found == describe(model).tower(tower)
    if isinstance(found.tokens, str):
        assert tower == "vision"
        assert family in (*tiny.HIERARCHICAL, "relpos")
        return
    shapes = []
    block = model.get_submodule(found.blocks[0])
    block.register_forward_pre_hook(lambda module, args: shapes.append(args[0].shape))
    with torch.no_grad():
        model.encode_image(tiny.images(model)) if tower == "vision" else model.encode_text(tiny.tokens(model))
    [(batch, count, width)] = shapes
    assert (batch, width) == (4, found.tokens.width)
    if tower == "vision":
        patches = count - found.tokens.first
        assert patches == math.isqrt(patches) ** 2 > 0
    else:
        assert count == tiny.CONTEXT + (family == "coca")
        assert model.get_parameter(found.tokens.table).shape == (tiny.VOCABULARY, width)


@pytest.mark.parametrize(
    ("text", "first", "end"),
    [
        ({"pool_type": "first", "no_causal_mask": True}, 1, "last"),
        ({"pool_type": "last", "no_causal_mask": True}, 1, "pad"),
        ({"pool_type": "last", "no_causal_mask": True, "proj_type": "none"}, 0, "id"),
        ({"pool_type": "eos", "eos_id": 2}, 1, "id"),
        ({"pool_type": "eos", "eos_id": 1}, 0, "id"),
    ],
)
@pytest.mark.parametrize("build", [tiny.clip_vit, tiny.custom_text])
def test_pooling_tells_how_texts_start_and_end(build, text, first, end):
    tokens = find_tower(build(text=text), "text").tokens
    assert isinstance(tokens, Tokens)
    assert (tokens.first, tokens.end) == (first, end)
    assert tokens.end_id == (text.get("eos_id", 1) if end == "id" else 0)


def test_what_is_pooled_stands_first_even_where_texts_have_no_start():
    assert find_tower(tiny.hf_text("mt5", "cls_pooler"), "text").tokens.first == 1
