"""LoRA beside every kind of product: it computes what the formulas say, by hand and, where PEFT is right, by PEFT."""

import copy
from functools import partial

import open_clip
import pytest
import torch
from by_hand import assert_near, leaves, loss_of, outputs, stir, written
from life import SGD, assert_same, features, planned, weights
from timm.models import register_model
from torch import Tensor, nn
from torch.nn import functional

from clipfreeze.changes import Applied, apply
from clipfreeze.inject.factor import parameter_of
from clipfreeze.inject.lora import Lora

import tiny

EVERYTHING = "lora = {{ rank = 2, alpha = 3.0{} }}"
TOO_SMALL = {  # rank 2 needs two rows and two columns
    "fastvit": "*.conv_scale.conv.weight",
    "hf_text": "*.token_type_embeddings.weight",
    "roberta": "*.token_type_embeddings.weight",
    "xlm_roberta": "*.token_type_embeddings.weight",
}
UNMOVED = (  # in tiny models: the class token has no relative position; one token alone attends to itself
    *("blocks.2.attn.rel_pos", "stages.3.blocks.0.token_mixer.qkv.lora.q", "stages.3.blocks.0.token_mixer.qkv.lora.k"),
)
VARIANTS = {
    "lora": "",
    "rslora": ', variant = "rslora", init = "orthogonal"',
    "dora": ', variant = "dora", init = "gaussian"',
    "pissa": ', init = "pissa"',
    "rslora pissa": ', variant = "rslora", init = "pissa"',
}
families = pytest.mark.parametrize("family", tiny.FAMILIES)


def base(family: str) -> nn.Module:
    """In eval mode, with no weight at zero: open_clip starts the last norm of each Bottleneck there."""
    torch.manual_seed(0)
    model = tiny.hf_text(family) if family in tiny.HF_CONFIGS else tiny.FAMILIES[family]()
    for name, parameter in model.named_parameters():
        if name.endswith("bn3.weight"):
            nn.init.ones_(parameter)
    return model.eval()


def rule(match: str, action: str, exclude: str | None = None) -> str:
    return "\n".join(["[[rule]]", f"match = {match!r}", action, f"exclude = {exclude!r}" if exclude else "", ""])


def adapted(model: nn.Module, folder, match: str = "*", more: str = "", exclude: str | None = None) -> Applied:
    return apply(planned(model, folder, rule(match, EVERYTHING.format(more), exclude) + SGD), model)


def everywhere(family: str, folder, more: str = "") -> tuple[nn.Module, Applied]:
    """A plain model, and its copy with LoRA on every product; in double precision, so that only formulas can differ."""
    plain = base(family)
    applied = adapted(copy.deepcopy(plain), folder, more=more, exclude=TOO_SMALL.get(family))
    return plain.double(), stir(applied)


def check_equal_to_hand(plain: nn.Module, applied: Applied) -> None:
    model = applied.model.double()
    factors = leaves(applied)
    expected = outputs(plain, written(plain, applied, factors))
    with torch.no_grad():
        inferred = outputs(model)
    found = outputs(model)
    for ours, without, hand in zip(found, inferred, expected, strict=True):
        assert_near(ours, hand, 1e-9)
        assert_near(without, hand, 1e-9)
    assert not all(map(partial(torch.allclose, rtol=1e-3), expected, outputs(plain)))
    loss_of(found).backward()
    loss_of(expected).backward()
    largest = max(float(leaf.grad.abs().max()) for leaf in factors.values())
    for name, leaf in factors.items():
        gradient = model.get_parameter(name).grad
        assert gradient is not None, name
        assert any(part in name for part in UNMOVED) or gradient.abs().max() > 1e-9 * largest, name
        assert (gradient - leaf.grad).abs().max() <= 1e-9 * leaf.grad.abs().max() + 1e-13 * largest, name
    frozen = [name for name, p in model.named_parameters() if p.grad is not None and name not in factors]
    assert not frozen


@families
def test_equal_to_w_plus_s_b_a_written_into_the_plain_model_with_all_gradients(family, tmp_path):
    check_equal_to_hand(*everywhere(family, tmp_path))


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "lora"])
@pytest.mark.parametrize("family", ["clip_vit", "clip_resnet", "pe", "fastvit", "coca", "hf_text"])
def test_variants_and_starts_equal_their_formulas_by_hand(family, variant, tmp_path):
    check_equal_to_hand(*everywhere(family, tmp_path, VARIANTS[variant]))


