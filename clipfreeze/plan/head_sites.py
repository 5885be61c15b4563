"""Where a classification head goes, and its shape."""

from __future__ import annotations

from collections.abc import Collection

from clipfreeze.anatomy.parts import Anatomy, Parameter
from clipfreeze.plan.classes import class_names
from clipfreeze.plan.lora_sites import matrix_shape
from clipfreeze.plan.sites import AddedParameter, HeadSite, SiteError
from clipfreeze.policy.actions import Head

HEAD = "head"
"""Where it is in the model."""


def place_head(anatomy: Anatomy, matched: Collection[int], spec: Head) -> list[HeadSite]:
    """One classifier behind the vision tower: weight (C, D), and bias (C,) unless it is cosine.

    Raises SiteError when the rule matched something else than the vision tower, and for a cosine head of zeros.
    """
    for parameter in (anatomy.parameters[index] for index in sorted(matched)):
        if parameter.tower != "vision":
            raise SiteError(f"head on {parameter.name}: it classifies what the vision tower gives", 'match = "@vision"')
    if spec.kind == "cosine" and spec.init == "zeros":
        raise SiteError(
            "a cosine head of zeros: rows without a direction learn nothing", 'init = "zero-shot" or "random"'
        )
    classes, width = class_names(spec.classes), feature_width(anatomy)
    added = [AddedParameter(name="weight", shape=(len(classes), width))]
    if spec.kind == "linear":
        added.append(AddedParameter(name="bias", shape=(len(classes),), bias=True))
    return [
        HeadSite(
            path=HEAD, of="image features", tower="vision", added=tuple(added), width=width, classes=classes, spec=spec
        )
    ]


def feature_width(anatomy: Anatomy) -> int:
    """D of the features that both towers give: what a projection gives or, where no tower has one, the pool or norm."""
    for role in ("vision.proj", "text.proj", "vision.pool", "vision.norm"):
        if widths := [width for parameter in anatomy.parameters if (width := _width(parameter, role))]:
            return widths[-1]
    raise SiteError(f"{anatomy.model} has neither projection nor norm: its features are of unknown width")


def _width(parameter: Parameter, role: str) -> int | None:
    """Of what a product or a norm of this role gives."""
    if parameter.role != role:
        return None
    if parameter.product is not None:
        return matrix_shape(parameter.product, parameter.shape)[0]
    return parameter.shape[0] if role == "vision.norm" else None
