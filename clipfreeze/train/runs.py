"""A whole run from its spec: data, model, plan, training, evaluation; and the evaluation of a run folder."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate.utils import set_seed
from torch import Tensor

from clipfreeze import changes, demo, models
from clipfreeze.errors import DataError
from clipfreeze.plan.sites import Site
from clipfreeze.plan.value import Plan
from clipfreeze.policy.loading import Policy, load_policy
from clipfreeze.stored import PLAN, WEIGHTS, read_plan
from clipfreeze.train.batches import Tokenizer
from clipfreeze.train.classes import asks_for_classes, is_closed, with_classes
from clipfreeze.train.evaluate import Encoder, Metrics
from clipfreeze.train.folder import run_folder
from clipfreeze.train.frontier import start_values
from clipfreeze.train.loop import Result, fit, make_accelerator
from clipfreeze.train.pairs import PairSet, split_pairs
from clipfreeze.train.sources import demo_pairs, read_data
from clipfreeze.train.spec import RunSpec, read_spec, repeatable, write_spec
from clipfreeze.train.tuned import measure_tuned, unknown_notes

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunData:
    """What a run trains on, and what it is measured on: the goal first."""

    train: PairSet
    tests: dict[str, PairSet]


def run_data(spec: RunSpec, sites: Sequence[Site] = ()) -> RunData:
    """The data of a run. The embedded model is also measured on a style it knew, to see what it forgets.

    The embedded pictures' own test split shows concepts that are not in the train split; what knows a set of classes
    alone is measured on another style's drawings of those it was trained on.
    """
    forgotten = {"forgotten": demo_pairs(demo.PRETRAIN_STYLES[0], "test")} if spec.model == "demo" else {}
    if spec.data is None:
        if spec.val is not None:
            raise DataError("--val without --data", "give both: the embedded pictures have their own test split")
        train = demo_pairs(demo.TARGET_STYLE, "train")
        goal = other_drawings(train) if is_closed(sites) else demo_pairs(demo.TARGET_STYLE, "test")
        return RunData(train, {"target": goal} | forgotten)
    pairs = read_data(spec.data, spec.table)
    train, held_out = (pairs, read_data(spec.val, spec.table)) if spec.val else split_pairs(pairs, seed=spec.seed)
    return RunData(train, {"target": held_out} | forgotten)


def other_drawings(train: PairSet) -> PairSet:
    """The concepts of the embedded training pictures in another style, without drawings that both styles share."""
    goal, seen = demo_pairs(demo.CLOSED_STYLE, "train"), {pair.image for pair in train}
    return replace(goal, pairs=tuple(pair for pair in goal if pair.image not in seen))


def run_policy(spec: RunSpec) -> Policy:
    """The policy of a run, with the classes of the data where it leaves them to those."""
    policy = load_policy(spec.policy, **spec.params)
    return with_classes(policy, run_data(spec).train) if asks_for_classes(policy) else policy


def train_run(spec: RunSpec, plan: Plan, out: Path | None = None) -> Result:
    """Load the data and the model, apply the plan, train, and leave a run folder: `out`, or the next of runs/POLICY-N.

    Everything a user can get wrong is found before the first step; then no folder is left behind.
    """
    data = run_data(spec, plan.sites)
    if data.train.ignored:
        log.warning("%d files in %s are no pictures in class folders: left out", data.train.ignored, spec.data)
    with run_folder(out, plan.policy.name) as folder:
        write_spec(repeatable(spec), folder)
        device = make_accelerator().device
        set_seed(spec.seed)  # of random weights, and of what the policy starts anew
        loaded = models.load(spec.model, spec.pretrained, device=str(device))
        for note in loaded.notes:
            log.warning(note)
        return fit(
            changes.apply(plan, loaded.model, tokenizer=loaded.tokenizer),
            data.train,
            data.tests,
            tokenizer=loaded.tokenizer,
            transform=loaded.transform,
            train_transform=None if spec.data is None else loaded.train_transform,
            epochs=spec.epochs,
            batch_size=spec.batch_size,
            seed=spec.seed,
            num_workers=_num_workers(spec, device),
            folder=folder,
        )


@dataclass(frozen=True)
class TrainedRun:
    """A run's model as trained, the sets to measure it on, and what it was before: see `wise_frontier`."""

    applied: changes.Applied
    encoder: Encoder
    tests: dict[str, PairSet]
    start: dict[str, Tensor]

    def metrics(self) -> dict[str, Metrics]:
        """Of the model as it is now, on each set."""
        return {name: measure_tuned(self.encoder, pairs, self.applied) for name, pairs in self.tests.items()}


def eval_run(folder: Path, data: Mapping[str, str] | None = None) -> dict[str, Metrics]:
    """Measure a trained run again on its own sets, or on those of `data` by name, read as the run read its own."""
    return open_run(folder, data).metrics()


def open_run(folder: Path, data: Mapping[str, str] | None = None) -> TrainedRun:
    """Load a run's weights onto its model. DataError where the folder holds no run with weights."""
    spec = read_spec(folder)
    if not (folder / WEIGHTS).is_file():
        raise DataError(f"the run in {folder} ended before its first epoch was saved", "train again")
    plan = read_plan(folder / PLAN)
    given = {name: read_data(path, spec.table) for name, path in (data or {}).items()}
    tests = given or run_data(spec, plan.sites).tests
    device = make_accelerator().device
    set_seed(spec.seed)
    loaded = models.load(spec.model, spec.pretrained, device=str(device))
    start = start_values(plan, loaded.model)
    applied = changes.load(folder, loaded.model)
    tokenizer = Tokenizer(loaded.tokenizer, loaded.model)
    encoder = Encoder(loaded.model, tokenizer, loaded.transform, num_workers=_num_workers(spec, device))
    for name, pairs in tests.items():
        for note in unknown_notes(name, pairs, plan.sites):
            log.warning(note)
    return TrainedRun(applied, encoder, tests, start)


def _num_workers(spec: RunSpec, device: torch.device) -> int:
    """A CPU is busy with the model itself."""
    if spec.num_workers is not None:
        return spec.num_workers
    return min(8, os.cpu_count() or 1) if device.type == "cuda" else 0
