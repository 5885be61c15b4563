"""What is added takes part in the cascade like the model's own parameters, and no rule about it is silently idle."""

from pathlib import Path

import pytest
from made import policy

from clipfreeze.anatomy.partition import describe
from clipfreeze.errors import PlanError
from clipfreeze.plan.build import resolve
from clipfreeze.plan.diff import compare_plans
from clipfreeze.plan.explain import explain_parameters
from clipfreeze.plan.value import Plan, PlannedParameter
from clipfreeze.policy.loading import load_policy

import tiny

VIT = describe(tiny.clip_vit())
COCA = describe(tiny.coca())
Q = "visual.transformer.resblocks.0.attn.lora.q"


def rule(match: str | list[str], *settings: str, exclude: str | None = None) -> str:
    excluded = [f"exclude = {exclude!r}"] if exclude else []
    return "\n".join(["[[rule]]", f"match = {match!r}", *excluded, *settings, ""])


def plan(folder: Path, *rules: str, anatomy=VIT, optimizer: str = "lr = 1e-4\nweight_decay = 0.1") -> Plan:
    return resolve(policy(folder, "".join(rules) + f"[optimizer]\n{optimizer}\n"), anatomy)


def problems(folder: Path, *rules: str, anatomy=VIT) -> list[tuple[int, str, str]]:
    with pytest.raises(PlanError) as caught:
        plan(folder, *rules, anatomy=anatomy)
    assert all(problem.path.endswith("mine.toml") for problem in caught.value.problems)
    return [(problem.line, problem.what, problem.fix) for problem in caught.value.problems]


def added(made: Plan) -> dict[str, PlannedParameter]:
    return {p.name: p for p in made.parameters if p.origin == "lora"}


def winners(parameter: PlannedParameter) -> dict[str, int]:
    return {claim.setting: claim.rule for claim in parameter.claims if claim.wins}


ALL = rule("@blocks", "lora = { rank = 2, targets = 'q,v' }")


def test_a_later_rule_takes_the_place_of_an_earlier_one_where_both_match(tmp_path):
    made = plan(tmp_path, ALL, rule("@vision.blocks[-1:].attn.q", "lora = { rank = 8, alpha = 16.0 }"))
    assert [site.spec.rank for site in made.sites if site.tower == "vision"] == [2, 2, 2, 2, 8, 2]
    assert len(made.sites) == 12
    last = added(made)["visual.transformer.resblocks.2.attn.lora.q.A"]
    assert last.shape == (8, 32)
    lora = [(claim.value, claim.rule, claim.wins) for claim in last.claims if claim.setting == "lora"]
    assert lora == [({"rank": 2, "targets": ["q", "v"]}, 1, False), ({"rank": 8, "alpha": 16.0}, 2, True)]
    assert last.claims[0].source.endswith("mine.toml:1")
    assert [report.decided for report in made.rules] == [22, 2]
    assert made.totals.injected == sum(p.size for p in added(made).values()) == 11 * 2 * 64 + 8 * 64


def test_rules_on_lora_set_lr_weight_decay_and_freeze(tmp_path):
    made = plan(
        tmp_path,
        ALL,
        rule("@lora", "lr = 1e-3"),
        rule("@vision.lora", "weight_decay = 0.5"),
        rule("@text.blocks[0].lora", "freeze = true"),
        rule("*.resblocks.2.attn.lora.?.B", "lr_scale = 2.0"),
    )
    found = added(made)
    assert (found[f"{Q}.A"].lr, found[f"{Q}.A"].weight_decay) == (1e-3, 0.5)
    assert found["transformer.resblocks.1.attn.lora.q.A"].weight_decay == 0.1
    assert not found["transformer.resblocks.0.attn.lora.q.A"].trainable
    assert found["transformer.resblocks.2.attn.lora.v.B"].lr == 2e-3
    assert winners(found[f"{Q}.A"]) == {"train": 1, "lora": 1, "lr": 2, "weight_decay": 3}
    assert sum(group.tensors for group in made.groups) == len(made.trainable) == 20


def test_an_action_s_own_lr_and_weight_decay_are_settings_of_the_cascade(tmp_path):
    made = plan(
        tmp_path,
        rule("@blocks", "lora = { rank = 2, lr = 3e-4, weight_decay = 0.2, lr_b_ratio = 16.0, variant = 'dora' }"),
        rule("@vision.lora", "lr = 1e-3"),
    )
    found = added(made)
    assert {(p.name.rpartition(".")[2], p.lr, p.weight_decay) for p in found.values()} == {
        ("A", 1e-3, 0.2), ("B", 1.6e-2, 0.2), ("magnitude", 1e-3, 0.0),
        ("A", 3e-4, 0.2), ("B", 4.8e-3, 0.2), ("magnitude", 3e-4, 0.0),
    }  # fmt: skip
    assert {(group.lr, group.weight_decay) for group in made.groups} == {(p.lr, p.weight_decay) for p in found.values()}


