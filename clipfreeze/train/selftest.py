"""Proof on a user's own model that a batch in chunks gives the gradients of the whole batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from clipfreeze import changes, models
from clipfreeze.errors import DataError
from clipfreeze.plan.value import Plan
from clipfreeze.train.accumulate import backward_in_chunks
from clipfreeze.train.engine import make_accelerator
from clipfreeze.train.objective import Anchored, training_module
from clipfreeze.train.probe import noise_batch

TOLERANCE = 1e-3
"""Of a gradient's largest difference, as a share of the largest gradient of its part."""


@dataclass(frozen=True)
class Check:
    """A part of the model: what its gradients differ by at most, as a share of the largest of them."""

    part: str
    tensors: int
    difference: float

    @property
    def holds(self) -> bool:
        """Whether that is rounding."""
        return self.difference <= TOLERANCE


def check_chunks(plan: Plan, model: str, pretrained: str | None, batch_size: int, micro_batch: int) -> list[Check]:
    """The loss, then each part that trains; on noise, in fp32, with dropout off: a chunk's own masks would differ.

    DataError where the chunks are no smaller than the batch.
    """
    if not 1 <= micro_batch < batch_size:
        raise DataError(f"chunks of {micro_batch} of a batch of {batch_size}", "a smaller --micro-batch, 1 or more")
    torch.manual_seed(0)
    device = make_accelerator("fp32").device
    loaded = models.load(model, pretrained, device=str(device))
    applied = changes.apply(plan, loaded.model, tokenizer=loaded.tokenizer)
    module = training_module(applied).eval()
    batch = {name: value.to(device) for name, value in noise_batch(loaded, module, plan, batch_size).items()}
    if isinstance(module, Anchored):
        batch |= module.start_features(applied, batch, batch_size)
    loss = module(**batch)
    loss.backward()
    trained = applied.training()
    whole = {name: p.grad.clone() for name, p in trained.items() if p.grad is not None}
    module.zero_grad()
    in_chunks = backward_in_chunks(module, batch, micro_batch)
    found = {name: p.grad for name, p in trained.items() if p.grad is not None}
    checks = [Check("loss", 1, float(abs(in_chunks - loss.detach()) / abs(loss.detach())))]
    parts: dict[str, list[str]] = {}
    for planned in plan.trainable:
        if planned.name in whole:
            parts.setdefault(planned.role if planned.origin == "model" else planned.origin, []).append(planned.name)
    for part, names in parts.items():
        largest = max(float(whole[name].abs().max()) for name in names)
        differences = (float((found[name] - whole[name]).abs().max()) if name in found else largest for name in names)
        checks.append(Check(part, len(names), max(differences) / largest if largest else 0.0))
    return checks
