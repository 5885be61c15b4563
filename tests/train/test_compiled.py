"""Compiled blocks give the loss and gradients that the others do, what a policy adds included."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch

import clipfreeze
from clipfreeze.train.compiled import compiled_blocks
from clipfreeze.train.objective import training_module

import tiny


def trained(policy: str, knobs: dict[str, Any], fast: bool) -> tuple[float, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model = tiny.clip_vit()
    torch.manual_seed(1)
    applied = clipfreeze.apply(clipfreeze.resolve(clipfreeze.load_policy(policy, **knobs), model), model)
    module = training_module(applied).train()
    batch = {"image": tiny.images(model), "text": tiny.tokens(model), "concepts": torch.arange(4)}
    with compiled_blocks(model) if fast else nullcontext():
        loss = module(**batch)
        loss.backward()
    return loss.item(), {name: p.grad for name, p in applied.training().items() if p.grad is not None}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch.compile looks at it
@pytest.mark.parametrize(("policy", "knobs"), [("last_n", {"n": 1}), ("lora", {"rank": 2})])
def test_compiled_blocks_are_the_blocks(policy: str, knobs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))  # needs no C++ compiler
    loss, gradients = trained(policy, knobs, fast=False)
    fast, its = trained(policy, knobs, fast=True)
    assert fast == pytest.approx(loss, rel=1e-5)
    assert gradients.keys() == its.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(its[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_only_what_backward_passes_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[Any] = []

    def noted(forward: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            ran.append(forward.__self__)
            return forward(*args, **kwargs)

        return run

    monkeypatch.setattr(torch, "compile", noted)
    model = tiny.clip_vit()
    applied = clipfreeze.apply(clipfreeze.resolve(clipfreeze.load_policy("last_n", n=1), model), model)
    with compiled_blocks(applied.model):
        model.encode_image(tiny.images(model))
        model.encode_text(tiny.tokens(model))
        with torch.no_grad():
            model.encode_image(tiny.images(model))
    model.encode_image(tiny.images(model))
    assert ran == [model.visual.transformer.resblocks[2], model.transformer.resblocks[2]]
