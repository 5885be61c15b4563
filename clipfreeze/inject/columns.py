"""Vectors among the tokens that a block is given, behind those that stand first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from clipfreeze.anatomy.parts import Tokens


def insert_columns(vectors: Tensor, tokens: Tokens, x: Tensor) -> Tensor:
    """vectors: (P, D), x: (B, N, D) -> (B, N + P, D); of a tower that is not batch first likewise (N, B, D)."""
    return _joined(vectors, tokens, x, tokens.first)


def replace_columns(vectors: Tensor, tokens: Tokens, x: Tensor) -> Tensor:
    """vectors: (P, D), x: (B, P + N, D) -> the same shape, with the vectors in place of the P that were put in."""
    return _joined(vectors, tokens, x, tokens.first + len(vectors))


def remove_columns(length: int, tokens: Tokens, x: Tensor) -> Tensor:
    """x: (B, length + N, D) -> (B, N, D)."""
    axis = int(tokens.batch_first)
    stop = tokens.first + length
    parts = [x.narrow(axis, 0, tokens.first), x.narrow(axis, stop, x.shape[axis] - stop)]
    return torch.cat(parts, axis)


def replace_first(
    args: tuple[Any, ...], kwargs: dict[str, Any], change: Callable[[Tensor], Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a module with the first one changed, however it was given."""
    if args:
        return (change(args[0]), *args[1:]), kwargs
    name = next(iter(kwargs))
    return args, {**kwargs, name: change(kwargs[name])}


def _joined(vectors: Tensor, tokens: Tokens, x: Tensor, stop: int) -> Tensor:
    axis = int(tokens.batch_first)
    batch = x.shape[1 - axis]
    between = vectors.to(x.dtype).unsqueeze(1 - axis)
    between = between.expand(batch, -1, -1) if axis else between.expand(-1, batch, -1)
    return torch.cat([x.narrow(axis, 0, tokens.first), between, x.narrow(axis, stop, x.shape[axis] - stop)], axis)