def test_layer_decay_counts_the_block_that_lora_stands_in(tmp_path):
    made = plan(tmp_path, ALL, rule("@lora", "layer_decay = 0.5"))
    rates = [added(made)[f"visual.transformer.resblocks.{i}.attn.lora.q.A"].lr for i in range(3)]
    assert rates == [1.25e-5, 2.5e-5, 5e-5]
    whole = plan(tmp_path, rule("@vision", "lora = { rank = 2 }"), rule("@lora", "layer_decay = 0.5"))
    assert added(whole)["visual.conv1.lora.A"].lr == 6.25e-6
    assert added(whole)["visual.lora.proj.A"].lr == 1e-4


def test_the_tower_is_not_what_was_added_to_it_but_names_are_names(tmp_path):
    made = plan(tmp_path, ALL, rule(["@vision.blocks[0]"], "train = true", "lr = 1e-5"))
    assert added(made)[f"{Q}.A"].lr == 1e-4
    made = plan(tmp_path, ALL, rule("visual.*.resblocks.0.*", "freeze = true"), rule("*.lora.v.*", "lr = 1e-3"))
    assert not added(made)[f"{Q}.A"].trainable
    assert added(made)["transformer.resblocks.0.attn.lora.v.B"].lr == 1e-3
    assert [p.name for p in made.parameters if p.trainable and p.origin == "model"] == []


def test_one_third_of_a_fused_weight_can_be_left_out(tmp_path):
    made = plan(tmp_path, rule("@vision.blocks.attn", "lora = { rank = 2 }", exclude="@attn.k"))
    assert {site.path.rpartition(".")[2] for site in made.sites} == {"q", "v", "lora"}
    made = plan(tmp_path, rule("@vision.blocks.attn.{q,k}", "lora = { rank = 2 }", exclude="*.1.*"))
    assert [site.block for site in made.sites] == [0, 0, 2, 2]


def test_patterns_that_overlap_add_once(tmp_path):
    made = plan(tmp_path, rule(["@blocks", "@blocks.attn.q", "*.in_proj_weight"], "lora = { rank = 2 }"))
    assert len(made.sites) == 36
    assert [claim.setting for claim in added(made)[f"{Q}.A"].claims] == ["train", "lora"]


def test_a_rule_may_train_and_adapt(tmp_path):
    made = plan(tmp_path, rule("@vision.proj", "train = true", "lr = 1e-3", "lora = { rank = 2, lr = 2e-3 }"))
    assert {p.name: p.lr for p in made.trainable} == {
        "visual.proj": 1e-3,
        "visual.lora.proj.A": 2e-3,
        "visual.lora.proj.B": 2e-3,
    }


@pytest.mark.parametrize(
    ("match", "action", "what"),
    [
        ("@biases", "{}", "no matrix, convolution or embedding among them"),
        ("visual.ln_post.weight", "{}", "lora on visual.ln_post.weight: no matrix"),
        (["@blocks", "visual.ln_post.*"], "{}", "lora on visual.ln_post.weight and 1 more: no matrix"),
        ("@blocks", "{ rank = 33 }", "rank 33 is above the 32 of visual.transformer.resblocks.0.attn.in_proj_weight q"),
        ("@blocks", "{ targets = ['c_fc', 'gate_proj'] }", "'gate_proj' is nothing that this rule matched"),
        (["@blocks", "@vision.pool"], "{}", "'@vision.pool' matches nothing"),
        ("@vision.blocks[7].attn.q", "{}", "in the vision tower"),
        ("@lora", "{}", "'@lora' matches nothing"),
    ],
    ids=str,
)
def test_bad_input_is_one_problem_with_its_place_and_a_fix(match, action, what, tmp_path):
    [(line, found, fix)] = problems(tmp_path, rule("@logit_scale", "train = true"), rule(match, f"lora = {action}"))
    assert what in found
    assert line == 4
    assert fix


def test_what_a_policy_adds_is_nothing_to_add_to(tmp_path):
    assert problems(tmp_path, ALL, rule("@lora", "lora = { rank = 2 }")) == [
        (
            4,
            "'@lora' takes what the policy itself adds, to which nothing can be added",
            "match the model's own parameters",
        )
    ]


