"""Channels last in memory are the same numbers, in the model, in its gradients and in what is saved."""

from __future__ import annotations

import pytest
import torch

import clipfreeze
from clipfreeze.train.memory_format import channels_last

import tiny


@pytest.mark.parametrize("family", ["clip_resnet", "clip_convnext", "fastvit", "clip_vit"])
def test_training_in_channels_last_is_training(family: str) -> None:
    ends = []
    for laid in (False, True):
        torch.manual_seed(0)
        model = tiny.FAMILIES[family]()
        torch.manual_seed(1)
        plan = clipfreeze.resolve(clipfreeze.load_policy("vision_only"), model)
        applied = clipfreeze.apply(plan, model)
        optimizer = applied.optimizer()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with channels_last(model) if laid else torch.enable_grad():
            assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
            last = [p for p in model.parameters() if p.ndim == 4 and not p.is_contiguous()]
            assert bool(last) == (laid and family != "clip_vit")
            for _ in range(2):
                model.encode_image(tiny.images(model), normalize=True)[:, 0].sum().backward()
                optimizer.step()
                optimizer.zero_grad()
        assert all(p.is_contiguous() for p in model.parameters())
        ends.append({name: p.detach() for name, p in applied.trainable().items()})
    for name, weight in ends[0].items():
        torch.testing.assert_close(ends[1][name], weight, rtol=1e-3, atol=2e-5, msg=name)
