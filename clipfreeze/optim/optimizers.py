"""Optimizers by name: torch's, then timm's."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from clipfreeze.errors import PlanError, Problem, did_you_mean, nearest
from clipfreeze.pieces import in_pieces
from clipfreeze.policy.schema import Optimizer

_OURS = ("params", "lr", "weight_decay")
"""Arguments that the plan fills."""

_REFUSED = {"sparseadam": "it takes sparse gradients only"}

_OUR_DEFAULTS: dict[str, dict[str, Any]] = {
    "lbfgs": {"max_iter": 100, "tolerance_grad": 1e-10, "tolerance_change": 1e-14, "line_search_fn": "strong_wolfe"},
}
"""To the minimum in one step: torch's are for many."""

_FUSED = (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD)
"""Optimizers that update all weights in one pass over memory: AdamW four times as fast on a CPU, equal to rounding."""

_KERNELS = ("foreach", "fused", "capturable", "differentiable")
"""Options that say how a step is computed; who gives one chooses it all."""


@dataclass(frozen=True)
class _Maker:
    """A class, its parameters' names, and the options that are not its own defaults."""

    make: Callable[..., torch.optim.Optimizer]
    takes: tuple[str, ...]
    defaults: dict[str, Any] = field(default_factory=dict)


def build_optimizer(optimizer: Optimizer, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """The optimizer a policy names, over `groups`; PlanError for a wrong name, option or value."""
    maker = _maker(optimizer.name)
    if problems := list(_option_problems(optimizer, maker)):
        raise PlanError(problems)
    if "weight_decay" not in maker.takes and any(group["weight_decay"] for group in groups):
        raise PlanError(f"{optimizer.name} has no weight decay, and the plan asks for it", "weight_decay = 0.0")
    ours = {"lr": optimizer.lr or groups[0]["lr"], "weight_decay": optimizer.weight_decay}  # no lr: Adafactor picks one
    given = {name: value for name, value in ours.items() if name in maker.takes}
    options = maker.defaults | _as_python(optimizer.options)
    if maker.make in _FUSED and not any(name in _KERNELS for name in options) and _can_be_fused(groups):
        options["fused"] = True
    try:
        made = maker.make(groups, **given, **options)
    except (ValueError, TypeError, IndexError, RuntimeError) as error:
        raise PlanError(f"{optimizer.name} does not take these options: {error}", "see its documentation") from error
    if options.get("fused"):
        made.register_step_pre_hook(_lay_alike)
    return made


def _can_be_fused(groups: list[dict[str, Any]]) -> bool:
    parameters = [parameter for group in groups for parameter in group["params"]]
    return all(p.device.type in ("cpu", "cuda") and p.is_floating_point() and not in_pieces(p) for p in parameters)


@torch.no_grad()
def _lay_alike(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Gradients and moments in memory as the weights are. Fused kernels go through all of them in the order of memory,
    so that of a weight in channels_last a contiguous gradient or moment would reach the wrong numbers.
    """
    for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
        if parameter.grad is not None and parameter.grad.stride() != parameter.stride():
            parameter.grad = _laid_as(parameter, parameter.grad)
        held = optimizer.state.get(parameter, {})
        for name, value in held.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                held[name] = _laid_as(parameter, value)


def _laid_as(parameter: Tensor, value: Tensor) -> Tensor:
    return torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _option_problems(optimizer: Optimizer, maker: _Maker) -> Iterator[Problem]:
    own = [name for name in maker.takes if name not in _OURS]
    for option in optimizer.options:
        if option not in own:
            yield Problem(f"{optimizer.name} has no option {option!r}", did_you_mean(option, own))


def _maker(name: str) -> _Maker:
    """The class of that name; PlanError when there is none that can be used here."""
    lower = name.lower()
    if reason := _REFUSED.get(lower):
        raise PlanError(f"the optimizer {name} cannot be used here: {reason}", 'name = "adamw" is the usual one')
    for known, made in _torch_optimizers().items():
        if known.lower() == lower:
            return _Maker(made, tuple(inspect.signature(made).parameters), _OUR_DEFAULTS.get(lower, {}))
    timm_optim: Any = import_module("timm.optim")  # heavy, and most policies name one of torch's
    if lower not in (listed := timm_optim.list_optimizers()):
        names = [*_torch_optimizers(), *listed]
        near = nearest(name, names, 5)
        fix = f"did you mean {' or '.join(near)}?" if near else "any optimizer of torch.optim or timm.optim"
        raise PlanError(f"no optimizer {name!r} in torch.optim or timm.optim", fix)
    info = timm_optim.get_optimizer_info(lower)
    if info.second_order:
        raise PlanError(f"the optimizer {name} cannot be used here: it needs second derivatives")
    try:
        made = timm_optim.get_optimizer_class(lower, bind_defaults=False)
    except (ImportError, AssertionError) as error:  # timm asserts CUDA for apex and bitsandbytes
        raise PlanError(f"the optimizer {name} cannot be used here: {error}") from error
    takes = tuple(inspect.signature(made).parameters)
    momentum = {"momentum": 0.9} if info.has_momentum else {}  # as timm.optim.create_optimizer_v2 has it
    return _Maker(made, takes, momentum | (info.defaults or {}))


def _torch_optimizers() -> dict[str, Callable[..., torch.optim.Optimizer]]:
    return {
        name: made
        for name, made in vars(torch.optim).items()
        if isinstance(made, type) and issubclass(made, torch.optim.Optimizer) and made is not torch.optim.Optimizer
    }


def _as_python(options: dict[str, Any]) -> dict[str, Any]:
    """TOML has lists where Python takes tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
