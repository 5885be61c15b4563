"""A linear classifier on image features: a head that was trained, or what a learned prompt makes of class names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from clipfreeze.changes import Applied
from clipfreeze.errors import ExportError
from clipfreeze.export.files import whole_folder, write_json, write_tensors
from clipfreeze.export.proof import probe_pictures, probe_pixels, proved
from clipfreeze.inject.head import ClassHead
from clipfreeze.inject.modes import evaluating
from clipfreeze.inject.tokenizers import fitting_tokenizer
from clipfreeze.models import Loaded
from clipfreeze.plan.sites import PromptSite

CONFIG, WEIGHTS = "head.json", "head.safetensors"

_TOGETHER = 64  # classes encoded at a time


def write_head(applied: Applied, loaded: Loaded, folder: Path, classes: Sequence[str] | None = None) -> float:
    """Write weight (C, D) and bias (C,) of a `torch.nn.Linear` on normalised image features, fp32, and the class names.

    The model's logit scale and bias are in them. `classes` are for a prompt that knows none of its own. Returns the
    largest difference of a logit on a probe batch between the layer, loaded back, and the model. Raises ExportError,
    before anything is written, for a policy without head and text prompt, and for classes that are missing or not its
    own.
    """
    applied.trainable()  # refuses what was removed
    model: Any = loaded.model
    names = _names(applied, classes)
    with torch.no_grad(), evaluating(model):
        features = model.encode_image(probe_pixels(loaded, probe_pictures(80, 60)), normalize=True)
        if head := _head(applied):
            ours, rows, bias = head(features), head.rows(), head.bias
        else:
            bias = getattr(model, "logit_bias", None)
            ours, rows = _said_by_prompt(loaded, names, features), _prompted(loaded, names)
        weight = model.logit_scale.float().exp() * rows
        constant = weight.new_zeros(len(names)) if bias is None else bias.float().expand(len(names))
    with whole_folder(folder) as part:
        write_tensors(part / WEIGHTS, {"weight": weight, "bias": constant})
        write_json(part / CONFIG, {"model": loaded.name, "pretrained": loaded.pretrained, "classes": list(names)})
        layer = _layer(part)
        with torch.no_grad():
            return proved(model, {"logits": ours}, {"logits": layer(features.cpu().float())})


def reload_lines(folder: Path) -> list[str]:
    """The expressions that make the layer and fill it."""
    layer = _layer(folder)
    return [
        f"layer = torch.nn.Linear({layer.in_features}, {layer.out_features})",
        f"layer.load_state_dict(safetensors.torch.load_file({str(folder / WEIGHTS)!r}))",
        "layer(model.encode_image(images, normalize=True))  # logits of the classes in " + CONFIG,
    ]


def changes_vision(applied: Applied) -> bool:
    """Whether the layer needs the features of the tuned vision tower, and not those of the base."""
    own = any(p.role.startswith("vision.") and (p.trainable or p.init is not None) for p in applied.plan.parameters)
    return own or any(site.tower == "vision" and site.kind != "head" for site, _ in applied.additions)


def _head(applied: Applied) -> ClassHead | None:
    return next((addition for _, addition in applied.additions if isinstance(addition, ClassHead)), None)


def _names(applied: Applied, given: Sequence[str] | None) -> Sequence[str]:
    sites = [site for site, _ in applied.additions]
    prompts = [site for site in sites if isinstance(site, PromptSite) and site.tower == "text"]
    own = next((site.classes for site in sites if site.kind in ("head", "prompt") and site.classes), ())
    if own and given is not None:
        raise ExportError(f"this policy knows its own {len(own)} classes", "leave out --classes")
    if own:
        return own
    if not prompts:
        raise ExportError("this policy has no head and no text prompt", "--to open_clip holds what it trained")
    if not given:
        raise ExportError(
            "this prompt is for any class: which ones the classifier shall tell apart is to be said",
            "--classes FILE of one a line, imagenet, or data: those that the run was trained on",
        )
    return given


def _prompted(loaded: Loaded, names: Sequence[str]) -> Tensor:
    """(C, D) features of the names as they are, the prompt being the model's, fp32."""
    model: Any = loaded.model
    tokens = fitting_tokenizer(model, loaded.tokenizer, "a prompt")
    columns = open_clip.build_zero_shot_classifier(model, tokens, names, ("{}",), _TOGETHER, model.logit_scale.device)
    rows: Tensor = columns.T.float()
    return rows


def _said_by_prompt(loaded: Loaded, names: Sequence[str], features: Tensor) -> Tensor:
    """(B, C) logits as the model gives them, a class at a time."""
    model: Any = loaded.model
    texts = [model.encode_text(loaded.tokenizer([name]).to(features.device), normalize=True) for name in names]
    logits: Tensor = model.logit_scale.exp() * features @ torch.cat(texts).T
    bias = getattr(model, "logit_bias", None)
    return logits if bias is None else logits + bias


def _layer(folder: Path) -> nn.Linear:
    tensors = load_file(folder / WEIGHTS)
    classes, width = tensors["weight"].shape
    layer = nn.Linear(width, classes)
    layer.load_state_dict(tensors)
    return layer
