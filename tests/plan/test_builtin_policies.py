"""The policies that ship: each plans on every architecture, and trains what its first lines say."""

import re

import open_clip
import pytest

from clipfreeze.anatomy.partition import describe
from clipfreeze.models import build_on_meta
from clipfreeze.plan.build import resolve
from clipfreeze.plan.value import Plan
from clipfreeze.policy.loading import builtin_policies, load_policy

import tiny

POLICIES = [name for name in builtin_policies() if name != "base"]
NEEDS_HUB = re.compile(r"hf_model_name")


def offline_configs() -> list[str]:
    return [
        name
        for name in open_clip.list_models()
        if "hf_model_name" not in open_clip.get_model_config(name)["text_cfg"]
    ]  # fmt: skip


@pytest.mark.slow
def test_every_policy_plans_on_every_offline_config():
    names = offline_configs()
    assert len(names) >= 134
    policies = [load_policy(name) for name in POLICIES]
    for name in names:
        anatomy = describe(build_on_meta(name), name)
        for policy in policies:
            plan = resolve(policy, anatomy)
            assert plan.trainable, (name, policy.name)
            assert len({p.name for p in plan.parameters}) == len(plan.parameters)
            decoder = [p for p in plan.trainable if p.role == "decoder"]
            everything = policy.name in ("full", "lp_ft", "gradual")
            assert bool(decoder) == (everything and "coca" in name.lower()), (name, policy.name)


def planned(name: str, model: str = "clip_vit", **knobs) -> Plan:
    return resolve(load_policy(name, **knobs), tiny.FAMILIES[model]())


def parts(plan: Plan) -> set[str]:
    return {p.role if p.block is None else f"{p.role}[{p.block}]" for p in plan.trainable}


BLOCKS = {tower: {f"{tower}.blocks[{i}]" for i in range(3)} for tower in ("vision", "text")}
VISION = BLOCKS["vision"] | {"vision.embed", "vision.norm", "vision.proj"}
TEXT = BLOCKS["text"] | {"text.embed", "text.norm", "text.proj"}
HEADS = {"vision.proj", "text.proj"}
SCALE = {"logit_scale"}
LAST = {"vision.blocks[2]", "text.blocks[2]"}

TRAINS = [  # policy, knobs, what trains in a ViT CLIP of 3 + 3 blocks
    ("full", {}, VISION | TEXT | SCALE),
    ("text_only", {}, TEXT | SCALE),
    ("text_only", {"last": 1}, {"text.blocks[2]", "text.norm", "text.proj"} | SCALE),
    ("text_only", {"visual_proj": True, "logit_scale": False}, TEXT | {"vision.proj"}),
    ("vision_only", {}, VISION | SCALE),
    ("vision_only", {"last": 1}, {"vision.blocks[2]", "vision.norm", "vision.proj"} | SCALE),
    ("vision_only", {"text_proj": True, "logit_scale": False}, VISION | {"text.proj"}),
    ("projections", {}, HEADS | SCALE),
    ("projections", {"logit_scale": False}, HEADS),
    ("last_n", {"n": 1}, LAST | HEADS | SCALE),
    ("last_n", {"n": 1, "n_text": 0}, {"vision.blocks[2]"} | HEADS | SCALE),
    ("last_n", {"n": 1, "n_vision": 0, "projections": False, "logit_scale": False}, {"text.blocks[2]"}),
    ("last_n", {"n": 1, "final_norm": True}, LAST | HEADS | SCALE | {"vision.norm", "text.norm"}),
    ("first_n", {}, {"vision.embed", "vision.blocks[0]"} | SCALE),
    ("first_n", {"embed": False, "n_text": 1, "logit_scale": False}, {"vision.blocks[0]", "text.blocks[0]"}),
    ("differential", {}, VISION | TEXT | SCALE),
    ("differential", {"freeze": "text"}, VISION | SCALE),
    ("differential", {"freeze": "vision"}, TEXT | SCALE),
    ("norm_bias", {}, BLOCKS["vision"] | {"vision.embed", "vision.norm"} | BLOCKS["text"]),
    ("norm_bias", {"logit_scale": True}, BLOCKS["vision"] | {"vision.embed", "vision.norm"} | BLOCKS["text"] | SCALE),
    ("logit_scale", {}, SCALE),
    ("lora", {}, {f"lora[{i}]" for i in range(3)}),
    ("lora", {"last": 1, "towers": "text", "targets": "fc1,c_proj"}, {"lora[2]"}),
    ("adapter", {"dim": 8}, {f"adapter[{i}]" for i in range(3)}),
    (
        "adapter",
        {"dim": 8, "towers": "text", "after": "both", "placement": "parallel"},
        {"adapter[0]", "adapter[1]", "adapter[2]"},
    ),
    ("prompt", {}, {"prompt"}),
    ("prompt", {"length": 3, "depth": 2, "visual": 2, "init": "random"}, {"prompt", "prompt[0]"}),
    ("prompt", {"couple": True}, {"prompt", "prompt[0]"}),
    ("lora_prompt", {}, {f"lora[{i}]" for i in range(3)} | {"prompt"}),
    ("head", {}, {"head"}),
    ("lp_ft", {}, VISION | TEXT | SCALE),
    ("gradual", {}, VISION | TEXT | SCALE),
    ("head", {"last": 1, "init": "zeros"}, {"head", "vision.blocks[2]", "vision.norm", "vision.proj"}),
]


