"""The other side of a cell: open_clip's own `train_one_epoch`, given a model that trains what our policy trains.

A tower is locked by open_clip where it can lock what the strategy freezes; elsewhere requires_grad is set by hand.
LoRA is put in by PEFT, adapters by clipfreeze, class prompts by CoOp's module; the loop is open_clip's in each. It
reads the batches that our own loader makes, and has AdamW with the policy's options. BatchNorm keeps its statistics, as
under our policies and as open_clip's `--lock-image-freeze-bn-stats` has it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import open_clip
import torch
from open_clip_train.train import train_one_epoch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import clipfreeze
from benchmarks import made
from benchmarks.cells import Cell, Clock, Gate, Side
from benchmarks.coop import CoOp, class_loss
from benchmarks.machine import device, peak_mb
from clipfreeze.errors import RunError
from clipfreeze.plan.value import Plan
from clipfreeze.train.batches import Tokenizer, TrainingLoader

_ATTENTION = re.compile(r"\.attn(\.(qkv|proj))?$")


@dataclass
class Peer:
    """A model for open_clip's loop, with its loss; `model` takes a batch's `reads`."""

    model: nn.Module
    loss: Callable[..., dict[str, Tensor]]
    reads: tuple[str, str] = ("image", "text")


def peer(cell: Cell, gate: Gate) -> Side:
    """Train as the cell says."""
    torch.set_num_threads(cell.threads)
    imported = peak_mb()
    model = made.build(cell.model).to(device())
    plan = cell.plan(model)
    words = made.tokenizer(model)
    made_peer = PEERS[cell.how.peer](model, plan, words)
    _rest_batch_norms(made_peer.model)
    with_text = "text" in made_peer.reads
    loader = TrainingLoader(
        cell.pairs(),
        made.transform(model),
        Tokenizer(words, model) if with_text else None,
        batch_size=cell.batch_size,
        seed=0,
        num_workers=0,
        labels=not with_text,
    )
    clock, args = Clock(), _arguments(cell)
    feed, loss = _Feed(loader, made_peer.reads, cell.batch_size, clock), _Noted(made_peer.loss)
    data = {"train": SimpleNamespace(dataloader=feed, set_epoch=feed.set_epoch)}
    for epoch in range(cell.epochs):
        clock.epoch(gate)
        if not epoch:
            optimizer = _optimizer(made_peer.model, plan)
        train_one_epoch(made_peer.model, data, loss, epoch, optimizer, None, None, None, args)
    trains = sum(p.numel() for p in made_peer.model.parameters() if p.requires_grad)
    return Side(clock.seconds, [float(noted) for noted in loss.noted], trains, imported, peak_mb())


class _Feed:
    """The batches of our loader, as open_clip's loop takes them; it asks for one when it has done with the last."""

    def __init__(self, loader: TrainingLoader, reads: tuple[str, str], batch_size: int, clock: Clock) -> None:
        self.loader, self.reads, self.clock = loader, reads, clock
        self.num_batches, self.num_samples = len(loader), len(loader) * batch_size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        for loaded in self.loader.batches(self.epoch):
            yield tuple(loaded.batch[name] for name in self.reads)
            self.clock.step()


class _Noted:
    """A loss that remembers what it came to."""

    def __init__(self, loss: Callable[..., dict[str, Tensor]]) -> None:
        self.loss = loss
        self.noted: list[Tensor] = []

    def __call__(self, **outputs: Any) -> dict[str, Tensor]:
        losses = self.loss(**outputs)
        self.noted.append(sum(losses.values(), torch.zeros(())).detach())
        return losses


def _open_clip(model: Any, plan: Plan, words: Any) -> Peer:
    """requires_grad by hand."""
    trained = {parameter.name for parameter in plan.trainable}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    return Peer(model, _contrastive(model))


def _lock_image(model: Any, plan: Plan, words: Any) -> Peer:
    model.lock_image_tower(unlocked_groups=0, freeze_bn_stats=True)
    return _locked(model, plan)


