"""Phases: what trains when, resolved before the run, under the same rules as all else."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made import anatomy, policy

from clipfreeze.errors import PlanError
from clipfreeze.plan.build import resolve
from clipfreeze.plan.diff import compare_plans
from clipfreeze.plan.explain import explain_parameters
from clipfreeze.plan.tables import difference_table, explanation_table
from clipfreeze.plan.value import Plan
from clipfreeze.policy.schema import Schedule

MADE = anatomy()
ALL = '[[rule]]\nmatch = "*"\ntrain = true\nlr = 1e-5\n'
PROBE = """
[[phase]]
name = "probe"
until = "20%"
[[phase.rule]]
match = "*"
exclude = "@projections"
freeze = true
"""
FULL = """
[[phase]]
name = "full"
warmup = "2%"
[[phase.rule]]
match = "visual.proj"
lr = 1e-3
weight_decay = 0.1
"""


def plan(text: str, folder) -> Plan:
    return resolve(policy(folder, text), MADE)


def problems(text: str, folder) -> list[str]:
    with pytest.raises(PlanError) as caught:
        plan(text, folder)
    return [str(problem).removeprefix(f"{folder}/") for problem in caught.value.problems]


def found(plan: Plan, name: str):
    return next(parameter for parameter in plan.parameters if parameter.name == name)


def test_the_cascade_goes_on_in_a_phase(tmp_path):
    made = plan(ALL + PROBE + FULL, tmp_path)
    probe, full = made.phases
    assert (probe.name, probe.until, full.name, full.until, full.warmup) == ("probe", "20%", "full", None, "2%")
    assert made.trains_in(0) == {"visual.proj", "text_projection"}
    assert made.trains_in(1) == made.trains_in(None) == {p.name for p in made.trainable}
    assert (probe.tensors, probe.parameters, full.parameters) == (2, 64, made.totals.trainable)
    rates = [{group.name: (group.lr, group.weight_decay) for group in phase.groups} for phase in made.phases]
    group = found(made, "visual.proj").group
    assert [of.get(group) for of in rates] == [(1e-5, 0.0), (1e-3, 0.1)]
    assert (found(made, "visual.proj").lr, found(made, "visual.class_embedding").lr) == (1e-5, 1e-5)


def test_without_phases_there_are_none(tmp_path):
    made = plan(ALL, tmp_path)
    assert made.phases == ()
    assert made.parameters[0].claims[0].phases is None


def test_behind_a_last_phase_that_ends_the_policy_s_own_rules_stand_alone(tmp_path):
    _, rest = plan(ALL + PROBE, tmp_path).phases
    assert (rest.name, rest.until, rest.tensors) == ("rest", None, len(MADE.parameters) - 1)
    assert len(plan(ALL + PROBE.replace("20%", "100%"), tmp_path).phases) == 1


def test_frontier_and_estimate_are_of_each_phase_and_of_the_largest(tmp_path):
    made = plan(ALL + PROBE + '[[phase]]\n[[phase.rule]]\nmatch = "@blocks"\nfreeze = true\n', tmp_path)
    assert made.phases[0].frontier == {"vision": "vision.proj", "text": "text.proj"}
    assert made.phases[1].frontier == made.frontier == {"vision": "vision.embed", "text": "text.embed"}
    assert made.estimate.gradients == 4 * made.phases[1].parameters
    both = '[[phase]]\nuntil = 5\n[[phase.rule]]\nmatch = "@vision"\nfreeze = true\n'
    both += '[[phase]]\n[[phase.rule]]\nmatch = "@text"\nfreeze = true\n'
    made = plan(ALL + both, tmp_path)
    assert made.estimate.gradients == 4 * max(phase.parameters for phase in made.phases) < 4 * made.totals.trainable


def test_a_plan_with_phases_is_json_both_ways(tmp_path):
    text = ALL + PROBE + FULL + 'schedule = { name = "StepLR", step_size = 3 }\n'
    made = plan(text, tmp_path)
    assert Plan.model_validate_json(made.model_dump_json()) == made == plan(text, tmp_path)


def test_a_schedule_of_a_rule_takes_the_policy_s_warmup_unless_it_has_one(tmp_path):
    rule = '[[rule]]\nmatch = "visual.proj"\nschedule = { name = "StepLR", step_size = 3%s }\n'
    run = '[schedule]\nname = "linear"\nwarmup = 7\n'
    own, other = (found(plan(ALL + rule % warmup + run, tmp_path), "visual.proj") for warmup in ("", ", warmup = 2"))
    assert (own.schedule, other.schedule) == (
        Schedule(name="StepLR", step_size=3, warmup=7), Schedule(name="StepLR", step_size=3, warmup=2))  # fmt: skip
    assert own.group != other.group
    same = ALL + '[[rule]]\nmatch = "visual.proj"\nschedule = { name = "linear" }\n' + run
    assert found(plan(same, tmp_path), "visual.proj").schedule is None


WRONG = {  # behind ALL, which is four lines: words of the one problem
    PROBE + '[[phase]]\n[[phase.rule]]\nmatch = "visual.porj"\nlr = 1\n': [":14:", "matches nothing", "visual.proj"],
    PROBE + '[[phase]]\n[[phase.rule]]\nmatch = "*"\nfreeze = true\n': [":13:", "nothing trains in this phase"],
    PROBE + "[[phase.rule]]\nmatch = '@blocks'\nlr = 1\n": [":13:", "lr on what stays frozen", "line 9"],
    PROBE + "[[phase.rule]]\nmatch = 'visual.proj'\nlr = 1\n[[phase.rule]]\nmatch = 'visual.proj'\nlr = 2\n": [
        ":13:", "decides nothing", "line 16"],
    '[[rule]]\nmatch = "@text"\nlr = 2\n' + '[[phase]]\n[[phase.rule]]\nmatch = "*"\nlr = 3\n': [
        ":5:", "decides nothing", "line 9"],
    '[[rule]]\nmatch = "*"\nfreeze = true\n' + PROBE.replace("freeze", "train"): [
        ":9:", "nothing trains after this phase", "until"],
}  # fmt: skip


@pytest.mark.parametrize("text", WRONG, ids=range(len(WRONG)))
def test_a_rule_of_a_phase_is_not_silently_without_effect(tmp_path, text):
    (problem,) = problems(ALL + text, tmp_path)
    assert all(word in problem for word in WRONG[text]), problem


def test_what_a_rule_tunes_may_train_in_a_later_phase_alone(tmp_path):
    text = '[[rule]]\nmatch = "visual.proj"\ntrain = true\nlr = 1\n[[rule]]\nmatch = "@logit_scale"\nlr = 2\n'
    text += 'clamp = [0, 4.6]\n[[phase]]\nuntil = 7\n[[phase]]\n[[phase.rule]]\nmatch = "@logit_scale"\ntrain = true\n'
    made = plan(text, tmp_path)
    assert [made.trains_in(number) for number in range(2)] == [{"visual.proj"}, {"visual.proj", "logit_scale"}]
    assert found(made, "logit_scale").clamp == (0.0, 4.6)


def test_the_plan_shows_each_phase(tmp_path):
    table = str(plan(ALL + PROBE + FULL + "[optimizer]\nwarm_start = 20\n", tmp_path))
    lines = [line for line in table.splitlines() if line.startswith(("probe ", "full "))]
    assert [" ".join(line.split()) for line in lines] == [
        "probe start 20% vision.proj, text.proj 2 64 1e-05",
        "full 20% end vision.embed, vision.blocks[0:12], vision.norm, vision.proj, text.embed, text.blocks[0:3], "
        "text.proj, logit_scale 36 1,233 1e-05, 0.001 2%",
    ]
    assert "mine.toml:9 (phase 1)" in table
    assert "at lr 0 for the first 20 steps" in table


def test_explain_tells_in_which_phase_a_rule_wins(tmp_path):
    made = plan(ALL + PROBE + FULL, tmp_path)
    table = explanation_table(explain_parameters(made, MADE, "visual.class_embedding"))
    assert [line.split()[1:] for line in table.splitlines() if line.startswith("train ")] == [
        ["true", f"{tmp_path}/mine.toml:1", "wins", "in", "phase", "2"],
        ["false", f"{tmp_path}/mine.toml:9", "wins", "in", "phase", "1"],
    ]
    assert "trains, in phase 2: lr=1e-05" in table


def test_diff_tells_phases_and_what_they_do(tmp_path):
    one, other = (plan(ALL + PROBE.replace("20%", end) + FULL, tmp_path) for end in ("20%", "30%"))
    assert compare_plans(one, other).phases == {"1": ("probe, until 20%", "probe, until 30%")}
    table = difference_table(compare_plans(one, plan(ALL, tmp_path)), ("mine", "all"))
    assert "phases 2: lr=1e-05 wd=0 -> none" in table
    assert "full, to the end with warmup 2% -> none" in table


NAMES = [parameter.name for parameter in MADE.parameters if not parameter.fixed]
SETTING = st.sampled_from(["freeze = true", "lr = 1e-3", "lr = 1e-4", "weight_decay = 0.1", "schedule = 'linear'"])
RULES = st.lists(st.tuples(st.sampled_from(NAMES[-6:]), SETTING), max_size=4)


@settings(max_examples=40, deadline=None)
@given(st.lists(RULES, min_size=1, max_size=3))
def test_groups_are_a_partition_of_the_union_and_alike_in_every_phase(tmp_path_factory, phases):
    text = ALL
    for number, rules in enumerate(phases):
        text += f"[[phase]]\nuntil = {number + 1}\n"
        for name, setting in rules:
            text += f'[[phase.rule]]\nmatch = "{name}"\noptional = true\n{setting}\n'
    folder = tmp_path_factory.mktemp("policy")
    made = plan(text, folder)
    assert sum(group.tensors for group in made.groups) == len(made.trainable)
    assert len({group.name for group in made.groups}) == len(made.groups)
    for number, phase in enumerate(made.phases):
        own = ALL + "".join(
            f'[[rule]]\nmatch = "{name}"\noptional = true\n{setting}\n'
            for name, setting in (phases[number] if number < len(phases) else [])
        )
        alone = plan(own, folder)
        assert made.trains_in(number) == {p.name for p in alone.trainable}
        settings_of = {group.name: group for group in phase.groups}
        for parameter in alone.trainable:
            group = settings_of[found(made, parameter.name).group]
            assert (group.lr, group.weight_decay, group.schedule) == (
                parameter.lr, parameter.weight_decay, parameter.schedule)  # fmt: skip
