"""Bottlenecks in blocks and behind towers: what they add is what the formula says, by hand on the plain model."""

import copy
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial

import open_clip
import pytest
import torch
from by_hand import assert_near, loss_of, outputs
from hypothesis import given, settings
from hypothesis import strategies as st
from life import SGD, features, picture, planned, weights
from timm.models import register_model
from torch import Tensor, nn
from torch.nn import functional

from clipfreeze.changes import Applied, apply
from clipfreeze.inject.adapter import ACTIVATIONS, Adapter, add_adapter
from clipfreeze.plan.sites import AdapterSite
from clipfreeze.policy.actions import Adapter as Spec

import tiny

families = pytest.mark.parametrize("family", tiny.FAMILIES)
placements = pytest.mark.parametrize("placement", ["sequential", "parallel"])
BOTH = 'dim = 4, scale = 0.5, after = "both"'
TOWER = 'after = "tower", dim = 4, scale = 0.5'

WHOLE = {"attn": ("attn", "attn"), "mlp": ("mlp", "mlp")}
"""What the two parts of a block are given and give as a whole, which is where adapters are in papers."""
VISION: dict[str, dict[str, tuple[str, str]]] = {
    **dict.fromkeys(tiny.FAMILIES, WHOLE),
    "clip_resnet": {"mlp": ("", "")},
    "vitamin": {**WHOLE, "mlp": ("mlp.w0", "mlp")},  # a norm stands before w0
    "fastvit": {"attn": ("token_mixer", "token_mixer"), "mlp": ("mlp.fc1", "mlp")},  # a convolution stands before fc1
}
BERT = {"attn": ("attention.self", "attention.output.dense"), "mlp": ("intermediate", "output.dense")}
TEXT = {
    **dict.fromkeys(("roberta", "xlm_roberta", "bert"), BERT),
    "mt5": {"attn": ("layer.0.SelfAttention",) * 2, "mlp": ("layer.1.DenseReluDense",) * 2},
    "m2m_100": {"attn": ("self_attn", "self_attn"), "mlp": ("fc1", "fc2")},
}


@pytest.fixture(autouse=True)
def one_path():
    """Torch's fused path rounds otherwise, and is taken with gradients too once the attention is frozen."""
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


def base(family: str) -> nn.Module:
    """In eval mode, with no weight at zero: open_clip starts the last norm of each Bottleneck there."""
    torch.manual_seed(0)
    model = tiny.hf_text(family) if family in tiny.HF_CONFIGS else tiny.FAMILIES[family]()
    for name, parameter in model.named_parameters():
        if name.endswith("bn3.weight"):
            nn.init.ones_(parameter)
    return model.eval()


def match_of(family: str, placement: str) -> str:
    """Both towers, unless the vision tower takes no parallel adapter."""
    return "@text.blocks" if (family, placement) == ("clip_resnet", "parallel") else "@blocks"


def adapted(model: nn.Module, folder, match: str = "@blocks", said: str = BOTH, placement: str = "") -> Applied:
    more = f', placement = "{placement}"' if placement else ""
    return apply(planned(model, folder, f'[[rule]]\nmatch = "{match}"\nadapter = {{ {said}{more} }}\n{SGD}'), model)


def stir(applied: Applied, std: float = 0.2) -> Applied:
    """Noise in all values, as if trained."""
    noise = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in applied.trainable().values():
            parameter.add_(torch.randn(parameter.shape, generator=noise).to(parameter) * std)
    return applied


def leaves(applied: Applied) -> dict[str, Tensor]:
    return {name: p.detach().clone().requires_grad_() for name, p in applied.trainable().items()}


def bottleneck(x: Tensor, values: Mapping[str, Tensor], path: str, spec: Spec) -> Tensor:
    """s * (act(x D + d) U + u) over the channels, which lie last or, in maps that no block of Swin has, second."""
    act: dict[str, Callable[[Tensor], Tensor]] = {
        "gelu": lambda x: 0.5 * x * (1 + torch.erf(x / 2**0.5)),
        "quick_gelu": lambda x: x / (1 + torch.exp(-1.702 * x)),
        "relu": lambda x: x.clamp(min=0),
        "silu": lambda x: x / (1 + torch.exp(-x)),
        "tanh": lambda x: 2 / (1 + torch.exp(-2 * x)) - 1,
    }
    down, up = values[f"{path}.down.weight"].flatten(1), values[f"{path}.up.weight"].flatten(1)
    axis = -1 if x.shape[-1] == down.shape[1] and values[f"{path}.down.weight"].ndim != 4 else 1
    inner = torch.tensordot(x, down, ([axis], [1])) + values[f"{path}.down.bias"]
    added = torch.tensordot(act[spec.act](inner), up, ([-1], [1])) + values[f"{path}.up.bias"]
    scale = spec.ratio / (1 - spec.ratio) if spec.ratio else spec.scale or 1.0
    return scale * (added if axis == -1 else added.movedim(-1, 1))


