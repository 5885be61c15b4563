"""A large batch on a small device: features first, the loss once over all of them, then gradients chunk by chunk.

GradCache (arXiv 2101.06983). The mean loss of small batches is another loss: each pair sees fewer negatives.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from clipfreeze.train.dice import dice_on, throw_again
from clipfreeze.train.objective import Chunk, Training


def backward_in_chunks(
    module: nn.Module,
    batch: dict[str, Tensor],
    size: int,
    backward: Callable[[Tensor], None] = Tensor.backward,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Tensor:
    """Gradients of the loss of the whole batch, at most `size` images through the encoder at once; the loss, detached.

    `module` is a Training, or DistributedDataParallel of one, which then reduces once. Texts go in as many chunks as
    images. The encoders draw their random numbers again as they were, so both passes drop the same; the objective draws
    none. What does not train runs once. Equal to `backward(module(**batch))` to float rounding, dropout apart.
    """
    inner = module.module if isinstance(module, nn.parallel.DistributedDataParallel) else module
    assert isinstance(inner, Training)
    device = batch["image"].device
    count = math.ceil(len(batch["image"]) / size)
    towers = [name for name in ("image", "text") if name in batch]
    targets = {name: value for name, value in batch.items() if name not in towers}
    chunks = {name: _chunks(batch[name], name, count) for name in towers}
    with autocast():
        features = {name: _features(inner, chunks[name]) for name in towers}
        after = dice_on(device)
        loss = inner.loss(features["image"], features.get("text"), **targets)
        training = [name for name in towers if features[name].requires_grad]
        gradients = torch.autograd.grad(loss, [features[name] for name in training]) if training else ()
    for name, gradient in zip(training, gradients, strict=True):
        for chunk, part in zip(chunks[name], gradient.tensor_split(len(chunks[name])), strict=True):
            chunk.gradient = part
    last = [chunks[name].pop() for name in training]
    for chunk in (chunk for name in training for chunk in chunks[name]):
        with autocast():
            pulled = inner.pull([chunk])
        backward(pulled)
    values = {name: features[name].detach() for name in towers}
    with autocast():  # what the loss reads beside features has its gradient here, where the ranks' are reduced
        pulled = module(chunks=last, then={"image": values["image"], "text": values.get("text"), **targets})
    backward(pulled)
    throw_again(after, device)
    return loss.detach()


def _chunks(given: Tensor, name: str, count: int) -> list[Chunk]:
    return [Chunk(part, name == "text") for part in given.tensor_split(min(count, len(given)))]


def _features(inner: Training, chunks: list[Chunk]) -> Tensor:
    """Of all chunks together; they require a gradient if the tower trains. Notes where each one's dice stood."""
    features = []
    trains = False
    for number, chunk in enumerate(chunks):
        chunk.dice = dice_on(chunk.given.device)
        with torch.set_grad_enabled(number == 0):  # the first one tells whether there is anything to train
            encoded = inner.encode(chunk)
        trains = trains or encoded.requires_grad
        features.append(encoded.detach())
    return torch.cat(features).requires_grad_(trains)
