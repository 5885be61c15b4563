"""Globs agree with fnmatchcase, slices with Python's own, braces with the set they stand for."""

import fnmatch
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipfreeze.policy.patterns import PatternError, RolePattern, Slice, parse_pattern


def matches(pattern: str, name: str) -> bool:
    return any(alternative.globs[0].fullmatch(name) for alternative in parse_pattern(pattern))


@given(st.text("ab.*?[]!-^\\1&|~", max_size=8), st.text("ab.-^1\\&|~", max_size=8))
def test_globs_without_slices_match_as_fnmatchcase_does(pattern, name):
    try:
        (alternative,) = parse_pattern(pattern)
    except PatternError:
        return
    if not alternative.slices:
        assert bool(alternative.globs[0].fullmatch(name)) == fnmatch.fnmatchcase(name, pattern)


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("a.*", "a.b.c", True),
        ("a.?", "a.b", True),
        ("resblocks.1[01].*", "resblocks.10.w", True),
        ("resblocks.1[01].*", "resblocks.1.w", False),
        ("resblocks.[!01].w", "resblocks.2.w", True),
        ("Visual.*", "visual.proj", False),
        ("{a,b}.w", "b.w", True),
        ("{a,b{c,d}}.w", "bd.w", True),
        ("{a,b{c,d}}.w", "b.w", False),
        ("{a,}x", "x", True),
    ],
)
def test_patterns_take_what_they_should(pattern, name, expected):
    assert matches(pattern, name) is expected


@given(st.integers(0, 12), st.one_of(st.none(), st.integers(-12, 12)), st.one_of(st.none(), st.integers(-12, 12)))
def test_slices_within_range_count_as_python_does(count, start, stop):
    text = f"{'' if start is None else start}:{'' if stop is None else stop}"
    fits = all(bound is None or abs(bound) <= count for bound in (start, stop))
    if not fits:
        with pytest.raises(PatternError, match="out of range"):
            Slice(text).indices(count)
    elif start != 0 or not text.startswith("-"):
        assert list(Slice(text).indices(count)) == list(range(count))[start:stop]


@given(st.integers(1, 200), st.integers(0, 100))
def test_a_share_takes_the_last_part_rounded_up(count, percent):
    assert len(Slice(f"-{percent}%:").indices(count)) == math.ceil(round(count * percent / 100, 9))


def test_minus_zero_counts_from_the_end():
    assert list(Slice("-0:").indices(5)) == []
    assert list(Slice(":-0").indices(5)) == [0, 1, 2, 3, 4]
    assert list(Slice("-1").indices(5)) == [4]


def test_a_leading_zero_is_a_character_class_and_no_index():
    (alternative,) = parse_pattern("blocks.[01].w")
    assert not alternative.slices
    (alternative,) = parse_pattern("blocks.[10].w")
    assert alternative.slices == (Slice("10"),)


def test_roles_are_words_with_slices():
    (role,) = parse_pattern("@vision.blocks[-2:].attn.q")
    assert role == RolePattern((("vision", None), ("blocks", Slice("-2:")), ("attn", None), ("q", None)))


@pytest.mark.parametrize("pattern", ["resblocks.[-2:]*", "a.b[10:].c", "a.x[-1]"])
def test_a_slice_that_is_no_component_by_itself_is_no_character_class(pattern):
    with pytest.raises(PatternError, match="no component by itself"):
        parse_pattern(pattern)


def test_braces_that_multiply_past_reason_are_refused():
    with pytest.raises(PatternError, match="more than 1000"):
        parse_pattern("{,a}" * 40)


def test_an_empty_range_takes_nothing():
    assert not matches("a[z-b]", "ac")
    assert matches("a[!z-b]", "ac")


@pytest.mark.parametrize(
    "pattern", ["@", "@vision.", "@vision..blocks", "@vision.blocks[x]", "{a,b", "@blocks[1", "[0].w"]
)
def test_what_cannot_be_read_is_an_error_with_a_fix(pattern):
    with pytest.raises(PatternError) as caught:
        parse_pattern(pattern)
    assert caught.value.fix