def write_beside(plain: nn.Module, applied: Applied, values: Mapping[str, Tensor], family: str) -> nn.Module:
    """A copy of the plain model with these adapters in the forward of its modules."""
    model = copy.deepcopy(plain)
    for site, _ in applied.additions:
        assert isinstance(site, AdapterSite)
        block, _, part = site.path.rpartition(".adapter.")
        parts = VISION[family] if site.tower == "vision" and family in VISION else TEXT.get(
            {"hf_text": "roberta"}.get(family, family), WHOLE)  # fmt: skip
        parts = parts if site.tower == "text" else VISION.get(family, WHOLE)
        read, write = (".".join(filter(None, (block, at))) for at in parts[part])
        _replace(model, read, write, partial(bottleneck, values=values, path=site.path, spec=site.spec), site.spec)
    return model


def _replace(model: nn.Module, read: str, write: str, added: Callable[[Tensor], Tensor], spec: Spec) -> None:
    reader, writer = model.get_submodule(read), model.get_submodule(write)
    given: list[Tensor] = []
    reads, writes = reader.forward, writer.forward

    def reading(*args, **kwargs):
        given[:] = [args[0] if args else next(iter(kwargs.values()))]
        return reads(*args, **kwargs)

    def writing(*args, **kwargs):
        out = writes(*args, **kwargs)
        first = out[0] if isinstance(out, tuple) else out
        total = first + added(given[0] if spec.placement == "parallel" else first)
        return (total, *out[1:]) if isinstance(out, tuple) else total

    if spec.placement == "parallel":
        reader.forward = reading
        writes = writer.forward
    writer.forward = writing


def check_equal_to_hand(plain: nn.Module, applied: Applied, family: str) -> None:
    """In double precision, so that only formulas can differ: outputs with and without gradients, and all gradients."""
    plain, model = plain.double(), applied.model.double()
    values = leaves(applied)
    hand = write_beside(plain, applied, values, family)
    with torch.no_grad():
        inferred = outputs(model)
    found, expected = outputs(model), outputs(hand)
    changed = False
    for ours, without, by_hand, untouched in zip(found, inferred, expected, outputs(plain), strict=True):
        assert_near(ours, by_hand, 1e-9)
        assert_near(without, by_hand, 1e-9)
        changed |= by_hand.ndim > 0 and not torch.allclose(by_hand, untouched, rtol=1e-3)
    assert changed
    loss_of(found).backward()
    loss_of(expected).backward()
    for name, leaf in values.items():
        gradient = model.get_parameter(name).grad
        assert gradient is not None, name
        assert gradient.any(), name
        assert_near(gradient, leaf.grad, 1e-8, name)
    assert not [name for name, p in model.named_parameters() if p.grad is not None and name not in values]


@placements
@families
def test_equal_to_the_bottleneck_by_hand_with_all_gradients(family, placement, tmp_path):
    plain = base(family)
    applied = stir(adapted(copy.deepcopy(plain), tmp_path, match_of(family, placement), BOTH, placement))
    check_equal_to_hand(plain, applied, family)


@placements
@pytest.mark.parametrize("architecture", tiny.HF_CONFIGS)
def test_equal_by_hand_in_every_hugging_face_tower(architecture, placement, tmp_path):
    plain = base(architecture)
    applied = stir(adapted(copy.deepcopy(plain), tmp_path, "@text.blocks", BOTH, placement))
    check_equal_to_hand(plain, applied, architecture)


@register_model
def tiny_fused_eva_adapted(**kwargs) -> nn.Module:
    """As EVA01 and BEiT are: the weight of q, k and v is handed to a function, its module is never called."""
    return tiny.tiny_eva(qkv_fused=True, **kwargs)


