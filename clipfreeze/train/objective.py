"""The contrastive losses, on open_clip's logits, with all pairs that say the same as each other's positives.

Labels by position, as in pre-training, push equal captions apart: with class names as captions most batches hold some.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import open_clip
import torch
from torch import Tensor, nn

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

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.objective = objective_for(model)

    def forward(self, image: Tensor, text: Tensor, concepts: Tensor) -> Tensor:
        """image: (B, 3, H, W), text: (B, L), concepts: (B,) -> loss, by the encoders: CoCa's forward decodes too."""
        features = [self.model.encode_image(image, normalize=True), self.model.encode_text(text, normalize=True)]
        with torch.autocast(image.device.type, enabled=False):  # bf16 logits of size 100 are off by 0.25
            image_features, text_features = (part.float() for part in features)
            return self.objective(
                image_features, text_features, self.model.logit_scale.exp(), self.model.logit_bias, concepts
            )


def _positives(concepts: Tensor) -> Tensor:
    return concepts[:, None] == concepts[None]
