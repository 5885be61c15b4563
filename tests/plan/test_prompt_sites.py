"""Which towers take prompts, of what shape, and what is told where they do not fit."""

from dataclasses import replace
from functools import partial

import made
import pytest

from clipfreeze.anatomy.partition import describe
from clipfreeze.anatomy.parts import Anatomy, Tokens
from clipfreeze.plan.prompt_sites import couple_problems, place_prompts
from clipfreeze.plan.sites import PromptSite, SiteError
from clipfreeze.policy.actions import Prompt

import tiny

TOWERS = {"vision": Tokens(8, first=1), "text": Tokens(6, first=1, table="token_embedding.weight", context=16)}


def anatomy() -> Anatomy:
    """The hand-made one, with 12 blocks and 3."""
    plain = made.anatomy()
    return replace(plain, towers=tuple(replace(tower, tokens=TOWERS[tower.name]) for tower in plain.towers))


def sites(*towers: str, of: Anatomy | None = None, **said: object) -> list[PromptSite]:
    of = of or anatomy()
    matched = {index for index, parameter in enumerate(of.parameters) if parameter.tower in towers}
    return place_prompts(of, matched, Prompt(**said))  # type: ignore[arg-type]


def shapes(found: list[PromptSite]) -> dict[str, tuple[int, ...]]:
    return {f"{site.path}.{added.name}": added.shape for site in found for added in site.added}


@pytest.mark.parametrize(
    ("towers", "said", "expected"),
    [
        (["text"], {}, {"prompt.text.vectors": (1, 4, 6)}),
        (["vision"], {"length": 2, "depth": 12}, {"prompt.vision.vectors": (12, 2, 8)}),
        (["vision", "text"], {"depth": 3}, {"prompt.vision.vectors": (3, 4, 8), "prompt.text.vectors": (3, 4, 6)}),
        (["text"], {"class_specific": True, "classes": ("a", "b", "c")}, {"prompt.text.vectors": (3, 4, 6)}),
        (
            ["vision"],
            {"couple": True, "depth": 2},
            {"prompt.vision.map.weight": (2, 8, 6), "prompt.vision.map.bias": (2, 8)},
        ),
        (["text"], {"length": 13}, {"prompt.text.vectors": (1, 13, 6)}),
    ],
)
def test_a_prompt_has_one_site_a_tower(towers, said, expected):
    found = sites(*towers, **said)
    assert shapes(found) == expected
    assert [site.tower for site in found] == towers
    assert [name for site in found for name in site.names] == list(expected)
    assert {added.name for site in found for added in site.added if added.bias} <= {"map.bias"}


def test_imagenet_has_two_names_twice_and_a_class_specific_prompt_each_once():
    [site] = sites("text", class_specific=True, classes="imagenet")
    assert len(site.classes) == len(set(site.classes)) == site.added[0].shape[0] == 998


@pytest.mark.parametrize(
    ("towers", "said", "what", "fix"),
    [
        ([], {}, "prompt on logit_scale, which is in no tower", 'match = "@text", or "@vision"'),
        (
            ["text"],
            {"length": 14},
            "prompt length 14 does not fit the context of made, 16 tokens",
            "length = 13 or less",
        ),
        (["text"], {"depth": 4}, "prompt depth 4: the text tower of made has 3 blocks", "depth = 3 or less"),
        (["vision"], {"depth": 13}, "prompt depth 13: the vision tower of made has 12 blocks", "depth = 12 or less"),
        (["text"], {"couple": True}, "couple = true on text", 'match = "@vision", beside'),
        (["vision"], {"init": "a photo"}, "init = 'a photo' is for texts", "take init out"),
        (["vision"], {"position": "end"}, "position = 'end' is for texts", "take position out"),
        (["vision", "text"], {"init": "a photo"}, "init = 'a photo' is for texts", "a rule each"),
        (["vision"], {"class_specific": True, "classes": ("a", "b")}, "class_specific = true is for texts", "out"),
        (["text"], {"class_specific": True, "classes": "data"}, "once there are data", "clipfreeze train"),
    ],
)
def test_what_does_not_fit_is_told_with_what_would(towers, said, what, fix):
    of = anatomy()
    matched = {i for i, p in enumerate(of.parameters) if p.tower in towers} or {len(of.parameters) - 1}
    with pytest.raises(SiteError) as error:
        place_prompts(of, matched, Prompt(**said))
    assert what in str(error.value)
    assert fix in str(error.value.fix)


