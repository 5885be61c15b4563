"""The language: what a policy may say, and the one answer with all problems when it says something else."""

import os.path
from pathlib import Path

import jsonschema
import pytest
import tomli

from clipfreeze.errors import PolicyError
from clipfreeze.policy.loading import builtin_policies, load_policy
from clipfreeze.policy.schema import policy_schema


def write(folder: Path, text: str, name: str = "mine.toml") -> str:
    path = folder / name
    path.write_bytes(text.encode())
    return str(path)


def problems(path: str, **knobs) -> list[str]:
    with pytest.raises(PolicyError) as caught:
        load_policy(path, **knobs)
    return [str(problem) for problem in caught.value.problems]


RULE = '[[rule]]\nmatch = "*"\ntrain = true\n'

WRONG = {  # text: [(line, words that the message holds)]
    'learning_rte = 1\n' + RULE: [(1, ["unknown key 'learning_rte'"])],
    RULE + "freze = true\n": [(4, ["unknown key 'freze'", "freeze"])],
    RULE + "learning_rate = 1e-5\n": [(4, ["learning_rate", "did you mean lr?"])],
    RULE + "lora = { rnk = 4 }\n": [(4, ["unknown key 'rnk'", "rank"])],
    RULE + "lora = { rank = 0 }\n": [(4, ["rank = 0", "equal to 1"])],
    RULE + "lora = 4\n": [(4, ["lora = 4", "a table"])],
    RULE + 'lora = { variant = "dora", init = "pissa" }\n': [(4, ["dora with pissa"])],
    RULE + "lora = { targets = [] }\n": [(4, ["targets names nothing"])],
    RULE + "adapter = { reduction = 4 }\n": [(4, ["reduction and ratio", "tower"])],
    RULE + "prompt = { class_specific = true }\n": [(4, ["class_specific needs classes"])],
    RULE + 'prompt = { depth = 2, position = "end" }\n': [(4, ["fixed places", "front"])],
    RULE + 'head = { kind = "linear" }\n': [(4, ["classes is missing"])],
    RULE + 'head = { classes = ["a", "a"] }\n': [(4, ["'a' stands there twice"])],
    RULE + "head = { classes = [] }\n": [(4, ["0 classes"])],
    RULE + "head = { classes = [1, 2] }\n": [(4, ["1 is no name", "quotes"])],
    RULE + 'head = { classes = "none.txt" }\n': [(4, ["cannot read", "one name a line"])],
    RULE + 'head = { classes = ["a", "b"], templates = "a photo" }\n': [(4, ["'a photo' needs {}"])],
    RULE + "[optimiser]\nname = 'x'\n": [(4, ["unknown key 'optimiser'", "optimizer"])],
    RULE + "[phase]\nuntil = '20%'\n": [(4, ["[phase] is one table", "[[phase]]"])],
    RULE + "[[phase]]\nfreeze = true\n": [(5, ["unknown key 'freeze'", "[[phase.rule]]"])],
    RULE + "[[phase]]\nuntill = '20%'\n": [(5, ["unknown key 'untill'", "until"])],
    RULE + "[[phase]]\nuntil = 'later'\n": [(5, ["until", "2 epochs"])],
    RULE + "[[phase]]\nuntil = 0\n": [(5, ["until", "no length"])],
    RULE + "[[phase]]\nuntil = '20%'\n[[phase]]\nuntil = '10%'\n": [(7, ["10%", "no later"])],
    RULE + "[[phase]]\n[[phase]]\nuntil = '10%'\n": [(4, ["lasts to the end", "others after it"])],
    RULE + "[[phase]]\n[phase.rule]\nmatch = '*'\n": [(5, ["[phase.rule] is one table", "[[phase.rule]]"])],
    RULE + "[[phase]]\n[[phase.rule]]\nmatch = '*'\nfreze = true\n": [(7, ["unknown key 'freze'", "freeze"])],
    RULE + "[[phase]]\n[[phase.rule]]\nmatch = '*'\nlora = { rank = 2 }\n": [(7, ["lora", "whole run"])],
    RULE + "[[phase]]\n[[phase.rule]]\nmatch = '*'\ninit = 0.0\n": [(7, ["init", "whole run"])],
    RULE + "[[phase]]\n[[phase.rule]]\nmatch = '*'\nlr = '{rate}'\n": [(7, ["{rate} is no knob"])],
    RULE + "[[phase]]\n[[phase.rule]]\nmatch = '*'\n": [(5, ["says nothing"])],
    RULE + "[[phase]]\nwhen = '{n}'\n": [(5, ["{n} is no knob"])],
    RULE + "[optimizer]\nwarm_start = 'x'\n": [(5, ["warm_start", "2 epochs"])],
    '[rule]\nmatch = "*"\n': [(1, ["[[rule]]"])],
    RULE + 'lr = "1e-5"\n': [(4, ["number", "lr = 1e-5 without quotes"])],
    RULE + "lr = nan\n": [(4, ["finite"])],
    RULE + "lr = inf\n": [(4, ["finite"])],
    RULE + "lr = -1e-5\n": [(4, ["lr", "greater than 0"])],
    RULE + "weight_decay = -1\n": [(4, ["weight_decay", "greater than or equal to 0"])],
    RULE + "dropout = 1.0\n": [(4, ["dropout", "less than 1"])],
    RULE + "layer_decay = 2\n": [(4, ["layer_decay", "less than or equal to 1"])],
    RULE + "lr = 1\nlr_scale = 2\n": [(1, ["lr and lr_scale together"])],
    RULE + "freeze = true\n": [(1, ["freeze and train together"])],
    RULE + 'init = "uniform"\n': [(4, ["zeros", "normal(0.02)"])],
    RULE + "clamp = [1, 0]\n": [(4, ["clamp", "low < high"])],
    RULE + "clamp = [1]\n": [(4, ["clamp", "low < high"])],
    RULE + "schedule = 3\n": [(4, ["schedule = 3", "text"])],
    RULE + "schedule = { step_size = 3 }\n": [(4, ["schedule", "write its name"])],
    '[[rule]]\nmatch = "*"\nfreeze = true\nlr = 1e-3\n': [(1, ["lr", "freezes"])],
    '[[rule]]\nmatch = "*"\ntrain = false\n': [(3, ["train = false", "freeze = true"])],
    "[[rule]]\ntrain = true\n": [(1, ["match is missing"])],
    "[[rule]]\nmatch = []\ntrain = true\n": [(2, ["at least one pattern"])],
    "[[rule]]\nmatch = ['*', 3]\ntrain = true\n": [(2, ["text is expected"])],
    RULE + "[schedule]\nwarmup = 'soon'\n": [(5, ["warmup", "2 epochs"])],
    RULE + "[schedule]\nwarmup = '150%'\n": [(5, ["warmup", "more than the whole run"])],
    RULE + "[optimizer]\nlr = true\n": [(5, ["lr", "number"])],
    "default = 'thaw'\n" + RULE: [(1, ["default", "freeze"])],
    "x = 'C:\\Users'\ny = \"C:\\Users\"\n": [(2, ["single quotes", "forward slashes"])],
    "visual.* = 1\n": [(1, ["match ="])],
    RULE + "lr = 1\nlr = 2\n": [(5, ["second time"])],
    RULE + "[optimizer]\n[optimizer]\n": [(5, ["second time"])],
    "[params]\na.b = 1\n" + RULE: [(2, ["default is missing"]), (2, ["unknown key 'b'"])],
    "[params]\nn = 2\n" + RULE: [(2, ["write n = { default = 2 }"])],
    "[params]\nn = { default = 2 }\n" + RULE: [(2, ["'n' is read by no rule"])],
    "[params]\nn = { default = '{m}' }\n" + RULE: [(1, ["'m', which is no knob"])],
    "[params]\na = { default = '{b}' }\nb = { default = '{a}' }\n" + RULE: [(1, ["a -> b -> a"])],
    RULE + "lr = '{rate}'\n": [(4, ["{rate} is no knob"])],
    "[params]\nrates = { default = 1e-5 }\n" + RULE + "lr = '{rate}'\nlr_scale='{rates}'\n": [
        (6, ["did you mean rates?"])],
    "[params]\nn = { default = 2 }\n" + RULE + "when = '{n}'\n": [(6, ["not true or false", '"{n} == 2"'])],
    "[params]\nn = { default = 2 }\n" + RULE + "when = '{n} > 1'\n": [(6, ["no condition"])],
    "freze = 1\n[[rule]]\nmatch = 2\n": [(1, ["freze"]), (3, ["match"])],
}  # fmt: skip


