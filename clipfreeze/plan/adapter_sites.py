"""Where adapters go: behind or beside the attention and the MLP of blocks, or behind a tower."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from clipfreeze.anatomy.parts import Anatomy, Parameter
from clipfreeze.plan.head_sites import feature_width
from clipfreeze.plan.lora_sites import matrix_shape
from clipfreeze.plan.sites import AdapterSite, AddedParameter, SiteError
from clipfreeze.policy.actions import Adapter

DIM = 64
REDUCTION = 4
"""Where a policy does not say: the width of a bottleneck in wider blocks; of features, their width divided by this."""

Kind = Literal["attn", "mlp"]


def place_adapters(anatomy: Anatomy, matched: Collection[int], spec: Adapter) -> list[AdapterSite]:
    """A bottleneck in each block of which a rule matched something, or behind its tower.

    Raises SiteError where nothing matched has such a part, where a parallel adapter would change a shape, and for a
    bottleneck wider than what it stands behind.
    """
    parameters = [anatomy.parameters[index] for index in sorted(matched)]
    towers = [tower.name for tower in anatomy.towers if any(of.tower == tower.name for of in parameters)]
    if not towers:
        raise SiteError(f"adapter on {parameters[0].name}: it belongs to no tower", 'match = "@blocks"')
    if spec.after == "tower":
        return [_behind(anatomy, tower, spec) for tower in towers]
    sites = [site for tower in towers for site in _within(anatomy, tower, parameters, spec)]
    if not sites:
        raise SiteError(
            f"adapter on {parameters[0].name}: no block is matched", 'match = "@blocks", or after = "tower"'
        )
    return sites


def _within(anatomy: Anatomy, tower: str, matched: Sequence[Parameter], spec: Adapter) -> list[AdapterSite]:
    names = anatomy.tower(tower).blocks
    blocks = sorted({of.block for of in matched if of.tower == tower and of.block is not None})
    had: dict[int, dict[Kind, _Part]] = {}
    for block in blocks:
        inside = [of for of in anatomy.parameters if of.role == f"{tower}.blocks" and of.block == block]
        had[block] = _parts(names[block], inside)
    found = [
        (block, kind, part)
        for block, parts in had.items()
        for kind, part in parts.items()
        if spec.after in (kind, "both")
    ]
    if blocks and not found:
        what = f"adapter after {spec.after}: no block matched in the {tower} tower has one"
        others = sorted({kind for parts in had.values() for kind in parts})
        raise SiteError(what, f'after = "{others[0]}"' if others else None)
    changed = dict.fromkeys(names[block] for block, _, part in found if part.resizes)
    if changed and spec.placement == "parallel":
        what = f"a parallel adapter in {', '.join(changed)}: what goes in has another shape than what comes out"
        raise SiteError(what, f'placement = "sequential", or exclude = {[f"{name}.*" for name in changed]}')
    return [_site(tower, block, names[block], kind, part, spec) for block, kind, part in found]


@dataclass(frozen=True, slots=True)
class _Part:
    """What an adapter reads and stands behind: names of modules, and what they are given and give."""

    source: str
    target: str
    conv: bool
    width_in: int
    width_out: int
    strided: bool = False

    @property
    def resizes(self) -> bool:
        """Whether what it is given has another shape than what it gives."""
        return self.strided or self.width_in != self.width_out


def _parts(name: str, inside: Sequence[Parameter]) -> dict[Kind, _Part]:
    parts: dict[Kind, _Part] = {}
    if attention := _attention(inside):
        parts["attn"] = attention
    first, last = _with_slot(inside, "fc1"), _with_slot(inside, "fc2")
    if first and last:
        width_in, width_out = matrix_shape(first.product, first.shape)[1], last.shape[0]
        parts["mlp"] = _Part(_module(first), _module(last), last.product == "conv", width_in, width_out)
    convolutions = [of for of in inside if of.product == "conv"]
    if convolutions and not parts:  # which are its MLP
        width_in, width_out = convolutions[0].shape[1], max(of.shape[0] for of in convolutions)
        parts["mlp"] = _Part(name, name, True, width_in, width_out, any("downsample" in of.name for of in inside))
    return parts


def _attention(inside: Sequence[Parameter]) -> _Part | None:
    """The module of the output product, if the model calls it; else the attention as a whole."""
    query, out = _with_slot(inside, "q"), _with_slot(inside, "out")
    if query is None or out is None:
        return None
    width_in, width_out = query.shape[1], out.shape[0]
    whole = _module(query)
    if query.name.endswith(("in_proj_weight", "q_proj_weight")):  # bare, and handed to a function with the output's
        return _Part(whole, whole, False, width_in, width_out)
    biases = {of.name for of in inside}
    around = whole.rpartition(".")[0]
    handed_over = f"{around}.q_bias" in biases  # EVA and BEiT multiply by qkv's weight without calling it
    return _Part(around if handed_over else whole, _module(out), False, width_in, width_out)


def _with_slot(inside: Sequence[Parameter], slot: str) -> Parameter | None:
    return next((of for of in inside if slot in of.slots and of.product is not None), None)


def _module(parameter: Parameter) -> str:
    return parameter.name.rpartition(".")[0]


def _site(tower: str, block: int, name: str, kind: Kind, part: _Part, spec: Adapter) -> AdapterSite:
    parallel = spec.placement == "parallel"
    dim = min(DIM, part.width_out) if spec.dim is None else spec.dim
    return AdapterSite(
        path=f"{name}.adapter.{kind}",
        of=f"{name} {kind}",
        tower=tower,
        block=block,
        added=_added(part.width_in if parallel else part.width_out, dim, part.width_out, part.conv, name),
        source=part.source,
        target=part.target,
        conv=part.conv,
        width_in=part.width_in,
        width_out=part.width_out,
        dim=dim,
        spec=spec,
    )


def _behind(anatomy: Anatomy, tower: str, spec: Adapter) -> AdapterSite:
    width = feature_width(anatomy)
    dim = spec.dim or width // (spec.reduction or REDUCTION)
    if not dim:
        raise SiteError(
            f"a reduction of {spec.reduction} leaves none of {width} features", f"reduction = {width} or less"
        )
    target, path, factor = "visual", "visual.adapter", False
    if tower == "text":
        target, path = "text", "text.adapter"
        if not any(of.name.startswith("text.") for of in anatomy.parameters):  # the class CLIP: no module of its own
            projection = next((of for of in anatomy.parameters if of.role == "text.proj" and of.product), None)
            if projection is None:
                raise SiteError("the text tower has no projection to put an adapter behind", 'match = "@vision"')
            factor = projection.product == "factor"
            target, path = projection.name if factor else _module(projection), "text_adapter"
    return AdapterSite(
        path=path,
        of=f"{tower} features",
        tower=tower,
        added=_added(width, dim, width, False, f"the {tower} tower"),
        source=target,
        target=target,
        factor=factor,
        width_in=width,
        width_out=width,
        dim=dim,
        spec=spec,
    )


def _added(width_in: int, dim: int, width_out: int, conv: bool, of: str) -> tuple[AddedParameter, ...]:
    if dim > width_out:
        raise SiteError(f"a bottleneck of {dim} behind the {width_out} of {of}", f"dim = {width_out} or less")
    kernel = (1, 1) if conv else ()
    return (
        AddedParameter(name="down.weight", shape=(dim, width_in, *kernel)),
        AddedParameter(name="down.bias", shape=(dim,), bias=True),
        AddedParameter(name="up.weight", shape=(width_out, dim, *kernel)),
        AddedParameter(name="up.bias", shape=(width_out,), bias=True),
    )
