"""What the ranks of a run tell each other; with one rank, nothing is sent."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed


def rank() -> int:
    """Of this process, from 0."""
    return distributed.get_rank() if _together() else 0


def world_size() -> int:
    """The number of processes that train together."""
    return distributed.get_world_size() if _together() else 1


def gathered(values: Tensor) -> Tensor:
    """(B, ...) of each rank to (ranks * B, ...), in the order of the ranks; without gradient."""
    if world_size() == 1:
        return values
    parts = [torch.empty_like(values) for _ in range(world_size())]
    distributed.all_gather(parts, values.contiguous())
    return torch.cat(parts)


def summed(values: list[float], device: torch.device) -> list[float]:
    """Each value's sum over the ranks, in double precision where the device has it."""
    if world_size() == 1:
        return values
    dtype = torch.float32 if device.type == "mps" else torch.float64
    total = torch.tensor(values, dtype=dtype, device=device)
    distributed.all_reduce(total)
    return [float(value) for value in total.tolist()]


def everyones(value: Any) -> list[Any]:
    """The value of each rank; anything that pickles."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    distributed.all_gather_object(values, value)
    return values


def wait_for_all() -> None:
    """Go on when every rank is here."""
    if world_size() > 1:
        distributed.barrier()


def _together() -> bool:
    return distributed.is_available() and distributed.is_initialized()
