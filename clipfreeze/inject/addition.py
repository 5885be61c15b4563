"""What every addition to a model has in common."""

from __future__ import annotations

from contextlib import ExitStack

import torch
from torch import nn


class Addition(nn.Module):
    """A module that a policy added. `strength` is 1 when it works in full, 0 when it is as if it were not there.

    The way to know one is `isinstance`, never a name.
    """

    strength: float = 1.0

    def set_strength(self, value: float) -> None:
        """0 to 1."""
        self.strength = value

    @property
    def scalable(self) -> bool:
        """Whether a strength between 0 and 1 has a meaning."""
        return True


def register(model: nn.Module, path: str, module: nn.Module, undo: ExitStack) -> None:
    """Put `module` at `path`, making the plain containers on the way; the undo takes out what was put in."""
    *way, last = path.split(".")
    owner = model
    for step in way:
        if step not in owner._modules:
            owner.add_module(step, nn.Module().train(owner.training))
            undo.callback(owner._modules.pop, step)
        inner = owner._modules[step]
        assert inner is not None
        owner = inner
    assert not hasattr(owner, last), f"{path} is taken"
    owner.add_module(last, module)
    undo.callback(owner._modules.pop, last)


def device_of(model: nn.Module, path: str) -> torch.device:
    """Where the parameters around `path` live: of the nearest module on the way to it that has some."""
    steps = path.split(".")
    for end in range(len(steps), -1, -1):
        try:
            owner = model.get_submodule(".".join(steps[:end]))
        except AttributeError:
            continue
        if (parameter := next(owner.parameters(), None)) is not None:
            return parameter.device
    raise AssertionError("a model without parameters")
