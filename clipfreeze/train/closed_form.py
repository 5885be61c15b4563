"""Logit scale and bias alone: an epoch's features are constant, and the loss of all its batches goes to its minimum.

A step of the run is an epoch. What the loss reads of features are their products, which are kept; from there on no
encoder runs, and L-BFGS needs some dozens of evaluations. With class prompts this is temperature scaling (arXiv
1706.04599).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from clipfreeze.errors import DataError, Problem, RunError
from clipfreeze.train.batches import Batch, Loaded
from clipfreeze.train.distributed import gathered, summed, world_size
from clipfreeze.train.engine import Engine, Step, gradient_notes
from clipfreeze.train.objective import (
    Anchored,
    Chunk,
    ClassPrompts,
    Contrastive,
    Given,
    Training,
    clip_loss,
    positives_of,
)
from clipfreeze.train.settings import TrainingSettings

_ROUNDS = 5
"""Of L-BFGS from where the one before ended: a minimum on a bound may take two."""
_AT_ONCE = 2**17  # products, which a processor's cache holds
_WIDE = (-20.0, 20.0)
"""Of a logit scale without a clamp: past it a softmax of fp32 products is flat, or all at one place."""

Bounds = tuple[float, float]


def check_closed_form(settings: TrainingSettings) -> None:
    """DataError for settings that nothing would read."""
    steps = "lbfgs goes to the minimum and takes no steps on the way"
    wrong = [name for name in ("ema", "clip_grad") if getattr(settings, name) is not None]
    if problems := [Problem(f"{name} does not go with lbfgs: {steps}", "leave it out") for name in wrong]:
        raise DataError(problems)


class ClosedForm(Engine):
    """An engine whose every step is the minimum of the mean loss of an epoch's batches."""

    def wrap(self, batch: Batch) -> None:
        """Look up what trains; gradients of the ranks are averaged as they are made."""
        self.training = self.applied.training()

    @torch.no_grad()
    def epoch(
        self, batches: Iterable[tuple[Loaded, float]], ready: Callable[[Loaded], Batch]
    ) -> Iterator[tuple[Loaded, float]]:
        """One batch, of products and targets, from those of an epoch and the seconds that each was waited for; `ready`
        makes them ready for the encoders.
        """
        kept: dict[str, list[Tensor]] = {}
        prompts: dict[int, tuple[Tensor, Tensor]] = {}  # class prompts that came up, with their features
        broken: list[str] = []
        waited = 0.0
        for loaded, seconds in batches:
            batch = self._here(ready(loaded))
            image, text = batch.pop("image"), batch.pop("text")
            asked = loaded.batch["text"]
            _, texts = prompts.get(id(asked)) or (asked, self._features(text, True))
            if self.module.reads_classes:
                prompts[id(asked)] = (asked, texts)  # held, so that no other comes by its id
            for name, value in products_of(self.module, self._features(image, False), texts, **batch).items():
                kept.setdefault(name, []).append(value)
            broken += loaded.broken
            waited += seconds
        yield Loaded({name: torch.cat(kept.pop(name)) for name in list(kept)}, tuple(broken)), waited

    def update(self, batch: Batch, step: int, flags: Callable[[], list[float]], late: bool = False) -> Step:
        """Go to the minimum; the loss is the one there. RunError where it is no finite number."""
        optimizer = self.optimizer.optimizer  # without accelerate's, which may scale the loss
        bounds = {planned.name: planned.clamp for planned in self.applied.plan.trainable if planned.clamp}
        least = Least(self.module.model, self.training, bounds, batch)
        loss = least.find(optimizer)
        if not math.isfinite(loss):
            raise RunError(f"the loss is {loss} at step {step}", "look for nan or inf in the weights and pictures")
        if self.unproved:
            self.notes += gradient_notes(self.applied)
            self.unproved = False
        self.reached |= {name for name, p in self.training.items() if p.grad is not None}
        self.scheduler.step()
        optimizer.zero_grad()
        return Step(loss, summed(flags(), self.accelerator.device))

    def _features(self, given: Tensor | Given, is_text: bool) -> Tensor:
        count = math.ceil(len(given) / (self.settings.micro_batch or len(given)))
        parts: Sequence[Tensor | Given] = given.tensor_split(count)
        with self.accelerator.autocast():
            return torch.cat([self.module.encode(Chunk(part, is_text)) for part in parts])


def products_of(module: Training, image: Tensor, text: Tensor, **targets: Tensor) -> Batch:
    """What the objective reads of features (B, D) and (T, D): one row for each question that it asks.

    rows: (R, W) products, those of a softmax less the row's largest; matched: (R,) what they come to at the target;
    positives: (R,), where each product is a question of its own. The columns are those of all ranks.
    """
    if isinstance(module, Anchored):  # of features that stand still
        module = module.of
    if isinstance(module, ClassPrompts):
        target = nn.functional.one_hot(targets["label"], len(text))
        return _softmax_rows(_product(image, text), target)
    assert isinstance(module, Contrastive)
    rows, positives = _product(image, gathered(text)), positives_of(targets["concepts"])
    if module.objective is clip_loss:
        both = torch.cat([rows, _product(text, gathered(image))])
        return _softmax_rows(both, positives.repeat(2, 1))
    return {"rows": rows.float(), "matched": (rows * positives).sum(1), "positives": positives.sum(1)}


