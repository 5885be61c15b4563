"""Optimizer and schedule of a policy file, checked without a model."""

import pytest

from clipfreeze.optim.checks import check_optimizer
from clipfreeze.policy.loading import builtin_policies, load_policy


def problems(folder, text: str) -> list[str]:
    path = folder / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return [str(problem).removeprefix(f"{folder}/") for problem in check_optimizer(load_policy(path))]


@pytest.mark.parametrize("policy", builtin_policies())
def test_the_built_in_policies_are_right(policy):
    assert check_optimizer(load_policy(policy)) == []


def test_each_problem_has_its_place(tmp_path):
    optimizer, schedule = problems(tmp_path, '[optimizer]\nname = "adamw"\nbeta = 1\n\n[schedule]\nname = "cosin"\n')
    assert optimizer.startswith("mine.toml:1: adamw has no option 'beta'\n  fix: did you mean betas")
    assert schedule.startswith("mine.toml:5: no schedule 'cosin'\n  fix: did you mean cosine")


def test_values_are_tried_out(tmp_path):
    found = problems(
        tmp_path, '[optimizer]\nname = "sgd"\nmomentum = -1.0\n[schedule]\nname = "MultiStepLR"\nmilestones = 3\n'
    )
    assert ["Invalid momentum" in found[0], "MultiStepLR does not take" in found[1]] == [True, True]


def test_warmup_in_epochs_is_fine_and_a_rule_may_have_any_schedule(tmp_path):
    assert problems(tmp_path, '[schedule]\nname = "StepLR"\nstep_size = 9\nwarmup = "1 epochs"\n') == []
    rule = '[[rule]]\nmatch = "*"\ntrain = true\nschedule = "linear"\n[schedule]\nname = "'
    assert problems(tmp_path, rule + 'cosine"\n') == []
    assert problems(tmp_path, rule + 'StepLR"\nstep_size = 9\n') == []


def test_the_schedule_of_a_rule_is_checked_at_its_place(tmp_path):
    rule = '[[rule]]\nmatch = "*"\ntrain = true\nschedule = '
    (problem,) = problems(tmp_path, "\n" + rule + '"cosin"\n')
    assert problem.startswith("mine.toml:2: no schedule 'cosin'\n  fix: did you mean cosine")
    (problem,) = problems(tmp_path, "[[phase]]\n" + rule.replace("rule", "phase.rule") + '{ name = "StepLR" }\n')
    assert problem.startswith("mine.toml:2: StepLR needs step_size")


@pytest.mark.parametrize("name", ["adamw", "sgd", "lion", "lamb", "adan", "muon"])
def test_a_warm_start_goes_with_most(tmp_path, name):
    assert problems(tmp_path, f'[optimizer]\nname = "{name}"\nwarm_start = 3\n') == []


def test_a_warm_start_is_refused_where_lr_0_moves_weights(tmp_path):
    (problem,) = problems(tmp_path, '[optimizer]\nname = "rprop"\nwarm_start = 3\n')
    assert "rprop moves weights at lr 0" in problem