def test_excluding_all_that_matched_is_told(tmp_path):
    [(line, what, _)] = problems(
        tmp_path, ALL, rule("@vision.blocks.attn.q", "lora = { rank = 4 }", exclude="*.in_proj_*")
    )
    assert (line, what) == (4, "exclude = '*.in_proj_*' takes out all that matched")


def test_a_rule_that_later_ones_replace_everywhere_is_told(tmp_path):
    [(line, what, _)] = problems(tmp_path, ALL, rule("@blocks", "lora = { rank = 4 }"))
    assert line == 1
    assert what == "this rule decides nothing: later rules (line 4) say otherwise of all it matches"


def test_settings_of_added_parameters_that_never_train_are_told(tmp_path):
    rules = ALL, rule("@vision.lora", "lr = 1e-3"), rule("@vision.lora", "freeze = true")
    [(line, what, _)] = problems(tmp_path, *rules)
    assert line == 4
    assert what.startswith(f"lr on what stays frozen: {Q}.A and 11 more")


def test_optional_lets_a_rule_pass_that_finds_nothing(tmp_path):
    made = plan(tmp_path, ALL, rule("@vision.pool", "lora = { rank = 2 }", "optional = true"))
    assert len(made.sites) == 12
    made = plan(tmp_path, ALL, rule("@norms", "lora = { rank = 2 }", "optional = true"))
    assert len(made.sites) == 12


def test_a_third_of_a_fused_weight_cannot_train(tmp_path):
    [(_, what, fix)] = problems(tmp_path, rule("@blocks.attn.q", "train = true", "lora = { rank = 2 }"))
    assert "a third of the fused" in what
    assert "lora alone" in fix


def test_an_explanation_tells_winner_and_losers_of_what_was_added(tmp_path):
    made = plan(tmp_path, ALL, rule("@lora", "lr = 1e-3"), rule("@vision.lora", "lr = 2e-3"))
    [a, b] = explain_parameters(made, VIT, f"{Q}.*")
    assert (a.name, b.name) == (f"{Q}.A", f"{Q}.B")
    rates = [(claim.value, claim.source.rpartition(":")[2], claim.wins) for claim in a.claims if claim.setting == "lr"]
    assert rates == [(1e-3, "4", False), (2e-3, "7", True)]
    assert len(explain_parameters(made, VIT, "@text.blocks[1].lora")) == 4
    with pytest.raises(PlanError, match="matches nothing"):
        explain_parameters(made, VIT, "@vision.proj.lora")


def test_a_difference_of_plans_has_what_one_adds_and_the_other_does_not(tmp_path):
    one = plan(tmp_path, ALL)
    other = plan(tmp_path, rule("@blocks", "lora = { rank = 4, targets = 'q' }"))
    found = {of.name: of.settings for of in compare_plans(one, other).parameters}
    assert found[f"{Q}.A"] == {"shape": ((2, 32), (4, 32))}
    gone = found["transformer.resblocks.0.attn.lora.v.B"]
    assert gone["shape"] == ((32, 2), None)
    assert gone["trainable"] == (True, None)
    assert all("lora" in name for name in found)
    assert not compare_plans(one, one).parameters


@pytest.mark.parametrize("anatomy", [VIT, COCA], ids=["clip_vit", "coca"])
def test_a_plan_with_additions_survives_json_and_a_second_resolve(anatomy, tmp_path):
    spec = "lora = { rank = 2, variant = 'dora', dropout = 0.1, targets = 'q,v,fc1', lr_b_ratio = 4.0 }"
    made = plan(tmp_path, rule("@blocks", spec), rule("@lora", "lr_scale = 2.0"), anatomy=anatomy)
    assert Plan.model_validate_json(made.model_dump_json()) == made
    assert resolve(load_policy(tmp_path / "mine.toml"), anatomy) == made
    assert made.model.parameters == sum(p.size for p in anatomy.parameters)
    assert made.totals.parameters == made.totals.trainable + made.totals.frozen
    assert made.totals.injected == made.totals.trainable == sum(group.parameters for group in made.groups)


def test_backward_stops_at_the_first_lora(tmp_path):
    made = plan(tmp_path, rule("@vision.blocks[-1:]", "lora = { rank = 2 }"), rule("@text.proj", "lora = { rank = 2 }"))
    assert made.frontier == {"vision": "vision.blocks[2]", "text": "text.proj"}