@pytest.mark.parametrize("architecture", tiny.HF_CONFIGS)
def test_equal_by_hand_in_every_hugging_face_tower(architecture, tmp_path):
    plain = base(architecture)
    model = copy.deepcopy(plain)
    exclude = TOO_SMALL.get(architecture)
    applied = stir(adapted(model, tmp_path, "@text", exclude=exclude))
    check_equal_to_hand(plain.double(), applied)


@pytest.mark.parametrize("variant", VARIANTS)
@families
def test_bit_equal_at_injection_with_and_without_gradients(family, variant, tmp_path):
    model = base(family)
    with torch.no_grad():
        fused = outputs(model)
    plain = outputs(model)
    adapted(model, tmp_path, more=VARIANTS[variant], exclude=TOO_SMALL.get(family))
    with torch.no_grad():
        assert all(map(torch.equal, fused, outputs(model)))
    with torch.inference_mode():
        assert all(map(torch.equal, fused, outputs(model)))
    if family != "relpos":  # timm picks another kernel there once the weights rest
        assert all(map(torch.equal, plain, outputs(model)))


@pytest.mark.parametrize("family", ["clip_vit", "siglip", "pe", "coca", "hf_text"])
def test_b12_each_address_works_alone_and_moves_its_rows_alone(family, tmp_path):
    plain = base(family)
    applied = adapted(copy.deepcopy(plain), tmp_path, exclude=TOO_SMALL.get(family))
    model = applied.model
    with torch.no_grad():
        before = outputs(model)
        for site, addition in applied.additions:
            nn.init.normal_(addition.B)
            after = outputs(model)
            assert not all(map(torch.equal, before, after)), site.path
            factors = {name: leaf.detach() for name, leaf in leaves(applied).items()}
            values = written(plain, applied, factors)
            moved = addition.merged(parameter_of(model, site.parameter), torch.zeros(()))
            assert_near(moved, values[site.parameter] - plain.get_parameter(site.parameter), 1e-5, site.path)
            start, stop = site.rows or (0, len(moved))
            assert not moved[:start].any()
            assert not moved[stop:].any()
            for ours, hand in zip(after, outputs(plain, values), strict=True):
                assert_near(ours, hand, 1e-4, site.path)
            nn.init.zeros_(addition.B)


def conv(**settings) -> tuple[nn.Conv2d, Tensor]:
    return nn.Conv2d(8, 12, 3, **settings), torch.randn(2, 8, 9, 9)


@pytest.mark.parametrize(
    "settings",
    [{}, {"stride": 2, "padding": 1}, {"groups": 4, "dilation": 2}, {"groups": 2, "bias": False, "padding": "same"}],
    ids=str,
)
@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_convolutions_of_all_kinds_equal_the_convolution_with_the_summed_kernel(settings, variant, tmp_path):
    model = base("clip_resnet")
    layer, given = conv(**settings)
    model.visual.layer1[0].conv1 = layer
    name = "visual.layer1.0.conv1.weight"
    applied = stir(adapted(model, tmp_path, name, VARIANTS[variant]))
    plain = {**dict(layer.named_parameters())}
    changed = written(model, applied, leaves(applied))[name]
    expected = layer._conv_forward(given, changed, plain.get("bias"))
    assert_near(layer(given), expected, 1e-5)


@register_model
def tiny_fused_eva(**kwargs) -> nn.Module:
    """As EVA01 and BEiT are: q, k and v fused, their bias made up at each call."""
    return tiny.tiny_eva(qkv_fused=True, **kwargs)


def test_a_weight_that_is_given_by_keyword_is_adapted_too(tmp_path):
    torch.manual_seed(0)
    plain = tiny.custom_timm("tiny_fused_eva", timm_pool="token", timm_proj=None).eval()
    applied = stir(adapted(copy.deepcopy(plain), tmp_path, "@vision.blocks"))
    assert {site.rows for site, _ in applied.additions if site.rows} == {(0, 32), (32, 64), (64, 96)}
    check_equal_to_hand(plain.double(), applied)


