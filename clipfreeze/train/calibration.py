"""How far a confidence can be believed: 15 bins of equal width, as Guo et al. have them (arXiv 1706.04599)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BINS = 15


@dataclass(frozen=True, slots=True)
class Bin:
    """The predictions whose confidence is above `low` and at most `high`; means are 0 where there are none."""

    low: float
    high: float
    count: int
    confidence: float
    accuracy: float


def reliability(confidence: Tensor, hits: Tensor) -> tuple[Bin, ...]:
    """BINS bins, the lowest first. confidence: (N,) of the top class, hits: (N,) chance that it is the right one."""
    place = _places(confidence)
    counts = torch.bincount(place, minlength=BINS)
    sums = (torch.bincount(place, values.double(), BINS) for values in (confidence, hits))
    means = ((total / counts.clamp(min=1)).tolist() for total in sums)
    rows = zip(counts.tolist(), *means, strict=True)
    return tuple(Bin(number / BINS, (number + 1) / BINS, *row) for number, row in enumerate(rows))


def calibration_gaps(confidence: Tensor, hits: Tensor) -> Tensor:
    """(N,) confidence minus hit, turned so that no bin's mean is negative: their mean is the calibration error.

    Their spread gives its standard error, the bins' signs being taken as known.
    """
    place, gaps = _places(confidence), confidence.double() - hits.double()
    return gaps * torch.bincount(place, gaps, BINS).sign()[place]


def _places(confidence: Tensor) -> Tensor:
    """(N,) the bin of each."""
    edges = torch.linspace(0, 1, BINS + 1, dtype=torch.double, device=confidence.device)
    return (torch.bucketize(confidence.double(), edges) - 1).clamp(0, BINS - 1)
