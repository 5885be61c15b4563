"""Our product-for-product copy of torch's attention gives torch's bits, whatever it is asked for."""

import copy
from contextlib import ExitStack

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from clipfreeze.inject.attention import attend, keep_fused
from clipfreeze.inject.factor import Factor, Product, add_effect


def same(found: tuple[Tensor, Tensor | None], expected: tuple[Tensor, Tensor | None]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:  # a row where all is masked is nan in both
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def mask(draw: st.DrawFn, shape: tuple[int, ...], kind: str) -> Tensor | None:
    if kind == "none" or not draw(st.booleans()):
        return None
    forbidden = torch.rand(shape) < 0.4
    return forbidden if kind == "bool" else torch.randn(shape).masked_fill(forbidden, float("-inf"))


@st.composite
def calls(draw: st.DrawFn) -> dict:
    torch.manual_seed(draw(st.integers(0, 99)))
    batch, length, sources = (draw(st.integers(1, 4)) for _ in range(3))
    heads, head = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([1, 4]))
    width = heads * head
    separate = draw(st.booleans())
    other = draw(st.sampled_from([width, 3])) if separate else width
    query = torch.randn(length, batch, width)
    inputs = draw(st.sampled_from(["self", "cross", "all distinct"] if other == width else ["cross", "all distinct"]))
    key = query if inputs == "self" else torch.randn(sources, batch, other)
    value = torch.randn_like(key) if inputs == "all distinct" else key
    kind = draw(st.sampled_from(["none", "bool", "float"]))
    shapes = [(length, len(key)), (batch * heads, length, len(key))]
    attn_mask = mask(draw, draw(st.sampled_from(shapes)), kind)
    need_weights = draw(st.booleans())
    weights = (
        {
            "in_proj_weight": None,
            "use_separate_proj_weight": True,
            "q_proj_weight": torch.randn(width, width),
            "k_proj_weight": torch.randn(width, other),
            "v_proj_weight": torch.randn(width, other),
        }
        if separate
        else {"in_proj_weight": torch.randn(3 * width, width)}
    )
    biased = draw(st.booleans())
    return {
        **weights,
        "query": query,
        "key": key,
        "value": value,
        "num_heads": heads,
        "in_proj_bias": torch.randn(3 * width) if biased else None,
        "dropout_p": draw(st.sampled_from([0.0, 0.5])),
        "out_proj_weight": torch.randn(draw(st.sampled_from([width, 5])), width),
        "training": draw(st.booleans()),
        "key_padding_mask": mask(draw, (batch, len(key)), kind),
        "need_weights": need_weights,
        "attn_mask": attn_mask,
        "average_attn_weights": draw(st.booleans()),
        "is_causal": attn_mask is not None and not need_weights and length == len(key) and draw(st.booleans()),
    }


@settings(max_examples=300)
@given(calls())
def test_attend_is_torch_s_own_attention_bit_for_bit(call):
    fixed = {
        "bias_k": None,
        "bias_v": None,
        "add_zero_attn": False,
        "out_proj_bias": None,
        "embed_dim": call["query"].shape[-1],
    }
    results = []
    for function, name in ((attend, "embed_dim"), (functional.multi_head_attention_forward, "embed_dim_to_check")):
        arguments = {(name if key == "embed_dim" else key): value for key, value in (fixed | call).items()}
        torch.manual_seed(0)
        results.append(function(**arguments))
    same(*results)


class Nothing:
    """An effect without effect: torch's attention meets a stand-in and must not show it."""

    def before(self, given: Tensor) -> Tensor:
        return given

    def after(self, product: Product, out: Tensor) -> Tensor:
        return out


PARAMETERS = ("in_proj_weight", "out_proj.weight")


