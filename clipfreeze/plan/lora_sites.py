"""Where LoRA goes: which products, and which rows of fused ones."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Sequence

from clipfreeze.anatomy.parts import SLOTS, Anatomy, Parameter
from clipfreeze.errors import did_you_mean
from clipfreeze.plan.match import Address
from clipfreeze.plan.sites import AddedParameter, LoraSite, SiteError
from clipfreeze.policy.actions import Lora


def place_lora(anatomy: Anatomy, matched: Collection[Address], spec: Lora) -> list[LoraSite]:
    """A site for each product among what a rule matched, or for those of `targets`.

    Raises SiteError for a target that nothing matched has, for a rank above the smaller side of a matrix, and when
    there is no product at all.
    """
    products = _found(anatomy, matched)
    if spec.targets is not None:
        products = list(_targeted(products, spec.targets))
    sites = [_site(parameter, slot, spec) for parameter, slot in products]
    _check(sites)
    return sites


def refuse_without_products(anatomy: Anatomy, matched: Collection[Address]) -> None:
    """SiteError unless one pattern, of which something matched, has a product among it."""
    if matched:
        _found(anatomy, matched)


_NUMBERED = re.compile(r"(^|\.)\d+(\.|$)")
Part = tuple[Parameter, str | None]


def _found(anatomy: Anatomy, matched: Collection[Address]) -> list[Part]:
    """The products in the model's order, each once, however many patterns took it."""
    addresses = [(anatomy.parameters[index], slot) for index, slot in sorted(matched, key=_in_order)]
    products = list(dict.fromkeys(address for part in addresses for address in _products(*part)))
    if not products:
        raise SiteError(f"lora on {_few(addresses)}: no matrix, convolution or embedding among them", _nearest(anatomy))
    return products


def _in_order(address: Address) -> tuple[int, int]:
    index, slot = address
    return index, -1 if slot is None else SLOTS.index(slot)


def _products(parameter: Parameter, slot: str | None) -> Iterator[Part]:
    """Of a fused weight each of its products, unless one is asked for."""
    if parameter.product is None:
        return
    if slot is None and len(parameter.slots) > 1:
        yield from ((parameter, each) for each in parameter.slots)
    else:
        yield parameter, slot


def _targeted(products: Sequence[Part], targets: Sequence[str]) -> Iterator[Part]:
    found = {target: [part for part in products if _is_target(*part, target)] for target in targets}
    for target, parts in found.items():
        if not parts:
            has = sorted({name for part in products for name in _target_names(*part) if not _NUMBERED.search(name)})
            raise SiteError(f"lora targets: {target!r} is nothing that this rule matched", did_you_mean(target, has))
    wanted = {(parameter.name, slot) for parts in found.values() for parameter, slot in parts}
    yield from ((parameter, slot) for parameter, slot in products if (parameter.name, slot) in wanted)


def _is_target(parameter: Parameter, slot: str | None, target: str) -> bool:
    return target in _target_names(parameter, slot)


def _target_names(parameter: Parameter, slot: str | None) -> set[str]:
    """Its slot, and the last steps of its name: of `...mlp.c_fc.weight`, c_fc and mlp.c_fc."""
    steps = parameter.name.removesuffix(".weight").split(".")
    names = {".".join(steps[start:]) for start in range(len(steps))}
    return names | ({slot} if slot else set(parameter.slots))


def _site(parameter: Parameter, slot: str | None, spec: Lora) -> LoraSite:
    path, _, leaf = parameter.name.rpartition(".")
    steps = [path, "lora", slot or ("" if leaf == "weight" else leaf)]
    rows, (outputs, inputs) = None, matrix_shape(parameter.product, parameter.shape)
    if slot and len(parameter.slots) > 1:
        outputs //= len(parameter.slots)
        start = parameter.slots.index(slot) * outputs
        rows = (start, start + outputs)
    ratio = spec.lr_b_ratio or 1.0
    added = [
        AddedParameter(name="A", shape=(spec.rank, inputs)),
        AddedParameter(name="B", shape=(outputs, spec.rank), lr_scale=ratio),
    ]
    if spec.variant == "dora":
        added.append(AddedParameter(name="magnitude", shape=(outputs,), bias=True))
    assert parameter.product is not None
    return LoraSite(
        path=".".join(filter(None, steps)),
        of=parameter.name + (f" {slot}" if rows else ""),
        tower=parameter.tower,
        block=parameter.block,
        added=tuple(added),
        parameter=parameter.name,
        product=parameter.product,
        rows=rows,
        spec=spec,
    )


def matrix_shape(product: str | None, shape: tuple[int, ...]) -> tuple[int, int]:
    """(out, in) of the matrix that a parameter of this shape is in its product."""
    if product in ("factor", "embedding"):
        return shape[1], shape[0]
    return shape[0], math.prod(shape[1:])


def _check(sites: Sequence[LoraSite]) -> None:
    for site in sites:
        largest = min(site.added[0].shape[1], site.added[1].shape[0])
        if site.spec.rank > largest:
            what = f"rank {site.spec.rank} is above the {largest} of {site.of}"
            raise SiteError(what, f"rank = {largest} or less, or exclude = {site.parameter!r}")
        if site.product == "embedding" and site.spec.dropout:
            what = f"lora dropout on {site.of}: what an embedding takes are ids, of which nothing can drop out"
            raise SiteError(what, f"dropout = 0, or exclude = {site.parameter!r}")


def _few(parts: Sequence[Part]) -> str:
    names = [parameter.name for parameter, _ in parts]
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _nearest(anatomy: Anatomy) -> str:
    return f'match = "@blocks", or names of weights: `clipfreeze roles {anatomy.model}` lists them'
