"""A classifier on the image features, beside the model: its own encoders give what they gave."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import open_clip
import torch
from torch import Tensor, nn
from torch.nn import functional

from clipfreeze.inject.addition import Addition, register
from clipfreeze.inject.modes import evaluating
from clipfreeze.inject.tokenizers import fitting_tokenizer
from clipfreeze.plan.sites import HeadSite

_CLASSES = 64  # encoded together


def add_head(
    site: HeadSite, model: nn.Module, undo: ExitStack, tokenizer: Callable[..., Tensor] | None, fresh: bool
) -> ClassHead:
    """Put the head into the model, where its user alone calls it; fresh zero-shot rows need a tokenizer."""
    head = ClassHead(site, model)
    if fresh and site.spec.init == "zero-shot":
        head.weight.data.copy_(zero_shot_rows(site, model, tokenizer))
    elif fresh and site.spec.init == "random":
        nn.init.normal_(head.weight, std=0.01)  # of a linear head logits of about 1 at a scale of 100
    register(model, site.path, head, undo)
    return head


class ClassHead(Addition):
    """weight: (C, D), bias: (C,) or none, fp32. Logits: the products times the model's logit scale, plus the bias."""

    bias: nn.Parameter | None
    _model: Any

    def __init__(self, site: HeadSite, model: nn.Module) -> None:
        super().__init__()
        self.classes, self.cosine = site.classes, site.spec.kind == "cosine"
        vars(self)["_model"] = model  # no child: its parameters are not the head's
        zeros = [torch.zeros(added.shape, device=_device(model)) for added in site.added]
        self.weight = nn.Parameter(zeros[0])
        self.register_parameter("bias", None if self.cosine else nn.Parameter(zeros[1]))

    @property
    def scalable(self) -> bool:
        """Half a classifier has no meaning."""
        return False

    def rows(self) -> Tensor:
        """(C, D) that features are multiplied by."""
        return functional.normalize(self.weight, dim=-1) if self.cosine else self.weight

    def forward(self, features: Tensor) -> Tensor:
        """features: (B, D) normalised -> logits (B, C), fp32 also under autocast: at size 100 bf16 is off by 0.25."""
        with torch.autocast(features.device.type, enabled=False):
            logits: Tensor = self._model.logit_scale.float().exp() * features.float() @ self.rows().T
            return logits if self.bias is None else logits + self.bias


def zero_shot_rows(site: HeadSite, model: Any, tokenizer: Callable[..., Tensor] | None) -> Tensor:
    """(C, D): open_clip's zero-shot classifier of the classes, fp32; the model's modes are as before."""
    tokens = fitting_tokenizer(model, tokenizer, 'a head with init = "zero-shot"')
    with torch.no_grad(), evaluating(model):
        columns: Tensor = open_clip.build_zero_shot_classifier(
            model, tokens, site.classes, site.spec.templates, _CLASSES, _device(model)
        )
    return columns.T.float()


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
