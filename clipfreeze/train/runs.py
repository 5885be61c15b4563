"""A whole run from its spec: data, model, plan, training, evaluation; and the evaluation of a run folder."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from torch import Tensor

from clipfreeze import changes, demo, models
from clipfreeze.anatomy.partition import describe
from clipfreeze.errors import DataError
from clipfreeze.plan.build import resolve
from clipfreeze.plan.diff import Settings, compare_plans
from clipfreeze.plan.sites import Site
from clipfreeze.plan.value import Plan
from clipfreeze.policy.loading import Policy, load_policy
from clipfreeze.stored import PLAN, WEIGHTS, read_plan
from clipfreeze.train.batches import Tokenizer
from clipfreeze.train.checkpoints import Saved, read_checkpoint
from clipfreeze.train.classes import asks_for_classes, is_closed, with_classes
from clipfreeze.train.distributed import everyones, rank
from clipfreeze.train.engine import few, make_accelerator
from clipfreeze.train.evaluate import Encoder, Metrics
from clipfreeze.train.folder import RESULTS, run_folder
from clipfreeze.train.frontier import start_values
from clipfreeze.train.loop import Callback, Result, fit
from clipfreeze.train.pairs import PairSet
from clipfreeze.train.parts import read_parts
from clipfreeze.train.sources import demo_pairs, read_data
from clipfreeze.train.spec import RunSpec, installed_version, read_spec, repeatable, write_spec
from clipfreeze.train.together import this_shard
from clipfreeze.train.tuned import measure_tuned, unknown_notes

log = logging.getLogger(__name__)

RETAINED, FORGOTTEN = "retained", "forgotten"
"""Names of the sets that a model shall go on to know: the user's, and the embedded model's."""


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
    forgotten = {FORGOTTEN: demo_pairs(demo.PRETRAIN_STYLES[0], "test")} if spec.model == "demo" else {}
    retained = {RETAINED: read_data(spec.retain, spec.table)} if spec.retain is not None else {}
    if spec.data is None:
        if spec.val is not None:
            raise DataError("--val without --data", "give both: the embedded pictures have their own test split")
        train = demo_pairs(demo.TARGET_STYLE, "train")
        goal = other_drawings(train) if is_closed(sites) else demo_pairs(demo.TARGET_STYLE, "test")
        return RunData(train, {"target": goal} | retained | forgotten)
    train, held_out = read_parts(spec.data, spec.val, spec.table, spec.seed)
    return RunData(train, {"target": held_out} | retained | forgotten)


def other_drawings(train: PairSet) -> PairSet:
    """The concepts of the embedded training pictures in another style, without drawings that both styles share."""
    goal, seen = demo_pairs(demo.CLOSED_STYLE, "train"), {pair.image for pair in train}
    return replace(goal, pairs=tuple(pair for pair in goal if pair.image not in seen))


def run_policy(spec: RunSpec) -> Policy:
    """The policy of a run, with the classes of the data where it leaves them to those."""
    policy = load_policy(spec.policy, **spec.params)
    return with_classes(policy, run_data(spec).train) if asks_for_classes(policy) else policy


def train_run(spec: RunSpec, plan: Plan, out: Path | None = None, callbacks: Sequence[Callback] = ()) -> Result:
    """Load the data and the model, apply the plan, train, and leave a run folder: `out`, or the next of runs/POLICY-N.

    Everything a user can get wrong is found before the first step; then no folder is left behind.
    """
    device = _start_device(spec)
    data = run_data(spec, plan.sites)
    if data.train.ignored:
        named = f" ({', '.join(data.train.ignored_names)})" if data.train.ignored_names else ""
        log.warning("%d files in %s are no pictures of pairs: left out%s", data.train.ignored, spec.data, named)
    with _run_folder(out, plan.policy.name) as folder:
        if rank() == 0:
            write_spec(repeatable(spec), folder)
        loaded = _model(spec, device)
        applied = changes.apply(plan, loaded.model, tokenizer=loaded.tokenizer)
        return _fit(spec, applied, loaded, data, folder, None, callbacks)


def resume_run(folder: Path, callbacks: Sequence[Callback] = (), shard: bool | None = None) -> Result:
    """Go on from the newest checkpoint of a run, as if it had never stopped; `shard` as it was unless said. DataError
    where the policy, the data or the model is not what it was, or the run is finished."""
    spec = read_spec(folder)
    if shard is not None:
        spec = spec.model_copy(update={"shard": shard})
    if (folder / RESULTS).is_file():
        raise DataError(f"the run in {folder} is finished", f"clipfreeze eval {folder}; for more epochs, train anew")
    saved = read_checkpoint(folder)
    if spec.version != installed_version():
        log.warning("the run was started with clipfreeze %s, this is %s", spec.version, installed_version())
    loaded = _model(spec, _start_device(spec))
    was, now = read_plan(saved.path / PLAN), resolve(run_policy(spec), describe(loaded.model, spec.model))
    _refuse_another_plan(was, now, folder)
    data = run_data(spec, was.sites)
    return _fit(spec, changes.load(saved.path, loaded.model), loaded, data, folder, saved, callbacks)


def _fit(
    spec: RunSpec,
    applied: changes.Applied,
    loaded: models.Loaded,
    data: RunData,
    folder: Path,
    saved: Saved | None,
    callbacks: Sequence[Callback],
) -> Result:
    settings = spec.training() | {"num_workers": _num_workers(spec, make_accelerator().device)}
    return fit(
        applied,
        data.train,
        data.tests,
        tokenizer=loaded.tokenizer,
        transform=loaded.transform,
        train_transform=None if spec.data is None else loaded.train_transform,
        folder=folder,
        retain=next((name for name in (RETAINED, FORGOTTEN) if name in data.tests), None),
        callbacks=callbacks,
        resume=saved,
        **settings,
    )


def _start_device(spec: RunSpec) -> torch.device:
    """Where the model is loaded: one to be split goes from the CPU to the ranks' devices piece by piece."""
    device = make_accelerator(spec.precision).device
    return torch.device("cpu") if spec.shard else device


