"""Blocks that train, compiled: worth its minute of work in long runs on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from clipfreeze.train.blocks import backward_passes, blocks_of, shadowed


@contextmanager
def compiled_blocks(model: nn.Module) -> Iterator[None]:
    """Inside, blocks that backward passes run as torch.compile makes them; in evaluation, and before the first part
    that trains, as ever.

    What a policy adds to a product it adds outside of what is compiled, where that cannot be.
    """
    with ExitStack() as undo:
        for block in blocks_of(model):
            undo.enter_context(shadowed(block, {"forward": _compiled(block, block.forward)}))
        yield


def _compiled(block: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    fast: Callable[..., Any] = torch.compile(forward)

    def run(*args: Any, **kwargs: Any) -> Any:
        return (fast if backward_passes(block, args, kwargs) else forward)(*args, **kwargs)

    return run
