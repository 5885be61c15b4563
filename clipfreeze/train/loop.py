"""`fit`: a run from the first measurement to the last."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import set_seed
from torch import Tensor

from clipfreeze.errors import DataError, InterruptedRunError
from clipfreeze.optim.state import OptimizerState
from clipfreeze.pieces import cut_like, on_cpu, piece
from clipfreeze.plan.closed_form import is_closed_form
from clipfreeze.plan.sites import HeadSite, PromptSite
from clipfreeze.policy.span import parse_span
from clipfreeze.stored import WEIGHTS, read_weights
from clipfreeze.train.attention_layout import laid_out
from clipfreeze.train.auto_batch import largest_batch
from clipfreeze.train.batches import Batch, Loaded, Tokenizer, TrainingLoader, Transform
from clipfreeze.train.best import Best
from clipfreeze.train.broken import Broken
from clipfreeze.train.calibration import Bin
from clipfreeze.train.checkpoints import Saved, checkpoint_path, keep_checkpoints, read_tensors, save_checkpoint
from clipfreeze.train.class_texts import ClassTexts
from clipfreeze.train.classes import captions_as_classes
from clipfreeze.train.closed_form import ClosedForm, check_closed_form
from clipfreeze.train.compiled import compiled_blocks
from clipfreeze.train.dice import Dice, dice_on, throw_again, undrawn
from clipfreeze.train.digest import digest_of
from clipfreeze.train.distributed import everyones, rank, wait_for_all, world_size
from clipfreeze.train.ema import Average
from clipfreeze.train.engine import Engine, Step, make_accelerator
from clipfreeze.train.evaluate import Encoder, Metrics, Score
from clipfreeze.train.folder import CHECKPOINTS, METRICS, RESULTS, check_room, write_text
from clipfreeze.train.journal import Journal, check_trackers, cut_metrics, memory_mb, start_trackers
from clipfreeze.train.memory_format import channels_last
from clipfreeze.train.normalise import split_transform
from clipfreeze.train.objective import training_module
from clipfreeze.train.pairs import Pair, PairSet
from clipfreeze.train.parts import measuring_part, training_part
from clipfreeze.train.recompute import recomputed
from clipfreeze.train.remarks import collapse_notes, decline_notes, warmup_notes
from clipfreeze.train.retain import RetainFloor
from clipfreeze.train.settings import FIXED, TrainingSettings, training_settings
from clipfreeze.train.sharding import check_sharding, split_model
from clipfreeze.train.sources import read_data
from clipfreeze.train.stopping import Stopping
from clipfreeze.train.store_folder import make_folder
from clipfreeze.train.stream import PairStream, StreamLoader, TrainingData
from clipfreeze.train.thrift import Thrift
from clipfreeze.train.together import Shard, this_shard
from clipfreeze.train.tuned import for_training, measure_tuned, measure_untuned, unknown_notes

if TYPE_CHECKING:
    from clipfreeze.changes import Applied


@dataclass(frozen=True)
class Result:
    """What a run came to: metrics of each set before and after, and what the user should know."""

    before: dict[str, Metrics]
    after: dict[str, Metrics]
    steps: int
    kept_step: int  # whose weights were kept: the last, the best, or the last above the retain floor
    seconds: float  # of training alone, in this process
    data_wait: float  # share of them in which training waited for data
    loss: float  # mean over the last epoch
    broken: tuple[str, ...]  # pictures that could not be read
    notes: tuple[str, ...]
    folder: Path | None
    interpolates: bool  # whether there are models between the start and these weights


class Callback:
    """What `fit` calls on rank 0; `run.stop(reason)` ends the run. All do nothing unless overridden."""

    def on_step(self, run: Run, record: Mapping[str, Any]) -> None:
        """After each optimizer step, with its line of metrics.jsonl."""

    def on_evaluation(self, run: Run, metrics: Mapping[str, Metrics]) -> None:
        """After each measurement under way."""

    def on_checkpoint(self, run: Run, path: Path) -> None:
        """After each checkpoint."""


def fit(
    applied: Applied,
    train: TrainingData | str | Path,
    tests: Mapping[str, PairSet | str | Path] | None = None,
    *,
    tokenizer: Callable[..., Tensor],
    transform: Transform,
    train_transform: Transform | None = None,
    folder: str | Path | None = None,
    retain: str | None = None,
    callbacks: Sequence[Callback] = (),
    resume: Saved | None = None,
    **settings: Any,
) -> Result:
    """Train what the plan trains, and measure `tests` (the goal first) before, during where asked, and after.

    `transform` serves evaluation, and training too unless `train_transform` is given. `settings` are those of
    TrainingSettings by name. The same seed gives the same weights, bit for bit on one CPU, whatever `num_workers`; on
    more ranks the same batches. `folder` receives checkpoints, metrics.jsonl and run.log under way, and plan, weights
    and results.json at the end. `retain` names the set that `retain_floor` watches. The model is left in eval mode,
    with the weights that were kept; with `shard` it also stays split: its ranks `applied.save` it together, and what
    they save loads onto a whole model.

    A plan with a head trains on the labels of its classes. Before is the model without what the plan adds.
    `resume` is a checkpoint of the same run, of which `applied` was loaded. Raises DataError for wrong input before the
    first step, RunError when the run fails, InterruptedRunError when a signal ended it after saving.
    """
    wanted = training_settings(**settings)
    if resume is not None and wanted.batch_size == "auto":  # what fits now may be another number
        wanted = wanted.model_copy(update={"batch_size": resume.state["run"]["pairs in a step"]})
    train = training_part(read_data(train)) if isinstance(train, (str, Path)) else train
    sets = {
        name: pairs if isinstance(pairs, PairSet) else measuring_part(read_data(pairs))
        for name, pairs in (tests or {}).items()
    }
    if wanted.evaluates is not None and not sets:
        raise DataError("there is nothing to measure under way", "give tests, or leave out evaluate_every")
    if isinstance(train, PairSet) and all(_said(pair) == _said(train[0]) for pair in train):
        raise DataError(
            f"all pairs of {train.name} say the same: there is nothing to tell apart", "give two captions or classes"
        )
    if wanted.retain_floor is not None and retain not in sets:
        raise DataError("a retain floor without a set to retain", "give data that the model knows: --retain PATH")
    check_trackers(wanted.trackers)
    run = Run(applied, train, sets, tokenizer, transform, train_transform, wanted)
    return run.go(folder, retain, callbacks, resume)


class Run:
    """A run under way; what happens when."""

    def __init__(
        self,
        applied: Applied,
        train: TrainingData,
        sets: Mapping[str, PairSet],
        tokenizer: Callable[..., Tensor],
        transform: Transform,
        train_transform: Transform | None,
        settings: TrainingSettings,
    ) -> None:
        self.applied, self.train, self.sets, self.settings = applied, train, sets, settings
        self.accelerator: Any = make_accelerator(settings.precision)
        if settings.shard:
            check_sharding(settings, applied.plan.optimizer, self.accelerator)
        if settings.cache_dir is not None:
            make_folder(Path(settings.cache_dir))
        if closed_form := is_closed_form(applied.plan.optimizer):
            check_closed_form(settings)
        tokens = Tokenizer(tokenizer, applied.model)
        pairs = for_training(train, applied.plan.sites)
        if settings.objective == "classes" and isinstance(pairs, PairSet) and not pairs.class_names:
            pairs = captions_as_classes(pairs)
        module = training_module(applied, settings.objective, len(pairs.class_names))
        self.prompts = ClassTexts(tokens, pairs, settings.seed) if module.reads_classes else None
        as_bytes, normalise = split_transform(train_transform or transform)

        def loader(batch_size: int) -> TrainingLoader | StreamLoader:
            kind: Any = StreamLoader
            if not isinstance(pairs, PairStream):
                kind = partial(TrainingLoader, views=settings.views)
            made: TrainingLoader | StreamLoader = kind(
                pairs,
                as_bytes,
                tokens if module.reads_texts and not module.reads_classes else None,
                batch_size=_share(batch_size),
                seed=settings.seed,
                num_workers=settings.num_workers or 0,
                labels=module.reads_labels,
                rank=rank(),
                world=world_size(),
            )
            return made

        if settings.batch_size == "auto":
            example = next(loader(2 * world_size()).batches(0)).batch
            example["image"] = normalise(example["image"])
            if self.prompts is not None:
                example = {**example, "text": self.prompts.at(0)}
            self.batch_size = largest_batch(applied, module, example, len(pairs), self.accelerator)
        else:
            self.batch_size = settings.batch_size
        self.loader = loader(self.batch_size)
        shard = Shard() if settings.shard else this_shard()  # a split model works on all ranks at once or on none
        self.encoder = Encoder(applied.model, tokens, transform, num_workers=settings.num_workers or 0, shard=shard)
        self.steps_per_epoch = 1 if closed_form else len(self.loader)
        self.pairs_per_step = self.batch_size * len(self.loader) // self.steps_per_epoch
        self.total_steps = settings.epochs * self.steps_per_epoch
        set_seed(settings.seed)
        if settings.shard:
            split_model(applied, self.accelerator.device)
        self.optimizer = applied.optimizer()
        self.scheduler = applied.scheduler(self.optimizer, self.total_steps, self.steps_per_epoch)
        prepared = self.accelerator.prepare_optimizer(self.optimizer)
        kind = ClosedForm if closed_form else Engine
        self.engine = kind(applied, module, self.accelerator, prepared, self.scheduler, settings, normalise)
        samples = self.loader.samples if isinstance(self.loader, TrainingLoader) else None
        self.thrift = None
        if not settings.shard:
            self.thrift = Thrift(applied, module, self.accelerator, settings, samples, normalise)
        if self.thrift is not None and isinstance(self.loader, TrainingLoader):
            self.loader.leave_out(self.thrift.knows)
        self.average = Average(applied.trainable(), settings.ema) if settings.ema is not None else None
        self.step = 0
        self.phase: int | None = -1  # that the ranks are ready for; before the first step none
        self.before: dict[str, Metrics] = {}
        self.losses: list[float] = []  # of this epoch
        self.notes: list[str] = []
        self.broken = Broken(len(pairs))
        self.best: Best | None = None
        self.floor: RetainFloor | None = None
        self.kept: dict[str, Tensor] | None = None  # weights of `kept_step`, where not simply the last
        self.kept_step = 0
        self.reason: str | None = None  # to end before the last step
        self.folder: Path | None = None
        self.retain: str | None = None
        self.callbacks: Sequence[Callback] = ()

    def go(
        self, folder: str | Path | None, retain: str | None, callbacks: Sequence[Callback], resume: Saved | None
    ) -> Result:
        """From the first measurement, or from a checkpoint, to the last."""
        self.retain, self.callbacks = retain, callbacks if rank() == 0 else ()
        if folder is not None:
            self._claim(Path(folder), resume is not None)
        if self.folder is not None:  # weights, moments, an average; and those half-written beside them
            size = sum(p.numel() * p.element_size() for p in self.applied.trainable().values())
            check_room(self.folder, 4 * (self.settings.keep + 2) * size + 10**6)
        with Stopping() as self.stopping, self._arranged():
            try:
                return self._go(resume)
            except KeyboardInterrupt:  # the second one: the first waits for the end of a step
                raise InterruptedRunError(f"interrupted in step {self.step + 1}: {self._how_to_go_on()}") from None

    @contextmanager
    def _arranged(self) -> Iterator[None]:
        """The model as it computes fastest, or in the least memory."""
        with ExitStack() as arranged:
            if self.accelerator.device.type == "cuda" and not self.settings.shard:
                arranged.enter_context(channels_last(self.applied.model))
            if self.settings.compile:
                arranged.enter_context(compiled_blocks(self.applied.model))
            else:
                arranged.enter_context(laid_out(self.applied.model))
            if self.settings.checkpoint_activations:
                arranged.enter_context(recomputed(self.applied.model))
            yield

    def _claim(self, folder: Path, resume: bool) -> None:
        """DataError for a folder that another run has written to."""
        if not resume and any((folder / name).exists() for name in (METRICS, CHECKPOINTS)):
            raise DataError(f"{folder} holds a run", "give another folder, or resume that run")
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder

    def _go(self, resume: Saved | None) -> Result:
        if resume is None:
            self.before = self._measured(measure_untuned)
        else:
            self.before = {name: _metrics(values) for name, values in resume.state["before"].items()}
        self._prepare_decisions()
        if resume is not None:
            self._restore(resume)
        elif self.kept is not None:
            self._save()
        settings = self.settings
        start_trackers(self.accelerator, settings.trackers, self.folder, settings.model_dump())
        with Journal(self.accelerator, self.folder, self.total_steps, self.step, settings.trackers) as self.journal:
            if resume is None:
                self._tell(warmup_notes(self.applied, self.total_steps, self.steps_per_epoch))
                for name, pairs in self.sets.items():
                    self._tell(unknown_notes(name, pairs, self.applied.plan.sites))
                set_seed(settings.seed, device_specific=True)
            else:
                self._restore_dice(resume)
                if resume.state["readers"] != self._readers():
                    self._tell(["the stream goes on in another order: it was read by other ranks or workers"])
            self.engine.module.train()
            self.journal.note(
                f"{len(self.train)} pairs, {self.total_steps} steps of {self.pairs_per_step} on {world_size()} rank(s) "
                f"of {self.accelerator.device}, from step {self.step}"
            )
            self.waited, started = 0.0, time.monotonic()
            try:
                self._train()
            finally:
                if self.thrift is not None:
                    self.thrift.close()
            return self._finish(time.monotonic() - started)

    def stop(self, reason: str) -> None:
        """End the run as soon as all ranks know, within a step, as if that had been its last."""
        self._asked = self._asked or reason

    _asked: str | None = None

    def _train(self) -> None:
        if self.reason is not None:  # of a run that was killed when this was decided, and goes on
            return
        for epoch in range(self.step // self.steps_per_epoch, self.settings.epochs):
            done = self.step % self.steps_per_epoch
            if self.thrift is not None:
                self.thrift.refresh()
            self.losses = self.losses if done else []
            batches: Iterator[tuple[Loaded, float]] = self._batches(epoch, done)
            if isinstance(self.engine, ClosedForm):
                batches = self.engine.epoch(batches, self._ready)
            since = time.monotonic()
            for loaded, waited in batches:
                self._take(loaded, epoch, waited, since)
                since = time.monotonic()
                if self.reason is not None:
                    self._read()
                    self._tell([f"ended after step {self.step} of {self.total_steps}: {self.reason}"])
                    return

    def _batches(self, epoch: int, done: int) -> Iterator[tuple[Loaded, float]]:
        """Those of an epoch behind the first `done`, class prompts put in, and the seconds that each was waited for."""
        for number, (loaded, waited) in enumerate(_timed(self.loader.batches(epoch, done)), done):
            if self.prompts is None:
                yield loaded, waited
            else:
                prompts = self.prompts.at(epoch * len(self.loader) + number)
                yield replace(loaded, batch={**loaded.batch, "text": prompts}), waited

    def _take(self, loaded: Loaded, epoch: int, waited: float, since: float) -> None:
        """One step, of which the first thing was done at the time `since`, and what is due after it."""
        batch = loaded.batch if isinstance(self.engine, ClosedForm) else self._ready(loaded)
        lr = {str(group["name"]): float(group["lr"]) for group in self.optimizer.param_groups}
        late = self._may_read_late()
        taken = self.engine.update(
            batch, self.step + 1, lambda: [*self._asked_to_end(), float(bool(loaded.broken))], late
        )
        self.step += 1
        if self.average is not None:
            self.average.update()
        self._read()
        seconds = time.monotonic() - since
        self.waited += waited
        record = {
            "step": self.step,
            "epoch": epoch + 1,
            "loss": math.nan,
            "lr": lr,
            "samples_per_s": round(self.pairs_per_step / seconds, 2),
            "data_wait": round(waited / seconds, 4),
            "memory_mb": round(memory_mb(self.accelerator.device), 1),
        }
        self._unread = taken, record
        if not late:
            self._read()
        self._tell(self.engine.take_notes())
        stop, finish, broken = taken.flags
        if broken:
            self._count(loaded)
        if self._due(self.settings.evaluates, self.step):
            self._evaluate()
        if self.step % self.steps_per_epoch == 0:
            self.journal.epoch(record)
            self.engine.check_weights(self.step)
        if self._due(self.settings.save_every, self.step):
            self._save()
        for callback in self.callbacks:
            callback.on_step(self, record)
        if world_size() == 1:
            stop, finish = self._asked_to_end()
        if stop and self.reason is None and self.step < self.total_steps:
            self._read()
            self._save()
            signal = self.stopping.asked or "a signal to another rank"
            done = f"stopped by {signal} after step {self.step} of {self.total_steps}"
            raise InterruptedRunError(f"{done}: {self._how_to_go_on()}")
        if finish:
            self.reason = self.reason or self._asked or "rank 0 asked for it"

    _unread: tuple[Step, dict[str, Any]] | None = None

    def _read(self) -> None:
        """Write down the last step that was not yet, its loss having been worked out in the meantime."""
        if self._unread is None:
            return
        (taken, record), self._unread = self._unread, None
        record["loss"] = taken.loss
        self.engine.check_loss(taken.loss, record["step"])
        self.losses.append(taken.loss)
        self.journal.step(record)

    def _may_read_late(self) -> bool:
        """Whether the next step's loss may wait until one more is launched, so that a GPU never waits for this process:
        nobody asks for it.
        """
        if self.accelerator.device.type not in self.late_devices or world_size() > 1:
            return False
        if self.callbacks or self.engine.unproved or self.accelerator.scaler is not None:
            return False
        step = self.step + 1
        due = (self._due(stretch, step) for stretch in (self.settings.evaluates, self.settings.save_every))
        return step % self.steps_per_epoch != 0 and not any(due)

    late_devices = ("cuda",)

    def _asked_to_end(self) -> tuple[float, float]:
        """1 for a signal; 1 for a callback's wish."""
        return float(self.stopping.asked is not None), float(self._asked is not None)

    def _due(self, stretch: str | None, step: int) -> bool:
        """Whether something done every `stretch` is due after that step; after the last one it always is."""
        if stretch is None:
            return False
        every = max(1, parse_span(stretch).steps(self.total_steps, self.steps_per_epoch))
        return step % every == 0 or step == self.total_steps

    def _ready(self, loaded: Loaded) -> Batch:
        """The batch as the engine takes it. Where the schedule has begun a phase, other parameters train, other parts
        are frozen, and the ranks reduce what trains.
        """
        begins = self.phase != self.applied.phase
        if begins and self.thrift is not None:
            self.thrift.enter(loaded)
            for line in self.thrift.take_notes():
                self.journal.note(line)
        batch = loaded.batch
        if self.thrift is not None:
            batch = self.thrift.prepare(loaded)
            self._tell(self.thrift.take_warnings())
        if begins:
            self.phase = self.applied.phase
            self.engine.wrap(batch)
        return batch

    def _prepare_decisions(self) -> None:
        """What evaluations under way decide. DataError for a score that is not measured."""
        settings = self.settings
        if settings.best is not None or settings.patience is not None:
            self.best = Best.by_name(settings.best, self.before)
        if settings.retain_floor is not None:
            assert self.retain is not None
            self.floor = RetainFloor(
                settings.retain_floor, settings.on_floor or "rollback", self.before[self.retain].main.value
            )
            if self.floor.action == "rollback":
                self._keep()

    def _evaluate(self) -> None:
        """Measure, and decide which weights to keep and whether to go on; the same on all ranks."""
        with undrawn(self.accelerator.device), self._averaged():
            found = self._measured(measure_tuned)
            self.journal.evaluation(self.step, found)
            better = self.best is None or self.best.update(self.step, found)
            above = self.floor is None or self.floor.check(self.step, found[str(self.retain)].main.value)
            if above and better and (self.best is not None or self.floor is not None):
                self._keep()
        if not above and self.floor is not None:
            if self.floor.action == "stop" and self.best is None:
                self.kept = None
            self._tell(self.floor.notes())
            self.reason = "the retained set fell below its floor"
        elif self.best is not None and self.best.since >= (self.settings.patience or math.inf):
            self.reason = f"no better {self.best.score} on {self.best.of} in {self.best.since} evaluations"
        if self.kept_step == self.step:
            self._save()
        for callback in self.callbacks:
            callback.on_evaluation(self, found)

    def _measured(self, how: Callable[[Encoder, PairSet, Applied], Metrics]) -> dict[str, Metrics]:
        found = {name: how(self.encoder, pairs, self.applied) for name, pairs in self.sets.items()}
        return everyones(found)[0] if self.settings.shard else found  # what is decided by it is so on all ranks

    def _averaged(self) -> Any:
        """The model with the average of its weights, where one is kept."""
        return nullcontext() if self.average is None else self.average.in_place()

    def _keep(self) -> None:
        """Remember the weights of now, of a split model this rank's pieces."""
        self.kept = {name: piece(p).cpu().clone() for name, p in self.applied.trainable().items()}
        self.kept_step = self.step

    def _count(self, loaded: Loaded) -> None:
        """Add up the broken pictures of all ranks; too many end the run."""
        known = len(self.broken)
        for of_a_rank in everyones(loaded.broken):
            self.broken.add(of_a_rank)
        self._tell(f"left out: {told}" for told in self.broken.names[known:])
        self.broken.check(self.settings.max_bad)

    def _tell(self, notes: Iterable[str]) -> None:
        """Now, and in the result."""
        for note in notes:
            self.journal.warn(note)
            self.notes.append(note)

    def _save(self) -> None:
        """A checkpoint of this step, once; of all ranks' dice."""
        if self.folder is None or self.saved == self.step:
            return
        self.engine.check_weights(self.step)
        dice = everyones(dice_on(self.accelerator.device))
        if rank() == 0 or self.settings.shard:
            tensors, plain = self.applied.optimizer_state(self.optimizer)
            tensors = {f"optimizer/{name}": tensor for name, tensor in tensors.items()}
            if self.average is not None:
                tensors |= on_cpu({f"average/{name}": tensor for name, tensor in self.average.values.items()})
        if rank() == 0:
            for number, thrown in enumerate(dice):
                tensors |= {f"dice/{number}/{kind}": of for kind, of in thrown._asdict().items() if of is not None}
            path = save_checkpoint(self.folder, self._state(plain), tensors, self.applied.save)
            keep_checkpoints(self.folder, self.settings.keep, self.kept_step if self.kept is not None else None)
            self.engine.last_good = path
            for callback in self.callbacks:
                callback.on_checkpoint(self, path)
        elif self.settings.shard:
            self.applied.save(self.folder)  # which rank 0 does
        self.saved = self.step
        wait_for_all()

    saved = -1

    def _state(self, optimizer: Any) -> dict[str, Any]:
        scaler = self.accelerator.scaler
        return {
            "step": self.step,
            "phase": self.applied.phase,
            "ranks": world_size(),
            "readers": self._readers(),
            "run": self._facts(),
            "optimizer": optimizer,
            "scheduler": self.scheduler.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "averaged": None if self.average is None else self.average.steps,
            "before": {name: asdict(metrics) for name, metrics in self.before.items()},
            "best": None if self.best is None else asdict(self.best),
            "kept_step": self.kept_step if self.kept is not None else None,
            "reason": self.reason,
            "losses": self.losses,
            "notes": self.notes,
            "broken": list(self.broken.names),
        }

    def _readers(self) -> list[int] | None:
        """Ranks and workers, where the order of the pairs depends on them."""
        return [world_size(), max(1, self.settings.num_workers or 0)] if isinstance(self.train, PairStream) else None

    def _facts(self) -> dict[str, Any]:
        """What must be the same when the run goes on."""
        return {
            **self.digests,
            **{
                f"setting {name}": value
                for name, value in self.settings.model_dump(mode="json").items()
                if name in FIXED
            },
            "pairs in a step": self.batch_size,
            "steps in an epoch": self.steps_per_epoch,
            "steps": self.total_steps,
        }

    @cached_property
    def digests(self) -> dict[str, str]:
        """Of all data, once: it takes microseconds a pair."""
        measured = {f"{name} data": digest_of(pairs) for name, pairs in self.sets.items()}
        return {"training data": digest_of(self.train)} | measured

    def _restore(self, saved: Saved) -> None:
        """Stand where the checkpoint was taken. DataError where this is another run."""
        state, facts = saved.state, self._facts()
        if other := [name for name in state["run"] | facts if state["run"].get(name) != facts.get(name)]:
            shown = ", ".join(
                f"the {name}" + ("" if name in self.digests else f" ({state['run'].get(name)}, now {facts.get(name)})")
                for name in other
            )
            raise DataError(f"the run cannot go on: changed since is {shown}", "give what the run was started with")
        if state["phase"] is not None:
            self.applied.enter_phase(self.optimizer, state["phase"])
        held = OptimizerState(_below("optimizer/", saved.tensors), state["optimizer"])
        self.applied.load_optimizer_state(self.optimizer, held)
        self.scheduler.load_state_dict(state["scheduler"])
        if state["scaler"] is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            self.average.restore(_below("average/", saved.tensors), state["averaged"])
        if state["best"] is not None:
            self.best = Best(**state["best"])
        self.step = self.saved = state["step"]
        self.losses, self.notes, self.reason = state["losses"], state["notes"], state["reason"]
        self.broken.add(state["broken"])
        if state["kept_step"] is not None:
            assert self.folder is not None
            self.kept_step, path = state["kept_step"], checkpoint_path(self.folder, state["kept_step"])
            if self.average is not None:
                weights = _below("average/", read_tensors(path))
            else:
                weights, *_ = read_weights(path / WEIGHTS)
            self.kept = {name: piece(cut_like(weights[name], p)) for name, p in self.applied.trainable().items()}
            if self.floor is not None:
                self.floor.kept = self.kept_step
        if self.folder is not None and rank() == 0:
            cut_metrics(self.folder, self.step)
            self.engine.last_good = saved.path

    def _restore_dice(self, saved: Saved) -> None:
        """This rank's own; on another number of ranks, ones that seed, step and rank give."""
        if saved.state["ranks"] != world_size():
            set_seed((self.settings.seed + self.step) % 2**31, device_specific=True)
            return
        mine = _below(f"dice/{rank()}/", saved.tensors)
        throw_again(Dice(mine["cpu"], mine.get("cuda")), self.accelerator.device)

    def _how_to_go_on(self) -> str:
        if self.folder is None:
            return "nothing was saved"
        if self.saved < 0:
            return "before the first checkpoint"
        return f"step {self.saved} is saved, go on with clipfreeze train --resume {self.folder}"

    def _finish(self, seconds: float) -> Result:
        """Put the weights in that are kept, measure them, and leave them in the folder."""
        module = self.engine.module.eval()
        kept = self.kept
        if kept is None and self.average is not None:
            kept = {name: piece(value) for name, value in self.average.values.items()}
        if kept is not None:
            with torch.no_grad():
                for name, parameter in self.applied.trainable().items():
                    piece(parameter).copy_(kept[name])
        after = self._measured(measure_tuned)
        loss = sum(self.losses) / len(self.losses)
        self._tell(collapse_notes(module, loss, self.batch_size) + decline_notes(self.before, after))
        result = Result(
            before=self.before,
            after=after,
            steps=self.step,
            kept_step=self.step if self.kept is None else self.kept_step,
            seconds=seconds,
            data_wait=self.waited / seconds if seconds else 0.0,
            loss=loss,
            broken=self.broken.names,
            notes=tuple(self.notes),
            folder=self.folder,
            interpolates=(self.kept is None or self.kept_step > 0)
            and not any(isinstance(site, (PromptSite, HeadSite)) for site in self.applied.plan.sites),
        )
        if self.folder is not None and (rank() == 0 or self.settings.shard):
            self.applied.save(self.folder)
        if self.folder is not None and rank() == 0:
            values = {name: value for name, value in asdict(result).items() if name != "folder"}
            write_text(self.folder / RESULTS, json.dumps(values, indent=2) + "\n")
        wait_for_all()
        return result


def _said(pair: Pair) -> int | tuple[str, ...]:
    return pair.captions if pair.label is None else pair.label


def _share(batch_size: int) -> int:
    """Of one rank. DataError where the ranks cannot share it evenly."""
    if batch_size % world_size():
        what = f"a batch of {batch_size} does not divide by {world_size()} ranks"
        near = max(2, batch_size // world_size()) * world_size()
        raise DataError(what, f"--batch-size {near}: it counts over all ranks together")
    return batch_size // world_size()


def _timed(batches: Iterator[Loaded]) -> Iterator[tuple[Loaded, float]]:
    """Each with the seconds it was waited for."""
    while True:
        started = time.monotonic()
        loaded = next(batches, None)
        if loaded is None:
            return
        yield loaded, time.monotonic() - started


def _metrics(values: dict[str, Any]) -> Metrics:
    """As `asdict` made them."""
    scores = {name: Score(**score) for name, score in values["scores"].items()}
    return Metrics(**{**values, "scores": scores, "reliability": tuple(Bin(**of) for of in values["reliability"])})


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
