"""One optimizer step, on one rank or many: forward, backward, clipping, and the first-step check."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import send_to_device
from torch import Tensor, nn

from clipfreeze.changes import Applied
from clipfreeze.errors import DataError, RunError
from clipfreeze.pieces import piece, whole
from clipfreeze.train.accumulate import backward_in_chunks
from clipfreeze.train.batches import Batch
from clipfreeze.train.dice import undrawn
from clipfreeze.train.distributed import summed, world_size
from clipfreeze.train.later import Later
from clipfreeze.train.objective import Anchored, Training
from clipfreeze.train.settings import TrainingSettings
from clipfreeze.train.sharding import average_gradients, clip_gradients

_MOST_SKIPPED = 20
"""Steps in a row that loss scaling may pass over: it halves the scale each time, from 2**16."""


def make_accelerator(precision: str = "auto") -> Accelerator:
    """The device there is and the ranks there are, autocast to `precision`; trained weights stay fp32.

    "auto" is bf16 where CUDA has it, fp32 elsewhere. DataError for fp16 without CUDA.
    """
    cuda = torch.cuda.is_available()
    choose_tf32(precision)
    if precision == "fp16" and not cuda:
        raise DataError("fp16 needs a CUDA device", "precision bf16 or fp32")
    if AcceleratorState._shared_state:  # made before in this process, by us or by a script
        accelerator = Accelerator()
        if precision != "auto" and accelerator.mixed_precision != ("no" if precision == "fp32" else precision):
            what = f"this process computes in {accelerator.mixed_precision} already (no: fp32), not in {precision}"
            raise DataError(what, "precision auto, or a process of its own")
        return accelerator
    if precision == "auto":
        precision = "bf16" if cuda and torch.cuda.is_bf16_supported() else "fp32"
    return Accelerator(mixed_precision="no" if precision == "fp32" else precision, cpu=not cuda)


def choose_tf32(precision: str) -> None:
    """Whether a GPU rounds what it multiplies in fp32 to 11 bits, 8 times as fast: unless that is asked for by name."""
    torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")
    torch.backends.cudnn.allow_tf32 = precision != "fp32"


@dataclass(frozen=True)
class Step:
    """What one step came to, on all ranks together."""

    told: float | Later
    flags: list[float]  # summed

    @property
    def loss(self) -> float:
        """The device is waited for where it is not there yet."""
        return self.told.read() if isinstance(self.told, Later) else self.told


@dataclass
class Engine:
    """Steps of a training module over the plan's optimizer."""

    applied: Applied
    module: Training
    accelerator: Any
    optimizer: Any  # prepared
    scheduler: Any
    settings: TrainingSettings
    normalise: Callable[[Tensor], Tensor] = lambda images: images  # of a batch, on the device
    reached: set[str] = field(default_factory=set)  # names that had a gradient in the first step
    notes: list[str] = field(default_factory=list)
    skipped: int = 0
    unproved: bool = True  # whether what trains now gets its gradients
    last_good: Path | None = None  # checkpoint
    training: dict[str, nn.Parameter] = field(init=False)  # what trains now
    wrapped: nn.Module = field(init=False)

    def __post_init__(self) -> None:
        self.wrapped = self.module

    def wrap(self, batch: Batch) -> None:
        """Look up what trains now, and let DistributedDataParallel reduce what of it gets a gradient from a piece of
        this batch; a split model does so itself.

        Before the first step, and again whenever another set of parameters trains: requires_grad is looked at once.
        """
        self.unproved = True
        self.training = self.applied.training()  # looked up once: it walks the model
        if world_size() == 1 or self.settings.shard:
            return
        idle = set(self.training) - self._reached_by(_piece(self._here(batch), self.module.reads_classes))
        names = {id(parameter): name for name, parameter in self.training.items() if name not in idle}
        aside = [name for name, parameter in self.module.named_parameters() if id(parameter) not in names]
        aside += [name for name, _ in self.module.named_buffers()]  # frozen: no BatchNorm moves
        wrapper: Any = nn.parallel.DistributedDataParallel
        wrapper._set_params_and_buffers_to_ignore_for_model(self.module, aside)
        device = self.accelerator.device
        self.wrapped = wrapper(
            self.module, device_ids=[device] if device.type == "cuda" else None, gradient_as_bucket_view=True
        )

    def update(self, batch: Batch, step: int, flags: Callable[[], list[float]], late: bool = False) -> Step:
        """Take step number `step`, from 1, and tell all ranks the `flags` of each. RunError where loss or the first
        gradients are not finite numbers; of a `late` one, alone on its device and not the first, the loss is not looked
        at here.
        """
        batch = self._here(batch)
        size = self.settings.micro_batch
        if isinstance(self.module, Anchored):
            with self.accelerator.autocast():
                batch |= self.module.start_features(self.applied, batch, size or len(batch["image"]))
        if size is not None and size < len(batch["image"]):
            loss = backward_in_chunks(self.wrapped, batch, size, self.accelerator.backward, self.accelerator.autocast)
        else:
            with self.accelerator.autocast():
                loss = self.wrapped(**batch)
            if not loss.requires_grad:
                raise RunError("the loss reaches nothing that trains", "another objective, or another policy")
            self.accelerator.backward(loss)
        if self.settings.shard:
            average_gradients(self.training.values())
        if late:
            taken = Step(Later(loss), flags())
        else:
            total, *told = summed([loss.item(), *flags()], loss.device)
            taken = Step(total / world_size(), told)
            self.check_loss(taken.loss, step)
        if self.unproved and math.isfinite(taken.loss):
            self.notes += gradient_notes(self.applied, scaled=self.accelerator.scaler is not None)
            self.unproved = False
        self.reached |= {name for name, p in self.training.items() if p.grad is not None}
        if self.settings.clip_grad is not None and self.settings.shard:
            clip_gradients(self.training.values(), self.settings.clip_grad)
        elif self.settings.clip_grad is not None:
            self.accelerator.clip_grad_norm_(self.training.values(), self.settings.clip_grad)
        scale = self._loss_scale()
        self.optimizer.step()
        self._count_skipped(scale, taken, step)
        self.scheduler.step()
        self.optimizer.zero_grad()
        return taken

    def take_notes(self) -> list[str]:
        """What is new to tell."""
        notes, self.notes = self.notes, []
        return notes

    def check_weights(self, step: int) -> None:
        """RunError where a weight that was trained is no finite number."""
        reached = {name: weight for name, weight in self.applied.trainable().items() if name in self.reached}
        if bad := _not_finite(reached):
            raise RunError(f"weights are not finite numbers after step {step}: {few(bad)}", "lower the lr")

    def _here(self, batch: Batch) -> Batch:
        moved: Batch = send_to_device(batch, self.accelerator.device, non_blocking=True)
        if isinstance(moved["image"], Tensor):
            moved["image"] = self.normalise(moved["image"])
        return moved

    def _reached_by(self, batch: Batch) -> set[str]:
        """Names of what gets a gradient; the dice go on as if nothing had been drawn."""
        with undrawn(self.accelerator.device), self.accelerator.autocast():
            self.module(**batch).backward()
        reached = {name for name, parameter in self.training.items() if parameter.grad is not None}
        self.optimizer.zero_grad()
        return reached

    def check_loss(self, loss: float, step: int) -> None:
        """RunError where it is no finite number, unless the loss is scaled: the scaler looks to that."""
        if not math.isfinite(loss) and self.accelerator.scaler is None:
            self._give_up(loss, step)

    def _loss_scale(self) -> float:
        return 1.0 if self.accelerator.scaler is None else float(self.accelerator.scaler.get_scale())

    def _count_skipped(self, scale: float, taken: Step, step: int) -> None:
        """A scaler that finds gradients not finite leaves the step out and scales less; not for ever.

        A fused optimizer leaves it out by itself, when called: accelerate's `step_was_skipped` would say no.
        """
        self.skipped = self.skipped + 1 if self._loss_scale() < scale else 0
        if self.skipped >= _MOST_SKIPPED:
            self._give_up(taken.loss, step)

    def _give_up(self, loss: float, step: int) -> NoReturn:
        rates = ", ".join(f"{group['name']} {group['lr']:g}" for group in self.optimizer.param_groups)
        what = f"the loss is {loss} at step {step} (lr: {rates}; {_largest(self.training)})"
        good = f"; the last good checkpoint is {self.last_good}" if self.last_good else ""
        raise RunError(what + good, "lower the lr, lengthen the warmup, or clip gradients: --clip-grad 1")


