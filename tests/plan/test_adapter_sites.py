"""Where adapters go in every family, of what shape, and what is told where they do not fit."""

from functools import cache

import made
import open_clip
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipfreeze.anatomy.partition import describe
from clipfreeze.anatomy.parts import Anatomy
from clipfreeze.errors import PlanError
from clipfreeze.models import build_on_meta
from clipfreeze.plan.adapter_sites import place_adapters
from clipfreeze.plan.build import resolve
from clipfreeze.plan.sites import AdapterSite, SiteError
from clipfreeze.policy.actions import Adapter

import tiny


@cache
def anatomy(family: str = "clip_vit") -> Anatomy:
    return describe(tiny.FAMILIES[family](), family)


def sites(of: Anatomy, match: str, **said: object) -> list[AdapterSite]:
    """Of the parameters whose role or name begins so."""
    matched = {i for i, p in enumerate(of.parameters) if f"@{p.role}".startswith(match) or p.name.startswith(match)}
    return place_adapters(of, matched, Adapter(**said))  # type: ignore[arg-type]


VIT = {"attn": ("attn", "attn"), "mlp": ("mlp.c_fc", "mlp.c_proj")}
TIMM = {"attn": ("attn.qkv", "attn.proj"), "mlp": ("mlp.fc1", "mlp.fc2")}
PARTS = {  # of the last block of the vision tower: what is read in parallel, and what is added to
    "clip_vit": VIT,
    "clip_resnet": {"mlp": ("", "")},
    "clip_convnext": {"mlp": ("mlp.fc1", "mlp.fc2")},
    "clip_swin": TIMM,
    "custom_text": VIT,
    "siglip": TIMM,
    "eva": {"attn": ("attn.q_proj", "attn.proj"), "mlp": ("mlp.fc1_g", "mlp.fc2")},
    "pe": TIMM,
    "fastvit": {"attn": ("token_mixer.qkv", "token_mixer.proj"), "mlp": ("mlp.fc1", "mlp.fc2")},
    "vitamin": {"attn": ("attn.qkv", "attn.proj"), "mlp": ("mlp.w0", "mlp.w2")},
    "mci": TIMM,
    "relpos": TIMM,
    "coca": VIT,
    "hf_text": VIT,
}
TEXT_PARTS = {
    "roberta": {
        "attn": ("attention.self.query", "attention.output.dense"),
        "mlp": ("intermediate.dense", "output.dense"),
    },
    "mt5": {
        "attn": ("layer.0.SelfAttention.q", "layer.0.SelfAttention.o"),
        "mlp": ("layer.1.DenseReluDense.wi_0", "layer.1.DenseReluDense.wo"),
    },
    "m2m_100": {"attn": ("self_attn.q_proj", "self_attn.out_proj"), "mlp": ("fc1", "fc2")},
}
TEXT_PARTS |= dict.fromkeys(("bert", "xlm_roberta"), TEXT_PARTS["roberta"])


def parts_of_last(of: Anatomy, tower: str) -> dict[str, tuple[str, str]]:
    block = of.tower(tower).blocks[-1]
    found = sites(of, block, dim=2, after="both")
    return {
        site.path.removeprefix(f"{block}.adapter."): tuple(
            at.removeprefix(block).removeprefix(".") for at in (site.source, site.target)
        )
        for site in found
    }


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_each_block_has_an_adapter_after_its_attention_and_its_mlp(family):
    assert parts_of_last(anatomy(family), "vision") == PARTS[family]
    if family != "hf_text":
        assert parts_of_last(anatomy(family), "text") == VIT


@pytest.mark.parametrize("architecture", tiny.HF_CONFIGS)
def test_hugging_face_blocks_have_theirs(architecture):
    assert parts_of_last(describe(tiny.hf_text(architecture)), "text") == TEXT_PARTS[architecture]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_site_says_where_it_is_and_goes_through_json(family):
    of = anatomy(family)
    for tower in ("vision", "text"):
        found = sites(of, f"@{tower}.blocks", dim=2)
        assert [site.block for site in found] == list(range(len(of.tower(tower).blocks)))
        for site in found:
            assert site.tower == tower
            assert site.path == f"{of.tower(tower).blocks[site.block]}.adapter.mlp"
            assert [name.removeprefix(site.path) for name in site.names] == [
                ".down.weight", ".down.bias", ".up.weight", ".up.bias",
            ]  # fmt: skip
            assert [added.bias for added in site.added] == [False, True, False, True]
            kernel = (1, 1) if site.conv else ()
            shapes = [(2, site.width_out, *kernel), (2,), (site.width_out, 2, *kernel), (site.width_out,)]
            assert [added.shape for added in site.added] == shapes
            assert AdapterSite.model_validate_json(site.model_dump_json()) == site


