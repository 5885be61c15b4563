"""Data told in the classes of a policy, and policies told the classes of data."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipfreeze.errors import DataError
from clipfreeze.policy.loading import Policy, load_policy
from clipfreeze.train.classes import as_classes, asks_for_classes, by_name, relabelled, with_classes
from clipfreeze.train.pairs import Pair, PairSet

from hand import COLOURS, colour_pairs

HEAD = 'name = "mine"\n[[rule]]\nmatch = "@vision"\nhead = {{ classes = {classes}{more} }}\n'


def mine(folder: Path, classes: str = '"data"', more: str = "") -> Policy:
    path = folder / "mine.toml"
    path.write_text(HEAD.format(classes=classes, more=more), encoding="utf-8")
    return load_policy(path)


def head(policy: Policy) -> Any:
    return policy.rules[0].rule.head


def test_the_classes_of_a_folder_are_its_class_names_sorted(tmp_path: Path) -> None:
    pairs = replace(colour_pairs(labelled=True), templates=("{}", "a {} thing"))
    policy = mine(tmp_path)
    assert asks_for_classes(policy)
    told = with_classes(policy, pairs)
    assert head(told).classes == tuple(sorted(COLOURS))
    assert head(told).templates == ("{}", "a {} thing")
    assert not asks_for_classes(told)
    assert head(policy).classes == "data"


def test_the_classes_of_a_table_are_its_distinct_captions_sorted(tmp_path: Path) -> None:
    pairs = PairSet("table", tuple(Pair(b"", (caption,), "table") for caption in ("b", "a", "b")))
    assert head(with_classes(mine(tmp_path), pairs)).classes == ("a", "b")


def test_what_a_rule_says_itself_stays(tmp_path: Path) -> None:
    pairs = replace(colour_pairs(labelled=True), templates=("{}",))
    own = mine(tmp_path, more=', templates = "my {}"')
    assert head(with_classes(own, pairs)).templates == ("my {}",)
    named = mine(tmp_path, classes='["cat", "dog"]')
    assert not asks_for_classes(named)
    assert with_classes(named, pairs) == named


def test_a_rule_that_is_off_asks_for_nothing() -> None:
    assert not asks_for_classes(load_policy("last_n"))
    assert not asks_for_classes(load_policy("prompt"))
    assert asks_for_classes(load_policy("prompt", class_specific=True))
    told = with_classes(load_policy("prompt", class_specific=True), colour_pairs(labelled=True))
    assert [rule.rule.prompt.classes for rule in told.rules if rule.active and rule.rule.prompt] == [
        tuple(sorted(COLOURS))
    ]


@given(st.permutations(COLOURS), st.integers(0, 3))
def test_labels_are_places_in_the_classes_whatever_their_order(order: list[str], more: int) -> None:
    classes = [*order, *(f"other {number}" for number in range(more))]
    pairs = colour_pairs(2, labelled=True)
    told = relabelled(pairs, classes)
    assert told.class_names == tuple(classes)
    for before, after in zip(pairs, told, strict=True):
        assert before.label is not None
        assert after.label is not None
        assert classes[after.label] == pairs.class_names[before.label]
        assert after.captions == before.captions


def test_of_captions_the_one_that_is_a_class_counts() -> None:
    pairs = PairSet("table", (Pair(b"", ("a photo", "cat"), "t:2"), Pair(b"", ("dog",), "t:3")))
    assert [pair.label for pair in relabelled(pairs, ("dog", "cat", "cow"))] == [1, 0]
    assert by_name(relabelled(pairs, ("dog", "cat"))).pairs[0].captions == ("cat",)


def test_of_a_class_that_stands_there_twice_the_first_counts() -> None:
    pairs = PairSet("table", (Pair(b"", ("missile",), "t:2"),))
    assert relabelled(pairs, ("a", "missile", "missile")).pairs[0].label == 1


def test_a_caption_that_is_no_class_is_named_with_the_nearest() -> None:
    pairs = PairSet("table", (Pair(b"", ("cat",), "t:2"), Pair(b"", ("gray dog",), "t:3")))
    with pytest.raises(DataError, match="t:3: 'gray dog' is none of the policy's 3 classes") as caught:
        relabelled(pairs, ("cat", "grey dog", "cow"))
    assert "did you mean grey dog?" in str(caught.value)
    assert 'classes = "data"' in str(caught.value)


def test_a_picture_of_two_classes_is_an_error() -> None:
    with pytest.raises(DataError, match="t:2 is of several classes: 'cat' and 'dog'"):
        relabelled(PairSet("table", (Pair(b"", ("cat", "dog"), "t:2"),)), ("cat", "dog"))


def test_a_set_is_of_the_classes_if_all_of_its_own_are() -> None:
    labelled = colour_pairs(labelled=True)
    assert as_classes(labelled, (*COLOURS, "pink")) == labelled
    assert as_classes(labelled, COLOURS[1:]) is None
    captions = PairSet("table", (Pair(b"", ("cow",), "t:2"), Pair(b"", ("cat",), "t:3")))
    told = as_classes(captions, ("cat", "dog", "cow"))
    assert told is not None
    assert told.class_names == ("cat", "cow")
    assert [pair.label for pair in told] == [1, 0]
    assert as_classes(captions, ("cat", "dog")) is None
