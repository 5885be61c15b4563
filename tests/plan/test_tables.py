"""What people read: equal blocks in one row, every number of the plan."""

import pytest
from made import anatomy, policy

from clipfreeze.errors import PlanError
from clipfreeze.plan.build import resolve
from clipfreeze.plan.diff import compare_plans
from clipfreeze.plan.explain import explain_parameters
from clipfreeze.plan.tables import anatomy_table, difference_table, explanation_table

MADE = anatomy()
TEXT = """
[[rule]]
match = ["@vision.blocks[-2:]", "@projections"]
train = true
lr = 1e-5

[[rule]]
match = "text_projection"
lr = 1e-3
"""


@pytest.fixture
def plan(tmp_path):
    return resolve(policy(tmp_path, TEXT), MADE)


def row(table: str, first: str) -> list[str]:
    return next(line for line in table.splitlines() if line.startswith(first + " ")).split()


def test_equal_blocks_share_a_row(plan):
    table = str(plan)
    assert row(table, "vision.blocks[0:10]")[1:4] == ["20", "720", "frozen"]
    assert row(table, "vision.blocks[10:12]")[1:5] == ["4", "144", "all", "1e-05"]
    assert row(table, "text.blocks[0:3]")[3] == "frozen"
    assert row(table, "text.proj")[4] == "0.001"


def test_rules_say_how_many_they_matched_and_decided(plan):
    table = str(plan)
    assert table.count("mine.toml:2") == 1
    assert row(table, plan.rules[0].source)[-2:] == ["6", "6"]
    assert row(table, plan.rules[1].source)[-2:] == ["1", "1"]
    assert f"{plan.totals.trainable:,} of {plan.totals.parameters:,}" in table
    assert "stops at vision.blocks[10]; stops at text.proj" in table


def test_explain_shows_winner_and_losers_with_their_lines(plan):
    table = explanation_table(explain_parameters(plan, MADE, "text_projection"))
    lines = [line.split() for line in table.splitlines() if line.startswith("lr")]
    assert [(line[1], line[2].rsplit(":")[-1], line[3]) for line in lines] == [
        ("1e-05", "2", "outvoted"), ("0.001", "7", "wins")]  # fmt: skip
    assert "no rule speaks of it" in explanation_table(explain_parameters(plan, MADE, "logit_scale"))


def test_explain_of_nothing_names_the_nearest(plan):
    with pytest.raises(PlanError, match=r"did you mean visual\.proj"):
        explain_parameters(plan, MADE, "visual.porj")


def test_diff_folds_and_lists_what_differs(plan, tmp_path):
    other = resolve(policy(tmp_path, TEXT.replace("[-2:]", "[-3:]").replace("1e-3", "1e-4"), "other"), MADE)
    found = compare_plans(plan, other)
    assert {d.name: d.settings.get("lr") for d in found.parameters}["text_projection"] == (1e-3, 1e-4)
    table = difference_table(found, ("mine", "other"))
    assert "vision.blocks[9]" in table
    assert "trainable false -> true" in table
    assert difference_table(compare_plans(plan, plan), ("mine", "mine")) == "no difference"


def test_only_blocks_that_differ_are_named(plan, tmp_path):
    text = TEXT + '[[rule]]\nmatch = ["@vision.blocks[10]", "@vision.blocks[0]"]\ntrain = true\nlr = 2e-5\n'
    other = resolve(policy(tmp_path, text + '[optimizer]\nname = "sgd"\n', "other"), MADE)
    table = difference_table(compare_plans(plan, other), ("mine", "other"))
    assert [line.split()[0] for line in table.splitlines()[2:]] == [
        "vision.blocks[0]",
        "vision.blocks[10]",
        "optimizer",
    ]


def test_blocks_that_train_different_tensors_have_rows_of_their_own(tmp_path):
    text = '[[rule]]\nmatch = ["@vision.blocks[0].attn", "@vision.blocks[1].mlp"]\ntrain = true\nlr = 1\n'
    table = str(resolve(policy(tmp_path, text), MADE))
    assert row(table, "vision.blocks[0]")
    assert row(table, "vision.blocks[1]")


def test_diff_of_two_models_is_refused(plan, tmp_path):
    with pytest.raises(PlanError, match="different models"):
        compare_plans(plan, resolve(policy(tmp_path, TEXT), anatomy(vision=11)))


def test_roles_are_listed_with_counts():
    table = anatomy_table(MADE)
    assert row(table, "@vision.blocks[0:12]")[1:3] == ["24", "864"]
    assert "12 vision blocks, 3 text blocks, vision has 2 stages" in table
    assert row(table, "@projections")[1] == "2"
