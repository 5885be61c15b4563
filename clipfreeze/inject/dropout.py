"""Dropout on what a projection projects."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_map

from clipfreeze.anatomy.partition import UNCALLED
from clipfreeze.errors import Problem
from clipfreeze.plan.value import PlannedParameter


def dropout_problems(planned: Iterable[PlannedParameter], model: nn.Module) -> Iterator[Problem]:
    """Projections whose input is out of reach, and those of which weight and bias disagree."""
    rates: dict[str, float] = {}
    for parameter in planned:
        if parameter.dropout is None:
            continue
        path, _, leaf = parameter.name.rpartition(".")
        owner, what = model.get_submodule(path), f"dropout on {parameter.name}"
        if UNCALLED in parameter.name:
            pool = path.rpartition(".")[0]
            yield Problem(f"{what}: {pool} multiplies by it without calling it", "leave out the dropout here")
        elif isinstance(owner, nn.Linear):
            if rates.setdefault(path, parameter.dropout) != parameter.dropout:
                yield Problem(f"{what} is {parameter.dropout}, but {rates[path]} on its weight", "say one for both")
        elif leaf not in ("proj", "text_projection"):  # what open_clip's towers multiply by
            kind = f"it is part of a {type(owner).__name__}, and no linear map"
            yield Problem(f"{what}: {kind}", "leave out the dropout here")


def drop_inputs(planned: Iterable[PlannedParameter], model: nn.Module, undo: ExitStack) -> None:
    """Dropout before each projection while its module is in train mode; names and state_dict stay as they are."""
    rates: dict[str, float] = {}
    for parameter in planned:
        path, _, leaf = parameter.name.rpartition(".")
        if parameter.dropout is None or path in rates:
            continue
        owner = model.get_submodule(path)
        if isinstance(owner, nn.Linear):
            rates[path] = parameter.dropout
            undo.callback(owner.register_forward_pre_hook(partial(_dropped, parameter.dropout)).remove)
        else:
            vars(owner)[leaf] = _DroppedFactor(owner, leaf, parameter.dropout)
            undo.callback(vars(owner).pop, leaf, None)  # assigning a new Parameter takes it off too


def _dropped(rate: float, linear: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (functional.dropout(inputs[0], rate, linear.training), *inputs[1:])


class _DroppedFactor:
    """Stands before a bare Parameter of a module, which reads `x @ self.proj`: drops out of `x`, then multiplies.

    An instance attribute wins over `nn.Module.__getattr__`, so the Parameter stays registered as it was, and is looked
    up at each use: in a copy of the module it is the copy's.
    """

    __slots__ = ("_module", "_name", "_rate")

    def __init__(self, module: nn.Module, name: str, rate: float) -> None:
        self._module, self._name, self._rate = module, name, rate

    @property
    def _parameter(self) -> nn.Parameter:
        parameter = self._module._parameters[self._name]
        assert parameter is not None
        return parameter

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in self.__slots__:  # asked by copy and pickle before there is a module
            raise AttributeError(name)
        return getattr(self._parameter, name)

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Any function of torch takes the Parameter in its place; a product drops out of its other factor first."""
        plain, named = tree_map(
            lambda value: value._parameter if isinstance(value, cls) else value, (list(args), dict(kwargs or {}))
        )
        if function in (torch.matmul, Tensor.matmul, Tensor.__matmul__) and args and isinstance(args[-1], cls):
            plain[0] = functional.dropout(plain[0], args[-1]._rate, args[-1]._module.training)
        return function(*plain, **named)
