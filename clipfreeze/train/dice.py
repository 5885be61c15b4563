"""torch's random numbers on the CPU and on a CUDA device: where they stand, and drawing them again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor


class Dice(NamedTuple):
    """States of the generators."""

    cpu: Tensor
    cuda: Tensor | None


def dice_on(device: torch.device) -> Dice:
    """Where the generators that work on `device` may draw from stand."""
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return Dice(torch.get_rng_state(), cuda)


def throw_again(dice: Dice, device: torch.device) -> None:
    """Set the generators to draw what they drew from there."""
    torch.set_rng_state(dice.cpu)
    if dice.cuda is not None:
        torch.cuda.set_rng_state(dice.cuda, device)


@contextmanager
def undrawn(device: torch.device) -> Iterator[None]:
    """What is drawn inside is as if it had not been."""
    before = dice_on(device)
    try:
        yield
    finally:
        throw_again(before, device)
