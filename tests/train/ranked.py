"""What each rank of a test runs: torchrun ... ranked.py TASK ... FOLDER; rank 0 leaves what it found in FOLDER."""

from __future__ import annotations

import gc
import json
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed

import clipfreeze
from clipfreeze.changes import Applied
from clipfreeze.errors import ApplyError, InterruptedRunError
from clipfreeze.pieces import piece, whole
from clipfreeze.train.checkpoints import read_checkpoint
from clipfreeze.train.distributed import everyones, rank, world_size
from clipfreeze.train.engine import Engine, make_accelerator
from clipfreeze.train.folder import CHECKPOINTS
from clipfreeze.train.loop import Callback, Result, Run, fit
from clipfreeze.train.objective import Contrastive
from clipfreeze.train.settings import training_settings
from clipfreeze.train.sharding import split_model

import tiny
from hand import Words, colour_pairs, transform

PAIRS = replace(colour_pairs(2), templates=("{}", "a {} thing"))
BATCH = 8


def applied(policy: str, family: str = "clip_vit", **knobs: Any) -> Applied:
    torch.manual_seed(0)
    model = tiny.FAMILIES[family]()
    torch.manual_seed(1)
    found: Applied = clipfreeze.apply(clipfreeze.resolve(clipfreeze.load_policy(policy, **knobs), model), model)
    return found


def batch_of(model: Any, size: int = BATCH) -> dict[str, Tensor]:
    """The same on all ranks; two pairs say the same, and with two ranks or more they are on different ones."""
    images, tokens = tiny.images(model), tiny.tokens(model)
    images = torch.cat([images, images.flip(0) * 0.5])[:size]
    concepts = torch.arange(size)
    concepts[-1] = 0
    return {"image": images, "text": torch.cat([tokens, tokens.flip(1)])[:size], "concepts": concepts}


def gradients(family: str, policy: str, micro_batch: int | None) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of one batch that all ranks share."""
    of = applied(policy, family)
    accelerator = make_accelerator()
    optimizer = of.optimizer()
    scheduler = of.scheduler(optimizer, 10)
    module = Contrastive(of.model).eval()
    kept: dict[str, Tensor] = {}

    def keep(*_: Any) -> None:
        kept.update({name: p.grad.clone() for name, p in of.trainable().items() if p.grad is not None})

    optimizer.register_step_pre_hook(keep)
    settings = training_settings(micro_batch=micro_batch)
    engine = Engine(of, module, accelerator, accelerator.prepare_optimizer(optimizer), scheduler, settings)
    own = {name: value.chunk(world_size())[rank()] for name, value in batch_of(of.model).items()}
    engine.wrap(own)
    taken = engine.update(own, 1, lambda: [float(rank())])
    assert taken.flags == [sum(range(world_size()))]
    weights = {name: p.detach().clone() for name, p in of.trainable().items()}
    for other in everyones(weights):
        assert all(torch.equal(other[name], weights[name]) for name in weights), "ranks drifted apart"
    return taken.loss, kept


def task_gradients(folder: Path) -> None:
    for family in ("clip_vit", "siglip", "coca"):
        for policy in ("full", "logit_scale"):
            for micro_batch in (None, 1):
                loss, kept = gradients(family, policy, micro_batch)
                if rank() == 0:
                    name = f"{family} {policy} {micro_batch}"
                    torch.save({"loss": loss, "gradients": kept}, folder / f"{name} {world_size()}.pt")


def training(folder: Path, policy: str, **settings: Any) -> Result:
    family = settings.pop("family", "clip_vit")
    of = applied(policy, family, **settings.pop("knobs", {}))
    resume = read_checkpoint(folder) if (folder / CHECKPOINTS).exists() else None
    if resume is not None:
        of.remove()
        torch.manual_seed(0)
        of = clipfreeze.load(resume.path, tiny.FAMILIES[family]())
    folder.mkdir(exist_ok=True)
    values: dict[str, Any] = {"epochs": 4, "batch_size": 8, "evaluate_every": "2 steps", "keep": 9} | settings
    result = fit(
        of,
        settings.pop("pairs", PAIRS),
        {"target": colour_pairs(1, labelled=True), "pairs": colour_pairs()},
        tokenizer=Words(),
        transform=transform(),
        train_transform=transform(train=True),
        folder=folder,
        resume=resume,
        **{name: value for name, value in values.items() if name != "pairs"},
    )
    weights = {name: whole(p).detach().clone() for name, p in of.trainable().items()}
    for other in everyones(weights):
        assert all(torch.equal(other[name], weights[name]) for name in weights), "ranks drifted apart"
    return result


def task_training(folder: Path) -> None:
    """Policies with phases, with frozen towers, with what gets no gradient, in closed form, with what frozen parts made
    kept on disk; and one broken picture.
    """
    name = f"{world_size()}"
    training(folder / f"full {name}", "full", ema=0.9)
    training(folder / f"lp_ft {name}", "lp_ft", knobs={"probe": "50%"})
    kept = {"views": 2, "cache_dir": str(folder / f"kept {name}")}  # each rank reads what others have worked out
    training(folder / f"micro {name}", "text_only", micro_batch=1, **kept)
    training(folder / f"closed {name}", "logit_scale", family="siglip", knobs={"optimizer": "lbfgs"})
    broken = replace(PAIRS, pairs=(replace(PAIRS.pairs[0], image=b"no picture"), *PAIRS.pairs[1:]))
    result = training(folder / f"broken {name}", "projections", pairs=broken)
    told = everyones(result.broken)
    assert all(names == told[0] for names in told)
    if rank() == 0:
        (folder / f"broken {name}.json").write_text(json.dumps(result.broken))


class StopAt(Callback):
    """As a signal to rank 0 does after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, run: Run, record: Any) -> None:
        if record["step"] == self.step:
            run.stopping.asked = "SIGTERM"


