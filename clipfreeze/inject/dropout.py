"""Dropout on what a projection projects."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack

from torch import Tensor, nn
from torch.nn import functional

from clipfreeze.errors import Problem
from clipfreeze.inject.factor import Product, add_effect
from clipfreeze.plan.value import PlannedParameter


def dropout_problems(planned: Iterable[PlannedParameter], model: nn.Module) -> Iterator[Problem]:
    """What is no projection, and projections of which weight and bias disagree."""
    rates: dict[str, float] = {}
    for parameter in planned:
        if parameter.dropout is None:
            continue
        path, _, leaf = parameter.name.rpartition(".")
        owner, what = model.get_submodule(path), f"dropout on {parameter.name}"
        if isinstance(owner, nn.Linear):
            if rates.setdefault(path, parameter.dropout) != parameter.dropout:
                yield Problem(f"{what} is {parameter.dropout}, but {rates[path]} on its weight", "say one for both")
        elif leaf not in ("proj", "text_projection"):  # what open_clip's towers multiply by
            kind = f"it is part of a {type(owner).__name__}, and no linear map"
            yield Problem(f"{what}: {kind}", "leave out the dropout here")


def drop_inputs(planned: Iterable[PlannedParameter], model: nn.Module, undo: ExitStack) -> None:
    """Dropout before each projection while its module is in train mode; names and state_dict stay as they are."""
    rates = {_weight(parameter.name): parameter.dropout for parameter in planned if parameter.dropout is not None}
    for name, rate in rates.items():
        add_effect(model, name, _Dropped(model.get_submodule(name.rpartition(".")[0]), rate), undo)


def _weight(name: str) -> str:
    """What is multiplied: the weight, where a rule speaks of the bias."""
    return name.removesuffix("bias") + "weight" if name.endswith(".bias") else name


class _Dropped:
    """The effect on a product of the projection, which is in train mode or not as its module is."""

    def __init__(self, module: nn.Module, rate: float) -> None:
        self.module, self.rate = module, rate

    def before(self, given: Tensor) -> Tensor:
        """Some of it dropped out."""
        return functional.dropout(given, self.rate, self.module.training)

    @classmethod
    def after(cls, effects: Sequence[_Dropped], product: Product, out: Tensor) -> Tensor:
        """As it is."""
        return out
