"""Reliability diagrams as SVG, a panel a set."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from clipfreeze.errors import DataError, RunError

if TYPE_CHECKING:
    from clipfreeze.train.calibration import Bin
    from clipfreeze.train.evaluate import Metrics

SIDE, GAP, STRIP = 220, 60, 40  # of a panel, around it, and the strip of counts below it, in pixels
_WIDTH, _HEIGHT = SIDE + GAP, GAP + SIDE + 10 + STRIP + GAP
_STYLE = (
    "text { font: 12px sans-serif; fill: #222 } .small { font-size: 10px } .middle { text-anchor: middle } "
    ".end { text-anchor: end } .accuracy { fill: #4477aa } .count { fill: #bbbbbb } "
    ".frame { fill: none; stroke: #222 } .ideal { stroke: #222; stroke-dasharray: 4 3 } .mean { fill: #cc3311 }"
)


def check_plot_path(path: Path) -> None:
    """DataError unless the file is one that a diagram can become; before anything is measured."""
    if path.suffix.lower() != ".svg":
        raise DataError(f"--plot {path}: a diagram is written as SVG", f"--plot {path.with_suffix('.svg')}")
    if not path.parent.is_dir():
        raise DataError(f"--plot {path}: there is no folder {path.parent}", "make it first")


def write_diagrams(found: Mapping[str, Metrics], path: Path) -> None:
    """One file. DataError where no set has classes; RunError in the system's words where it cannot be written."""
    shown = {name: metrics for name, metrics in found.items() if metrics.reliability}
    if not shown:
        raise DataError("--plot shows how sure a classification is, and no set has classes", "leave out --plot")
    try:
        path.write_text(diagrams(shown), encoding="utf-8")
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror}", "give another --plot") from error


def diagrams(found: Mapping[str, Metrics]) -> str:
    """Accuracy by confidence beside the diagonal of one who is as often right as sure, and the share of each bin."""
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{GAP // 2 + _WIDTH * len(found)}" height="{_HEIGHT}">',
        f"<style>{_STYLE}</style>",
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for number, (name, metrics) in enumerate(found.items()):
        lines += [f'<g transform="translate({GAP + number * _WIDTH} {GAP})">', *_panel(name, metrics), "</g>"]
    return "\n".join([*lines, "</svg>"]) + "\n"


def _panel(name: str, metrics: Metrics) -> Iterator[str]:
    ece, confidence = (100 * metrics.scores[score].value for score in ("ece", "confidence"))
    yield f'<text class="middle" x="{SIDE / 2}" y="-30">{escape(name)}: {metrics.images} images</text>'
    said = f"accuracy {100 * metrics.main.value:.1f} %, confidence {confidence:.1f} %, ECE {ece:.1f} %"
    yield f'<text class="middle small" x="{SIDE / 2}" y="-12">{said}</text>'
    for each in metrics.reliability:
        yield from _bars(each, metrics.images)
    yield f'<line class="ideal" x1="0" y1="{SIDE}" x2="{SIDE}" y2="0"/>'
    yield f'<rect class="frame" width="{SIDE}" height="{SIDE}"/>'
    bottom = SIDE + 10 + STRIP
    yield f'<rect class="frame" y="{SIDE + 10}" width="{SIDE}" height="{STRIP}"/>'
    for share in (0.0, 0.5, 1.0):
        yield f'<text class="small end" x="-4" y="{SIDE * (1 - share) + 4:g}">{100 * share:.0f}</text>'
        yield f'<text class="small middle" x="{SIDE * share:g}" y="{bottom + 14}">{100 * share:.0f}</text>'
    yield f'<text class="small middle" x="{SIDE / 2}" y="{bottom + 30}">confidence, %</text>'
    yield f'<text class="small middle" transform="translate(-28 {SIDE / 2}) rotate(-90)">accuracy, %</text>'
    yield f'<text class="small end" x="-4" y="{bottom - STRIP / 2 + 4}">share</text>'


def _bars(each: Bin, images: int) -> Iterator[str]:
    """The bin's accuracy with a dot at its mean confidence, and below its share of all images."""
    if not each.count:
        return
    left, width = SIDE * each.low, SIDE * (each.high - each.low)
    for kind, height, bottom in (
        ("accuracy", SIDE * each.accuracy, SIDE),
        ("count", STRIP * each.count / images, SIDE + 10 + STRIP),
    ):
        where = f'x="{left + 1:.1f}" y="{bottom - height:.1f}" width="{width - 2:.1f}" height="{height:.1f}"'
        yield f'<rect class="{kind}" {where}/>'
    yield f'<circle class="mean" cx="{SIDE * each.confidence:.1f}" cy="{SIDE * (1 - each.accuracy):.1f}" r="3"/>'
