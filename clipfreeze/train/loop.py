"""The training loop: what runs between two measurements."""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from torch import Tensor, nn
from tqdm import tqdm

from clipfreeze.errors import DataError, InterruptedRunError, RunError
from clipfreeze.train.batches import Batch, Tokenizer, Transform, training_loader, unbroken
from clipfreeze.train.evaluate import Encoder, Metrics
from clipfreeze.train.folder import METRICS, RESULTS, append_json, check_room, write_text
from clipfreeze.train.objective import training_module
from clipfreeze.train.pairs import PairSet
from clipfreeze.train.sources import read_data
from clipfreeze.train.tuned import for_training, measure_tuned, measure_untuned, unknown_notes

if TYPE_CHECKING:
    from clipfreeze.changes import Applied

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """What a run came to: metrics of each set before and after, and what the user should know."""

    before: dict[str, Metrics]
    after: dict[str, Metrics]
    steps: int
    seconds: float  # of training alone
    loss: float  # mean over the last epoch
    notes: tuple[str, ...]
    folder: Path | None


def make_accelerator() -> Accelerator:
    """The device there is, bf16 autocast where CUDA has it; trained weights stay fp32."""
    bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    if AcceleratorState._shared_state:  # a script has made one, with a precision of its own
        accelerator = Accelerator()
    else:
        accelerator = Accelerator(mixed_precision="bf16" if bf16 else "no")
    if accelerator.num_processes > 1:
        raise RunError("this version trains in one process", "start it without torchrun or accelerate launch")
    return accelerator


def fit(
    applied: Applied,
    train: PairSet | str | Path,
    tests: Mapping[str, PairSet | str | Path] | None = None,
    *,
    tokenizer: Callable[..., Tensor],
    transform: Transform,
    train_transform: Transform | None = None,
    epochs: int = 1,
    batch_size: int = 64,
    seed: int = 0,
    num_workers: int = 0,
    folder: Path | None = None,
) -> Result:
    """Train what the plan trains, and measure `tests` (the goal first) before and after.

    `transform` serves evaluation, and training too unless `train_transform` is given. The same seed gives the same
    weights, bit for bit on one CPU, whatever `num_workers`. `folder` receives plan and weights after every epoch,
    metrics.jsonl line by line and results.json at the end. The model is left in eval mode.

    A plan with a head trains on the labels of its classes. Before is the model without what the plan adds.
    """
    if epochs < 1:
        raise DataError(f"{epochs} epochs train nothing", "--epochs 1 or more")
    train = train if isinstance(train, PairSet) else read_data(train)
    sets = {name: pairs if isinstance(pairs, PairSet) else read_data(pairs) for name, pairs in (tests or {}).items()}
    if len({pair.label if pair.label is not None else pair.captions for pair in train}) < 2:
        raise DataError(
            f"all pairs of {train.name} say the same: there is nothing to tell apart", "give two captions or classes"
        )
    model: Any = applied.model
    tokens = Tokenizer(tokenizer, model)
    tuning = training_module(applied)
    loader: Any = training_loader(
        for_training(train, applied.plan.sites),
        train_transform or transform,
        tokens if tuning.reads_texts else None,
        batch_size=batch_size,
        seed=seed,
        num_workers=num_workers,
        labels=tuning.reads_labels,
    )
    if folder is not None:  # twice the weights: the new file is whole before the old one goes
        check_room(folder, 2 * sum(p.numel() * p.element_size() for p in applied.trainable().values()) + 10**6)

    accelerator: Any = make_accelerator()
    set_seed(seed)
    optimizer = applied.optimizer()
    module, prepared, loader = accelerator.prepare(tuning, optimizer, loader)
    scheduler = applied.scheduler(optimizer, epochs * len(loader), len(loader))  # last: prepare makes new group dicts
    encoder = Encoder(model, tokens, transform, num_workers=num_workers)
    before = {name: measure_untuned(encoder, pairs, applied) for name, pairs in sets.items()}

    set_seed(seed)
    module.train()
    training = _Training(applied, accelerator, module, prepared, scheduler, loader, folder)
    training.tell(_warmup_notes(applied, epochs, len(loader)))
    training.tell([note for name, pairs in sets.items() for note in unknown_notes(name, pairs, applied.plan.sites)])
    started = time.monotonic()
    epoch = 0
    try:
        with _progress(epochs * len(loader)) as bar:
            for epoch in range(1, epochs + 1):
                loss = training.run_epoch(epoch, bar)
                if folder is not None:
                    applied.save(folder)
    except KeyboardInterrupt:
        kept = f"{folder} holds the weights of epoch {epoch - 1}" if folder and epoch > 1 else "no weights were saved"
        raise InterruptedRunError(f"stopped after step {training.step} of {epochs * len(loader)}: {kept}") from None
    seconds = time.monotonic() - started
    module.eval()

    after = {name: measure_tuned(encoder, pairs, applied) for name, pairs in sets.items()}
    training.tell(_collapse_notes(module, loss, batch_size) + _decline_notes(before, after))
    result = Result(before, after, training.step, seconds, loss, tuple(training.notes), folder)
    if folder is not None:
        write_text(folder / RESULTS, json.dumps(_plain(result), indent=2) + "\n")
    return result