def _model(spec: RunSpec, device: torch.device) -> models.Loaded:
    """The base model; random weights, and what the policy starts anew, come from the run's seed."""
    set_seed(spec.seed)
    loaded = models.load(spec.model, spec.pretrained, device=str(device))
    for note in loaded.notes if rank() == 0 else ():
        log.warning(note)
    return loaded


@contextmanager
def _run_folder(out: Path | None, policy: str) -> Iterator[Path]:
    """As run_folder, made by rank 0 for all."""
    if rank() == 0:
        with run_folder(out, policy) as folder:
            yield Path(everyones(str(folder))[0])
    else:
        yield Path(everyones("")[0])


def _refuse_another_plan(was: Plan, now: Plan, folder: Path) -> None:
    """DataError that says what the policy does now and did not do when the run was started."""
    if _without_places(was) == _without_places(now):
        return
    found = compare_plans(was, now)
    changed = [f"{p.name}: {', '.join(_changed(p.settings))}" for p in found.parameters]
    changed += _changed(found.optimizer) + _changed(found.schedule) or ["its rules or phases"]
    fix = "give the policy back what it said, or start a new run"
    raise DataError(f"the policy is not what the run in {folder} was started with: {few(changed)}", fix)


def _without_places(plan: Plan) -> dict[str, Any]:
    """What it does, without which line of which file says so."""
    parameters = [parameter.model_copy(update={"claims": ()}) for parameter in plan.parameters]
    return {
        "parameters": parameters,
        "groups": plan.groups,
        "optimizer": plan.optimizer,
        "schedule": plan.schedule,
        "sites": plan.sites,
    }


def _changed(settings: Settings) -> list[str]:
    return [f"{name} {one} is now {other}" for name, (one, other) in settings.items()]


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
        raise DataError(f"the run in {folder} is not finished", f"go on with it: clipfreeze train --resume {folder}")
    plan = read_plan(folder / PLAN)
    given = {name: read_data(path, spec.table) for name, path in (data or {}).items()}
    tests = given or run_data(spec, plan.sites).tests
    device = make_accelerator().device
    loaded = _model(spec, device)
    start = start_values(plan, loaded.model)
    applied = changes.load(folder, loaded.model)
    tokenizer = Tokenizer(loaded.tokenizer, loaded.model)
    encoder = Encoder(
        loaded.model, tokenizer, loaded.transform, num_workers=_num_workers(spec, device), shard=this_shard()
    )
    for name, pairs in tests.items():
        for note in unknown_notes(name, pairs, plan.sites):
            log.warning(note)
    return TrainedRun(applied, encoder, tests, start)


def _num_workers(spec: RunSpec, device: torch.device) -> int:
    """A CPU is busy with the model itself."""
    if spec.num_workers is not None:
        return spec.num_workers
    return min(8, os.cpu_count() or 1) if device.type == "cuda" else 0
