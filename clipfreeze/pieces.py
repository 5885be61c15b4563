"""Tensors of which each rank holds a piece (DTensors): put together, and cut. All others pass through as they are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, distributed, nn


def in_pieces(tensor: Tensor) -> bool:
    """Whether the ranks hold a piece of it each."""
    if type(tensor) in (Tensor, nn.Parameter) or not distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor  # slow to import, and few runs have any

    return isinstance(tensor, DTensor)


def piece(tensor: Tensor) -> Tensor:
    """What this rank holds of it, in the same memory, without gradient."""
    held: Any = tensor.detach()
    own: Tensor = held.to_local() if in_pieces(tensor) else held
    return own


def whole(tensor: Tensor) -> Tensor:
    """Of all pieces: the ranks ask for the same tensors in the same order, and get the same."""
    held: Any = tensor
    gathered: Tensor = held.full_tensor() if in_pieces(tensor) else held
    return gathered


def cut_like(value: Tensor, tensor: Tensor) -> Tensor:
    """A copy, where `tensor` is, of a value that each rank has whole; in pieces if that is. Nothing is sent."""
    if not in_pieces(tensor):
        return value.detach().to(tensor.device, copy=True)
    from torch.distributed.tensor import distribute_tensor

    held: Any = tensor
    cut: Tensor = distribute_tensor(value.detach(), held.device_mesh, held.placements, src_data_rank=None)
    return cut.to(tensor.device, copy=True)


def on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies, whole; of tensors in pieces rank 0 alone has them, so that a machine of many ranks holds one copy."""
    copies = {}
    for name, tensor in tensors.items():
        value = whole(tensor).detach()
        if writes([tensor]):
            copies[name] = value.to("cpu", copy=True).contiguous()
    return copies


def writes(tensors: Iterable[Tensor]) -> bool:
    """Whether this process writes what is saved of them: where any is in pieces, rank 0 alone."""
    return not any(map(in_pieces, tensors)) or distributed.get_rank() == 0
