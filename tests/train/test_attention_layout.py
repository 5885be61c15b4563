"""Attention on inputs laid out otherwise: the same numbers, by fewer and larger products."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from clipfreeze.train.attention_layout import laid_out


class _Called(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def passed(frozen: bool, masked: bool, apart: bool, laid: bool) -> tuple[list[Tensor], set[str]]:
    """Output and gradients of an attention that its inputs train through, and the operations that ran."""
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, batch_first=True).requires_grad_(not frozen)
    x = torch.randn(3, 5, 8, requires_grad=True)
    mask = torch.full((2 if apart else 5, 5), float("-inf")).triu(1) if masked else None
    before = dict(vars(attention))
    with laid_out(nn.Sequential(attention)) if laid else nullcontext(), _Called() as called:
        query = x[:, :2] if apart else x
        out, _ = attention(query, x, x, need_weights=False, attn_mask=mask)
        out.square().sum().backward()
    assert vars(attention) == before
    grads = [p.grad for p in (x, *attention.parameters()) if p.grad is not None]
    return [out.detach(), *grads], called.names


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("apart", [True, False])
def test_outputs_and_gradients_are_the_same(frozen: bool, masked: bool, apart: bool) -> None:
    (plain, _), (laid, called) = (passed(frozen, masked, apart, on) for on in (False, True))
    torch.testing.assert_close(laid, plain, rtol=1e-5, atol=1e-6)
    assert "bmm" not in called


def test_torch_multiplies_place_by_place_what_is_not_laid_out() -> None:
    assert "bmm" in passed(True, False, False, False)[1]
    # when this no longer holds, `laid_out` is no longer needed


def test_evaluation_takes_its_own_way() -> None:
    attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    x = torch.randn(3, 5, 8)
    with torch.no_grad():
        plain, _ = attention(x, x, x, need_weights=False)
        with laid_out(attention):
            laid, _ = attention(x, x, x, need_weights=False)
    assert torch.equal(laid, plain)