class MainAttention(nn.Module):
    """Attention as open_clip's main branch has it: torch's parameter names, functions in place of torch's class."""

    def __init__(self, of: nn.MultiheadAttention) -> None:
        super().__init__()
        self.heads = of.num_heads
        self.in_proj_weight, self.in_proj_bias = of.in_proj_weight, of.in_proj_bias
        self.out_proj = nn.Linear(of.embed_dim, of.embed_dim)
        self.out_proj.weight, self.out_proj.bias = of.out_proj.weight, of.out_proj.bias

    def forward(self, x: Tensor, *_: Tensor, attn_mask: Tensor | None = None, need_weights: bool = False):
        parts = functional.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask).transpose(1, 2).flatten(2)
        return self.out_proj(mixed), None


def test_the_attention_of_open_clip_s_main_branch_has_the_same_addresses(tmp_path):
    plain, other = base("clip_vit"), base("clip_vit")
    for module in list(other.modules()):
        if isinstance(module, open_clip.transformer.ResidualAttentionBlock):
            module.attn = MainAttention(module.attn)
    kept = outputs(other)
    ours, theirs = (adapted(model, tmp_path, "@blocks.attn") for model in (plain, other))
    assert list(ours.trainable()) == list(theirs.trainable())
    assert all(map(torch.equal, kept, outputs(other)))
    stir(ours)
    for one, another in zip(ours.additions, theirs.additions, strict=True):
        another[1].load_state_dict(one[1].state_dict())
    for one, another in zip(outputs(plain), outputs(other), strict=True):
        assert_near(another, one, 1e-4)
    loss_of(outputs(other)).backward()
    assert all(parameter.grad.any() for parameter in theirs.trainable().values())


C_FC = "visual.transformer.resblocks.0.mlp.c_fc.weight"
Q = "@vision.blocks[0].attn.q"


def test_dropout_is_on_the_input_of_a_linear_map_s_factors_alone(tmp_path):
    model = base("clip_vit")
    [(_, lora)] = stir(adapted(model, tmp_path, C_FC, ", dropout = 0.5")).additions
    layer, x = model.visual.transformer.resblocks[0].mlp.c_fc, torch.randn(4, 5, 32)
    model.train()
    torch.manual_seed(5)
    found = layer(x)
    torch.manual_seed(5)
    dropped = functional.dropout(x, 0.5)
    bare = functional.linear(x, parameter_of(model, C_FC), layer.bias)
    assert_near(found, bare + 1.5 * dropped @ lora.A.T @ lora.B.T, 1e-6)
    model.eval()
    assert_near(layer(x), bare + 1.5 * x @ lora.A.T @ lora.B.T, 1e-6)


@pytest.mark.parametrize("gradients", [True, False])
def test_dropout_reaches_one_third_of_a_fused_attention_also_without_gradients(gradients, tmp_path):
    model = base("clip_vit")
    [(_, lora)] = stir(adapted(model, tmp_path, Q, ", dropout = 0.5")).additions
    attention, x = model.visual.transformer.resblocks[0].attn, torch.randn(4, 5, 32)
    model.train()
    assert lora.training
    assert not attention.training
    with torch.set_grad_enabled(gradients):
        torch.manual_seed(5)
        found, _ = attention(x, x, x, need_weights=False)
        torch.manual_seed(5)
        dropped = functional.dropout(x.transpose(0, 1).contiguous(), 0.5).transpose(0, 1)
        weight = parameter_of(model, "visual.transformer.resblocks.0.attn.in_proj_weight")
        q, k, v = functional.linear(x, weight, attention.in_proj_bias).chunk(3, -1)
        q = q + 1.5 * dropped @ lora.A.T @ lora.B.T
        q, k, v = (part.unflatten(-1, (2, 16)).transpose(1, 2) for part in (q, k, v))
        mixed = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        assert_near(found, attention.out_proj(mixed), 1e-5)
        kept = features(model.eval())
        assert all(map(torch.equal, kept, features(model)))


