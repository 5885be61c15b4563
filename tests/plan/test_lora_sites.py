"""Which products LoRA stands beside, with which rows and shapes, and what it refuses."""

import pytest

from clipfreeze.anatomy.partition import describe
from clipfreeze.anatomy.parts import Anatomy, Parameter, Tower
from clipfreeze.plan.lora_sites import matrix_shape, place_lora, refuse_without_products
from clipfreeze.plan.match import Matcher
from clipfreeze.plan.sites import LoraSite, SiteError
from clipfreeze.policy.actions import Lora

import tiny


def part(name: str, shape: tuple[int, ...], product: str | None, slots: tuple[str, ...] = ()) -> Parameter:
    return Parameter(f"b.0.{name}", shape, "float32", "vision.blocks", 0, slots=slots, product=product)


MADE = Anatomy(
    "made",
    "CLIP",
    (
        part("attn.in_proj_weight", (24, 8), "linear", ("q", "k", "v")),
        part("attn.in_proj_bias", (24,), None, ("q", "k", "v")),
        part("attn.out_proj.weight", (8, 8), "linear", ("out",)),
        part("pool.kv.weight", (12, 8), "linear", ("k", "v")),
        part("pool.q_proj_weight", (6, 8), "linear", ("q",)),
        part("ln.weight", (8,), None),
        part("conv.weight", (10, 2, 3, 3), "conv"),
        part("proj", (8, 4), "factor"),
        part("table.weight", (50, 8), "embedding"),
    ),
    (Tower("vision", ("b.0",)), Tower("text", ())),
)


def sites(*patterns: str, of: Anatomy = MADE, **spec) -> list[LoraSite]:
    matcher = Matcher(of)
    matched = frozenset().union(*(matcher.addresses(pattern) for pattern in patterns))
    return place_lora(of, matched, Lora(**{"rank": 2, **spec}))


def refused(*patterns: str, **spec) -> tuple[str, str]:
    with pytest.raises(SiteError) as caught:
        sites(*patterns, **spec)
    assert caught.value.fix
    return str(caught.value), caught.value.fix


def test_every_product_has_a_site_with_its_matrix_and_rows_in_the_model_s_order():
    found = {site.path: (site.product, site.rows, *(added.shape for added in site.added)) for site in sites("*")}
    assert found == {
        "b.0.attn.lora.q": ("linear", (0, 8), (2, 8), (8, 2)),
        "b.0.attn.lora.k": ("linear", (8, 16), (2, 8), (8, 2)),
        "b.0.attn.lora.v": ("linear", (16, 24), (2, 8), (8, 2)),
        "b.0.attn.out_proj.lora": ("linear", None, (2, 8), (8, 2)),
        "b.0.pool.kv.lora.k": ("linear", (0, 6), (2, 8), (6, 2)),
        "b.0.pool.kv.lora.v": ("linear", (6, 12), (2, 8), (6, 2)),
        "b.0.pool.lora.q_proj_weight": ("linear", None, (2, 8), (6, 2)),
        "b.0.conv.lora": ("conv", None, (2, 18), (10, 2)),
        "b.0.lora.proj": ("factor", None, (2, 8), (4, 2)),
        "b.0.table.lora": ("embedding", None, (2, 50), (8, 2)),
    }
    assert list(found) == [site.path for site in sites("b.0.table.weight", "b.0.[!t]*", "@vision")]


def test_facts_of_a_site_are_those_of_its_parameter():
    [q] = sites("@attn.q", of=describe(tiny.clip_vit()), targets="q", alpha=3.0)[:1]
    assert (q.of, q.tower, q.block) == ("visual.transformer.resblocks.0.attn.in_proj_weight q", "vision", 0)
    assert q.parameter == "visual.transformer.resblocks.0.attn.in_proj_weight"
    assert q.names == tuple(f"visual.transformer.resblocks.0.attn.lora.q.{factor}" for factor in "AB")
    assert q.spec.scaling == 1.5


def test_scaling():
    assert Lora(rank=4).scaling == 1
    assert Lora(rank=4, alpha=8.0).scaling == 2
    assert Lora(rank=4, alpha=8.0, variant="rslora").scaling == 4
    assert Lora(rank=4, alpha=8.0, variant="dora").scaling == 2