@pytest.mark.parametrize("text", WRONG)
def test_each_fault_is_told_with_its_line_and_the_right_thing(tmp_path, text):
    path = write(tmp_path, text)
    found = problems(path)
    for line, words in WRONG[text]:
        assert any(
            problem.startswith(f"{path}:{line}: ") and all(word in problem for word in words) for problem in found
        ), found


@pytest.mark.parametrize("policy", builtin_policies())
def test_a_wrong_knob_is_told_once_and_not_by_what_reads_it(policy):
    for name, knob in load_policy(policy).knobs.items():
        wrong = "no such word" if knob.choices else knob.min - 1 if knob.min is not None else None
        if wrong is not None:
            (told,) = problems(policy, **{name: wrong})
            assert f"knob {name!r}" in told


def test_bom_and_crlf_are_fine_and_lines_stay_right(tmp_path):
    text = "\ufeff" + (RULE + "lr = 1e-5\n").replace("\n", "\r\n")
    assert load_policy(write(tmp_path, text)).rules[0].rule.lr == 1e-5
    assert problems(write(tmp_path, text.replace("lr =", "rl ="))) == [
        f"{tmp_path}/mine.toml:4: unknown key 'rl'\n  fix: did you mean lr?"
    ]


def test_other_encodings_are_named(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_bytes(RULE.encode("utf-16"))
    assert "UTF-16" in problems(str(path))[0]
    path.write_bytes(RULE.encode() + b"# caf\xe9\n")
    assert problems(str(path))[0].startswith(f"{path}:4: byte 0xe9")


def test_unknown_policies_and_files_get_the_nearest_name(tmp_path):
    assert "did you mean last_n" in problems("lastn")[0]
    write(tmp_path, RULE)
    assert "did you mean mine.toml" in problems(str(tmp_path / "mne.toml"))[0]
    assert "is a folder" in problems(f"{tmp_path}/")[0]


def test_extends_puts_parents_first_and_merges_knobs_and_sections(tmp_path):
    write(
        tmp_path,
        "[params]\nn = { default = 1, min = 1 }\n" + RULE + "lr_scale = '{n}'\n[optimizer]\nname = 'adamw'\nlr = 1e-3\n"
        "betas = [0.9, 0.95]\n[schedule]\nname = 'cosine'\nwarmup = '5%'\n",
        "parent.toml",
    )
    child = write(
        tmp_path,
        "extends = './parent.toml'\n[params]\nn = { default = 3 }\n[[rule]]\nmatch = 'a'\nfreeze = true\n"
        "[optimizer]\nname = 'sgd'\nmomentum = 0.9\n[schedule]\nwarmup = 7\n",
    )
    policy = load_policy(child)
    assert [rule.rule.match for rule in policy.rules] == [("*",), ("a",)]
    assert policy.params == {"n": 3}
    assert policy.knobs["n"].min == 1
    assert (policy.optimizer.name, policy.optimizer.lr, policy.optimizer.options) == ("sgd", 1e-3, {"momentum": 0.9})
    assert (policy.schedule.name, policy.schedule.warmup) == ("cosine", 7)


def test_a_parent_reached_twice_counts_once(tmp_path):
    write(tmp_path, RULE, "base2.toml")
    write(tmp_path, "extends = './base2.toml'\n[[rule]]\nmatch = 'l'\nfreeze = true\n", "left.toml")
    write(tmp_path, "extends = './base2.toml'\n[[rule]]\nmatch = 'r'\nfreeze = true\n", "right.toml")
    policy = load_policy(write(tmp_path, "extends = ['./left.toml', './right.toml']\n"))
    assert [rule.rule.match[0] for rule in policy.rules] == ["*", "l", "r"]


def test_a_circle_is_told_with_its_path(tmp_path):
    write(tmp_path, "extends = './b.toml'\n", "a.toml")
    write(tmp_path, "\nextends = './a.toml'\n", "b.toml")
    (problem,) = problems(str(tmp_path / "a.toml"))
    assert "b.toml:2: extends goes in a circle" in problem
    assert "a.toml -> " in problem


def test_a_missing_parent_is_told_where_it_is_asked_for(tmp_path):
    path = write(tmp_path, "name = 'x'\nextends = 'last_m'\n")
    (problem,) = problems(path)
    assert problem.startswith(f"{path}:2: no policy 'last_m'")
    assert "last_n" in problem


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"m": 1}, ["no knob 'm'", "n"]),
        ({"n": -1}, ["'n' is -1", "at least 0"]),
        ({"n": 2.5}, ["whole number"]),
        ({"n": "two"}, ["a number"]),
        ({"n": True}, ["a number"]),
        ({"logit_scale": 1}, ["true or false"]),
        ({"lr": float("nan")}, ["finite"]),
    ],
)
def test_wrong_knob_values_are_told(knobs, words):
    (problem,) = problems("last_n", **knobs)
    assert all(word in problem for word in words), problem


