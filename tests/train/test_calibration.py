"""Calibration agrees with torchmetrics, and with what can be counted by hand."""

from __future__ import annotations

import pytest
import torch
from test_evaluate import encoder
from torchmetrics.functional.classification import multiclass_calibration_error

from clipfreeze.train.calibration import BINS, calibration_gaps, reliability
from clipfreeze.train.evaluate import measure

from hand import colour_pairs


@pytest.mark.parametrize("sharpness", [0.1, 1.0, 3.0])
def test_the_calibration_error_is_that_of_torchmetrics(sharpness: float) -> None:
    torch.manual_seed(0)
    probabilities, labels = (sharpness * torch.randn(500, 7)).softmax(1), torch.randint(7, (500,))
    confidence, best = probabilities.max(1)
    hits = (best == labels).double()
    expected = multiclass_calibration_error(probabilities, labels, num_classes=7, n_bins=BINS, norm="l1")
    gaps = calibration_gaps(confidence, hits)
    assert gaps.mean().item() == pytest.approx(expected.item(), rel=1e-5)
    bins = reliability(confidence, hits)
    assert sum(b.count for b in bins) == 500
    assert sum(b.count * abs(b.accuracy - b.confidence) for b in bins) / 500 == pytest.approx(expected.item(), rel=1e-5)


def test_bins_are_those_of_guo_et_al() -> None:
    confidence = torch.tensor([1.0, 0.99, 1 / 3, 0.34, 0.0], dtype=torch.double)
    bins = reliability(confidence, torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0]))
    counts = {number: b.count for number, b in enumerate(bins) if b.count}
    assert counts == {0: 1, 4: 1, 5: 1, 14: 2}  # (low, high]: a third is the end of the fifth, 1 is in the last
    assert (bins[14].low, bins[14].high) == (14 / 15, 1)
    assert (bins[14].confidence, bins[14].accuracy) == (0.995, 0.5)
    assert (bins[1].confidence, bins[1].accuracy) == (0, 0)


def test_one_who_is_always_sure_and_always_wrong_is_off_by_one() -> None:
    assert calibration_gaps(torch.ones(4), torch.zeros(4)).tolist() == [1] * 4
    assert calibration_gaps(torch.ones(4), torch.ones(4)).tolist() == [0] * 4


def test_classification_has_it_and_retrieval_has_not() -> None:
    metrics = measure(encoder(), colour_pairs(3, labelled=True))
    assert list(metrics.scores) == ["top1", "top5", "nll", "confidence", "ece"]
    means = (
        sum(b.count * b.confidence for b in metrics.reliability),
        sum(b.count * b.accuracy for b in metrics.reliability),
    )
    assert means == pytest.approx((24 * metrics.scores["confidence"].value, 24 * metrics.main.value))
    retrieval = measure(encoder(), colour_pairs())
    assert retrieval.reliability == ()
    assert retrieval.main is retrieval.scores["image_to_text_recall_at_1"]
