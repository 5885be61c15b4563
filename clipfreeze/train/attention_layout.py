"""torch's attention given its inputs as it reads them.

It turns (B, L, D) to (L, B, D) without a copy, and multiplies such a view with a weight that is frozen place by place:
L products of B rows, which take twice the time of one. A copy before is a hundredth of that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from clipfreeze.train.blocks import shadowed


@contextmanager
def laid_out(model: nn.Module) -> Iterator[None]:
    """Inside, attentions that are given (B, L, D) copy it to (L, B, D) where gradients are taken, to the same end."""
    with ExitStack() as undo:
        for module in model.modules():
            if isinstance(module, nn.MultiheadAttention) and module.batch_first:
                undo.enter_context(shadowed(module, {"forward": partial(_forward, module, module.forward)}))
        yield


def _forward(
    attention: nn.MultiheadAttention,
    forward: Callable[..., tuple[Tensor, Tensor | None]],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    if query.ndim < 3 or not torch.is_grad_enabled():
        return forward(query, key, value, *args, **kwargs)
    given = (query, key, value)
    turned = {id(x): x.transpose(0, 1).contiguous() for x in given}  # which may be one and the same
    with shadowed(attention, {"batch_first": False}):
        out, weights = forward(*(turned[id(x)] for x in given), *args, **kwargs)
    return out.transpose(0, 1), weights
