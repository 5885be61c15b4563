"""The blocks of a model's towers, and other ways to run them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from clipfreeze.anatomy.partition import find_tower
from clipfreeze.anatomy.parts import TOWERS


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Of both towers, in order."""
    return [model.get_submodule(name) for tower in TOWERS for name in find_tower(model, tower).blocks]


def backward_passes(block: nn.Module, *given: Any) -> bool:
    """Whether it will, through what the block makes of `given`: something trains here or before."""
    if not torch.is_grad_enabled():
        return False
    inputs = (value.requires_grad for value in tree_leaves(given) if isinstance(value, Tensor))
    return any(inputs) or any(parameter.requires_grad for parameter in block.parameters())


def replace_forward(block: nn.Module, forward: Callable[..., Any], undo: ExitStack) -> None:
    """Run the block so until `undo` is closed; its hooks are called as before."""
    undo.callback(_put_back, block, vars(block).get("forward"))
    vars(block)["forward"] = forward


def _put_back(block: nn.Module, forward: Callable[..., Any] | None) -> None:
    if forward is None:
        del vars(block)["forward"]
    else:
        vars(block)["forward"] = forward
