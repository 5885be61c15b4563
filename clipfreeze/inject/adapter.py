"""Bottleneck adapters: sequential (arXiv 1902.00751), parallel (2110.04366), behind a tower (2110.04544)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from clipfreeze.inject.addition import Addition, device_of, register
from clipfreeze.inject.factor import Product, add_effect
from clipfreeze.plan.sites import AdapterSite

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": functional.relu,
    "silu": functional.silu,
    "tanh": torch.tanh,
}


def add_adapter(
    site: AdapterSite, model: nn.Module, undo: ExitStack, tokenizer: Callable[..., Tensor] | None, fresh: bool
) -> Adapter:
    """Put the bottleneck into its block or behind its tower."""
    adapter = Adapter(site, device_of(model, site.path), fresh)
    register(model, site.path, adapter, undo)
    if site.factor:
        add_effect(model, site.target, adapter, undo)
        return adapter
    source, target = model.get_submodule(site.source), model.get_submodule(site.target)
    if site.spec.placement == "parallel" and source is not target:
        undo.callback(source.register_forward_pre_hook(partial(_read, adapter), with_kwargs=True).remove)
        undo.callback(target.register_forward_hook(partial(_add_read, adapter)).remove)
    else:
        undo.callback(target.register_forward_hook(partial(_add, adapter), with_kwargs=True).remove)
    return adapter


class Adapter(Addition):
    """down: (dim, in), up: (out, dim), of 1x1 convolutions where the block has maps; fp32. up starts at zero."""

    def __init__(self, site: AdapterSite, device: torch.device, fresh: bool) -> None:
        super().__init__()
        self.spec = site.spec
        wide, narrow = (site.added[0].shape[1], site.dim), (site.dim, site.width_out)
        self.down, self.up = _layer(site.conv, *wide, device), _layer(site.conv, *narrow, device)
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            assert zero is not None
            nn.init.zeros_(zero)
        self.waiting: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        """What is added: x: (..., in) -> (..., out), of maps (B, in, H, W) -> (B, out, H, W); fp32 but for autocast."""
        given = x if torch.is_autocast_enabled(x.device.type) else x.to(self.down.weight.dtype)
        inner = functional.dropout(ACTIVATIONS[self.spec.act](self.down(given)), self.spec.dropout, self.training)
        added: Tensor = self.up(inner) * (self.spec.factor * self.strength)
        return added

    def before(self, given: Tensor) -> Tensor:
        """The product itself takes what it is given."""
        return given

    @classmethod
    def after(cls, effects: Sequence[Adapter], product: Product, out: Tensor) -> Tensor:
        """Behind a bare projection."""
        for adapter in effects:
            out = out if adapter.strength == 0 else out + adapter(out).to(out.dtype)
        return out

    def __getstate__(self) -> dict[str, Any]:
        """Without what waits: checkpointing's second pass may stop between the two modules."""
        return {**vars(self), "waiting": []}


def _layer(conv: bool, width_in: int, width_out: int, device: torch.device) -> nn.Conv2d | nn.Linear:
    return nn.Conv2d(width_in, width_out, 1, device=device) if conv else nn.Linear(width_in, width_out, device=device)


def _given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    given: Tensor = args[0] if args else next(iter(kwargs.values()))
    return given


def _first(out: Any) -> Tensor:
    """A module may give a tuple, of which the first counts: attention with its weights, pooled with tokens."""
    first: Tensor = out[0] if isinstance(out, tuple) else out
    return first


def _plus(out: Any, added: Tensor) -> Any:
    """`out` with what is added to its first, which stays of its type."""
    first = _first(out)
    total = first + added.to(first.dtype)
    return (total, *out[1:]) if isinstance(out, tuple) else total


def _add(adapter: Adapter, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
    if adapter.strength == 0:
        return out
    parallel = adapter.spec.placement == "parallel"
    return _plus(out, adapter(_given(args, kwargs) if parallel else _first(out)))


def _read(adapter: Adapter, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before the first of two modules: what is to be added behind the second."""
    adapter.waiting = [] if adapter.strength == 0 else [adapter(_given(args, kwargs))]


def _add_read(adapter: Adapter, module: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
    return _plus(out, adapter.waiting.pop()) if adapter.waiting else out
