"""What README and docs show is run: python, toml and console blocks."""

import re
import sys
from pathlib import Path

import pytest

from clipfreeze.anatomy.partition import describe
from clipfreeze.cli.app import main
from clipfreeze.models import build_on_meta
from clipfreeze.plan.build import resolve
from clipfreeze.policy.actions import ACTIONS
from clipfreeze.policy.loading import builtin_policies, load_policy
from clipfreeze.policy.schema import SETTINGS, PolicyFile

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(kind: str) -> list:
    return [
        pytest.param(text, id=f"{page.name}-{number}")
        for page in PAGES
        for number, (language, text) in enumerate(BLOCK.findall(page.read_text(encoding="utf-8")))
        if language == kind
    ]


@pytest.mark.parametrize("text", blocks("toml"))
def test_policies_in_the_docs_plan(text, tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(text, encoding="utf-8")
    assert resolve(load_policy(path), describe(build_on_meta("ViT-B-32"))).trainable


@pytest.mark.parametrize("text", blocks("python"))
def test_python_in_the_docs_runs(text):
    exec(compile(text, "docs", "exec"), {})


@pytest.mark.parametrize("text", blocks("console"))
def test_commands_in_the_docs_print_what_is_shown(text, monkeypatch, capsys):
    command, _, shown = text.partition("\n")
    assert command.startswith("$ clipfreeze ")
    monkeypatch.setattr(sys, "argv", command.removeprefix("$ ").split())
    with pytest.raises(SystemExit) as stop:
        main()
    printed = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert stop.value.code == 0
    assert printed == shown.splitlines()


def test_the_language_page_names_every_setting_and_the_readme_every_policy():
    page = (ROOT / "docs" / "language.md").read_text(encoding="utf-8")
    assert all(f"`{name}" in page for name in SETTINGS)
    assert all(f"`{name}`" in page for action in ACTIONS.values() for name in action.model_fields)
    assert all(re.search(rf"^\[*{name}\b", page, re.MULTILINE) for name in PolicyFile.model_fields)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in readme for name in builtin_policies() if name != "base")