def test_a_knob_may_take_words_or_numbers():
    assert load_policy("text_only").params["last"] == "all"
    assert load_policy("text_only", last=3).params["last"] == 3
    assert "one of: all, or a number" in problems("text_only", last="some")[0]
    assert "at least 1" in problems("text_only", last=0)[0]


def test_a_default_may_follow_another_knob():
    assert load_policy("last_n", n=4).params["n_text"] == 4
    assert load_policy("last_n", n=4, n_text=1).params["n_text"] == 1


def test_when_switches_rules():
    on = [rule.active for rule in load_policy("last_n", final_norm=True, logit_scale=False).rules]
    assert on == [True, True, True, True, False, False, False]


PHASES = """
[[phase]]
name = "probe"
until = "{probe}"
[[phase.rule]]
match = "@blocks[-{n}:]"
freeze = true

[[phase]]
warmup = "2%"
when = "{rest}"
"""
KNOBS = "[params]\nprobe = { default = '20%' }\nrest = { default = true }\nn = { default = 2 }\n"


def test_phases_take_knobs_and_conditions(tmp_path):
    path = write(tmp_path, KNOBS + RULE + PHASES)
    probe, rest = load_policy(path).phases
    assert (probe.phase.name, probe.phase.until, rest.phase.until, rest.phase.warmup) == ("probe", "20%", None, "2%")
    assert (probe.line, probe.rules[0].source, probe.rules[0].rule.match) == (9, f"{path}:12", ("@blocks[-2:]",))
    (alone,) = load_policy(path, probe="3 epochs", rest=False).phases
    assert alone.phase.until == "3 epochs"


