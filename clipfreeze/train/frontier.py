"""Between the base and what was trained: weights interpolated as in WiSE-FT (arXiv 2109.01903), LoRA in part."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clipfreeze.changes import Applied
from clipfreeze.errors import ApplyError, DataError
from clipfreeze.inject.init import overwrite
from clipfreeze.plan.value import Plan
from clipfreeze.train.evaluate import Metrics
from clipfreeze.train.retain import check_floor

ALPHAS = tuple(tenth / 10 for tenth in range(11))


@dataclass(frozen=True, slots=True)
class Point:
    """What the model `alpha` of the way from its base (0) to what was trained (1) does on each set."""

    alpha: float
    metrics: dict[str, Metrics]


@dataclass(frozen=True, slots=True)
class Frontier:
    """Points from the base on; the sets are the same at each."""

    points: tuple[Point, ...]


def start_values(plan: Plan, base: nn.Module) -> dict[str, Tensor]:
    """What `base`, the plan not being applied to it yet, has of its own where the plan changes it; on the CPU."""
    parameters = dict(base.named_parameters())
    changing = (p for p in plan.parameters if p.origin == "model" and (p.trainable or p.init is not None))
    return {planned.name: parameters[planned.name].detach().to("cpu", copy=True) for planned in changing}


@contextmanager
def interpolating(applied: Applied, start: Mapping[str, Tensor], alpha: float) -> Iterator[None]:
    """The model `alpha` of the way from `start` inside; afterwards every bit of it is as before."""
    with ExitStack() as undo:
        _move(applied, start, alpha, undo)
        yield


def interpolate(applied: Applied, start: Mapping[str, Tensor], alpha: float) -> None:
    """For good: (1 - alpha) start + alpha trained of the model's own weights, LoRA and adapters at strength alpha.

    Raises ApplyError, the model being as it was, for no alpha and for a prompt or a head, of which a part has no
    meaning.
    """
    _move(applied, start, alpha, ExitStack())  # which nobody closes


def wise_frontier(
    applied: Applied,
    start: Mapping[str, Tensor],
    measure: Callable[[], dict[str, Metrics]],
    alphas: Sequence[float] = ALPHAS,
) -> Frontier:
    """`measure` of the model at each alpha, and at 0, which the others are compared with; the model is as before."""
    points = []
    for alpha in sorted({0.0, *alphas}):
        with interpolating(applied, start, alpha):
            points.append(Point(alpha, measure()))
    return Frontier(tuple(points))


def best_alpha(frontier: Frontier, goal: str, retain: Sequence[str] = (), floor: float | None = None) -> float:
    """Where the goal's main score is highest; of equal ones the nearest to the base.

    With a floor among those alone where each of the `retain` sets keeps that share of its main score at alpha 0.
    """
    check_retain(retain, floor)
    share = floor or 0.0
    kept = [point for point in frontier.points if all(_keeps(frontier, point, name, share) for name in retain)]
    return max(kept, key=lambda point: (point.metrics[goal].main.value, -point.alpha)).alpha


def check_retain(retain: Sequence[str], floor: float | None) -> None:
    """DataError for a floor that is no share of a score, or under nothing."""
    if floor is not None:
        check_floor(floor)
        if not retain:
            raise DataError("a retain floor, and no set beside the goal to retain", "give another set: --data")


def _keeps(frontier: Frontier, point: Point, name: str, floor: float) -> bool:
    return point.metrics[name].main.value >= floor * frontier.points[0].metrics[name].main.value


def _move(applied: Applied, start: Mapping[str, Tensor], alpha: float, undo: ExitStack) -> None:
    if not 0 <= alpha <= 1:
        raise ApplyError(f"an alpha of {alpha:g}", "0 (the base) to 1 (as trained)")
    if whole := dict.fromkeys(site.kind for site, addition in applied.additions if not addition.scalable):
        kinds = " and ".join(whole)
        raise ApplyError(f"this policy adds what has no alpha: {kinds}", "weights, LoRA and adapters have one")
    parameters = dict(applied.model.named_parameters())
    between = {
        name: torch.lerp(value.to(parameters[name]), parameters[name].detach(), alpha) for name, value in start.items()
    }
    if applied.additions:
        undo.callback(applied.set_scale, applied.scale)
        applied.set_scale(alpha)
    overwrite(applied.model, between, undo)