@placements
def test_where_the_module_of_q_k_and_v_is_never_called_the_attention_is_read(placement, tmp_path):
    torch.manual_seed(0)
    plain = tiny.custom_timm("tiny_fused_eva_adapted", timm_pool="token", timm_proj=None).eval()
    applied = stir(adapted(copy.deepcopy(plain), tmp_path, "@vision.blocks", BOTH, placement))
    check_equal_to_hand(plain, applied, "eva")


class MainAttention(nn.Module):
    """Attention as open_clip's main branch has it: torch's parameter names, and `out_proj` is called."""

    def __init__(self, of: nn.MultiheadAttention) -> None:
        super().__init__()
        self.heads, self.out_proj = of.num_heads, nn.Linear(of.embed_dim, of.embed_dim)
        self.in_proj_weight, self.in_proj_bias = of.in_proj_weight, of.in_proj_bias
        self.out_proj.weight, self.out_proj.bias = of.out_proj.weight, of.out_proj.bias

    def forward(self, x: Tensor, *_: Tensor, attn_mask: Tensor | None = None, need_weights: bool = False):
        parts = functional.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask).transpose(1, 2).flatten(2)
        return self.out_proj(mixed), None


@placements
def test_the_attention_of_open_clip_s_main_branch_is_adapted_alike(placement, tmp_path):
    found = []
    for main in (False, True):
        model = base("clip_vit")
        for block in model.modules() if main else ():
            if isinstance(block, open_clip.transformer.ResidualAttentionBlock):
                block.attn = MainAttention(block.attn)
        torch.manual_seed(1)
        found.append(outputs(stir(adapted(model, tmp_path, "@blocks", BOTH, placement)).model))
    for ours, theirs in zip(*found, strict=True):
        assert_near(ours, theirs, 1e-4)


@placements
@families
def test_bit_equal_at_injection_with_and_without_gradients(family, placement, tmp_path):
    model = base(family)
    plain = outputs(model)
    torch.backends.mha.set_fastpath_enabled(True)
    with torch.no_grad():
        fused = outputs(model)
    applied = adapted(model, tmp_path, match_of(family, placement), BOTH, placement)
    assert applied.additions
    with torch.no_grad():
        assert all(map(torch.equal, fused, outputs(model)))
    with torch.inference_mode():
        assert all(map(torch.equal, fused, outputs(model)))
    torch.backends.mha.set_fastpath_enabled(False)
    if family != "relpos":  # timm picks another kernel there once the weights rest
        assert all(map(torch.equal, plain, outputs(model)))


@families
def test_at_injection_up_alone_has_a_gradient_and_with_it_down_learns(family, tmp_path):
    model = base(family)
    applied = adapted(model, tmp_path)
    ups = {name for name in applied.trainable() if ".up." in name}
    loss_of(outputs(model)).backward()
    assert {name for name, p in applied.trainable().items() if p.grad.any()} == ups
    optimizer = applied.optimizer()
    optimizer.step()
    optimizer.zero_grad()
    loss_of(outputs(model)).backward()
    assert all(p.grad.any() for p in applied.trainable().values())


def _vision_first(applied: Applied) -> list:
    return sorted(applied.additions, key=lambda added: added[0].tower == "text")


@families
def test_behind_a_tower_features_are_those_of_the_plain_model_adapted(family, tmp_path):
    model = base(family)
    model.encode_image, model.encode_text = (  # CoCa's would normalise
        partial(encode, normalize=False) for encode in (model.encode_image, model.encode_text)
    )
    plain = [feature.detach() for feature in features(model)]
    applied = adapted(model, tmp_path, "@{vision,text}", TOWER)
    equal = partial(torch.allclose, atol=1e-5) if family == "relpos" else torch.equal  # another kernel of timm's
    assert all(map(equal, plain, features(model)))
    stir(applied)
    values = leaves(applied)
    found = features(model)
    normal = model(tiny.images(model), tiny.tokens(model))
    normal = [normal[name] for name in ("image_features", "text_features")] if isinstance(normal, dict) else normal[:2]
    for (site, _), feature, ours, unit in zip(_vision_first(applied), plain, found, normal, strict=True):
        hand = feature + bottleneck(feature, values, site.path, site.spec)
        assert_near(ours, hand, 1e-5)
        assert not torch.allclose(hand, feature, rtol=1e-2)
        assert_near(unit, functional.normalize(hand, dim=-1), 1e-5)
    loss_of(list(found)).backward()
    assert all(p.grad.any() for p in applied.trainable().values())


