"""Low-rank adaptation (arXiv 2106.09685), rsLoRA (2312.03732), DoRA (2402.09353), PiSSA (2404.02948)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.nn import functional

from clipfreeze.inject.addition import Addition, register
from clipfreeze.inject.attention import keep_fused
from clipfreeze.inject.factor import Product, add_effect, parameter_of, wide
from clipfreeze.plan.sites import LoraSite


def add_lora(
    site: LoraSite, model: nn.Module, undo: ExitStack, tokenizer: Callable[..., Tensor] | None, fresh: bool
) -> Lora:
    """Put the factors beside the product; the parameter and its name stay as they are."""
    lora = Lora(site, parameter_of(model, site.parameter), fresh)
    connect(lora, site, model, undo)
    return lora


def connect(lora: Lora, site: LoraSite, model: nn.Module, undo: ExitStack) -> None:
    """Let the factors work in the model."""
    register(model, site.path, lora, undo)
    add_effect(model, site.parameter, lora, undo)
    keep_fused(model, site.parameter, undo)


class Lora(Addition):
    """A: (rank, in), B: (out, rank), in DoRA magnitude: (out,); all fp32. B starts at zero, so that nothing changes.

    PiSSA starts from the largest singular vectors and subtracts what they give: the weight itself stays as it was.
    """

    A: nn.Parameter
    B: nn.Parameter
    A_start: Tensor
    B_start: Tensor

    def __init__(self, site: LoraSite, weight: nn.Parameter, fresh: bool) -> None:
        super().__init__()
        self.product, self.rows, self.spec = site.product, site.rows, site.spec
        pissa = self.spec.init == "pissa"  # whose two products must cancel to the bit
        self.linear = site.product in ("linear", "factor") and self.spec.variant != "dora" and not pissa
        a, b = (torch.zeros(added.shape, device=weight.device) for added in site.added[:2])
        if fresh:
            a, b = self._start(a, b, weight) if pissa else (_drawn(a, self.spec.init), b)
        self.A, self.B = nn.Parameter(a), nn.Parameter(b)
        if pissa:
            self.register_buffer("A_start", a.clone())
            self.register_buffer("B_start", b.clone())
        if self.spec.variant == "dora":
            self.magnitude = nn.Parameter(self._norms(weight))

    def before(self, given: Tensor) -> Tensor:
        """The product itself takes what it is given."""
        return given

    @classmethod
    def after(cls, effects: Sequence[Lora], product: Product, out: Tensor) -> Tensor:
        """`out` plus what the factors of all give; of a fused product, in their rows of the last dimension."""
        placed = [(lora, lora._place(product, out)) for lora in effects if lora.strength]
        linear = [(lora, place) for lora, place in placed if place and lora.linear]
        if linear:
            out = _plus_linear(linear, product, out)
        for lora, place in placed:
            if place and not lora.linear:
                out = lora._plus(product, place, out)
        return out

    def _place(self, product: Product, out: Tensor) -> tuple[int, int] | None:
        """Of these rows in what comes out; None in a part of the fused product without them."""
        if self.rows is None:
            return 0, out.shape[-1]
        start, stop = self.rows[0] - product.start, self.rows[1] - product.start
        return (start, stop) if start >= 0 and stop <= out.shape[-1] else None

    def _plus(self, product: Product, place: tuple[int, int], out: Tensor) -> Tensor:
        if self.rows is None:
            return out + self._increment(product, product.base, product.bias).to(out.dtype)
        start, stop = place
        bias = None if product.bias is None else product.bias[start:stop]
        here = out[..., start:stop] + self._increment(product, product.base[..., start:stop], bias).to(out.dtype)
        return torch.cat([out[..., :start], here, out[..., stop:]], -1)

    @property
    def drops(self) -> bool:
        """Whether dropout is at work."""
        return self.training and self.spec.dropout > 0

    def dropped(self, given: Tensor) -> Tensor:
        """What the factors are given."""
        return functional.dropout(given, self.spec.dropout, self.training)

    def _increment(self, product: Product, base: Tensor, bias: Tensor | None) -> Tensor:
        """What is added to `base`, in fp32 unless autocast says otherwise."""
        given = product.fed
        if self.product != "embedding":
            if not torch.is_autocast_enabled(given.device.type):
                given = given.to(self.A.dtype)
            given = self.dropped(given)
        delta = self._through(self.A, self.B, given, product)
        if self.spec.init == "pissa":
            delta = delta - self._through(self.A_start, self.B_start, given, product)
        delta = delta * self.spec.scaling
        if self.spec.variant == "dora":
            gain = self.magnitude / self._norms(product.weight)
            channels = (-1, 1, 1) if self.product == "conv" else (-1,)
            plain = base if bias is None else base - bias.view(channels)
            gain = gain.view(channels)
            delta = (gain - 1) * plain + gain * delta
        return delta if self.strength == 1 else delta * self.strength

    def _through(self, a: Tensor, b: Tensor, given: Tensor, product: Product) -> Tensor:
        if self.product != "conv":  # in two dimensions: in more, a gradient changes the kernel, and so the last bit
            if self.product == "embedding":
                rows = functional.embedding(given.flatten(), a.T, **product.options)
            else:
                rows = given.flatten(0, -2) @ a.T
            return functional.linear(rows, b).view(*product.base.shape[:-1], -1)
        groups = product.options.get("groups", 1)
        kernels = a.view(-1, *product.weight.shape[1:]).repeat(groups, 1, 1, 1)
        inner: Tensor = product.function(given, kernels, **product.options)
        return functional.conv2d(inner, b[:, :, None, None], groups=groups)

    def matrix(self, weight: Tensor) -> Tensor:
        """The (out, in) matrix of these rows of the parameter, fp32 or wider."""
        whole = wide(weight)
        whole = whole.T if self.product in ("factor", "embedding") else whole.flatten(1)
        return whole if self.rows is None else whole[slice(*self.rows)]

    @torch.no_grad()
    def merged(self, weight: Tensor, into: Tensor) -> Tensor:
        """`into` (the shape of `weight`, fp32 or wider) plus what the factors add to `weight` at this strength."""
        if self.strength == 0:
            return into
        with _full_precision(weight):
            delta = self._delta()
            if self.spec.variant == "dora":
                matrix = self.matrix(weight)
                delta = (self.magnitude / self._norms(weight))[:, None] * (matrix + delta) - matrix
        delta = delta * self.strength
        if self.rows is not None:
            delta = functional.pad(delta, (0, 0, self.rows[0], len(weight) - self.rows[1]))
        return into + (delta.T if self.product in ("factor", "embedding") else delta).reshape(weight.shape)

    def _delta(self) -> Tensor:
        delta = self.B @ self.A
        if self.spec.init == "pissa":
            delta = delta - self.B_start @ self.A_start
        return delta * self.spec.scaling

    @torch.no_grad()
    def _norms(self, weight: Tensor) -> Tensor:
        """Lengths of the rows of W + scaling B A, (out,), without making it; a constant to the gradient, as in DoRA."""
        matrix, a, b = self.matrix(weight), self.A, self.B * self.spec.scaling
        with _full_precision(weight):
            squares = matrix.square().sum(1) + 2 * ((matrix @ a.T) * b).sum(1) + ((b @ (a @ a.T)) * b).sum(1)
        return squares.clamp(min=1e-12).sqrt()

    def _start(self, a: Tensor, b: Tensor, weight: nn.Parameter) -> tuple[Tensor, Tensor]:
        """PiSSA: A and B from the largest singular vectors: scaling B A is the best rank-r part of the weight."""
        left, values, right = torch.linalg.svd(self.matrix(weight), full_matrices=False)
        rank = self.spec.rank
        roots = (values[:rank] / self.spec.scaling).sqrt()
        return (roots[:, None] * right[:rank]).contiguous(), (left[:, :rank] * roots).contiguous()


def _plus_linear(placed: Sequence[tuple[Lora, tuple[int, int]]], product: Product, out: Tensor) -> Tensor:
    """All factors of one linear map as two thin products, and no more passes over `out` than the sum takes.

    In two dimensions: in more, a gradient changes the kernel, and so the last bit.
    """
    given, width = product.fed.flatten(0, -2), out.shape[-1]
    if not torch.is_autocast_enabled(given.device.type):
        given = given.to(placed[0][0].A.dtype)
    alike = [(lora, place) for lora, place in placed if not lora.drops]
    groups = [(given, alike)] if alike else []
    groups += [(lora.dropped(given), [(lora, place)]) for lora, place in placed if lora.drops]
    inner, outer = [], []
    for fed, group in groups:
        inner.append(fed @ torch.cat([lora.A for lora, _ in group]).T)
        for lora, (start, stop) in group:
            outer.append(functional.pad(lora.B * (lora.spec.scaling * lora.strength), (0, 0, start, width - stop)))
    low, up, flat = torch.cat(inner, 1), torch.cat(outer, 1).T, out.flatten(0, -2)
    total = torch.addmm(flat, low, up) if low.dtype == out.dtype else flat + (low @ up).to(out.dtype)
    return total.view(out.shape)


def _full_precision(weight: Tensor) -> torch.autocast:
    """Without autocast: what is a sum of squares, or becomes a weight, needs its digits."""
    return torch.autocast(weight.device.type, enabled=False)


def _drawn(a: Tensor, init: str) -> Tensor:
    if init == "gaussian":
        return nn.init.normal_(a, std=1 / len(a))
    if init == "orthogonal":
        return nn.init.orthogonal_(a)
    return nn.init.kaiming_uniform_(a, a=5**0.5)
