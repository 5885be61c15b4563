"""The contrastive losses, on open_clip's logits, with all pairs that say the same as each other's positives; and a
head's cross-entropy.

Labels by position, as in pre-training, push equal captions apart: with class names as captions most batches hold some.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import open_clip
import torch
from torch import Tensor, nn

from clipfreeze.changes import Applied
from clipfreeze.inject.head import ClassHead

Objective = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor], Tensor]


def clip_loss(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None, concepts: Tensor) -> Tensor:
    """Cross-entropy both ways, the target spread evenly over the positives; open_clip's loss when all are distinct.

    image, text: (B, D) normalised; scale: of the logits, not its log; concepts: (B,). The minimum is the mean log of
    the number of positives, 0 when all are distinct.
    """
    per_image, per_text = open_clip.ClipLoss().get_logits(image, text, scale, bias)
    positives = _positives(concepts).to(per_image.dtype)
    target = positives / positives.sum(1, keepdim=True)
    return (nn.functional.cross_entropy(per_image, target) + nn.functional.cross_entropy(per_text, target)) / 2


def siglip_loss(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None, concepts: Tensor) -> Tensor:
    """Each image and each text a yes-or-no question: +1 for positives, -1 for the rest. Arguments as for clip_loss."""
    logits = open_clip.loss.SigLipLoss().get_logits(image, text, scale, bias)
    signs = _positives(concepts).to(logits.dtype) * 2 - 1
    return -nn.functional.logsigmoid(signs * logits).sum() / len(image)


def objective_for(model: Any) -> Objective:
    """SigLIP's loss for a model with a logit bias, else CLIP's."""
    return clip_loss if model.logit_bias is None else siglip_loss


class Contrastive(nn.Module):
    """A model with its objective as one module: what an engine wraps, so that the whole step passes through it."""

    reads_texts, reads_labels = True, False

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.objective = objective_for(model)

    def forward(self, image: Tensor, text: Tensor, concepts: Tensor) -> Tensor:
        """image: (B, 3, H, W), text: (B, L), concepts: (B,) -> loss, by the encoders: CoCa's forward decodes too."""
        return self.loss(self.model.encode_image(image, normalize=True), text, concepts)

    def loss(self, image_features: Tensor, text: Tensor, concepts: Tensor) -> Tensor:
        """image_features: (B, D) normalised, text: (B, L), concepts: (B,) -> loss."""
        text_features = self.model.encode_text(text, normalize=True)
        with torch.autocast(text.device.type, enabled=False):  # bf16 logits of size 100 are off by 0.25
            return self.objective(
                image_features.float(),
                text_features.float(),
                self.model.logit_scale.exp(),
                self.model.logit_bias,
                concepts,
            )

    def by_guessing(self, batch_size: int) -> float | None:
        """The loss of features that say nothing; None where there is no such number."""
        return math.log(batch_size) if self.objective is clip_loss else None


class Classification(nn.Module):
    """A model with its head; `contrast` adds the contrastive loss, for what the head does not reach."""

    reads_labels = True

    def __init__(self, model: Any, head: ClassHead, contrast: Contrastive | None) -> None:
        super().__init__()
        self.model, self.head, self.contrast = model, head, contrast

    @property
    def reads_texts(self) -> bool:
        """Whether a batch needs text and concepts."""
        return self.contrast is not None

    def forward(
        self, image: Tensor, label: Tensor, text: Tensor | None = None, concepts: Tensor | None = None
    ) -> Tensor:
        """image: (B, 3, H, W), label: (B,) of the head's classes, text and concepts as for Contrastive -> loss."""
        features = self.model.encode_image(image, normalize=True)
        loss = nn.functional.cross_entropy(self.head(features), label)
        if self.contrast is None:
            return loss
        assert text is not None
        assert concepts is not None
        return loss + self.contrast.loss(features, text, concepts)

    def by_guessing(self, batch_size: int) -> float | None:
        """The loss of features that say nothing."""
        classes = math.log(len(self.head.weight))
        if self.contrast is None:
            return classes
        pairs = self.contrast.by_guessing(batch_size)
        return None if pairs is None else classes + pairs


def training_module(applied: Applied) -> Contrastive | Classification:
    """What trains the plan: its head's cross-entropy where it adds one. Texts are encoded, and the contrastive loss is
    added to it, only if something that the head does not reach trains: text tower, text prompt, logit bias.
    """
    contrast = Contrastive(applied.model)
    for _, addition in applied.additions:
        if isinstance(addition, ClassHead):
            return Classification(applied.model, addition, contrast if _texts_train(applied) else None)
    return contrast


def _texts_train(applied: Applied) -> bool:
    names = {name for site, _ in applied.additions if site.tower == "text" for name in site.names}
    return any(
        planned.name in names or planned.role.startswith("text.") or planned.role == "logit_bias"
        for planned in applied.plan.trainable
    )


def _positives(concepts: Tensor) -> Tensor:
    return concepts[:, None] == concepts[None]