@pytest.mark.parametrize("family", ["clip_vit", "clip_resnet", "hf_text"])
def test_the_base_stands_still_while_dropout_of_the_factors_runs(family, tmp_path):
    model = base(family)
    applied = stir(adapted(model, tmp_path, "@blocks", ", dropout = 0.5"))
    before = weights(model)
    optimizer = applied.optimizer()
    model.train()
    assert all(lora.training for _, lora in applied.additions)
    assert not any(m.training for m in model.modules() if isinstance(m, (nn.Dropout, nn.BatchNorm2d)))
    one, two = features(model), features(model)
    assert not any(map(torch.equal, one, two))
    for _ in range(5):
        loss_of(outputs(model)).backward()
        optimizer.step()
        optimizer.zero_grad()
    added = {f"{site.path}.{name}" for site, lora in applied.additions for name in lora.state_dict()}
    after = weights(model)
    assert_same({k: v for k, v in before.items() if k not in added}, {k: v for k, v in after.items() if k not in added})
    assert not any(torch.equal(before[name], after[name]) for name in added)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("family", ["clip_vit", "siglip", "coca"])
def test_b17_half_precision_weights_take_fp32_factors(family, variant, dtype, tmp_path):
    model = base(family).to(dtype)
    with torch.no_grad():
        fused = outputs(model)
    kept = outputs(model)
    plain = copy.deepcopy(model)
    applied = adapted(model, tmp_path, "@blocks", VARIANTS[variant])
    assert all(map(torch.equal, kept, outputs(model)))
    with torch.no_grad():
        assert all(map(torch.equal, fused, outputs(model)))
    stir(applied, std=0.1)
    found = outputs(model)
    assert {leaf.dtype for leaf in found} == {leaf.dtype for leaf in kept}
    loss_of(found).backward()
    for name, parameter in applied.trainable().items():
        assert parameter.dtype is parameter.grad.dtype is torch.float32
        assert parameter.grad.isfinite().all(), name
    exact = plain.float()
    expected = outputs(exact, written(exact, applied, leaves(applied)))
    with torch.no_grad():
        inferred = outputs(model)
    change = applied.merge()
    bound = 16 * torch.finfo(dtype).eps  # of three blocks, each rounding a dozen times
    assert 0 < change < bound
    with torch.no_grad():
        merged = outputs(model)
    for ours, without, after, hand in zip(found, inferred, merged, expected, strict=True):
        for result in (ours, without, after):
            assert_near(result.float(), hand, bound)
    assert all(p.dtype is dtype and p.is_contiguous() for p in model.parameters())


@pytest.mark.parametrize("variant", ["lora", "dora", "pissa"])
@pytest.mark.parametrize("family", ["clip_vit", "clip_resnet", "eva"])
def test_under_autocast_it_is_bit_equal_at_injection_and_near_to_fp32(family, variant, tmp_path):
    model = base(family)
    cast = partial(torch.autocast, "cpu", torch.bfloat16)
    with cast():
        kept = outputs(model)
    applied = adapted(model, tmp_path, "@blocks", VARIANTS[variant])
    with cast(), torch.no_grad():
        assert all(map(torch.equal, kept, outputs(model)))
    with cast():
        assert all(map(torch.equal, kept, outputs(model)))
    stir(applied, std=0.1)
    with cast():
        found = outputs(model)
        loss_of(found).backward()
    for ours, exact in zip(found, outputs(model), strict=True):
        assert_near(ours.float(), exact, 0.1)
    assert all(p.grad.dtype is torch.float32 and p.grad.any() for p in applied.trainable().values())


