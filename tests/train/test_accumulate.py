"""Chunks of a batch give the gradients of the whole batch, whatever trains, and run what is frozen once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clipfreeze.train.accumulate import backward_in_chunks
from clipfreeze.train.objective import ClassPrompts, Contrastive, Training

import tiny


def gradients(module: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    return found


def batch(model: Any) -> dict[str, Tensor]:
    images, tokens = tiny.images(model), tiny.tokens(model)
    more = torch.cat([images, images.flip(0) * 0.5, images[:2] * 0.1])
    return {"image": more, "text": torch.cat([tokens, tokens.flip(1), tokens[:2]]), "concepts": torch.arange(10) % 8}


def compare(module: Training, given: dict[str, Tensor], size: int) -> None:
    loss = module(**given)
    torch.autograd.backward(loss)
    expected = gradients(module)
    found_loss = backward_in_chunks(module, given, size)
    found = gradients(module)
    torch.testing.assert_close(found_loss, loss.detach(), rtol=1e-5, atol=1e-6)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-3, atol=1e-6, msg=lambda said, name=name: f"{name}: {said}"
        )


@pytest.mark.parametrize("size", [1, 3, 10])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_gradients_are_those_of_the_whole_batch(family: str, size: int) -> None:
    torch.manual_seed(0)
    model = tiny.FAMILIES[family]().eval()
    compare(Contrastive(model), batch(model), size)


def test_the_logit_scale_s_gradient_is_not_counted_once_a_chunk() -> None:
    torch.manual_seed(0)
    model = tiny.clip_vit()
    model.requires_grad_(False)
    model.logit_scale.requires_grad_(True)
    module = Contrastive(model)
    given = batch(model)
    torch.autograd.backward(module(**given))
    (expected,) = gradients(module).values()
    backward_in_chunks(module, given, 2)
    (found,) = gradients(module).values()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(("frozen", "calls"), [("visual", (5, 10)), ("text", (10, 5))])
def test_a_frozen_tower_runs_once(monkeypatch: pytest.MonkeyPatch, frozen: str, calls: tuple[int, int]) -> None:
    torch.manual_seed(0)
    model: Any = tiny.clip_vit()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("visual.") is (frozen == "text") and name != "logit_scale")
    counts = {"encode_image": 0, "encode_text": 0}
    for name in counts:
        real = getattr(model, name)

        def counted(*arguments: Any, real: Any = real, name: str = name, **settings: Any) -> Tensor:
            counts[name] += 1
            return real(*arguments, **settings)

        monkeypatch.setattr(model, name, counted)
    compare(module := Contrastive(model), batch(model), 2)
    counts.update(dict.fromkeys(counts, 0))
    backward_in_chunks(module, batch(model), 2)
    assert tuple(counts.values()) == calls


def test_dropout_drops_the_same_in_both_passes_and_the_dice_go_on() -> None:
    torch.manual_seed(0)
    model: Any = tiny.FAMILIES["hf_text"]().train()  # has dropout
    given = batch(model)
    module = Contrastive(model)
    drawn: list[Tensor] = []
    model.text.register_forward_hook(lambda module, given, output: drawn.append(output.detach()))
    torch.manual_seed(1)
    backward_in_chunks(module, given, 5)
    after = torch.rand(1)
    assert len(drawn) == 4
    assert all(torch.equal(drawn[i], drawn[i + 2]) for i in range(2))
    torch.manual_seed(1)
    for part in given["image"].tensor_split(2):
        model.encode_image(part)
    for part in given["text"].tensor_split(2):
        model.encode_text(part)
    assert torch.equal(torch.rand(1), after)


def test_class_prompts_are_chunked_too() -> None:
    torch.manual_seed(0)
    model = tiny.clip_vit()
    given = batch(model)
    classes = {"image": given["image"], "text": given["text"][:3], "label": torch.arange(10) % 3}
    compare(ClassPrompts(model, 3), classes, 2)
