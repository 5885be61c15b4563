"""Stand-ins for weights: what a policy adds to a product happens where the product does, whatever class does it.

Attention classes read weights without calling the module that holds them, and pass them to functions; a forward hook or
a wrapper around the module never runs there. A stand-in takes part in any product through `__torch_function__`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_map


class Product(NamedTuple):
    """One product under way: `given` (as the caller gave it) and `fed` (after `before`) to `function` with `weight`.

    `options` are the other arguments, by name; `base` is what the product gives by itself. Of a fused weight it may be
    a part, whose first row in the whole is `start`.
    """

    function: Callable[..., Tensor]
    given: Tensor
    fed: Tensor
    weight: nn.Parameter
    bias: Tensor | None
    options: dict[str, Any]
    base: Tensor
    start: int = 0


class Effect(Protocol):
    """What can be done to a product; deepcopy must take it to the copy of the model."""

    def before(self, given: Tensor) -> Tensor:
        """To what is multiplied."""

    @classmethod
    def after(cls, effects: Sequence[Any], product: Product, out: Tensor) -> Tensor:
        """To what has come out so far, by all of this class together."""


@runtime_checkable
class Mergeable(Protocol):
    """An effect that a change of the weight can stand for."""

    def merged(self, weight: Tensor, into: Tensor) -> Tensor:
        """`into` (fp32 or wider) plus what this adds to `weight`."""


ARGUMENTS: dict[Any, tuple[str, ...]] = {
    torch.matmul: ("input", "other"),
    **dict.fromkeys((Tensor.matmul, Tensor.__matmul__), ("self", "other")),
    functional.linear: ("input", "weight", "bias"),
    torch.conv2d: ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
    functional.embedding: (
        *("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse"),
    ),
}
"""The products, functions of what is multiplied, the weight, and more: their arguments in order."""


class Factor:
    """Stands before a Parameter of a module, in the module's instance attributes, which win over registered parameters.

    The Parameter stays registered as it was and is looked up at each use: in a copy of the module it is the copy's.
    """

    __slots__ = ("effects", "module", "name", "rows")

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module, self.name = module, name
        self.effects: list[Effect] = []
        self.rows: tuple[int, int] | None = None

    @property
    def parameter(self) -> nn.Parameter:
        """The one it stands for."""
        parameter = self.module._parameters[self.name]
        assert parameter is not None
        return parameter

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in self.__slots__:  # asked by copy and pickle before there is a module
            raise AttributeError(name)
        return getattr(self.parameter, name)

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Any function of torch takes the Parameter in its place; a product takes the effects too."""
        if function is functional.multi_head_attention_forward:
            from clipfreeze.inject.attention import attend

            return attend(*args, **(kwargs or {}))
        if function in ARGUMENTS:
            order = ARGUMENTS[function]
            given = dict(zip(order, args, strict=False)) | dict(
                kwargs or {}
            )  # callers name some, and not the same ones
            if isinstance(factor := given.get(order[1]), cls):
                return factor.product(function, given)
        plain, named = tree_map(
            lambda value: value.parameter if isinstance(value, cls) else value, (list(args), dict(kwargs or {}))
        )
        return function(*plain, **named)

    def part(self, start: int, stop: int) -> Factor:
        """The same for some rows of a fused weight."""
        part = Factor(self.module, self.name)
        part.effects, part.rows = self.effects, (start, stop)
        return part

    def product(self, function: Any, arguments: dict[str, Any]) -> Tensor:
        """The product of the function with these arguments and all effects, in the order they were added."""
        one, other, *_ = ARGUMENTS[function]
        fed = given = arguments.pop(one)
        del arguments[other]
        for effect in self.effects:
            fed = effect.before(fed)
        weight = self.parameter if self.rows is None else self.parameter[slice(*self.rows)]
        base: Tensor = function(fed, weight, **arguments)
        bias = arguments.pop("bias", None)
        start = 0 if self.rows is None else self.rows[0]
        made = Product(function, given, fed, self.parameter, bias, arguments, base, start)
        out = base
        for kind in dict.fromkeys(type(effect) for effect in self.effects):
            out = kind.after([effect for effect in self.effects if type(effect) is kind], made, out)
        return out


def parameter_of(model: nn.Module, name: str) -> nn.Parameter:
    """The registered parameter of this name, also where a stand-in hides it."""
    path, _, leaf = name.rpartition(".")
    parameter = model.get_submodule(path)._parameters[leaf]
    assert parameter is not None
    return parameter


def add_effect(model: nn.Module, parameter: str, effect: Effect, undo: ExitStack) -> None:
    """Let `effect` take part in every product of the parameter of this name."""
    path, _, leaf = parameter.rpartition(".")
    owner = model.get_submodule(path)
    factor = vars(owner).get(leaf)
    if not isinstance(factor, Factor):
        factor = Factor(owner, leaf)
        vars(owner)[leaf] = factor
    factor.effects.append(effect)
    undo.callback(_take_off, factor, effect)


def _take_off(factor: Factor, effect: Effect) -> None:
    """The stand-in goes with its last effect, whichever that is."""
    factor.effects.remove(effect)
    if not factor.effects and vars(factor.module).get(factor.name) is factor:
        del vars(factor.module)[factor.name]


@contextmanager
def stand_ins_aside(model: nn.Module) -> Iterator[None]:
    """The model without stand-ins, for code that reads parameters as attributes; no product has its effects then."""
    held = [
        (module, name, value)
        for module in model.modules()
        for name, value in vars(module).items()
        if isinstance(value, Factor)
    ]
    for module, name, _ in held:
        del vars(module)[name]
    try:
        yield
    finally:
        for module, name, value in held:
            vars(module)[name] = value


def summed(factor: Factor) -> Tensor:
    """The weight with all that is merged into it, in its own type."""
    weight = factor.parameter
    total = wide(weight)
    for effect in factor.effects:
        if isinstance(effect, Mergeable):
            total = effect.merged(weight, total)
    return total.to(weight.dtype)


def wide(weight: Tensor) -> Tensor:
    """Its values in fp32, or in its own type where that is wider; a constant to the gradient."""
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
