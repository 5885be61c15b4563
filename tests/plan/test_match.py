"""Which parameters a pattern takes, and what is said when it takes none."""

import os.path

import pytest
from made import anatomy

from clipfreeze.plan.match import Matcher
from clipfreeze.policy.patterns import PatternError

MADE = anatomy()


def names(pattern: str, of=MADE) -> list[str]:
    return [of.parameters[index].name for index in sorted(Matcher(of).select(pattern))]


def blocks(pattern: str, tower: str = "vision") -> list[int]:
    chosen = [MADE.parameters[index] for index in Matcher(MADE).select(pattern)]
    return sorted({p.block for p in chosen if p.tower == tower and p.block is not None})


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("@vision.blocks[-2:]", [10, 11]),
        ("@vision.blocks[3]", [3]),
        ("@vision.blocks[::4]", [0, 4, 8]),
        ("@vision.blocks[-25%:]", [9, 10, 11]),
        ("@vision.blocks[:10%]", [0, 1]),
        ("@vision.blocks[-0:]", []),
        ("@blocks[-3:]", [9, 10, 11]),
        ("@vision.stages[-1]", list(range(4, 12))),
        ("visual.transformer.resblocks.[-2:].*", [10, 11]),
        ("visual.*.[1].*", [1]),
        ("*.resblocks.[-1].attn.*", [11]),
        ("visual.transformer.resblocks.1[01].*", [10, 11]),
        ("visual.transformer.resblocks.1*", [1, 10, 11]),
        ("visual.transformer.resblocks.1.*", [1]),
        ("visual.transformer.resblocks.{3,5}.*", [3, 5]),
        ("{visual.transformer.resblocks.[0].*,@vision.blocks[-1:]}", [0, 11]),
    ],
)
def test_blocks_are_taken_by_index_and_share(pattern, expected):
    assert blocks(pattern) == expected


def test_case_counts_on_every_system(monkeypatch):
    monkeypatch.setattr(os.path, "normcase", str.lower)
    assert names("Visual.*") == names("LOGIT_SCALE") == []


def test_a_union_counts_each_tower_by_itself():
    assert blocks("@blocks[-3:]", "vision") == [9, 10, 11]
    assert blocks("@blocks[-3:]", "text") == [0, 1, 2]


def test_roles_narrow_word_by_word():
    assert names("@vision.blocks[0].attn") == ["visual.transformer.resblocks.0.attn.qkv.weight"]
    assert names("@text.blocks.mlp.fc1.biases") == [f"transformer.resblocks.{i}.mlp.fc1.bias" for i in range(3)]
    assert names("@projections") == ["visual.proj", "text_projection"]
    assert names("@text.projections") == ["text_projection"]
    assert names("@logit_scale") == ["logit_scale"]
    assert len(names("@attn.qkv")) == 15


def test_a_tied_tensor_answers_to_each_of_its_names():
    assert names("head.*") == names("token_embedding.*") == ["token_embedding.weight"]


def test_a_third_of_a_fused_weight_cannot_be_frozen_or_trained():
    with pytest.raises(PatternError, match=r"q is a third of the fused visual.*attn\.qkv\.weight") as caught:
        names("@vision.blocks.attn.q")
    assert ".attn.qkv" in caught.value.fix
    assert len(names("@attn.q", anatomy(fused=False))) == 15
    assert len(names("@attn.qkv", anatomy(fused=False))) == 45


@pytest.mark.parametrize("pattern", ["@text.blocks[99]", "@vision.blocks[-20:]", "*.resblocks.[-4:].*", "@blocks[:4]"])
def test_a_slice_past_the_end_is_an_error_with_the_range(pattern):
    with pytest.raises(PatternError, match=r"out of range: there are (3|12), ") as caught:
        names(pattern)
    assert "share" in caught.value.fix


@pytest.mark.parametrize(
    ("pattern", "words"), [("@vison", "vision"), ("@vision.block", "blocks"), ("@attn[1]", "blocks")]
)
def test_a_wrong_role_word_gets_the_nearest(pattern, words):
    with pytest.raises(PatternError) as caught:
        names(pattern)
    assert words in caught.value.fix


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("visual.transfomer.*", "visual.transformer.*"),
        (r"^visual\..*$", "globs, not regular expressions: visual.*"),
        (r"^visual\.transformer\.resblocks\.(10|11)\..*", "visual.transformer.resblocks.{10,11}.*"),
        (r"^@vision", "globs, not regular expressions"),
        (r"^.[0].x", "globs, not regular expressions"),
        ("Visual.*", "visual.*"),
        ("LOGIT_SCALE", "logit_scale"),
        ("visual.transformer", "did you mean visual.transformer.*?"),
        ("visual.prj", "visual.proj"),
    ],
)
def test_what_matches_nothing_gets_the_nearest_right_pattern(pattern, words):
    assert names(pattern) == []
    assert words in Matcher(MADE).nearest_right(pattern)
