"""A head takes the image features of any model, of the classes it is given."""

from __future__ import annotations

from typing import Any

import open_clip
import pytest
from made import anatomy

from clipfreeze.anatomy.partition import describe
from clipfreeze.anatomy.parts import Anatomy
from clipfreeze.models import build_on_meta
from clipfreeze.plan.classes import class_names
from clipfreeze.plan.head_sites import place_head
from clipfreeze.plan.sites import HeadSite, SiteError
from clipfreeze.policy.actions import Head

import tiny


def tower(found: Anatomy, name: str | None) -> set[int]:
    return {index for index, parameter in enumerate(found.parameters) if parameter.tower == name}


def sites(found: Anatomy | None = None, **said: Any) -> list[HeadSite]:
    found = found or anatomy()
    return place_head(found, tower(found, "vision"), Head(**{"classes": ["cat", "dog", "cow"], **said}))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_width_is_that_of_the_features(family: str) -> None:
    (site,) = sites(describe(tiny.FAMILIES[family](), family))
    assert site.width == tiny.EMBED_DIM
    assert [(added.shape, added.bias) for added in site.added] == [((3, tiny.EMBED_DIM), False), ((3,), True)]
    assert site.names == ("head.weight", "head.bias")


@pytest.mark.parametrize(
    "name",
    ["RN50", "ViT-B-16-SigLIP", "ViT-SO400M-16-SigLIP-i18n-256", "MobileCLIP-S2", "coca_ViT-B-32", "ViTamin-S"],
)
def test_the_width_of_real_models_is_their_config_s(name: str) -> None:
    (site,) = sites(describe(build_on_meta(name), name))
    assert site.width == open_clip.get_model_config(name)["embed_dim"]


def test_a_cosine_head_has_no_bias() -> None:
    assert sites(kind="cosine")[0].names == ("head.weight",)


def test_imagenet_is_open_clips_list_in_order_with_its_two_doubles() -> None:
    (site,) = sites(classes="imagenet")
    assert site.classes == tuple(open_clip.IMAGENET_CLASSNAMES)
    assert site.added[0].shape[0] == 1000
    assert HeadSite.model_validate_json(site.model_dump_json()) == site


def test_classes_of_data_are_known_to_a_run_alone() -> None:
    with pytest.raises(SiteError, match="once there are data") as caught:
        sites(classes="data")
    assert "clipfreeze train" in str(caught.value.fix)
    assert class_names(("b", "a")) == ("b", "a")


@pytest.mark.parametrize("other", ["text", None])
def test_a_head_takes_the_vision_tower_alone(other: str | None) -> None:
    wrong = tower(anatomy(), other)
    with pytest.raises(SiteError, match="the vision tower gives") as caught:
        place_head(anatomy(), tower(anatomy(), "vision") | wrong, Head(classes=("cat", "dog")))
    assert anatomy().parameters[min(wrong)].name in str(caught.value)
    assert caught.value.fix == 'match = "@vision"'


def test_a_cosine_head_of_zeros_is_refused() -> None:
    with pytest.raises(SiteError, match="without a direction"):
        sites(kind="cosine", init="zeros")