def test_lengths_in_dora_keep_their_digits_under_autocast(tmp_path):
    applied = stir(adapted(base("clip_vit"), tmp_path, C_FC, VARIANTS["dora"]))
    [(site, lora)] = applied.additions
    weight = parameter_of(applied.model, site.parameter)
    lengths = lora._norms(weight)
    assert_near(lengths, (weight + 1.5 * lora.B @ lora.A).norm(dim=1), 1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(lora._norms(weight), lengths)
        merged = lora.merged(weight, torch.zeros(()))
    assert torch.equal(merged, lora.merged(weight, torch.zeros(())))


def test_starts_of_the_factors(tmp_path):
    def start(init: str) -> Lora:
        [(_, lora)] = adapted(base("clip_vit"), tmp_path, C_FC, f', init = "{init}"').additions
        return lora

    assert not any(start(init).B.any() for init in ("default", "gaussian", "orthogonal"))
    assert start("default").A.abs().max() <= 32**-0.5
    orthogonal = start("orthogonal").A
    torch.testing.assert_close(orthogonal @ orthogonal.T, torch.eye(2))
    lora, weight = start("pissa"), parameter_of(base("clip_vit"), C_FC).detach()
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    best = left[:, :2] * values[:2] @ right[:2]
    torch.testing.assert_close(1.5 * lora.B @ lora.A, best, rtol=1e-4, atol=1e-6)


def test_compiled_forward_and_backward_are_the_same(tmp_path):
    gradients = []
    for compiling in (False, True):
        torch.manual_seed(0)
        model = tiny.clip_vit({"layers": 1}).eval()
        applied = stir(adapted(model, tmp_path, "@vision", VARIANTS["dora"]))
        run = torch.compile(model.visual, backend="aot_eager") if compiling else model.visual
        loss_of([run(tiny.images(model))]).backward()
        gradients.append({name: parameter.grad for name, parameter in applied.trainable().items()})
    for name, gradient in gradients[0].items():
        assert_near(gradients[1][name], gradient, 1e-4, name)


def test_data_parallel_gives_the_same_gradients(tmp_path):
    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        gradients = []
        for wrapped in (False, True):
            model = base("clip_vit")
            applied = stir(adapted(model, tmp_path))
            run = nn.parallel.DistributedDataParallel(model) if wrapped else model
            loss_of(list(run(tiny.images(model), tiny.tokens(model)))).backward()
            gradients.append([parameter.grad for parameter in applied.trainable().values()])
        assert all(map(torch.equal, *gradients))
    finally:
        torch.distributed.destroy_process_group()


peft = pytest.importorskip("peft")


@pytest.mark.parametrize("variant", ["lora", "rslora", "dora"])
def test_equal_to_peft_on_linear_maps_convolutions_and_embeddings(variant, tmp_path):
    plain = base("clip_vit")
    match = "*.{c_fc,c_proj,conv1,token_embedding}.weight"
    ours = stir(adapted(copy.deepcopy(plain), tmp_path, match, VARIANTS[variant]))
    targets = sorted({site.path.removesuffix(".lora") for site, _ in ours.additions})
    config = peft.LoraConfig(
        r=2, lora_alpha=3.0, target_modules=targets, use_rslora=variant == "rslora", use_dora=variant == "dora"
    )
    theirs = peft.LoraModel(plain, config, "default").eval()
    with torch.no_grad():
        for site, lora in ours.additions:
            layer = plain.get_submodule(site.path.removesuffix(".lora"))
            if site.product == "embedding":
                layer.lora_embedding_A["default"].copy_(lora.A)
                layer.lora_embedding_B["default"].copy_(lora.B)
            else:
                for name, factor in (("lora_A", lora.A), ("lora_B", lora.B)):
                    weight = getattr(layer, name)["default"].weight
                    weight.copy_(factor.view_as(weight))
            if variant == "dora":
                magnitude = layer.lora_magnitude_vector["default"].weight
                magnitude.copy_(lora.magnitude.view_as(magnitude))
    for one, other in zip(outputs(ours.model), outputs(theirs.model), strict=True):
        assert_near(one, other, 1e-5)


def test_peft_has_one_pair_of_factors_for_q_k_and_v_and_no_dropout_on_them(tmp_path):
    plain = base("clip_vit")
    config = peft.LoraConfig(r=2, lora_dropout=0.5, target_modules=["visual.transformer.resblocks.0.attn"])
    model = peft.LoraModel(plain, config, "default")
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if "lora" in name}
    at = "model.visual.transformer.resblocks.0.attn"
    assert shapes[f"{at}.lora_A.default.weight"] == (2, 32)
    assert shapes[f"{at}.lora_B.default.weight"] == (96, 2)
    ours = adapted(base("clip_vit"), tmp_path, "@vision.blocks[0].attn")
    own = "visual.transformer.resblocks.0.attn.lora"
    found = {name: tuple(p.shape) for name, p in ours.trainable().items()}
    assert [found[f"{own}.{slot}.{factor}"] for slot in "qkv" for factor in "AB"] == [(2, 32), (32, 2)] * 3
    nn.init.normal_(model.get_parameter(f"{at}.lora_B.default.weight"))
    model.train()
    assert all(map(torch.equal, features(plain), features(plain)))