def _lock_text(model: Any, plan: Plan, words: Any) -> Peer:
    model.lock_text_tower(unlocked_layers=0, freeze_layer_norm=True)
    return _locked(model, plan)


def _locked(model: Any, plan: Plan) -> Peer:
    """Freeze by hand what open_clip's lock leaves: a timm tower's projection. RunError where it locks what trains."""
    trained = {parameter.name for parameter in plan.trainable}
    for name, parameter in model.named_parameters():
        if name in trained and not parameter.requires_grad:
            raise RunError(f"open_clip's lock freezes {name}, which {plan.policy.name} trains")
        parameter.requires_grad_(name in trained)
    return Peer(model, _contrastive(model))


def _coop(model: Any, plan: Plan, words: Any) -> Peer:
    spec = next(site.spec for site in plan.sites if site.kind == "prompt")
    start = words(spec.init)[0, 1 : 1 + spec.length]
    return Peer(CoOp(model, words(list(made.CLASSES)), start).to(device()), class_loss, ("image", "label"))


def _peft(model: Any, plan: Plan, words: Any) -> Peer:
    """LoRA of the same rank and strength on all attentions: PEFT takes in_proj as one matrix, and out_proj with it."""
    import peft

    spec = next(site.spec for site in plan.sites if site.kind == "lora")
    names = [
        name
        for name, module in model.named_modules()
        if _ATTENTION.search(name) and isinstance(module, (nn.MultiheadAttention, nn.Linear))
    ]
    config = peft.LoraConfig(r=spec.rank, lora_alpha=int(spec.alpha or spec.rank), target_modules=names)
    return Peer(peft.get_peft_model(model, config), _contrastive(model))


def _adapters(model: Any, plan: Plan, words: Any) -> Peer:
    clipfreeze.apply(plan, model)
    return Peer(model, _contrastive(model))


PEERS: dict[str, Callable[[Any, Plan, Any], Peer]] = {
    "open_clip": _open_clip,
    "open_clip --lock-image": _lock_image,
    "open_clip --lock-text": _lock_text,
    "open_clip, adapters in": _adapters,
    "CoOp": _coop,
    "PEFT": _peft,
}


def _rest_batch_norms(model: nn.Module) -> None:
    """Keep them in eval mode when the loop calls `model.train()`."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()
            vars(module)["train"] = lambda mode=True, module=module: module


def _contrastive(model: Any) -> Callable[..., dict[str, Tensor]]:
    """open_clip's loss for this model."""
    made_loss: Callable[..., dict[str, Tensor]] = (
        open_clip.ClipLoss(cache_labels=True) if model.logit_bias is None else open_clip.loss.SigLipLoss()
    )
    return made_loss


def _optimizer(model: nn.Module, plan: Plan) -> torch.optim.Optimizer:
    """torch's AdamW with the plan's options; rate and decay by parameter where it has the plan's names."""
    assert plan.optimizer.name == "adamw"
    groups = {group.name: group for group in plan.groups}
    of = {parameter.name: groups[str(parameter.group)] for parameter in plan.trainable}
    members: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            group = of.get(name, plan.groups[0])
            members.setdefault((group.lr, group.weight_decay), []).append(parameter)
    options: dict[str, Any] = dict(plan.optimizer.options)
    return torch.optim.AdamW(
        [{"params": group, "lr": lr, "weight_decay": decay} for (lr, decay), group in members.items()], **options
    )


def _arguments(cell: Cell) -> SimpleNamespace:
    """Of open_clip's command line, those that its loop reads."""
    return SimpleNamespace(
        device=str(device()),
        precision="amp_bf16" if device().type == "cuda" else "fp32",
        batch_size=cell.batch_size,
        accum_freq=1,
        grad_clip_norm=None,
        skip_scheduler=True,
        log_every_n_steps=100,
        distill=False,
        horovod=False,
        wandb=False,
        rank=0,
        world_size=1,
    )