@pytest.mark.parametrize("proj_bias", [False, True])
def test_a_ratio_gives_clip_adapter_s_features(proj_bias, tmp_path):
    torch.manual_seed(0)
    model = tiny.clip_vit(text={"proj_bias": proj_bias}).eval()
    plain = [feature.detach() for feature in features(model)]
    applied = stir(
        adapted(model, tmp_path, "@{vision,text}", 'after = "tower", reduction = 2, ratio = 0.2, act = "relu"')
    )
    for (_, adapter), f, ours in zip(_vision_first(applied), plain, features(model), strict=True):
        mapped = (f @ adapter.down.weight.T + adapter.down.bias).relu() @ adapter.up.weight.T + adapter.up.bias
        theirs = 0.8 * f + 0.2 * mapped
        torch.testing.assert_close(functional.normalize(ours, dim=-1), functional.normalize(theirs, dim=-1))


def test_behind_a_projection_that_lora_changes_it_reads_the_changed_feature(tmp_path):
    model = base("clip_vit")
    rules = f'[[rule]]\nmatch = "@text"\nadapter = {{ {TOWER} }}\n'
    rules += '[[rule]]\nmatch = "text_projection"\nlora = { rank = 2 }\n'
    applied = stir(apply(planned(model, tmp_path, rules + SGD), model))
    values = leaves(applied)
    found = model.encode_text(tiny.tokens(model))
    with applied.disabled():
        plain = model.encode_text(tiny.tokens(model))
    [adapter] = [part for _, part in applied.additions if isinstance(part, Adapter)]
    adapter.set_strength(0.0)
    changed = model.encode_text(tiny.tokens(model))
    assert not torch.allclose(plain, changed, rtol=1e-2)
    assert_near(found, changed + bottleneck(changed, values, "text_adapter", adapter.spec), 1e-5)


def lone(act: str = "gelu", dropout: float = 0.0, width: int = 6, dim: int = 3, conv: bool = False) -> Adapter:
    """An adapter of noise, in a model of one layer."""
    layer = nn.Conv2d(width, width, 1) if conv else nn.Linear(width, width)
    kernel = (1, 1) if conv else ()
    shapes = {"down.weight": (dim, width, *kernel), "down.bias": (dim,), "up.weight": (width, dim, *kernel)}
    site = AdapterSite.model_validate(
        {
            "path": "adapter.mlp",
            "of": "0",
            "added": [{"name": name, "shape": shape} for name, shape in {**shapes, "up.bias": (width,)}.items()],
            **dict.fromkeys(("source", "target"), "0"),
            **dict.fromkeys(("width_in", "width_out"), width),
            "dim": dim,
            "conv": conv,
            "spec": Spec(dim=dim, act=act, dropout=dropout, scale=0.5),
        }
    )
    adapter = add_adapter(site, nn.Sequential(layer), ExitStack(), None, True)
    assert not adapter.up.weight.any()
    assert not adapter.up.bias.any()
    assert 0 < adapter.down.weight.abs().max() <= width**-0.5
    assert [tuple(p.shape) for p in adapter.parameters()] == [added.shape for added in site.added]
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    return adapter


def values_of(adapter: Adapter) -> dict[str, Tensor]:
    return {f".{name}": parameter.detach() for name, parameter in adapter.named_parameters()}


@settings(max_examples=60)
@given(
    act=st.sampled_from(list(ACTIVATIONS)),
    conv=st.booleans(),
    width=st.integers(1, 9),
    dim=st.integers(1, 9),
    strength=st.floats(0, 1),
)
def test_what_is_added_is_the_formula_times_the_strength(act, conv, width, dim, strength):
    adapter = lone(act, 0.0, width, min(dim, width), conv)
    x = torch.randn(2, width, 3, 4) if conv else torch.randn(2, 5, width)
    hand = bottleneck(x, values_of(adapter), "", adapter.spec)
    torch.testing.assert_close(adapter(x), hand, rtol=1e-4, atol=1e-5)
    adapter.set_strength(strength)
    torch.testing.assert_close(adapter(x), strength * hand, rtol=1e-4, atol=1e-5)


