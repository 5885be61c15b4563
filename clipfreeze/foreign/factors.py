"""LoRA of one product, wherever it was read."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from pydantic import ValidationError
from torch import Tensor

from clipfreeze.policy.actions import Lora


@dataclass(frozen=True)
class Factors:
    """A (rank, in), B (out, rank) and in DoRA magnitude (out,) for a parameter, or one `slot` of a fused one; fp32."""

    parameter: str
    slot: str | None
    spec: Lora
    A: Tensor
    B: Tensor
    magnitude: Tensor | None = None

    @classmethod
    def scaled(
        cls,
        parameter: str,
        slot: str | None,
        pair: tuple[Tensor, Tensor],
        spec: Lora,
        magnitude: Tensor | None = None,
    ) -> Factors:
        """Of as many rows as `pair` has, with the scaling of `spec`; a rank above the matrix's is brought down."""
        a, b = pair
        if len(a) > min(len(b), a.shape[1]):
            whole = b @ a
            a, b = (torch.eye(a.shape[1]), whole) if a.shape[1] < len(b) else (whole, torch.eye(len(b)))
        alpha = spec.scaling * (len(a) ** 0.5 if spec.variant == "rslora" else len(a))
        spec = spec.model_copy(update={"rank": len(a), "alpha": alpha})
        return cls(parameter, slot, spec, a.contiguous(), b.contiguous(), magnitude)


def reason(error: Exception) -> str:
    """In one line, why something is no LoRA."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return str(error).splitlines()[0]