def loss_of(products: Batch, log_scale: float, bias: float) -> tuple[float, float, float]:
    """The objective's loss at a logit scale and bias, and its slopes: of rows of one batch or of several, their mean.

    Softmax: log sum exp(scale * row) - scale * matched, to which a bias is nothing. Sigmoid: the sum of
    log(1 + exp(scale * product + bias)), less the logits of the positives.
    """
    rows, matched = products["rows"], products["matched"]
    scale = math.exp(log_scale)
    sums = matched.new_zeros(3)
    for part in torch.split(rows, max(1, _AT_ONCE // rows.shape[1])):
        values = part.to(matched.dtype)
        if "positives" in products:
            logits = values * scale + bias
            chances = logits.sigmoid()
            sums += torch.stack([nn.functional.softplus(logits).sum(), (chances * values).sum(), chances.sum()])
        else:
            powers = (values * scale).exp_()
            total = powers.sum(1)
            sums[:2] += torch.stack([total.log().sum(), (powers.mul_(values).sum(1) / total).sum()])
    loss, by_scale, by_bias = (sums / len(rows)).tolist()
    target, positives = float(matched.mean()), 0.0
    if "positives" in products:
        positives = float(products["positives"].to(matched.dtype).mean())
    return loss - scale * target - bias * positives, scale * (by_scale - target), by_bias - positives


class Least:
    """The least mean loss over the rows of all ranks, by a model's logit scale and bias within their bounds."""

    def __init__(
        self, model: Any, scalars: Mapping[str, nn.Parameter], bounds: Mapping[str, Bounds], products: Batch
    ) -> None:
        self.model, self.products = model, products
        self.scalars = list(scalars.values())
        wide = {id(model.logit_scale): _WIDE}
        self.bounds = [
            p.detach().new_tensor(bounds.get(name, wide.get(id(p), (-math.inf, math.inf)))).tolist()
            for name, p in scalars.items()
        ]

    def find(self, optimizer: torch.optim.Optimizer) -> float:
        """Move the scalars there; the loss. Gradients are left as they are there, on a bound zero."""
        for _ in range(_ROUNDS if math.isfinite(self.evaluate()) else 0):
            before = self._values()
            optimizer.state.clear()
            optimizer.step(self.evaluate)
            for scalar, value in zip(self.scalars, self._within(self._values()), strict=True):
                scalar.data.fill_(value)
            if self._values() == before:
                break
        optimizer.state.clear()  # nothing of it is of use to the next epoch
        return self.evaluate()

    def evaluate(self) -> float:
        """The loss where the scalars are, and their gradients.

        Past a bound it goes on straight: level where it would fall, up where it rises. So its minimum is the one within
        bounds, and a line search that leaps too far comes back.
        """
        values = self._values()
        nearest = self._within(values)
        loss, slopes = self._loss(nearest)
        for scalar, value, at, bounds, slope in zip(self.scalars, values, nearest, self.bounds, slopes, strict=True):
            if slope is not None:
                low, high = bounds
                slope = max(slope, 0.0) if value >= high else min(slope, 0.0) if value <= low else slope
                loss += slope * (value - at)
            scalar.grad = None if slope is None else torch.full_like(scalar, slope)
        return loss

    def _loss(self, values: list[float]) -> tuple[float, list[float | None]]:
        """Over all ranks, with the slope by each scalar; None where it does not depend on one."""
        value_of = {id(scalar): value for scalar, value in zip(self.scalars, values, strict=True)}
        scale, bias = (
            0.0 if held is None else value_of.get(id(held), float(held.detach()))
            for held in (self.model.logit_scale, self.model.logit_bias)
        )
        own = loss_of(self.products, scale, bias)
        loss, by_scale, by_bias = (of / world_size() for of in summed([*own], self.products["rows"].device))
        slope_of = {id(self.model.logit_scale): by_scale}
        if "positives" in self.products:
            slope_of[id(self.model.logit_bias)] = by_bias
        return loss, [slope_of.get(id(scalar)) for scalar in self.scalars]

    def _values(self) -> list[float]:
        return [float(scalar.detach()) for scalar in self.scalars]

    def _within(self, values: list[float]) -> list[float]:
        return [min(max(value, low), high) for value, (low, high) in zip(values, self.bounds, strict=True)]


def _product(one: Tensor, other: Tensor) -> Tensor:
    """(A, D), (B, D) -> (A, B), in double precision where the device has it."""
    exact = torch.float32 if one.device.type == "mps" else torch.float64
    return one.to(exact) @ other.to(exact).T


def _softmax_rows(products: Tensor, target: Tensor) -> Batch:
    """Of (R, W) products, and positives by 1 or True, of which each row has one or more."""
    rest = products - products.amax(1, keepdim=True)
    return {"rows": rest.float(), "matched": (rest * target).sum(1) / target.sum(1)}
