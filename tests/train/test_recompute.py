"""Blocks computed again in backward change neither loss nor gradients, and keep less."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

import clipfreeze
from clipfreeze.train.objective import training_module
from clipfreeze.train.recompute import recomputed

import tiny

POLICIES: dict[str, dict[str, Any]] = {
    "full": {},
    "last_n": {"n": 1},
    "lora": {"rank": 2, "dropout": 0.5},
    "prompt": {**tiny.KNOBS["prompt"], "depth": 2, "visual": 2},
}


def trained(family: str, policy: str, again: bool) -> tuple[Tensor, dict[str, Tensor], list[str], int]:
    """The loss, the gradients, the blocks that ran a second time, and the elements kept for backward."""
    torch.manual_seed(0)
    model = tiny.FAMILIES[family]()
    torch.manual_seed(1)
    applied = clipfreeze.apply(clipfreeze.resolve(clipfreeze.load_policy(policy, **POLICIES[policy]), model), model)
    module = training_module(applied).train()
    batch = {"image": tiny.images(model), "text": tiny.tokens(model), "concepts": torch.arange(4)}
    kept: list[int] = []
    ran: list[str] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    forwards = [vars(part).get("forward") for part in model.modules()]
    with recomputed(model) if again else nullcontext():
        torch.manual_seed(2)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = module(**batch)
        for name, block in model.named_modules():
            if name.rpartition(".")[0].endswith("resblocks") and name.rpartition(".")[2].isdigit():
                inner = next(block.children())
                inner.register_forward_pre_hook(lambda *_, name=name: ran.append(name))
        loss.backward()
    assert [vars(part).get("forward") for part in model.modules()] == forwards
    gradients = {name: p.grad for name, p in applied.training().items() if p.grad is not None}
    return loss.detach(), gradients, ran, sum(kept)


@pytest.mark.parametrize(
    ("family", "policy"),
    [
        *(("clip_vit", policy) for policy in POLICIES),
        ("clip_resnet", "full"),
        ("siglip", "last_n"),
        ("hf_text", "lora"),
    ],
)
def test_loss_and_gradients_are_the_same_and_less_is_kept(family: str, policy: str) -> None:
    loss, gradients, _, kept = trained(family, policy, again=False)
    loss_again, gradients_again, _, kept_again = trained(family, policy, again=True)
    assert torch.equal(loss, loss_again)
    assert gradients.keys() == gradients_again.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradients_again[name], gradient, rtol=1e-6, atol=1e-7, msg=name)
    assert kept_again < kept


def test_only_what_backward_passes_is_computed_again() -> None:
    *_, ran, _ = trained("clip_vit", "last_n", again=True)
    assert sorted(ran) == ["transformer.resblocks.2", "visual.transformer.resblocks.2"]
