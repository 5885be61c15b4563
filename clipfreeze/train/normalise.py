"""Pictures as bytes as far as the device, and normalised there: a quarter of the memory and of what is sent.

open_clip's transforms end in ToTensor and Normalize, which are the same numbers on any device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from open_clip import transform as open_clips
from PIL import Image
from timm.data import transforms as timms
from torch import Tensor
from torchvision.transforms import Compose, Normalize, ToTensor
from torchvision.transforms.functional import pil_to_tensor

from clipfreeze.train.batches import Transform

_TO_TENSOR = (ToTensor, open_clips.MaybeToTensor, timms.MaybeToTensor)


def split_transform(transform: Transform) -> tuple[Transform, Callable[[Tensor], Tensor]]:
    """A transform of pictures to (3, H, W) uint8, and what makes of (B, 3, H, W) of them what `transform` gives.

    Bit for bit on the CPU, and with the same dice. A transform that does not end so stays as it is.
    """
    made: Any = transform
    steps = made.transforms if type(made) is Compose else []
    if len(steps) < 2 or type(steps[-2]) not in _TO_TENSOR or type(steps[-1]) is not Normalize:
        return transform, _unchanged
    return _ToBytes(steps[:-2], steps[-2:]), _Normalised(steps[-1])


def _unchanged(images: Tensor) -> Tensor:
    return images


class _ToBytes:
    """All steps but the last ones; those too where others have made something else than an RGB picture."""

    def __init__(self, steps: list[Any], last: list[Any]) -> None:
        self.steps, self.last = steps, last

    @property
    def transforms(self) -> list[Any]:
        """All steps, as of a Compose."""
        return [*self.steps, *self.last]

    def __call__(self, picture: Image.Image) -> Tensor:
        made: Any = picture
        for step in self.steps:
            made = step(made)
        if isinstance(made, Image.Image) and made.mode == "RGB":
            image: Tensor = pil_to_tensor(made)
            return image
        for step in self.last:
            made = step(made)
        whole: Tensor = made
        return whole


class _Normalised:
    """What ToTensor and Normalize do to bytes; what is no bytes has been through both."""

    def __init__(self, normalize: Normalize) -> None:
        self.mean, self.std = (
            torch.as_tensor(of, dtype=torch.get_default_dtype()).view(-1, 1, 1)
            for of in (normalize.mean, normalize.std)
        )

    def __call__(self, images: Tensor) -> Tensor:
        """images: (B, 3, H, W)."""
        if images.dtype != torch.uint8:
            return images
        self.mean, self.std = self.mean.to(images.device), self.std.to(images.device)  # once: it waits for the device
        return images.to(self.mean.dtype).div_(255).sub_(self.mean).div_(self.std)