def test_dropout_is_before_up_and_while_training_alone():
    adapter = lone("relu", 0.5)
    x = torch.randn(7, 6)
    torch.manual_seed(5)
    found = adapter.train()(x)
    torch.manual_seed(5)
    inner = functional.dropout((x @ adapter.down.weight.T + adapter.down.bias).relu(), 0.5)
    torch.testing.assert_close(found, 0.5 * (inner @ adapter.up.weight.T + adapter.up.bias))
    adapter.eval()
    assert torch.equal(adapter(x), adapter(x))


@pytest.mark.parametrize("family", tiny.BATCH_NORM)
def test_the_base_stands_still_while_dropout_of_the_adapters_runs(family, tmp_path):
    model = base(family)
    applied = stir(adapted(model, tmp_path, said="dim = 4, dropout = 0.5"), 0.05)
    before = weights(model)
    optimizer = applied.optimizer()
    model.train()
    assert all(adapter.training for _, adapter in applied.additions)
    assert not any(m.training for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    assert not any(map(torch.equal, features(model), features(model)))
    loss_of(outputs(model)).backward()
    optimizer.step()
    moved = {name for name, tensor in weights(model).items() if not torch.equal(tensor, before[name])}
    assert moved == set(applied.trainable())


@placements
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["clip_vit", "siglip", "coca"])
def test_half_precision_weights_take_fp32_adapters(family, dtype, placement, tmp_path):
    model = base(family).to(dtype)
    plain, kept = copy.deepcopy(model), outputs(model)
    applied = adapted(model, tmp_path, "@blocks", BOTH, placement)
    assert all(map(torch.equal, kept, outputs(model)))
    stir(applied, 0.1)
    found = outputs(model)
    assert [leaf.dtype for leaf in found] == [leaf.dtype for leaf in kept]
    loss_of(found).backward()
    for name, parameter in applied.trainable().items():
        assert parameter.dtype is parameter.grad.dtype is torch.float32
        assert parameter.grad.isfinite().all(), name
    hand = write_beside(plain.float(), applied, leaves(applied), family)
    for ours, exact in zip(found, outputs(hand), strict=True):
        assert_near(ours.float(), exact, 16 * torch.finfo(dtype).eps)  # of three blocks, each rounding a dozen times


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_features_of_half_precision_stay_so(dtype, tmp_path):
    model = base("clip_vit").to(dtype)
    images, tokens = tiny.images(model).to(dtype), tiny.tokens(model)
    kept = model.encode_image(images), model.encode_text(tokens)
    applied = adapted(model, tmp_path, "@{vision,text}", TOWER)
    assert all(map(torch.equal, kept, (model.encode_image(images), model.encode_text(tokens))))
    values = leaves(stir(applied))
    for (site, _), plain, ours in zip(
        _vision_first(applied), kept, (model.encode_image(images), model.encode_text(tokens)), strict=True
    ):
        assert ours.dtype is dtype
        exact = plain.float() + bottleneck(plain.float(), values, site.path, site.spec)
        assert_near(ours.float(), exact, 2 * torch.finfo(dtype).eps)


@placements
@pytest.mark.parametrize("family", ["clip_vit", "clip_resnet", "eva", "hf_text"])
def test_under_autocast_it_is_bit_equal_at_injection_and_near_to_fp32(family, placement, tmp_path):
    model = base(family)
    cast = partial(torch.autocast, "cpu", torch.bfloat16)
    with cast(), torch.no_grad():
        fused = outputs(model)
    with cast():
        kept = outputs(model)
    applied = adapted(model, tmp_path, match_of(family, placement), BOTH, placement)
    with cast(), torch.no_grad():
        assert all(map(torch.equal, fused, outputs(model)))
    with cast():
        assert all(map(torch.equal, kept, outputs(model)))
    stir(applied, 0.1)
    with cast():
        found = outputs(model)
        loss_of(found).backward()
    for ours, before, exact in zip(found, kept, outputs(model), strict=True):
        assert ours.dtype is before.dtype
        assert_near(ours.float(), exact, 0.1)
    assert all(p.grad.dtype is torch.float32 and p.grad.any() for p in applied.trainable().values())