def test_ends_in_unlike_units_wait_for_the_length_of_the_run(tmp_path):
    ends = "".join(f"[[phase]]\nuntil = {end}\n" for end in ("'20%'", "10", "'2 epochs'", "'11 steps'", "'100%'"))
    assert len(load_policy(write(tmp_path, RULE + ends)).phases) == 5


def test_a_file_s_own_phases_take_the_place_of_those_it_inherits(tmp_path):
    write(tmp_path, KNOBS + RULE + PHASES, "parent.toml")
    child = "extends = './parent.toml'\n"
    assert len(load_policy(write(tmp_path, child)).phases) == 2
    (own,) = load_policy(write(tmp_path, child + "[[phase]]\nuntil = 7\n")).phases
    assert own.phase.until == 7


def test_a_phase_that_is_off_needs_no_sensible_knobs(tmp_path):
    text = KNOBS.replace("'20%'", "'none'") + RULE + PHASES.replace('{probe}"', "{probe}\"\nwhen = '{probe} != none'")
    assert [phase.phase.warmup for phase in load_policy(write(tmp_path, text)).phases] == ["2%"]


def test_a_rule_may_have_a_schedule_with_options_and_knobs(tmp_path):
    text = "[params]\nn = { default = 7 }\n" + RULE + 'schedule = { name = "StepLR", step_size = "{n}", warmup = 3 }\n'
    schedule = load_policy(write(tmp_path, text)).rules[0].rule.schedule
    assert (schedule.name, schedule.options, schedule.warmup) == ("StepLR", {"step_size": 7}, 3)


def test_a_rule_that_is_off_needs_no_sensible_knobs():
    assert load_policy("logit_scale").rules[-1].active is False
    assert load_policy("logit_scale", init=2.659).rules[-1].rule.init == 2.659


@pytest.mark.parametrize("name", builtin_policies())
def test_built_in_policies_load_say_what_they_are_and_begin_with_a_comment(name):
    policy = load_policy(name)
    text = builtin_policies()[name].read_text(encoding="utf-8")
    assert policy.name == name
    assert policy.summary
    assert text.startswith("# ")
    assert all(knob.help for knob in policy.knobs.values())


