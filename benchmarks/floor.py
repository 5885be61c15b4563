"""The floor under a step: its floating-point operations over the rate at which this machine multiplies matrices.

The operations are those of matrix products, convolutions and attention in one of our own steps in steady state, forward
and backward, as torch's counter sees them run: the work that is left once the cache, trimming and the short backward
have taken theirs away. Norms, activations, the optimizer, decoding and Python count for nothing.
"""

from __future__ import annotations

import math
import statistics
import time
from typing import Any

import torch
from torch.utils import flop_counter as torch_flops
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.machine import device


def flop_counter() -> FlopCounterMode:
    """A context that counts what runs inside: on CPUs attention too, for which torch has no formula, and backward of
    convolutions in groups, of which torch's own formula takes all channels for one group.
    """
    aten = torch.ops.aten
    return FlopCounterMode(
        display=False,
        custom_mapping={
            aten._scaled_dot_product_flash_attention_for_cpu: _attention,
            aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
            aten.convolution_backward: _convolution_backward,
        },
    )


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> Any:
    """Of shapes (B, heads, L, D)."""
    count: Any = torch_flops.sdpa_flop_count
    return count(query, key, value)


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> Any:
    count: Any = torch_flops.sdpa_backward_flop_count
    return count(grad, query, key, value)


def _convolution_backward(grad: Any, x: Any, weight: Any, *rest: Any, **_: Any) -> Any:
    """Shapes (B, out, ...), (B, in, ...), (out, in / groups, ...): gradients of x and weight cost the forward each."""
    wanted = rest[-1]
    return 2 * math.prod(grad) * math.prod(weight[1:]) * sum(wanted[:2])


def product_rate(rows: int = 3200) -> float:
    """FLOP/s of (rows, 768) x (768, 3072), a ViT-B's first MLP product of 64 pictures of 50 tokens: fp32 on the CPU,
    bf16 on a GPU, as training has it there. The median of 7 after 2.
    """
    where = device()
    kind = torch.float32 if where.type == "cpu" else torch.bfloat16
    left = torch.randn(rows, 768, device=where, dtype=kind)
    right = torch.randn(768, 3072, device=where, dtype=kind)
    times = []
    for _ in range(9):
        started = time.perf_counter()
        left @ right
        if where.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return 2 * rows * 768 * 3072 / statistics.median(times[2:])