@dataclass
class _Training:
    """The run under way."""

    applied: Applied
    accelerator: Any
    module: Any
    optimizer: Any
    scheduler: Any
    loader: Any
    folder: Path | None
    step: int = 0
    notes: list[str] = field(default_factory=list)
    reached: dict[str, nn.Parameter] = field(default_factory=dict)

    def run_epoch(self, epoch: int, bar: Any) -> float:
        """One pass over the data; the mean loss."""
        losses = []
        last = time.monotonic()
        for batch in unbroken(self.loader):
            lr = {str(group["name"]): float(group["lr"]) for group in self.optimizer.param_groups}
            losses.append(self._update(batch, lr))
            now = time.monotonic()
            speed, last = len(batch["image"]) / (now - last), now
            record = {"step": self.step, "epoch": epoch, "loss": losses[-1], "lr": lr, "samples_per_s": round(speed, 2)}
            if self.folder is not None:
                append_json(self.folder / METRICS, record)
            bar.set_postfix_str(_shown(record), refresh=False)
            bar.update()
        if bar.disable:
            print(f"epoch {epoch}: {_shown(record)}", file=sys.stderr, flush=True)
        _check_weights(self.reached, self.step)
        return sum(losses) / len(losses)

    def _update(self, batch: Batch, lr: dict[str, float]) -> float:
        """One optimizer step; its loss."""
        loss = self.module(**batch)
        value = _finite_loss(loss, self.step, lr)
        self.accelerator.backward(loss)
        if self.step == 0:
            self.tell(gradient_notes(self.applied))
            self.reached = {name: p for name, p in self.applied.trainable().items() if p.grad is not None}
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.step += 1
        return value

    def tell(self, notes: list[str]) -> None:
        """Now, and in the result."""
        for note in notes:
            log.warning(note)
        self.notes += notes


def _progress(steps: int) -> Any:
    """A bar where there is a terminal; elsewhere the loop prints a line an epoch."""
    return tqdm(total=steps, unit="step", file=sys.stderr, disable=None, dynamic_ncols=True)


def _shown(record: dict[str, Any]) -> str:
    return f"loss {record['loss']:.3f}, lr {max(record['lr'].values()):.1e}, {record['samples_per_s']:.0f} pictures/s"


def _plain(result: Result) -> dict[str, Any]:
    values = asdict(result)
    del values["folder"]
    return values


def _finite_loss(loss: Tensor, step: int, lr: dict[str, float]) -> float:
    value = loss.item()
    if not math.isfinite(value):
        rates = ", ".join(f"{name} {rate:g}" for name, rate in lr.items())
        raise RunError(f"the loss is {value} at step {step + 1} (lr: {rates})", "lower the lr or lengthen the warmup")
    return value


def gradient_notes(applied: Applied) -> list[str]:
    """Which trained parameters the loss does not reach; RunError when a gradient is not finite."""
    gradients = {name: parameter.grad for name, parameter in applied.trainable().items()}
    if bad := [name for name, grad in gradients.items() if grad is not None and not grad.isfinite().all()]:
        raise RunError(f"no finite gradient in the first step: {_few(bad)}", "look for nan or inf in the weights")
    idle = [name for name, grad in gradients.items() if grad is None]
    return [f"no gradient in the first step, so these stay as they are: {_few(idle)}"] if idle else []


def _check_weights(parameters: dict[str, nn.Parameter], step: int) -> None:
    if bad := [name for name, parameter in parameters.items() if not parameter.isfinite().all()]:
        raise RunError(f"weights are not finite numbers after step {step}: {_few(bad)}", "lower the lr")


def _warmup_notes(applied: Applied, epochs: int, steps_per_epoch: int) -> list[str]:
    steps = epochs * steps_per_epoch
    warmup = applied.plan.schedule.warmup_span.steps(steps, steps_per_epoch)
    return [f"the warmup of {warmup} steps is as long as the run of {steps}: shorten it"] if warmup >= steps else []


def _collapse_notes(module: Any, loss: float, batch_size: int) -> list[str]:
    chance = module.by_guessing(batch_size)
    if chance is None or abs(loss - chance) > 0.01 * chance:
        return []
    return [
        f"the loss stayed at {loss:.3f}, which is what guessing gives: "
        "features collapsed, captions all equal, or too small an lr"
    ]


def _decline_notes(before: dict[str, Metrics], after: dict[str, Metrics]) -> list[str]:
    """A goal that fell by more than two standard errors."""
    for name in list(before)[:1]:
        measured, start = next(iter(before[name].scores.items()))
        end = after[name].scores[measured]
        if start.value - end.value > 2 * math.hypot(start.error, end.error):
            return [f"{measured} on {name} fell from {start.value:.3f} to {end.value:.3f}: lower the lr, or train less"]
    return []


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
