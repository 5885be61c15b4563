"""What is said of a data set before training is so."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import combinations, product
from pathlib import Path

import open_clip
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from clipfreeze.errors import DataError
from clipfreeze.train.contact_sheet import write_contact_sheet
from clipfreeze.train.pairs import Pair, PairSet
from clipfreeze.train.survey import expected_false_negatives, look_over, token_counts

from hand import colour_pairs, coloured

TOKENIZER = open_clip.get_tokenizer("ViT-B-32")


def with_faults(folder: Path) -> PairSet:
    (folder / "half.png").write_bytes(coloured("red")[:50])
    more = (
        Pair(coloured("red"), ("red 0",), "again", split="train"),
        Pair(folder / "half.png", ("long " * 80,), "pairs.csv:9", split="val"),
    )
    return PairSet("faults", (*colour_pairs(2), *more), ignored=3, ignored_names=("a", "b", "c"))


def test_counts_sizes_and_faults(tmp_path: Path) -> None:
    survey = look_over(with_faults(tmp_path), TOKENIZER, batch_size=4)
    assert (survey.pictures, survey.captions, survey.classes, survey.ignored) == (18, 17, 0, 3)
    assert survey.parts == {"train": 1, "val": 1}
    assert (survey.width, survey.height) == ((32, 32, 33), (32, 32, 32))
    assert (survey.duplicate_pictures, survey.duplicate_captions) == (1, 2)
    assert survey.most_common == (("red 0", 2),)
    assert survey.false_negatives == pytest.approx(6 / 153)
    assert (survey.texts.context, survey.texts.longest, survey.texts.cut) == (77, 82, 1)
    (name,) = survey.broken
    assert name.startswith(f"{tmp_path}/half.png: the picture cannot be decoded")


def test_classes_are_what_pictures_share() -> None:
    survey = look_over(colour_pairs(3, labelled=True), TOKENIZER, batch_size=8)
    assert (survey.classes, survey.duplicate_captions) == (8, 24)
    assert survey.false_negatives == pytest.approx(28 * 2 / 23)


@given(st.lists(st.lists(st.sampled_from("abc"), min_size=1, max_size=3, unique=True), min_size=2, max_size=5))
def test_false_negatives_are_what_counting_all_batches_gives(said: list[list[str]]) -> None:
    for batch_size in (2, 3, 9):
        counts = []
        for batch in combinations(said, min(batch_size, len(said))):
            drawn = list(product(*batch))
            counts.append(sum(sum(a == b for a, b in combinations(each, 2)) for each in drawn) / len(drawn))
        assert expected_false_negatives(said, batch_size) == pytest.approx(sum(counts) / len(counts))


@given(st.integers(0, 90), st.randoms(use_true_random=False))
def test_tokens_are_counted_past_the_context(words: int, dice: random.Random) -> None:
    text = " ".join(dice.choice(["cat", "a", "!", "dog"]) for _ in range(words))
    assert token_counts([text], TOKENIZER, 300) == [len(TOKENIZER.encode(text)) + 2]


@pytest.mark.parametrize(("count", "rows"), [(1, 1), (7, 2), (500, 5)])
def test_a_contact_sheet_shows_pictures_from_all_of_the_set(tmp_path: Path, count: int, rows: int) -> None:
    base = colour_pairs()
    pairs = replace(base, pairs=tuple(replace(base[i % 8], captions=("a caption " * i,)) for i in range(count)))
    path = tmp_path / "sheet.jpg"
    write_contact_sheet(pairs, path)
    with Image.open(path) as sheet:
        assert sheet.size == (6 * 190 + 10, rows * 235 + 10)
    assert [file.name for file in tmp_path.iterdir()] == ["sheet.jpg"]


def test_a_contact_sheet_passes_over_what_is_broken(tmp_path: Path) -> None:
    write_contact_sheet(with_faults(tmp_path), tmp_path / "sheet.png")
    with pytest.raises(DataError, match="no name of a picture"):
        write_contact_sheet(colour_pairs(), tmp_path / "sheet.txt")
    with pytest.raises(DataError, match="cannot write"):
        write_contact_sheet(colour_pairs(), tmp_path / "none" / "sheet.png")