@pytest.mark.parametrize(("name", "knobs", "expected"), TRAINS)
def test_a_policy_trains_what_it_says(name, knobs, expected):
    assert parts(planned(name, **knobs)) == expected


PHASES = [  # policy, knobs, what trains in each phase
    ("lp_ft", {}, [("20%", HEADS | SCALE), (None, VISION | TEXT | SCALE)]),
    ("lp_ft", {"probe": "2 epochs"}, [("2 epochs", HEADS | SCALE), (None, VISION | TEXT | SCALE)]),
    (
        "gradual",
        {"until_upper": "400 steps", "until_lower": "60%"},
        [
            ("10%", HEADS | SCALE),
            ("400 steps", HEADS | SCALE | LAST | {"vision.norm", "text.norm"}),
            ("60%", HEADS | SCALE | LAST | {"vision.norm", "text.norm", "vision.blocks[1]", "text.blocks[1]"}),
            (None, VISION | TEXT | SCALE),
        ],
    ),
]


@pytest.mark.parametrize(("name", "knobs", "expected"), PHASES)
def test_a_policy_with_phases_trains_what_it_says_when_it_says(name, knobs, expected):
    plan = planned(name, **knobs)
    found = []
    for number, phase in enumerate(plan.phases):
        names = plan.trains_in(number)
        found.append((phase.until, {part for part in parts(plan) if _in(plan, part, names)}))
    assert found == expected


def _in(plan: Plan, part: str, names: frozenset[str]) -> bool:
    return any(p.name in names for p in plan.trainable if part in (p.role, f"{p.role}[{p.block}]"))


def test_gradual_slows_the_lower_blocks():
    rates = {p.block: p.lr for p in planned("gradual").trainable if p.role == "vision.blocks"}
    assert rates == {0: 6.14125e-06, 1: 7.225e-06, 2: 8.5e-06}


def test_norm_bias_trains_norms_and_output_biases_alone():
    names = {p.name for p in planned("norm_bias").trainable}
    assert "transformer.resblocks.0.mlp.c_proj.bias" in names
    assert "visual.transformer.resblocks.0.ln_1.weight" in names
    assert not any(name.startswith("transformer") and not name.endswith("mlp.c_proj.bias") for name in names)


@pytest.mark.parametrize("model", tiny.FAMILIES)
def test_policies_plan_on_every_family_and_leave_no_decay_where_there_should_be_none(model):
    anatomy = describe(tiny.FAMILIES[model](), model)
    for name in POLICIES:
        for parameter in resolve(load_policy(name, **tiny.KNOBS.get(name, {})), anatomy).trainable:
            if len(parameter.shape) < 2 or parameter.role in ("logit_scale", "logit_bias"):
                assert parameter.weight_decay == 0, (name, parameter.name)


def test_the_logit_bias_goes_with_the_scale():
    for name in POLICIES:
        if "logit_scale" in load_policy(name).params or name in ("full", "differential", "logit_scale"):
            knobs = {"logit_scale": True} if "logit_scale" in load_policy(name).params else {}
            assert {"logit_scale", "logit_bias"} <= parts(planned(name, "siglip", **knobs))


def test_rates_reach_the_parameters():
    rates = {p.role: p.lr for p in planned("differential").trainable}
    assert (rates["vision.blocks"], rates["text.blocks"], rates["vision.proj"], rates["logit_scale"]) == (
        1e-5, 1e-6, 1e-4, 1e-6)  # fmt: skip
    decayed = {p.block: p.lr for p in planned("full", layer_decay=0.5).trainable if p.role == "vision.blocks"}
    assert decayed == {0: 1.25e-6, 1: 2.5e-6, 2: 5e-6}


def test_regularised_and_reinitialised_projections():
    plan = planned("projections", reinit="xavier", dropout=0.2, l2sp=0.5)
    heads = [p for p in plan.trainable if p.role.endswith(".proj")]
    assert {(p.init, p.dropout, p.l2sp) for p in heads} == {("xavier", 0.2, 0.5)}
    assert {p.dropout for p in planned("last_n", n=1, dropout=0.1).trainable if p.role.endswith(".proj")} == {0.1}


def test_the_logit_scale_can_start_and_end_where_one_likes():
    (scale,) = planned("logit_scale", init=2.659, clamp_max=5.0).trainable
    assert (scale.init, scale.clamp) == (2.659, (0.0, 5.0))
