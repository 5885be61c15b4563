"""An anchor holds features near those of the model at the start, which comes back bit for bit for each step."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import clipfreeze
from clipfreeze.errors import ApplyError, PlanError
from clipfreeze.train.accumulate import backward_in_chunks
from clipfreeze.train.loop import fit
from clipfreeze.train.objective import Anchored, Contrastive, training_module

import tiny
from hand import Words, colour_pairs, transform

POLICY = """
extends = "{}"
[anchor]
vision = {}
text = {}
"""


def applied(folder: Path, policy: str, vision: float, text: float) -> tuple[Any, Any]:
    """Applied, and a copy of the model before."""
    path = folder / "anchored.toml"
    path.write_text(POLICY.format(policy, vision, text))
    torch.manual_seed(0)
    model = tiny.clip_vit()
    base = copy.deepcopy(model)
    return clipfreeze.apply(clipfreeze.resolve(clipfreeze.load_policy(path), model), model), base


@pytest.mark.parametrize("policy", ["full", "lora", "last_n"])
def test_loss_and_gradients_are_those_written_by_hand(tmp_path: Path, policy: str) -> None:
    of, base = applied(tmp_path, policy, 0.7, 0.3)
    with torch.no_grad():  # as after some steps
        for parameter in of.trainable().values():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    weights = {name: p.detach().clone() for name, p in of.trainable().items()}
    model: Any = of.model.eval()
    batch = {"image": tiny.images(model), "text": tiny.tokens(model), "concepts": torch.arange(4)}
    module = training_module(of)
    assert isinstance(module, Anchored)
    start = module.start_features(of, batch, 3)
    assert all(torch.equal(p.detach(), weights[name]) for name, p in of.trainable().items())
    with torch.no_grad():
        expected = (
            base.eval().encode_image(batch["image"], normalize=True),
            base.encode_text(batch["text"], normalize=True),
        )
    torch.testing.assert_close((start["image_start"], start["text_start"]), expected)

    features = model.encode_image(batch["image"], normalize=True), model.encode_text(batch["text"], normalize=True)
    plain = Contrastive(model).loss(*features, concepts=batch["concepts"])
    distances = [(now - then).square().sum(1).mean() for now, then in zip(features, expected, strict=True)]
    by_hand = plain + 0.7 * distances[0] + 0.3 * distances[1]
    found = module(**batch, **start)
    torch.testing.assert_close(found, by_hand)
    trained = list(of.trainable().values())
    gradients: list[tuple[Tensor, ...]] = [torch.autograd.grad(loss, trained) for loss in (found, by_hand)]
    torch.testing.assert_close(gradients[0], gradients[1])
    backward_in_chunks(module, batch | start, 3)
    torch.testing.assert_close([p.grad for p in trained], list(gradients[1]), rtol=1e-3, atol=1e-6)


def drift(folder: Path, strength: float) -> float:
    of, base = applied(folder, "full", strength, strength)
    fit(of, colour_pairs(2), tokenizer=Words(), transform=transform(), epochs=10, batch_size=8)
    images = tiny.images(of.model)
    with torch.no_grad():
        return float(
            (of.model.encode_image(images, normalize=True) - base.eval().encode_image(images, normalize=True)).norm()
        )


def test_a_stronger_anchor_leaves_features_nearer_the_start(tmp_path: Path) -> None:
    assert drift(tmp_path, 100.0) < 0.5 * drift(tmp_path, 0.01)


def test_an_anchor_on_what_stays_frozen_is_an_error_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"anchored.toml:3: anchor on the text tower, which stays frozen"):
        applied(tmp_path, "vision_only", 1.0, 1.0)


def test_the_plan_shows_it_and_without_one_no_start_is_kept(tmp_path: Path) -> None:
    of, _ = applied(tmp_path, "full", 1.0, 0.0)
    assert "anchor     vision 1 on features of the start" in str(of.plan)
    of, _ = applied(tmp_path, "full", 0.0, 0.0)
    with pytest.raises(ApplyError, match="start values are kept for an anchor alone"), of.started():
        pass
