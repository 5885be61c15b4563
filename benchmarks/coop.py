"""Prompt learning as CoOp has it (arXiv 2109.01134): each step every image and every class prompt, in full length."""

from __future__ import annotations

from typing import Any

import torch
from open_clip.transformer import text_global_pool
from torch import Tensor, nn
from torch.nn import functional


class CoOp(nn.Module):
    """An open_clip model that stands still, and vectors in front of the names of classes, which learn."""

    def __init__(self, model: Any, names: Tensor, words: Tensor) -> None:
        """names: (classes, L) ids of bare class names; words: (n,) ids that the vectors start as."""
        super().__init__()
        self.model = model.requires_grad_(False)
        text = getattr(model, "text", model)  # CLIP has its text tower spread over the top level
        self.context = nn.Parameter(text.token_embedding.weight[words].detach().clone())
        start, room = names[:, :1], names[:, 1 : -len(words)]
        self.register_buffer("names", names)
        self.register_buffer("places", torch.cat([start, words.new_zeros(len(names), len(words)), room], 1))
        self.pool = (getattr(text, "pool_type", None) or text.text_pool_type, getattr(text, "eos_id", None))

    @property
    def logit_scale(self) -> nn.Parameter:
        scale: nn.Parameter = self.model.logit_scale
        return scale

    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """images: (B, 3, H, W), labels: (B,) -> what `class_loss` takes."""
        return {
            "image_features": self.model.encode_image(images, normalize=True),
            "text_features": functional.normalize(self.encode_classes(), dim=-1),
            "logit_scale": self.logit_scale.exp(),
            "labels": labels,
        }

    def encode_classes(self) -> Tensor:
        """(classes, D)."""
        text = getattr(self.model, "text", self.model)
        named = text.token_embedding(self.names)
        context = self.context.expand(len(named), -1, -1)
        tokens = torch.cat([named[:, :1], context, named[:, 1 : -len(self.context)]], 1) + text.positional_embedding
        tokens = text.ln_final(text.transformer(tokens, attn_mask=text.attn_mask))
        pooled = text_global_pool(tokens, self.places, self.pool[0], eos_token_id=self.pool[1])
        projection = text.text_projection
        projected: Tensor = projection(pooled) if isinstance(projection, nn.Linear) else pooled @ projection
        return projected


def class_loss(
    image_features: Tensor, text_features: Tensor, logit_scale: Tensor, labels: Tensor, output_dict: bool
) -> dict[str, Tensor]:
    """As open_clip's trainer calls a loss."""
    return {"class_loss": functional.cross_entropy(logit_scale * image_features @ text_features.T, labels)}