CHECKPOINTED = ["clip_vit", "clip_resnet", "clip_swin", "siglip", "eva", "fastvit", "coca", "hf_text"]


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")  # open_clip's call
@placements
@pytest.mark.parametrize("family", CHECKPOINTED)
def test_b11_checkpointing_changes_no_gradient_and_leaves_nothing_waiting(family, placement, tmp_path):
    model = base(family)
    applied = stir(adapted(model, tmp_path, match_of(family, placement), f"{BOTH}, dropout = 0.5", placement))
    with applied.disabled():
        plain = [feature.detach() for feature in features(model)]
    model.train()
    gradients = []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        torch.manual_seed(3)
        loss_of(outputs(model)).backward()
        gradients.append([p.grad for p in applied.trainable().values()])
        model.zero_grad()
    for one, other in zip(*gradients, strict=True):
        assert_near(other, one, 1e-6)
    model.eval()
    with applied.disabled():
        assert all(map(torch.equal, plain, features(model)))
    twin = copy.deepcopy(model)
    assert all(map(torch.equal, features(twin), features(model)))


def test_a_forward_that_failed_half_way_leaves_nothing_to_the_next(tmp_path):
    model = base("clip_vit")
    applied = stir(adapted(model, tmp_path, "@vision.blocks", "dim = 4", "parallel"))
    kept = features(model)

    def fail(*_: object) -> None:
        raise RuntimeError("half way")

    handle = model.visual.transformer.resblocks[1].mlp.gelu.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="half way"):
        features(model)
    handle.remove()
    assert all(map(torch.equal, kept, features(model)))
    with applied.disabled():
        off = features(model)
    applied.remove()
    assert all(map(torch.equal, off, features(model)))


@placements
@families
def test_removed_it_leaves_the_model_as_it_was(family, placement, tmp_path):
    model = base(family)
    before, state = picture(model), dict(model.state_dict(keep_vars=True))
    applied = adapted(model, tmp_path, match_of(family, placement), BOTH, placement)
    new = {name for site, _ in applied.additions for name in site.names}
    assert {name for name in model.state_dict() if name not in state} == new
    assert all(
        model.get_parameter(name) is tensor for name, tensor in state.items() if isinstance(tensor, nn.Parameter)
    )
    applied.remove()
    assert picture(model) == before
    assert dict(model.state_dict(keep_vars=True)) == state


@placements
def test_a_copy_and_a_loaded_model_work_with_their_own_adapters(placement, tmp_path):
    model = base("eva")
    applied = stir(adapted(model, tmp_path, "@blocks", BOTH, placement))
    kept = features(model)
    twin, fresh = copy.deepcopy(model), base("eva")
    adapted(fresh, tmp_path, "@blocks", BOTH, placement)
    fresh.load_state_dict(model.state_dict())
    for parameter in applied.trainable().values():
        nn.init.zeros_(parameter)
    assert all(map(torch.equal, kept, features(twin)))
    assert all(map(torch.equal, kept, features(fresh)))
    assert not any(map(torch.equal, kept, features(model)))
    loss_of(list(features(twin))).backward()
    assert not any(p.grad is not None for p in model.parameters())


def test_half_the_scale_adds_half_behind_a_tower(tmp_path):
    model = base("siglip")
    plain = features(model)
    applied = stir(adapted(model, tmp_path, "@{vision,text}", TOWER))
    full = features(model)
    applied.set_scale(0.5)
    for before, whole, half in zip(plain, full, features(model), strict=True):
        torch.testing.assert_close(half - before, (whole - before) / 2, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("said", [BOTH, f'{BOTH}, placement = "parallel"', TOWER], ids=["behind", "beside", "tower"])
def test_compiled_forward_and_backward_are_the_same(said, tmp_path):
    gradients = []
    for compiling in (False, True):
        torch.manual_seed(0)
        model = tiny.clip_vit({"layers": 1}, {"layers": 1}).eval()
        applied = stir(adapted(model, tmp_path, "@{vision,text}", said))
        run = torch.compile(model, backend="aot_eager") if compiling else model
        for _ in range(2):
            loss_of([leaf for leaf in run(tiny.images(model), tiny.tokens(model)) if leaf.ndim]).backward()
        gradients.append({name: parameter.grad for name, parameter in applied.trainable().items()})
    for name, gradient in gradients[0].items():
        assert_near(gradients[1][name], gradient, 1e-4, name)