def test_dora_has_a_magnitude_without_weight_decay_and_lora_plus_a_faster_b():
    [site] = sites("b.0.attn.out_proj.weight", variant="dora", lr_b_ratio=16.0)
    assert [(a.name, a.shape, a.bias, a.lr_scale) for a in site.added] == [
        ("A", (2, 8), False, 1.0),
        ("B", (8, 2), False, 16.0),
        ("magnitude", (8,), True, 1.0),
    ]


@pytest.mark.parametrize(
    ("targets", "paths"),
    [
        ("q", ["b.0.attn.lora.q", "b.0.pool.lora.q_proj_weight"]),
        ("k,out", ["b.0.attn.lora.k", "b.0.attn.out_proj.lora", "b.0.pool.kv.lora.k"]),
        (["out_proj"], ["b.0.attn.out_proj.lora"]),
        (["attn.out_proj", "conv"], ["b.0.attn.out_proj.lora", "b.0.conv.lora"]),
        (["kv"], ["b.0.pool.kv.lora.k", "b.0.pool.kv.lora.v"]),
        (["in_proj_weight", "q"], [*(f"b.0.attn.lora.{s}" for s in "qkv"), "b.0.pool.lora.q_proj_weight"]),
        (["proj"], ["b.0.lora.proj"]),
        (["b.0.conv"], ["b.0.conv.lora"]),
    ],
    ids=str,
)
def test_targets_are_slots_or_the_last_steps_of_a_name(targets, paths):
    assert [site.path for site in sites("*", targets=targets)] == paths


def test_b16_a_dead_target_is_named_with_its_nearest():
    what, fix = refused("*", targets=["q", "conf"])
    assert what == "lora targets: 'conf' is nothing that this rule matched"
    assert fix == "did you mean conv?"
    assert "'q'" in refused("b.0.conv.weight", targets=["q"])[0]


def test_what_is_no_product_is_refused():
    what, fix = refused("b.0.ln.weight", "b.0.attn.in_proj_bias")
    assert what == "lora on b.0.attn.in_proj_bias and 1 more: no matrix, convolution or embedding among them"
    assert "clipfreeze roles made" in fix
    with pytest.raises(SiteError, match=r"lora on b\.0\.ln\.weight: no matrix"):
        refuse_without_products(MADE, Matcher(MADE).addresses("*.ln.*"))
    refuse_without_products(MADE, ())  # a pattern that takes nothing has its own error
    refuse_without_products(MADE, Matcher(MADE).addresses("*"))


def test_a_rank_above_the_matrix_is_refused_with_the_largest_that_fits():
    assert refused("*", rank=5) == ("rank 5 is above the 4 of b.0.proj", "rank = 4 or less, or exclude = 'b.0.proj'")
    assert sites("b.0.proj", rank=4)
    assert refused("@attn.q", of=describe(tiny.clip_vit()), rank=33)[0].endswith("attn.in_proj_weight q")


def test_dropout_on_the_input_of_an_embedding_is_refused():
    what, fix = refused("*", dropout=0.1)
    assert "b.0.table.weight" in what
    assert "b.0.table.weight" in fix


@pytest.mark.parametrize(
    ("product", "shape", "matrix"),
    [
        ("linear", (3, 5), (3, 5)),
        ("conv", (3, 5, 2, 2), (3, 20)),
        ("factor", (3, 5), (5, 3)),
        ("embedding", (3, 5), (5, 3)),
    ],
)
def test_matrix_shape(product, shape, matrix):
    assert matrix_shape(product, shape) == matrix


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_matrix_of_every_family_is_a_product_or_known_not_to_be(family):
    anatomy = describe(tiny.FAMILIES[family]())
    left = {p.name.rpartition(".")[2] for p in anatomy.parameters if len(p.shape) > 1 and p.product is None}
    tokens = {"positional_embedding", "cls_token", "pos_embed", "reg_token", "latent", "query", "class_token"}
    assert left <= tokens | {"relative_position_bias_table", "gamma", "layer_scale", "cls_emb"}
    paths = [site.path for site in place_lora(anatomy, Matcher(anatomy).addresses("*"), Lora(rank=1))]
    assert len(paths) == len(set(paths))
