"""Options that name sets."""

from pathlib import Path

import pytest

from clipfreeze.cli.common import named_paths
from clipfreeze.errors import DataError


def test_a_set_is_named_by_the_user_or_by_its_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a=b").mkdir()
    assert named_paths(["data/cats.csv", "dogs=data/cats.csv", "./x=1/birds", "a=b", "b=a=b"]) == {
        "cats": "data/cats.csv",
        "dogs": "data/cats.csv",
        "birds": "./x=1/birds",
        "a=b": "a=b",
        "b": "a=b",
    }
    assert named_paths(["."]) == {tmp_path.stem: "."}
    assert named_paths([]) == {}


def test_wrong_names_come_in_one_answer():
    with pytest.raises(DataError) as caught:
        named_paths(["a=1.csv", "a=2.csv", "=3.csv", "b="])
    assert [problem.fix for problem in caught.value.problems] == [
        "--data OTHER_NAME=2.csv",
        *["write --data PATH or --data NAME=PATH"] * 2,
    ]
