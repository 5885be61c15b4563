"""The proof of an export: both encoders, loaded back, say the same of a probe batch as the model that was exported."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from clipfreeze.errors import RunError
from clipfreeze.inject.modes import evaluating
from clipfreeze.models import Loaded

CAPTIONS = ("a photo of a cat", "Two dogs' houses, 3 cafés & a tree!", "far too many words " * 50)


def probe_pictures(height: int, width: int) -> list[Image.Image]:
    """Two pictures of noise, always the same."""
    noise = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (2, height, width, 3), dtype=torch.uint8, generator=noise)
    return [Image.fromarray(picture.numpy()) for picture in pixels]


def probe_outputs(loaded: Loaded, pictures: list[Image.Image]) -> dict[str, Tensor]:
    """What the model makes of the pictures and of CAPTIONS, by its own transform and tokenizer; and its scalars.

    Of a model with a decoder, what that makes of both, too.
    """
    model: Any = loaded.model
    pixels = probe_pixels(loaded, pictures)
    tokens = loaded.tokenizer(list(CAPTIONS)).to(pixels.device)
    with torch.no_grad(), evaluating(model):
        outputs = {
            "image features": model.encode_image(pixels, normalize=False),
            "text features": model.encode_text(tokens, normalize=False),
        }
        if "text_decoder" in dict(model.named_children()):
            outputs["decoder logits"] = model(pixels, tokens[: len(pixels)])["logits"]
    return outputs | {
        name: tensor.reshape(()) for name, tensor in model.named_parameters(recurse=False) if "logit" in name
    }


def probe_pixels(loaded: Loaded, pictures: list[Image.Image]) -> Tensor:
    """(B, 3, H, W) of the pictures by the model's own transform, where the model is and of its type."""
    model: Any = loaded.model
    dtype = next(module.weight.dtype for module in model.visual.modules() if isinstance(module, nn.Conv2d))
    pixels = torch.stack([loaded.transform(picture) for picture in pictures])
    return pixels.to(model.logit_scale.device, dtype)


def proved(model: nn.Module, ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """The largest difference between `model` and what was loaded back; RunError when it is too large.

    Too large is more than half of the digits that the model's least precise weights have, counted from the largest
    feature: other orders of summing stay far below, another activation or a lost weight is far above.
    """
    eps = max(torch.finfo(parameter.dtype).eps for parameter in model.parameters())
    differences = {}
    for name, tensor in ours.items():
        expected, found = (each.detach().double().cpu() for each in (tensor, theirs[name]))
        difference, bound = float((expected - found).abs().max()), eps**0.5 * float(expected.abs().max())
        if not difference <= bound:  # nan is in no order
            what = f"{name} differ by {difference:.1g} once the export is loaded back; the bound is {bound:.1g}"
            raise RunError(what, "this is a fault of the export or weights that are not finite; nothing was written")
        differences[name] = difference
    return max(differences.values())
