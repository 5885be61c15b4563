"""The largest batch that fits: measured on two small ones, and on a CUDA device tried."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import psutil
import torch
from torch import Tensor

from clipfreeze.changes import Applied
from clipfreeze.errors import RunError
from clipfreeze.train.dice import undrawn
from clipfreeze.train.distributed import everyones, world_size
from clipfreeze.train.objective import Training

_USED = 0.7  # of the free memory: beside what backward needs saved, each layer has passing buffers
_MULTIPLE = 8
_MOST = 32768  # the logits of a batch are its square


def largest_batch(applied: Applied, module: Training, example: Mapping[str, Tensor], pairs: int, engine: Any) -> int:
    """Over all ranks together; `example` is a batch of one rank, `pairs` the size of the data.

    What backward keeps grows by the same bytes with each pair, which two sizes tell. RunError when 2 do not fit.
    """
    device: torch.device = engine.device
    batch = {name: value.to(device) for name, value in example.items()}
    fixed = 4 * sum(p.numel() * p.element_size() for p in applied.trainable().values())  # with gradients and moments
    two, four = (_kept_bytes(module, _repeated(batch, module, size), engine) for size in (2, 4))
    each = max(1, (four - two) // 2)
    room = _USED * _free_bytes(device) - fixed - max(0, two - 2 * each)
    size: int = min(everyones(int(min(room // each, pairs // world_size(), _MOST // world_size()))))
    size = size // _MULTIPLE * _MULTIPLE if size >= _MULTIPLE else size
    while device.type == "cuda" and size > 2 and not _fits(module, _repeated(batch, module, size), engine):
        size = size * 3 // 4
    size = min(everyones(size))
    if size < 2:
        raise RunError(
            f"not even two pairs fit: each needs {each / 1e6:.0f} MB",
            "train less (clipfreeze apply POLICY --dry-run estimates it), or --micro-batch 1 with a --batch-size",
        )
    return size * world_size()


def _repeated(batch: Mapping[str, Tensor], module: Training, size: int) -> dict[str, Tensor]:
    """A batch of `size` from one of at least one pair; prompts of all classes stay as they are."""
    return {
        name: value if module.reads_classes and name == "text" else value[torch.arange(size) % len(value)]
        for name, value in batch.items()
    }


def _kept_bytes(module: Training, batch: dict[str, Tensor], engine: Any) -> int:
    """What one forward keeps for backward, and the batch itself."""
    own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    kept = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in batch.values()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with undrawn(engine.device), engine.autocast(), torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept):
        loss = module(**batch)
    del loss
    return int(sum(kept.values()))


def _fits(module: Training, batch: dict[str, Tensor], engine: Any) -> bool:
    try:
        with undrawn(engine.device), engine.autocast():
            module(**batch).backward()
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        module.zero_grad()
        torch.cuda.empty_cache()


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)
