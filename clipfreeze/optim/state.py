"""An optimizer's state by parameter name: tensors for safetensors, and what JSON holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from clipfreeze.errors import ApplyError
from clipfreeze.pieces import cut_like, in_pieces, on_cpu

_GROUP = "param group "
"""Begins the owner of a tensor that an optimizer keeps in a param group, by its number."""

_HOW = ("foreach", "fused")
"""Settings that are this process's own: how it computes a step, not which step."""


class OptimizerState(NamedTuple):
    """All that an optimizer knows. `tensors` are on the CPU, by "parameter/entry"; `plain` is as JSON has it."""

    tensors: dict[str, Tensor]
    plain: dict[str, Any]


def optimizer_state(optimizer: torch.optim.Optimizer, names: Mapping[str, nn.Parameter]) -> OptimizerState:
    """Copies; `names` are those of the parameters that the optimizer holds. Of a model in pieces rank 0 has them all.

    ApplyError where it keeps something else than tensors, numbers and words of a parameter.
    """
    tensors: dict[str, Tensor] = {}
    groups = []
    for number, (group, members) in enumerate(zip(optimizer.param_groups, _members(optimizer, names), strict=True)):
        settings = {key: value for key, value in group.items() if key != "params"}
        tensors |= _tensors(f"{_GROUP}{number}", settings)
        constant = {key: value for key, value in settings.items() if _is_plain(value)}  # others the policy makes anew
        groups.append({"parameters": members, "settings": constant})
    entries: dict[str, dict[str, Any]] = {}
    for name, parameter in names.items():
        if (held := optimizer.state.get(parameter)) is None:
            continue
        tensors |= _tensors(name, held)
        entries[name] = {key: value for key, value in held.items() if not isinstance(value, Tensor)}
        if odd := [key for key, value in entries[name].items() if not _is_plain(value)]:
            raise ApplyError(f"the optimizer's {odd[0]} of {name} cannot be saved", "take another optimizer: adamw")
    shapes = {name: list(parameter.shape) for name, parameter in names.items()}
    return OptimizerState(tensors, {"groups": groups, "state": entries, "shapes": shapes, "tensors": sorted(tensors)})


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, names: Mapping[str, nn.Parameter], state: OptimizerState
) -> None:
    """Put back what `optimizer_state` gave, bit for bit. ApplyError where this is another optimizer's."""
    tensors, plain = state
    if problem := next(_misfits(optimizer, names, state), None):
        what = f"the optimizer's state is of another run: {problem}"
        raise ApplyError(what, "resume with the policy and the model it was saved with")
    owned: dict[str, dict[str, Tensor]] = {}
    for path, tensor in tensors.items():
        owner, _, key = path.rpartition("/")
        owned.setdefault(owner, {})[key] = _as_held(tensor, names.get(owner))
    number_of: dict[str, int] = {}
    groups = []
    for number, (group, saved) in enumerate(zip(optimizer.param_groups, plain["groups"], strict=True)):
        members = [number_of.setdefault(name, len(number_of)) for name in saved["parameters"]]
        settings = {
            key: group[key] if key in _HOW and key in group else _like(value, group.get(key))
            for key, value in saved["settings"].items()
        }
        made = {key: value for key, value in group.items() if not _is_plain(value)}
        groups.append(made | settings | owned.get(f"{_GROUP}{number}", {}) | {"params": members})
    held = {number_of[name]: entries | owned.get(name, {}) for name, entries in plain["state"].items()}
    optimizer.load_state_dict({"state": held, "param_groups": groups})


def _members(optimizer: torch.optim.Optimizer, names: Mapping[str, nn.Parameter]) -> list[list[str]]:
    """Of each param group the names of its parameters."""
    name_of = {id(parameter): name for name, parameter in names.items()}
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if strangers := [parameter for parameter in held if id(parameter) not in name_of]:
        what = f"the optimizer holds a parameter of shape {tuple(strangers[0].shape)} that the policy does not train"
        raise ApplyError(what, "keep its state yourself, in an optimizer of its own")
    return [[name_of[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]


def _tensors(owner: str, entries: Mapping[str, Any]) -> dict[str, Tensor]:
    return on_cpu({f"{owner}/{key}": value for key, value in entries.items() if isinstance(value, Tensor)})


def _as_held(tensor: Tensor, parameter: nn.Parameter | None) -> Tensor:
    """A copy; of what has an entry for each weight, in pieces if the weights are."""
    if parameter is not None and in_pieces(parameter) and tensor.shape == parameter.shape:
        return cut_like(tensor, parameter)
    return tensor.clone()


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def _like(value: Any, current: Any) -> Any:
    """JSON has lists where an optimizer's options are tuples."""
    return tuple(value) if isinstance(value, list) and isinstance(current, tuple) else value


def _misfits(
    optimizer: torch.optim.Optimizer, names: Mapping[str, nn.Parameter], state: OptimizerState
) -> Iterator[str]:
    """What does not fit, the most telling first."""
    tensors, plain = state
    there, here = plain["shapes"], {name: list(parameter.shape) for name, parameter in names.items()}
    yield from (f"{name} trains here and did not there" for name in here if name not in there)
    yield from (f"{name} trained there and does not here" for name in there if name not in here)
    yield from (
        f"{name} is {tuple(shape)} here and was {tuple(there[name])}"
        for name, shape in here.items()
        if there.get(name, shape) != shape
    )
    if [group["parameters"] for group in plain["groups"]] != _members(optimizer, names):
        yield "its param groups are others"
    yield from (f"{path} is missing" for path in plain["tensors"] if path not in tensors)
    yield from (f"{path} is unknown" for path in tensors if path not in plain["tensors"])
