"""open_clip's losses when all captions differ; equal ones are positives of each other, down to the true minimum."""

from __future__ import annotations

import math
from typing import Any

import open_clip
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from clipfreeze.train.objective import Contrastive, clip_loss, objective_for, siglip_loss

import tiny

SCALE = torch.tensor(20.0)


def features(batch: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    image, text = nn.functional.normalize(torch.randn(2, batch, 8, generator=generator), dim=-1)
    return image.requires_grad_(), text.requires_grad_()


@given(st.integers(2, 9), st.integers(0, 100))
def test_with_distinct_captions_loss_and_gradients_are_open_clips(batch: int, seed: int) -> None:
    bias = torch.tensor(-3.0)
    distinct = torch.arange(batch) * 7 - 3
    image, text = features(batch, seed)
    for found, expected in (
        (clip_loss(image, text, SCALE, None, distinct), open_clip.ClipLoss()(image, text, SCALE)),
        (siglip_loss(image, text, SCALE, bias, distinct), open_clip.loss.SigLipLoss()(image, text, SCALE, bias)),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
        gradients = [torch.autograd.grad(loss, (image, text), retain_graph=True) for loss in (found, expected)]
        torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("concepts", "minimum"), [([0, 1, 2, 2], math.log(2) / 2), ([0, 1] * 4, math.log(4))])
def test_a_perfect_encoder_reaches_the_true_minimum(concepts: list[int], minimum: float) -> None:
    ids = torch.tensor(concepts)
    perfect = nn.functional.one_hot(ids, 8).float().requires_grad_()
    loss = clip_loss(perfect, perfect, torch.tensor(1000.0), None, ids)
    assert loss.item() == pytest.approx(minimum, abs=1e-6)
    (gradient,) = torch.autograd.grad(loss, perfect)
    assert gradient.abs().max() < 1e-3
    by_position = open_clip.ClipLoss()(perfect, perfect, torch.tensor(1000.0))
    assert by_position.item() == pytest.approx(minimum, abs=1e-6)  # it is no lower: what it asks for cannot be had


@given(st.lists(st.integers(0, 3), min_size=2, max_size=8), st.integers(0, 100))
def test_no_features_go_below_the_minimum(concepts: list[int], seed: int) -> None:
    image, text = features(len(concepts), seed)
    minimum = sum(math.log(concepts.count(concept)) for concept in concepts) / len(concepts)
    assert clip_loss(image, text, SCALE, None, torch.tensor(concepts)).item() >= minimum - 1e-5


def test_siglip_pulls_equal_captions_together() -> None:
    ids = torch.tensor([0, 1, 2, 2])
    perfect = nn.functional.one_hot(ids, 8).float()
    assert siglip_loss(perfect, perfect, torch.tensor(40.0), torch.tensor(-20.0), ids).item() < 1e-6
    assert open_clip.loss.SigLipLoss()(perfect, perfect, torch.tensor(40.0), torch.tensor(-20.0)).item() > 5


def test_under_bf16_autocast_the_loss_is_computed_in_fp32_and_trained_weights_stay_so() -> None:
    torch.manual_seed(0)
    model: Any = tiny.clip_vit()
    images, tokens, concepts = tiny.images(model), tiny.tokens(model), torch.arange(4)
    expected = Contrastive(model)(images, tokens, concepts=concepts)
    with torch.autocast("cpu", torch.bfloat16):
        found = Contrastive(model)(images, tokens, concepts=concepts)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)
    torch.autograd.backward(found)
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_step_of_every_family_is_open_clips(family: str) -> None:
    model: Any = tiny.FAMILIES[family]().eval()
    images, tokens = tiny.images(model), tiny.tokens(model)
    found = Contrastive(model)(images, tokens, concepts=torch.arange(4))
    encoded = model.encode_image(images, normalize=True), model.encode_text(tokens, normalize=True)
    if family == "siglip":
        expected = open_clip.loss.SigLipLoss()(*encoded, model.logit_scale.exp(), model.logit_bias)
    else:
        expected = open_clip.ClipLoss()(*encoded, model.logit_scale.exp())
    assert objective_for(model) is (siglip_loss if family == "siglip" else clip_loss)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