def gradient_notes(applied: Applied, scaled: bool = False) -> list[str]:
    """Which of the parameters that train now the loss does not reach; RunError when a gradient is not finite, unless it
    is scaled: the scaler looks to that."""
    gradients = {name: p.grad for name, p in applied.training().items()}
    if not scaled and (bad := _not_finite({name: grad for name, grad in gradients.items() if grad is not None})):
        raise RunError(f"no finite gradient in the first step: {few(bad)}", "look for nan or inf in the weights")
    idle = [name for name, grad in gradients.items() if grad is None]
    return [f"no gradient in the first step, so these stay as they are: {few(idle)}"] if idle else []


def _not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of those that have other numbers, on any rank."""
    pieces = [piece(tensor) for tensor in tensors.values()]
    bad = summed([float(not held.isfinite().all()) for held in pieces], pieces[0].device) if pieces else []
    return [name for name, ranks in zip(tensors, bad, strict=True) if ranks]


def few(names: Iterable[str]) -> str:
    """The first five names, and how many more."""
    names = list(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _piece(batch: Batch, of_classes: bool) -> Batch:
    """Two pairs of a batch; prompts of all classes stay together."""
    return {name: value if of_classes and name == "text" else value[:2] for name, value in batch.items()}


def _largest(parameters: Mapping[str, nn.Parameter]) -> str:
    """The largest gradient, for a message."""
    sizes: dict[str, Tensor] = {n: whole(p.grad).abs().max() for n, p in parameters.items() if p.grad is not None}
    if not sizes:
        return "no gradients"
    numbers = {name: size.item() for name, size in sizes.items()}
    name = max(numbers, key=lambda name: numbers[name] if math.isfinite(numbers[name]) else math.inf)
    return f"largest gradient: {numbers[name]:g} of {name}"
