"""Reliability diagrams: what they draw is what was measured."""

from xml.etree import ElementTree

import pytest
import torch

from clipfreeze.cli.diagram import SIDE, STRIP, check_plot_path, diagrams, write_diagrams
from clipfreeze.errors import DataError, RunError
from clipfreeze.train.calibration import reliability
from clipfreeze.train.evaluate import Metrics, Score

SVG = "{http://www.w3.org/2000/svg}"
SCORES = {"top1": Score(0.75, 0.2), "confidence": Score(0.7, 0.1), "ece": Score(0.25, 0.1)}


def measured() -> Metrics:
    confidence, hits = torch.tensor([0.95, 0.97, 0.5, 0.1]), torch.tensor([1.0, 0.0, 1.0, 1.0])
    return Metrics("zero-shot", 4, 10, SCORES, reliability(confidence, hits))


def drawn(root: ElementTree.Element, kind: str) -> list[dict[str, str]]:
    return [element.attrib for element in root.iter() if element.get("class") == kind]


def test_a_panel_a_set_with_the_measured_bars():
    root = ElementTree.fromstring(diagrams({"cats & <dogs>": measured(), "other": measured()}))
    assert root.tag == f"{SVG}svg"
    assert len(root.findall(f"{SVG}g")) == 2
    texts = [element.text for element in root.iter(f"{SVG}text")]
    assert "cats & <dogs>: 4 images" in texts
    assert "accuracy 75.0 %, confidence 70.0 %, ECE 25.0 %" in texts
    heights = [float(bar["height"]) for bar in drawn(root, "accuracy")]
    assert heights == [SIDE, SIDE, SIDE / 2] * 2  # of the bins that hold something, the lowest first
    assert [float(bar["height"]) for bar in drawn(root, "count")] == [STRIP / 4, STRIP / 4, STRIP / 2] * 2
    dots = [(float(dot["cx"]) / SIDE, 1 - float(dot["cy"]) / SIDE) for dot in drawn(root, "mean")][:3]
    assert dots == [pytest.approx(dot, abs=1e-3) for dot in [(0.1, 1), (0.5, 1), (0.96, 0.5)]]


def test_what_cannot_be_drawn_or_written_is_said(tmp_path):
    with pytest.raises(DataError, match=r"written as SVG\n  fix: --plot a.svg"):
        check_plot_path(tmp_path.__class__("a.png"))
    with pytest.raises(DataError, match="there is no folder"):
        check_plot_path(tmp_path / "nothing" / "a.svg")
    with pytest.raises(DataError, match="no set has classes"):
        write_diagrams({"captions": Metrics("retrieval", 4, 4, {})}, tmp_path / "a.svg")
    (tmp_path / "taken.svg").mkdir()
    with pytest.raises(RunError, match="cannot write"):
        write_diagrams({"classes": measured()}, tmp_path / "taken.svg")
    write_diagrams({"classes": measured(), "captions": Metrics("retrieval", 4, 4, {})}, tmp_path / "a.svg")
    assert (tmp_path / "a.svg").read_text().count("<g ") == 1
