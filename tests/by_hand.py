"""LoRA written into the weights by hand, from its formulas, for comparison with what runs beside the products."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

from clipfreeze.changes import Applied
from clipfreeze.plan.sites import LoraSite

import tiny


def leaves(applied: Applied) -> dict[str, Tensor]:
    """Copies of the factors and magnitudes by full name, which require gradients."""
    return {
        f"{site.path}.{name}": parameter.detach().clone().requires_grad_()
        for site, addition in applied.additions
        for name, parameter in addition.named_parameters()
    }


def written(plain: nn.Module, applied: Applied, factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of each adapted parameter W the changed value: W + s B A, of DoRA m (W + s B A) / |W + s B A| row by row.

    PiSSA's B A is counted from its start. The length in DoRA's denominator is a constant to the gradient.
    """
    values = {name: parameter.detach().clone() for name, parameter in plain.named_parameters()}
    for site, addition in applied.additions:
        assert isinstance(site, LoraSite)
        spec = site.spec
        alpha = spec.rank if spec.alpha is None else spec.alpha
        scaling = alpha / spec.rank**0.5 if spec.variant == "rslora" else alpha / spec.rank
        old = values[site.parameter]
        transposed = site.product in ("factor", "embedding")
        matrix = old.T if transposed else old.reshape(len(old), -1)
        start, stop = site.rows or (0, len(matrix))
        change = factors[f"{site.path}.B"] @ factors[f"{site.path}.A"]
        if spec.init == "pissa":
            change = change - addition.B_start @ addition.A_start
        rows = matrix[start:stop] + scaling * change
        if spec.variant == "dora":
            rows = factors[f"{site.path}.magnitude"][:, None] * rows / rows.norm(dim=1, keepdim=True).detach()
        matrix = torch.cat([matrix[:start], rows, matrix[stop:]])
        values[site.parameter] = (matrix.T if transposed else matrix).reshape(old.shape)
    return values


def outputs(model: nn.Module, changed: Mapping[str, Tensor] | None = None) -> list[Tensor]:
    """Features, logits and whatever else the model's forward gives, with these parameters in place of its own."""
    dtype = model.logit_scale.dtype
    given = tiny.images(model).to(dtype), tiny.tokens(model)
    found = model(*given) if changed is None else functional_call(model, dict(changed), given)
    return [leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def loss_of(found: list[Tensor]) -> Tensor:
    """A number that every output takes part in, each element with another weight."""
    noise = torch.Generator().manual_seed(3)
    return sum((leaf * torch.randn(leaf.shape, generator=noise).to(leaf)).sum() for leaf in found)


def stir(applied: Applied, seed: int = 7, std: float = 0.2) -> Applied:
    """Noise in every B, as if trained; in DoRA the magnitudes change too."""
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, addition in applied.additions:
            addition.B.add_(torch.randn(addition.B.shape, generator=noise).to(addition.B) * std)
            if hasattr(addition, "magnitude"):
                addition.magnitude.mul_(1 + 0.2 * torch.rand(addition.magnitude.shape, generator=noise))
    return applied


def assert_near(found: Tensor, expected: Tensor, share: float, what: str = "") -> None:
    """Their largest difference is at most this share of the largest value expected."""
    found, expected = found.detach(), expected.detach()
    difference = (found - expected).abs().max()
    assert difference <= share * expected.abs().max(), f"{what}: {difference / expected.abs().max():.2g} of the largest"