def test_stages_of_a_convolutional_tower_have_bottlenecks_of_their_own_width():
    found = sites(anatomy("clip_resnet"), "@vision.blocks", dim=4)
    assert [(site.conv, site.target, site.width_in, site.width_out) for site in found] == [
        (True, "visual.layer1.0", 8, 32),
        (True, "visual.layer2.0", 32, 64),
        (True, "visual.layer3.0", 64, 128),
        (True, "visual.layer4.0", 128, 256),
    ]
    mixed = sites(anatomy("fastvit"), "@vision.blocks", dim=4, after="both")
    assert [(site.block, site.conv) for site in mixed if site.path.endswith("attn")] == [(4, False)]
    assert {site.conv for site in mixed if site.path.endswith("mlp")} == {True}


def test_one_parameter_of_a_block_is_enough_and_other_blocks_stay():
    of = anatomy()
    found = sites(of, "visual.transformer.resblocks.1.ln_1.weight", dim=4, after="both")
    assert [site.path.partition("resblocks.")[2] for site in found] == ["1.adapter.attn", "1.adapter.mlp"]
    both = place_adapters(of, range(len(of.parameters)), Adapter(dim=4, after="attn"))
    assert [(site.tower, site.block) for site in both] == [(t, i) for t in ("vision", "text") for i in range(3)]


def test_if_no_width_is_said_it_is_64_or_that_of_a_narrower_block():
    assert {site.dim for site in sites(anatomy(), "@vision.blocks")} == {32}
    assert [site.dim for site in sites(anatomy("clip_resnet"), "@vision.blocks")] == [32, 64, 64, 64]


@settings(max_examples=40)
@given(dim=st.integers(1, 80), placement=st.sampled_from(["sequential", "parallel"]))
def test_a_bottleneck_is_at_most_as_wide_as_what_it_adds_to(dim, placement):
    if dim <= 32:
        found = sites(anatomy(), "@text.blocks", dim=dim, placement=placement)
        assert {site.added[0].shape for site in found} == {(dim, 32)}
    else:
        with pytest.raises(
            SiteError, match=f"a bottleneck of {dim} behind the 32 of transformer.resblocks.0"
        ) as caught:
            sites(anatomy(), "@text.blocks", dim=dim, placement=placement)
        assert caught.value.fix == "dim = 32 or less"


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_behind_a_tower_there_is_one_on_its_features(family):
    text = {
        **dict.fromkeys(tiny.FAMILIES, ("text.adapter", "text", False)),
        **dict.fromkeys(
            (name for name in tiny.FAMILIES if anatomy(name).family.startswith("CLIP ")),
            ("text_adapter", "text_projection", True),
        ),
    }[family]
    of = anatomy(family)
    found = place_adapters(of, range(len(of.parameters)), Adapter(after="tower"))
    assert [(site.path, site.target, site.factor) for site in found] == [("visual.adapter", "visual", False), text]
    for site in found:
        assert (site.width_in, site.width_out, site.dim, site.block) == (tiny.EMBED_DIM, tiny.EMBED_DIM, 4, None)
    assert [site.tower for site in sites(of, "@text.blocks", after="tower")] == ["text"]


def test_a_text_projection_with_bias_is_a_module():
    model = tiny.clip_vit(text={"proj_bias": True})
    [site] = sites(describe(model), "@text", after="tower")
    assert (site.target, site.factor) == ("text_projection", False)


@pytest.mark.parametrize(("said", "dim"), [({"reduction": 2}, 8), ({"reduction": 16}, 1), ({"dim": 16}, 16), ({}, 4)])
def test_the_bottleneck_of_features_is_a_share_of_them(said, dim):
    assert [site.dim for site in sites(anatomy(), "@", after="tower", **said)] == [dim, dim]


