"""Convolutions with their channels last in memory, which is what a GPU's tensor cores read.

On two CPU cores forward and backward of RN50 and ConvNeXt took as long either way, so the CPU stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def channels_last(model: nn.Module) -> Iterator[None]:
    """The weights of a convolution tower laid so inside, and as before afterwards; the numbers are the same ones.

    What has one convolution alone, its patch embedding, works on tokens: there nothing changes.
    """
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    if len(convolutions) > 1:
        _lay(convolutions, torch.channels_last)
    try:
        yield
    finally:
        if len(convolutions) > 1:
            _lay(convolutions, torch.contiguous_format)  # what safetensors asks of whoever saves the model


def _lay(convolutions: list[nn.Conv2d], layout: torch.memory_format) -> None:
    for module in convolutions:
        for parameter in module._parameters.values():  # behind stand-ins
            if parameter is not None and parameter.ndim == 4:
                parameter.data = parameter.data.contiguous(memory_format=layout)
