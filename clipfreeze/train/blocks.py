"""The blocks of a model's towers, and other ways to run them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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


@contextmanager
def shadowed(owner: nn.Module, values: Mapping[str, Any]) -> Iterator[None]:
    """The module with other values for some of its attributes: an instance's own win over parameters and methods."""
    former = {name: vars(owner)[name] for name in values if name in vars(owner)}
    vars(owner).update(values)
    try:
        yield
    finally:
        for name in values:
            del vars(owner)[name]
        vars(owner).update(former)
