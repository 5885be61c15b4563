"""Start values."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from clipfreeze.errors import Problem
from clipfreeze.plan.value import PlannedParameter


def init_problems(planned: Iterable[PlannedParameter]) -> Iterator[Problem]:
    """Start values that the shape does not allow."""
    for parameter in planned:
        if parameter.init == "xavier" and len(parameter.shape) < 2:
            what = f"init = 'xavier' on {parameter.name}: it needs two dimensions, and the shape is {parameter.shape}"
            yield Problem(what, 'exclude it (`exclude = "@biases"`), or init = "zeros"')


def start_anew(planned: Iterable[PlannedParameter], model: nn.Module, undo: ExitStack) -> None:
    """Fill each parameter as its `init` says, in place, drawing from torch's global generator."""
    parameters = dict(model.named_parameters())
    for parameter in planned:
        if parameter.init is not None:
            tensor = parameters[parameter.name]
            _keep(tensor, undo)
            _fill(tensor, parameter.init)


def overwrite(model: nn.Module, values: Mapping[str, Tensor], undo: ExitStack) -> None:
    """Copy `values` into the parameters of these names, in place."""
    parameters = dict(model.named_parameters())
    for name, value in values.items():
        _keep(parameters[name], undo)
        with torch.no_grad():
            parameters[name].copy_(value)


def _keep(tensor: Tensor, undo: ExitStack) -> None:
    undo.callback(tensor.detach().copy_, tensor.detach().clone())


def _fill(tensor: Tensor, init: float | str) -> None:
    if init == "xavier":
        nn.init.xavier_uniform_(tensor)
    elif isinstance(init, str) and init.startswith("normal"):
        nn.init.normal_(tensor, std=float(init[len("normal(") : -1]))
    else:
        nn.init.constant_(tensor, 0.0 if init == "zeros" else float(init))
