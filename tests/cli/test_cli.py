"""The command line as a user meets it: output, messages, exit codes, nothing half-written."""

import json
import sys
from pathlib import Path

import pytest

from clipfreeze.cli.app import main
from clipfreeze.plan.value import Plan
from clipfreeze.policy.loading import builtin_policies


@pytest.fixture
def cli(monkeypatch, capsys, tmp_path):
    """Runs a command in an empty folder: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["clipfreeze", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out, err

    return run


def write(text: str, name: str = "mine.toml") -> str:
    Path(name).write_text(text, encoding="utf-8")
    return name


def test_list_names_every_policy(cli):
    code, out, err = cli("list")
    assert (code, err) == (0, "")
    assert all(f"\n{name} " in out for name in builtin_policies())
    code, out, _ = cli("list", "--format", "json")
    assert [entry["name"] for entry in json.loads(out)] == list(builtin_policies())


def test_show_prints_the_file_and_its_knobs(cli):
    code, out, _ = cli("show", "last_n")
    assert code == 0
    assert builtin_policies()["last_n"].read_text(encoding="utf-8").strip() in out
    assert "blocks to train in each tower" in out.rpartition("takes")[2]
    assert json.loads(cli("show", "last_n", "--format", "json")[1])["params"]["n"]["value"] == 2


def test_dry_run_prints_the_plan_and_leaves_nothing(cli, tmp_path):
    code, out, err = cli("apply", "last_n", "--set", "n=3", "--dry-run")
    assert (code, err) == (0, "")
    assert "last_n on ViT-B-32" in out
    assert "vision.blocks[9:12]" in out
    assert not list(tmp_path.iterdir())


def test_json_goes_alone_to_stdout(cli):
    code, out, err = cli("apply", "last_n", "--model", "demo", "--dry-run", "--format", "json")
    assert (code, err) == (0, "")
    plan = Plan.model_validate_json(out)
    assert plan.model.name == "demo"
    assert plan.policy.params["n"] == 2


def test_apply_does_one_of_two_things(cli):
    for arguments in ([], ["--dry-run", "--out", "x"]):
        code, out, err = cli("apply", "last_n", *arguments)
        assert (code, out) == (2, "")
        assert "--dry-run for a preview, or --out FOLDER" in err


def test_explain_and_diff_and_roles(cli):
    code, out, _ = cli("explain", "last_n", "visual.proj")
    assert code == 0
    assert "trains, lr 0.0001" in out
    assert json.loads(cli("explain", "last_n", "@logit_scale", "--format", "json")[1])[0]["clamp"] == [0.0, 4.6052]
    code, out, _ = cli("diff", "last_n", "last_n", "--set", "n=3")
    assert code == 0
    assert out.count("vision.blocks[9]") == out.count("text.blocks[9]") == 1
    same = json.loads(cli("diff", "last_n", "last_n", "--format", "json")[1])
    assert same == {"parameters": [], "optimizer": {}, "schedule": {}, "anchor": {}, "phases": {}}
    assert "name adamw -> sgd" in cli("diff", "last_n", "norm_bias")[1]
    code, out, _ = cli("roles", "RN50")
    assert code == 0
    assert "@vision.blocks[0:16]" in out
    assert json.loads(cli("roles", "RN50", "--format", "json")[1])["model"] == "RN50"


def test_schema_of_policies_and_plans(cli):
    code, out, _ = cli("schema")
    assert code == 0
    rule = json.loads(out)["$defs"]["Rule"]
    assert rule["additionalProperties"] is False
    assert any(option.get("pattern") == r"^\{\w+\}$" for option in rule["properties"]["lr"]["anyOf"])
    assert "frontier" in json.loads(cli("schema", "plan")[1])["properties"]


def test_check_tells_all_problems_of_all_files(cli):
    code, out, _ = cli("check", "last_n", "full", "--model", "ViT-B-32")
    assert code == 0
    assert out.splitlines()[:2] == ["last_n: ok on ViT-B-32", "full: ok on ViT-B-32"]
    bad = write("[[rule]]\nmatch = '*'\nfreze = true\nlr = '1'\n")
    code, out, err = cli("check", "last_n", bad, "--format", "json")
    assert code == 2
    assert [entry["ok"] for entry in json.loads(out)] == [True, False]
    assert "mine.toml:3: unknown key 'freze'" in err
    assert "mine.toml:4: " in err


RULE = '[[rule]]\nmatch = "*"\ntrain = true\nlr = 1e-5\n'

WRONG = [  # arguments, text of mine.toml, words of the message
    (["apply", "lastn", "--dry-run"], "", ["last_n"]),
    (["apply", "last_n", "--dry-run", "--model", "vit-b-32"], "", ["vit-b-32", "ViT-B-32"]),
    (["apply", "last_n", "--dry-run", "--model", "ViT-B-33"], "", ["ViT-B-32"]),
    (["apply", "last_n", "--dry-run", "--model", "local-dir:nowhere"], "", ["nowhere"]),
    (["apply", "last_n", "--dry-run", "--set", "m=1"], "", ["no knob 'm'", "n"]),
    (["apply", "last_n", "--dry-run", "--set", "n"], "", ["--set n", "knob=value"]),
    (["apply", "last_n", "--dry-run", "--set", "n=99"], "", ["last_n.toml:", "out of range", "12"]),
    (["apply", "mine.toml", "--dry-run"], RULE + "[optimizer]\nname = 'adamv'\n", ["mine.toml:5", "AdamW"]),
    (["apply", "mine.toml", "--dry-run"], RULE + "[optimizer]\nbeta = 1\n", ["mine.toml:5", "beta", "betas"]),
    (["apply", "mine.toml", "--dry-run"], RULE + "[schedule]\nname = 'cosin'\n", ["mine.toml:5", "cosine"]),
    (["apply", "mine.toml", "--dry-run"], "[[rule]]\nmatch = 'visual.transfomer.*'\ntrain = true\nlr = 1\n",
     ["mine.toml:1", "visual.transformer.*"]),
    (["check", "mine.toml"], RULE + "[optimizer]\nname = 'adamv'\n", ["mine.toml:5", "AdamW"]),
    (["check", "mine.toml"], RULE.replace("*", "@visoin"), ["mine.toml:1", "vision"]),
    (["explain", "last_n", "visual.porj"], "", ["visual.proj"]),
    (["train", "last_n", "--data", "nothing.csv"], "", ["nothing.csv"]),
    (["train", "last_n", "--model", "demo", "--val", "mine.toml"], "", ["--data"]),
    (["train", "last_n", "--out", "mine.toml"], RULE, ["mine.toml"]),
    (["eval", "nowhere"], "", ["nowhere"]),
    (["train", "last_n", "--data", ""], "", ["empty path"]),
    (["train", "last_n", "--seed", "-1"], "", ["--seed"]),
    (["apply", "mine.toml", "--dry-run"], RULE + "[optimizer]\nbetas = [0.9]\n", ["mine.toml:5", "adamw"]),
    (["apply", "mine.toml", "--dry-run"], RULE + "[optimizer]\ncapturable = true\n", ["mine.toml:5", "adamw"]),
    (["apply", "mine.toml", "--dry-run"], RULE + "[schedule]\nname = 'StepLR'\nstep_size = 'a'\n", ["mine.toml:5"]),
    (["apply", "mine.toml", "--dry-run"], RULE + "[schedule]\nname = 'OneCycleLR'\ntotal_steps = 2\n",
     ["mine.toml:5", "the run's length"]),
    (["frobnicate"], "", ["frobnicate"]),
    (["apply"], "", ["POLICY"]),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "text", "words"), WRONG, ids=[" ".join(row[0]) for row in WRONG])
def test_bad_input_is_one_message_exit_2_and_nothing_written(cli, tmp_path, arguments, text, words):
    if text:
        write(text)
    code, out, err = cli(*arguments)
    assert code == 2
    assert out == "" or arguments[0] == "train"
    assert all(word in err for word in words), err
    assert "Traceback" not in err
    assert {path.name for path in tmp_path.iterdir()} <= {"mine.toml"}


def test_slash_names_work_everywhere(cli):
    assert cli("roles", "ViT-B/32")[0] == 0
    assert "last_n on ViT-B-32" in cli("apply", "last_n", "--dry-run", "--model", "ViT-B/32")[1]
