"""torch's attention with stand-ins among its weights."""

from __future__ import annotations

import copy
import math
from contextlib import ExitStack
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from clipfreeze.inject.addition import Addition
from clipfreeze.inject.factor import Factor, summed

M = TypeVar("M", bound=nn.Module)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim: int,
    num_heads: int,
    in_proj_weight: Tensor | Factor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor | Factor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | Factor | None = None,
    k_proj_weight: Tensor | Factor | None = None,
    v_proj_weight: Tensor | Factor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """What `torch.nn.functional.multi_head_attention_forward` does, product for product, so that the bits are the same.

    query: (L, B, D), key, value: (S, B, D) -> (L, B, D), and the weights (B, L, S) where asked for. Keys and values
    added by torch's own options, which no tower has, are refused.
    """
    assert bias_k is None
    assert bias_v is None
    assert static_k is None
    assert static_v is None
    assert not add_zero_attn
    assert query.dim() == 3
    length, batch, width = query.shape
    if use_separate_proj_weight:
        biases = (None, None, None) if in_proj_bias is None else in_proj_bias.chunk(3)
        weights = (q_proj_weight, k_proj_weight, v_proj_weight)
        q, k, v = (_linear(*of) for of in zip((query, key, value), weights, biases, strict=True))
    else:
        q, k, v = _packed(query, key, value, in_proj_weight, in_proj_bias)
    head = width // num_heads
    q, k, v = (x.view(len(x), batch * num_heads, head).transpose(0, 1) for x in (q, k, v))

    mask = None if is_causal and key_padding_mask is None and not need_weights else _additive(attn_mask, query.dtype)
    is_causal = is_causal and mask is None
    if mask is not None and mask.dim() == 2:
        mask = mask.unsqueeze(0)
    if (padding := _additive(key_padding_mask, query.dtype)) is not None:
        padding = padding.view(batch, 1, 1, -1).expand(-1, num_heads, -1, -1).reshape(batch * num_heads, 1, -1)
        mask = padding if mask is None else mask + padding
    dropout_p = dropout_p if training else 0.0

    if need_weights:
        scaled = q * math.sqrt(1 / head)
        scores = torch.bmm(scaled, k.transpose(-2, -1)) if mask is None else torch.baddbmm(mask, scaled, k.mT)
        attention = functional.dropout(functional.softmax(scores, dim=-1), dropout_p)
        mixed = torch.bmm(attention, v).transpose(0, 1).reshape(length * batch, width)
        weights_out = attention.view(batch, num_heads, length, -1)
        weights_out = weights_out.mean(dim=1) if average_attn_weights else weights_out
    else:
        if mask is not None:
            mask = mask.unsqueeze(0) if len(mask) == 1 else mask.view(batch, num_heads, -1, mask.shape[-1])
        q, k, v = (x.view(batch, num_heads, -1, head) for x in (q, k, v))
        mixed = functional.scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal)
        mixed = mixed.permute(2, 0, 1, 3).reshape(batch * length, width)
        weights_out = None
    return _linear(mixed, out_proj_weight, out_proj_bias).view(length, batch, -1), weights_out


def _packed(
    query: Tensor, key: Tensor, value: Tensor, weight: Tensor | Factor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v from one fused weight, (3 D, D), with as few products as the inputs allow."""
    width = query.shape[-1]
    if query is key and key is value:
        packed = _linear(query.contiguous(), weight, bias)  # else a product for each place, of few rows
        packed = packed.view(*packed.shape[:-1], 3, width).unsqueeze(0).transpose(0, -2).squeeze(-2).contiguous()
        return packed[0], packed[1], packed[2]
    if key is value:
        both = _linear(key, *_rows(weight, bias, width, 3 * width))
        both = both.view(*both.shape[:-1], 2, width).unsqueeze(0).transpose(0, -2).squeeze(-2).contiguous()
        return _linear(query, *_rows(weight, bias, 0, width)), both[0], both[1]
    thirds = (_rows(weight, bias, start, start + width) for start in range(0, 3 * width, width))
    q, k, v = (_linear(x, *third) for x, third in zip((query, key, value), thirds, strict=True))
    return q, k, v


def _rows(weight: Any, bias: Tensor | None, start: int, stop: int) -> tuple[Any, Tensor | None]:
    return weight.part(start, stop) if isinstance(weight, Factor) else weight[start:stop], (
        None if bias is None else bias[start:stop]
    )


def _linear(x: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
    return functional.linear(x, weight, bias)


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """True, which forbids, as -inf."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))


def keep_fused(model: nn.Module, parameter: str, undo: ExitStack) -> None:
    """In inference torch's attention takes one fused call, which reads weights: let it go on, with their sums.

    So an adaptation that adds nothing changes no bit there either. What trains runs beside the products.
    """
    path = parameter.removesuffix(".out_proj.weight") if ".out_proj." in parameter else parameter.rpartition(".")[0]
    attention = model.get_submodule(path)
    if isinstance(attention, nn.MultiheadAttention) and "forward" not in vars(attention):
        attention.forward = partial(_forward, attention)  # type: ignore[method-assign]
        undo.callback(vars(attention).pop, "forward")


def _forward(attention: nn.MultiheadAttention, query: Tensor, *args: Any, **kwargs: Any) -> Any:
    plain = attention
    if not (
        attention.training
        or any(module.training for module in attention.modules() if isinstance(module, Addition))
        or torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch.is_autocast_enabled(query.device.type)
    ):
        plain = _with_sums(attention)
        plain.out_proj = _with_sums(attention.out_proj)
    return type(attention).forward(plain, query, *args, **kwargs)


def _with_sums(module: M) -> M:
    """The same module for one call, its own stand-ins replaced by plain tensors.

    Those require gradients as the weights do: torch chooses the kernel by that, also where none are taken.
    """
    plain = copy.copy(module)
    factors = {name: held for name, held in vars(module).items() if isinstance(held, Factor)}
    for name in ("forward", *factors):
        vars(plain).pop(name, None)
    sums = {name: summed(held).requires_grad_(held.requires_grad) for name, held in factors.items()}
    vars(plain)["_parameters"] = {**module._parameters, **sums}
    vars(plain)["_modules"] = dict(module._modules)
    return plain