BRIEF: dict[str, Any] = {"epochs": 2, "evaluate_every": None}
SPLIT: dict[str, dict[str, Any]] = {
    "full": {"ema": 0.9, "clip_grad": 0.5, "best": "nll", "evaluate_every": "2 steps"},
    "lora": {"family": "siglip", "knobs": {"dropout": 0.0}},
    "text_only": {"micro_batch": 1},
    "lp_ft": {"knobs": {"probe": "50%"}},
}
"""Policies by which all trains, what is added, one tower, and first this and then that."""


def task_sharded(folder: Path) -> None:
    """Train split over the ranks, and go on with a run of one process; with one, whole, and with one of the ranks'."""
    ranks = world_size()
    for policy, settings in SPLIT.items():
        again = ranks > 1 and policy == "full"  # blocks computed again in backward gather their pieces again
        training(
            folder / f"{policy} {ranks}", policy, **BRIEF | settings, shard=ranks > 1, checkpoint_activations=again
        )
    with pytest.raises(InterruptedRunError, match="after step"):
        training(folder / f"begun by {ranks}", "full", **BRIEF | SPLIT["full"], shard=ranks > 1, callbacks=[StopAt(2)])


def task_sharded_resume(folder: Path) -> None:
    """Go on with what another number of ranks began."""
    ranks = world_size()
    training(folder / f"begun by {3 - ranks}", "full", **BRIEF | SPLIT["full"], shard=ranks > 1)


def task_split(folder: Path) -> None:
    """What a rank holds of a split model, and what cannot be done to one."""
    of = applied("full")
    size, largest = (measure(p.numel() for p in of.model.parameters()) for measure in (sum, max))
    let_go = weakref.ref(next(p for p in of.model.parameters() if p.numel() == largest))
    split_model(of, make_accelerator().device)
    gc.collect()
    assert let_go() is None, "the whole weight is still there"
    held = sum(piece(p).numel() for p in of.model.parameters())
    assert held == pytest.approx(size / world_size(), rel=0.02)
    for forbidden in (of.merge, of.remove, lambda: of.add(folder, "other")):
        with pytest.raises(ApplyError, match="split over the ranks"):
            forbidden()


def task_resume(folder: Path) -> None:
    """Go on with what FOLDER holds."""
    training(folder / "run", "full")


if __name__ == "__main__":
    make_accelerator()
    *tasks, where = sys.argv[1:]
    for task in tasks:
        globals()[f"task_{task}"](Path(where))
    if distributed.is_initialized():
        distributed.destroy_process_group()