@pytest.mark.parametrize(
    "name", ["RN50", "ViT-B-16-SigLIP", "ViT-SO400M-16-SigLIP-i18n-256", "MobileCLIP-S2", "ViTamin-S"]
)
def test_real_models_of_every_kind_take_the_defaults(name):
    of = describe(build_on_meta(name), name)
    blocks = place_adapters(of, range(len(of.parameters)), Adapter())
    assert len(blocks) == sum(len(tower.blocks) for tower in of.towers)
    assert {site.dim for site in blocks} == {64}
    width = open_clip.get_model_config(name)["embed_dim"]
    assert {site.width_out for site in place_adapters(of, range(len(of.parameters)), Adapter(after="tower"))} == {width}


@pytest.mark.parametrize(
    ("family", "match", "said", "what", "fix"),
    [
        ("clip_vit", "logit_scale", {}, "adapter on logit_scale: it belongs to no tower", 'match = "@blocks"'),
        ("coca", "@decoder", {"after": "tower"}, "belongs to no tower", 'match = "@blocks"'),
        ("clip_vit", "@vision.proj", {}, "adapter on visual.proj: no block is matched", 'or after = "tower"'),
        ("clip_resnet", "@vision", {"after": "attn"}, "adapter after attn: no block matched in the vision", '"mlp"'),
        ("clip_convnext", "@vision", {"after": "attn"}, "adapter after attn: no block matched in the vision", '"mlp"'),
        ("fastvit", "visual.trunk.stages.0", {"after": "attn"}, "no block matched in the vision tower", '"mlp"'),
        ("clip_resnet", "@vision", {"dim": 33}, "a bottleneck of 33 behind the 32 of visual.layer1.0", "dim = 32"),
        ("clip_vit", "@text", {"after": "tower", "dim": 17}, "17 behind the 16 of the text tower", "dim = 16 or less"),
        (
            "clip_vit",
            "@text",
            {"after": "tower", "reduction": 17},
            "a reduction of 17 leaves none of 16",
            "reduction = 16",
        ),
        (
            "clip_resnet",
            "@vision",
            {"placement": "parallel", "dim": 4},
            "in visual.layer1.0, visual.layer2.0, visual.layer3.0, visual.layer4.0: what goes in has another shape",
            "exclude = ['visual.layer1.0.*', ",
        ),
    ],
)
def test_what_does_not_fit_is_told_with_what_would(family, match, said, what, fix):
    with pytest.raises(SiteError) as caught:
        sites(anatomy(family), match, **said)
    assert what in str(caught.value)
    assert fix in caught.value.fix


def test_the_tower_without_such_a_part_is_named_also_when_the_other_has_it():
    of = anatomy("clip_resnet")
    with pytest.raises(SiteError, match="in the vision tower has one"):
        place_adapters(of, range(len(of.parameters)), Adapter(after="attn"))


def test_a_block_without_products_is_told():
    with pytest.raises(SiteError, match="no block matched in the vision tower has one"):
        sites(made.anatomy(), "@vision.blocks")


def test_blocks_that_keep_their_shape_take_parallel_ones():
    of = describe(build_on_meta("RN50"), "RN50")
    found = sites(of, "visual.layer1.1", placement="parallel")
    [site] = found
    assert (site.source, site.target, site.width_in, site.width_out) == ("visual.layer1.1", "visual.layer1.1", 256, 256)


def test_in_a_policy_the_error_has_its_line(tmp_path):
    policy = made.policy(tmp_path, '[[rule]]\nmatch = "@vision.blocks"\nadapter = { dim = 4, after = "attn" }\n')
    with pytest.raises(PlanError) as caught:
        resolve(policy, anatomy("clip_resnet"))
    [problem] = caught.value.problems
    assert (problem.path, problem.line) == (str(tmp_path / "mine.toml"), 1)


def test_a_later_rule_replaces_the_adapter_of_the_blocks_it_matches(tmp_path):
    rules = (
        '[[rule]]\nmatch = "@text.blocks"\nadapter = { dim = 4, lr = 0.1 }\n'
        '[[rule]]\nmatch = "@text.blocks[-1]"\nadapter = { dim = 8, lr = 0.5 }\n'
    )
    plan = resolve(made.policy(tmp_path, rules), anatomy())
    added = {p.name: p for p in plan.parameters if p.origin == "adapter"}
    assert [p.shape[0] for name, p in added.items() if name.endswith("down.weight")] == [4, 4, 8]
    assert [p.lr for name, p in added.items() if name.endswith("down.weight")] == [0.1, 0.1, 0.5]