def test_one_rule_on_both_towers_couples_them_and_its_words_are_the_text_s():
    found = sites("vision", "text", couple=True, init="a photo of a")
    assert set(shapes(found)) == {"prompt.vision.map.weight", "prompt.vision.map.bias", "prompt.text.vectors"}
    assert not list(couple_problems(found))


@pytest.mark.parametrize(
    ("text", "vision", "what"),
    [
        (None, {}, "adds no text prompt"),
        ({"length": 3}, {}, "this prompt has length 4, the text prompt 3"),
        ({"depth": 2}, {"depth": 3}, "this prompt has depth 3, the text prompt 2"),
        ({"class_specific": True, "classes": ("a", "b")}, {}, "an image's class is not known"),
        ({}, {}, None),
        ({"depth": 3}, {"depth": 3}, None),
    ],
)
def test_coupled_prompts_are_alike(text, vision, what):
    found = sites("vision", couple=True, **vision) + (sites("text", **text) if text is not None else [])
    problems = list(couple_problems(found))
    assert [site.tower for site, _ in problems] == ["vision"] * bool(what)
    assert all(what in str(error) and error.fix for _, error in problems)


def test_prompts_that_are_not_coupled_may_differ():
    assert not list(couple_problems(sites("vision", length=2) + sites("text", length=3)))


TEXTS = {**tiny.FAMILIES, **{f"hf_{name}": partial(tiny.hf_text, name) for name in tiny.HF_CONFIGS}}
WITHOUT_START = ("siglip", "hf_mt5")
CONTEXTS = {"hf_bert": 18, "hf_m2m_100": 18, "hf_mt5": None}


@pytest.mark.parametrize("family", TEXTS)
def test_every_text_tower_takes_a_prompt(family):
    of = describe(TEXTS[family](), family)
    tokens = of.tower("text").tokens
    assert isinstance(tokens, Tokens)
    assert tokens.first == (family not in WITHOUT_START)
    assert tokens.context == CONTEXTS.get(family, tiny.CONTEXT)
    table = next(parameter for parameter in of.parameters if parameter.name == tokens.table)
    assert table.shape == (tiny.VOCABULARY, tokens.width)
    assert sites("text", of=of)[0].added[0].shape == (1, 4, tokens.width)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_vision_towers_of_tokens_take_a_prompt_and_the_others_say_why_not(family):
    of = describe(tiny.FAMILIES[family](), family)
    if family in tiny.VIT_LIKE and family != "relpos":
        assert sites("vision", of=of)[0].width == (16 if family == "siglip" else 32)
        return
    why = "adds a bias to each pair of its positions" if family == "relpos" else "has no tokens"
    with pytest.raises(SiteError, match=f"the vision tower of {family} {why}") as error:
        sites("vision", of=of)
    assert error.value.fix == 'match = "@text"'


def test_a_causal_tower_pooled_at_its_first_token_takes_none():
    with pytest.raises(SiteError, match="all captions have one feature"):
        sites("text", of=describe(tiny.custom_text(text={"pool_type": "first"})))
    assert sites("text", of=describe(tiny.custom_text(text={"pool_type": "first", "no_causal_mask": True})))


def test_a_context_without_bound_takes_any_length():
    of = describe(tiny.hf_text("mt5"))
    assert sites("text", of=of, length=500)[0].added[0].shape[1] == 500
