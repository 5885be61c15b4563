"""A file of CLIP-LoRA (arXiv 2405.18541, github.com/MaxZanella/CLIP-LoRA), which names no layer: they come in order."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from clipfreeze.anatomy.parts import Anatomy, Parameter
from clipfreeze.errors import ApplyError, Problem
from clipfreeze.foreign.factors import Factors, reason
from clipfreeze.foreign.pickled import read_pickle
from clipfreeze.plan.lora_sites import matrix_shape
from clipfreeze.policy.actions import Lora

TOWERS = {"text": ("text",), "vision": ("vision",), "both": ("text", "vision")}
POSITIONS = {
    "all": range(12),
    "bottom": range(4),
    "mid": range(4, 8),
    "up": range(8, 12),
    "half-up": range(6, 12),
    "half-bottom": range(6),
    "top": range(11, 12),
    "top1": range(11, 12),
    "top2": range(10, 12),
    "top3": range(9, 12),
}
"""Of each position the blocks, as far as a tower has them."""

LARGE = range(21)
"""`all` in the vision tower of ViT-L/14, by CLIP-LoRA's own table: the last 3 of its 24 blocks are not in it."""

SLOTS = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "proj": "out"}


def read_clip_lora(path: Path, anatomy: Anatomy) -> list[Factors]:
    """The factors of each product. Raises ApplyError for another file, and for one made for another model."""
    layers, metadata = _read(path)
    try:
        # Their scale is alpha / sqrt(r), whatever the paper of LoRA says.
        spec = Lora(rank=metadata["r"], alpha=float(metadata["alpha"]), variant="rslora")
        blocks = _blocks(metadata["encoder"], metadata["position"], len(layers), anatomy)
    except (KeyError, TypeError, ValueError) as error:
        what = f"its metadata are not CLIP-LoRA's: {reason(error)}"
        raise ApplyError(Problem(what, "r, alpha, encoder, params and position are needed", str(path))) from error
    if blocks is None:
        what = f"{len(layers)} layers for encoder {metadata['encoder']!r} and position {metadata['position']!r}"
        count = " and ".join(f"{len(tower.blocks)} {tower.name}" for tower in anatomy.towers)
        raise ApplyError(Problem(f"{what}, the model has {count} blocks", "it was made for another model", str(path)))
    factors, problems = [], []
    for number, (tower, block) in enumerate(blocks):
        place = f"{tower} block {block}"
        layer = layers.get(f"layer_{number}")
        if not isinstance(layer, dict):
            problems.append(Problem(f"layer_{number}, {place}: is missing", None, str(path)))
            continue
        for name, pair in layer.items():
            found = _factors(pair, _address(anatomy, tower, block, SLOTS.get(name)), spec)
            if isinstance(found, Factors):
                factors.append(found)
            else:
                problems.append(Problem(f"layer_{number}.{name}, {place}: {found}", None, str(path)))
    if problems or not factors:
        raise ApplyError(problems or Problem("no factors in it", None, str(path)))
    return factors


def _read(path: Path) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    match read_pickle(path, "give a folder that save() or PEFT wrote, or a file of CLIP-LoRA"):
        case {"weights": dict() as weights, "metadata": dict() as metadata}:
            return weights, metadata
    what = "is no file of CLIP-LoRA: that has weights and metadata"
    raise ApplyError(Problem(what, "weights of a whole model are given as --pretrained", str(path)))


def _blocks(encoder: str, position: str, layers: int, anatomy: Anatomy) -> list[tuple[str, int]] | None:
    """Tower and block of each layer in order: text first; None where the number of layers is another."""
    counts = {tower: len(anatomy.tower(tower).blocks) for tower in TOWERS[encoder]}
    ranges = {tower: [index for index in POSITIONS[position] if index < count] for tower, count in counts.items()}
    readings = [ranges]
    if position == "all" and "vision" in counts:
        readings += [ranges | {"vision": [*LARGE]}, ranges | {"vision": [*range(counts["vision"])]}]
    for reading in readings:
        blocks = [(tower, index) for tower, indices in reading.items() for index in indices]
        if len(blocks) == layers and all(index < counts[tower] for tower, index in blocks):
            return blocks
    return None


def _address(anatomy: Anatomy, tower: str, block: int, slot: str | None) -> tuple[Parameter, str | None] | None:
    """The parameter of a block's attention that carries the slot, and which of its slots if several."""
    for parameter in anatomy.parameters:
        here = parameter.tower == tower and parameter.block == block and "attn" in parameter.tags
        if here and parameter.product and slot in parameter.slots:
            return parameter, slot if len(parameter.slots) > 1 else None
    return None


def _factors(pair: Any, address: tuple[Parameter, str | None] | None, spec: Lora) -> Factors | str:
    """Or what is wrong."""
    if address is None:
        return "this model has no such product there"
    a, b = (pair.get(f"w_lora_{which}") if isinstance(pair, dict) else None for which in "AB")
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return "has no w_lora_A and w_lora_B"
    parameter, slot = address
    outputs, inputs = matrix_shape(parameter.product, parameter.shape)
    outputs //= len(parameter.slots)
    if (shapes := [tuple(a.shape), tuple(b.shape)]) != (wanted := [(spec.rank, inputs), (outputs, spec.rank)]):
        return f"factors of {shapes[0]} and {shapes[1]}, {parameter.name} has {wanted[0]} and {wanted[1]}"
    return Factors.scaled(parameter.name, slot, (a.float(), b.float()), spec)
