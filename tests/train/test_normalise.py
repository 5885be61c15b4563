"""Bytes that are normalised on the device are what the transform gives, bit for bit, drawn by the same dice."""

from __future__ import annotations

import pickle
import random
from typing import Any

import pytest
import torch
from open_clip.transform import AugmentationCfg, image_transform
from PIL import Image
from torchvision import transforms

from clipfreeze.train.batches import Draw, Sample, TrainingSamples
from clipfreeze.train.normalise import split_transform

from hand import colour_pairs, transform

MADE: dict[str, Any] = {
    "evaluation": image_transform(32, is_train=False),
    "training": image_transform(32, is_train=True),
    "timm": image_transform(32, is_train=True, aug_cfg=AugmentationCfg(use_timm=True, color_jitter=0.4)),
    "torchvision": transforms.Compose(
        [
            transforms.RandomCrop(32),
            transforms.ColorJitter(0.5),
            transforms.ToTensor(),
            transforms.Normalize([0.5], 0.2),
        ]
    ),
}


def noise(size: tuple[int, int] = (50, 40)) -> Image.Image:
    values = torch.randint(0, 256, (*size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    return Image.fromarray(values.numpy())


def drawn(transform: Any, count: int) -> list[torch.Tensor]:
    torch.manual_seed(5)
    random.seed(5)
    return [transform(noise()) for _ in range(count)]


@pytest.mark.parametrize("made", MADE)
def test_open_clip_s_transforms_are_split_bit_for_bit(made: str) -> None:
    as_bytes, normalise = split_transform(MADE[made])
    as_bytes = pickle.loads(pickle.dumps(as_bytes))  # as a worker gets it
    images = torch.stack(drawn(as_bytes, 6))
    assert images.dtype == torch.uint8
    assert torch.equal(normalise(images), torch.stack(drawn(MADE[made], 6)))


@pytest.mark.parametrize(
    "other",
    [
        lambda picture: torch.zeros(3, 2, 2),
        transforms.Compose([transforms.ToTensor()]),
        transforms.Compose([*MADE["evaluation"].transforms, transforms.RandomErasing(1.0)]),
        transforms.Compose([transforms.Grayscale(), transforms.ToTensor(), transforms.Normalize([0.5], [0.2])]),
    ],
)
def test_another_transform_stays_as_it_is(other: Any) -> None:
    as_bytes, normalise = split_transform(other)
    assert torch.equal(normalise(torch.stack(drawn(as_bytes, 1))), torch.stack(drawn(other, 1)))


def test_samples_draw_the_same_crops_and_captions_as_bytes() -> None:
    whole = transform(train=True)
    as_bytes, normalise = split_transform(whole)
    given, bytes_ = (TrainingSamples(colour_pairs(2), of, 0) for of in (whole, as_bytes))
    for position in range(4):
        one, other = given[Draw(0, position)], bytes_[Draw(0, position)]
        assert isinstance(one, Sample)
        assert isinstance(other, Sample)
        assert one.caption == other.caption
        assert torch.equal(normalise(other.image), one.image)