def test_names_do_not_depend_on_the_system(monkeypatch):
    monkeypatch.setattr(os.path, "normcase", str.lower)
    assert "no policy 'LAST_N'" in problems("LAST_N")[0]


HARD = {  # what once ended in a traceback or passed in silence: text, words of a message
    'name = "x"\nextends = ["base"\n': ["not TOML"],
    "[params]\nn = { default = 2\n": ["not TOML"],
    "n = " + "9" * 5000 + "\n": ["not TOML"],
    "n = " + "[" * 5000 + "\n": ["not TOML"],
    RULE + "[schedule]\nwarmup = " + "9" * 400 + "\n": ["warmup"],
    "extends = '" + "x" * 5000 + "'\n" + RULE: ["no policy"],
    '[[rule]]\nmatch = "@text"\n': ["says nothing"],
    "extends = ['./nope.toml', './nope2.toml']\n": ["nope.toml"],
    "[params]\nextends = 'base'\n" + RULE: ["above the first table"],
    RULE.replace("true", '"true"'): ["write train = true without quotes"],
    "[params]\nheads = true\n" + RULE: ["heads = { default = true }"],
    "[params]\na = { default = 'x' }\n" + RULE + "when = '{a} == x and {a} == y'\n": ["no condition"],
    "[params]\na = { default = 'x' }\n" + RULE + "when = '{a} == {a}'\n": ["no condition"],
    "[params]\na = { default = 'x', choices = ['x', 'y'] }\n" + RULE + "when = '{a} == X'\n": ["one of: x, y"],
    "[params]\na = { default = true }\n" + RULE + "when = '{a} == True'\n": ["never the same kind"],
    "[params]\na = { default = '4' }\n" + RULE + "when = '{a} == 4'\n": ["never the same kind"],
    "[params]\nn = 2\n" + RULE + "learning_rate = '{n}'\nfreze = true\n": ["write n =", "learning_rate", "freze"],
    RULE + "lr = 1\nfreeze = true\nlr_scale = 2\n": ["freeze and train together", "lr and lr_scale together"],
}  # fmt: skip


@pytest.mark.parametrize("text", HARD, ids=range(len(HARD)))
def test_odd_input_is_told_all_the_same(tmp_path, text):
    found = "\n".join(problems(write(tmp_path, text)))
    assert all(word in found for word in HARD[text]), found


def test_every_missing_parent_and_every_wrong_knob_is_told(tmp_path):
    assert len(problems(write(tmp_path, "extends = ['./nope.toml', './nope2.toml']\n"))) == 2
    found = problems(write(tmp_path, "[params]\nn = { default = 2 }\n" + RULE + "freze = '{n}'\n"), n="x", m=1)
    assert len(found) == 3, found


def test_a_file_of_a_built_in_policy_s_name_is_another_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "policies").mkdir()
    path = write(tmp_path / "policies", "extends = 'last_n'\n" + RULE + RULE, "last_n.toml")
    own = [rule.active for rule in load_policy("last_n").rules]
    assert [rule.active for rule in load_policy(path).rules] == [*own, True, True]


def test_a_deep_chain_of_doubled_parents_takes_no_time(tmp_path):
    write(tmp_path, RULE, "p0.toml")
    for depth in range(1, 25):
        write(tmp_path, f"extends = ['./p{depth - 1}.toml', './p{depth - 1}.toml']\n", f"p{depth}.toml")
    assert len(load_policy(tmp_path / "p24.toml").rules) == 1


def test_the_schema_accepts_every_policy_that_ships_and_refuses_a_misspelt_key():
    schema = jsonschema.Draft202012Validator(policy_schema())
    for path in builtin_policies().values():
        schema.validate(tomli.loads(path.read_text(encoding="utf-8")))
    with pytest.raises(jsonschema.ValidationError, match="freze"):
        schema.validate({"rule": [{"match": "*", "freze": True}]})
    schema.validate({"phase": [{"until": "{n}", "rule": [{"match": "*", "lr": "{lr}"}]}]})
    with pytest.raises(jsonschema.ValidationError, match="lora"):
        schema.validate({"phase": [{"rule": [{"match": "*", "lora": {"rank": 2}}]}]})