@pytest.mark.parametrize("parameter", PARAMETERS)
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("masking", ["none", "bool", "float", "padding"])
def test_a_stand_in_for_either_weight_is_not_seen(parameter, batch_first, need_weights, gradients, masking):
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=batch_first)
    block = nn.ModuleDict({"attn": attention})
    x = torch.randn(3, 4, 8)
    batch, length = (3, 4) if batch_first else (4, 3)
    later = torch.ones(length, length, dtype=torch.bool).triu(1)
    masks = {
        "none": {},
        "bool": {"attn_mask": later},
        "float": {"attn_mask": torch.zeros(length, length).masked_fill(later, float("-inf"))},
        "padding": {"key_padding_mask": torch.arange(length).expand(batch, -1) > torch.arange(batch)[:, None]},
    }
    plain = copy.deepcopy(attention)
    with ExitStack() as undo:
        add_effect(block, f"attn.{parameter}", Nothing(), undo)
        keep_fused(block, f"attn.{parameter}", undo)
        for training in (True, False):
            results = []
            for module in (plain, attention):
                module.train(training)
                torch.manual_seed(1)
                with torch.set_grad_enabled(gradients):
                    results.append(module(x, x, x, need_weights=need_weights, **masks[masking]))
            same(*results)
    assert vars(attention).keys() == vars(plain).keys()
    assert "weight" not in vars(attention.out_proj)


@pytest.mark.parametrize("gradients", [True, False])
def test_cross_attention_with_weights_of_its_own_is_not_changed_by_stand_ins(gradients):
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, kdim=6, vdim=6, batch_first=True).eval()
    block = nn.ModuleDict({"attn": attention})
    query, context = torch.randn(3, 2, 8), torch.randn(3, 5, 6)
    with torch.set_grad_enabled(gradients):
        expected = attention(query, context, context, need_weights=False)
        with ExitStack() as undo:
            for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"):
                add_effect(block, f"attn.{name}", Nothing(), undo)
                keep_fused(block, f"attn.{name}", undo)
            same(attention(query, context, context, need_weights=False), expected)


@pytest.mark.parametrize("add", ["bias", "zeros", "unbatched"])
def test_what_no_tower_has_is_refused_and_never_ignored(add):
    attention = nn.MultiheadAttention(8, 2, add_bias_kv=add == "bias", add_zero_attn=add == "zeros")
    x = torch.randn(4, 8) if add == "unbatched" else torch.randn(4, 3, 8)
    with ExitStack() as undo:
        add_effect(attention, "in_proj_weight", Nothing(), undo)
        with pytest.raises(AssertionError):
            attention(x, x, x)


class Doubled(Nothing):
    def after(self, product: Product, out: Tensor) -> Tensor:
        return 2 * out


@pytest.mark.parametrize(
    "multiply",
    [
        lambda x, w: functional.linear(x, w),
        lambda x, w: functional.linear(x, weight=w),
        lambda x, w: functional.linear(input=x, weight=w, bias=torch.zeros(8)),
        lambda x, w: functional.linear(x, w, torch.zeros(8)),
        lambda x, w: x @ w,
        lambda x, w: torch.matmul(x, w),
        lambda x, w: torch.matmul(x, other=w),
        lambda x, w: x.matmul(w),
        lambda x, w: functional.conv2d(x[..., None, None], w[:, :, None, None]) if isinstance(w, Tensor) else None,
        lambda x, w: functional.embedding(torch.arange(3), w),
        lambda x, w: functional.embedding(torch.arange(3), weight=w, padding_idx=1),
    ],
    ids=range(11),
)
def test_a_product_is_met_however_its_arguments_are_given(multiply):
    holder = nn.Linear(8, 8)
    factor = Factor(holder, "weight")
    x = torch.randn(5, 8)
    if (expected := multiply(x, holder.weight)) is not None and multiply(x, factor) is not None:
        assert torch.equal(multiply(x, factor), expected)
        factor.effects.append(Doubled())
        assert torch.equal(multiply(x, factor), 2 * expected)


def test_the_stand_in_goes_with_its_last_effect_in_whatever_order_they_go():
    holder = nn.Linear(2, 2)
    first, second = ExitStack(), ExitStack()
    add_effect(holder, "weight", Doubled(), first)
    add_effect(holder, "weight", Doubled(), second)
    x = torch.randn(1, 2)
    once = functional.linear(x, holder._parameters["weight"])
    first.close()
    torch.testing.assert_close(functional.linear(x, holder.weight), 2 * once)
    second.close()
    assert "weight" not in vars(holder)
