"""Pairs to batches: decoded, transformed, a caption drawn, tokens made; in this process or in workers."""

from __future__ import annotations

import pickle
import random
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np
import torch
from open_clip.hf_model import HFTextEncoder
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from clipfreeze.errors import DataError, RunError
from clipfreeze.train.broken import Broken, none_whole, reason
from clipfreeze.train.pairs import Pair, PairSet
from clipfreeze.train.pictures import open_image

_ATTEMPTS = 20  # pairs tried in the place of a broken one

Transform = Callable[[Image.Image], Tensor]
Batch = dict[str, Tensor]
"""image: (B, 3, H, W), uint8 until normalised on the device; text: (B, L) ids and concepts: (B,) equal where pairs say
the same; label: (B,) classes."""


class Draw(NamedTuple):
    """Which pair, in which pass over the data: all that a sample's dice depend on, beside the run's seed. Of a `known`
    one the picture is not needed.
    """

    epoch: int
    position: int
    known: bool = False


@dataclass(frozen=True, slots=True)
class Sample:
    image: Tensor | None  # (3, H, W), see normalise.py
    caption: str
    label: int | None
    broken: tuple[str, ...] = ()  # what could not be read in its place, and why
    draw: Draw | None = None  # where another pair stands in for a broken one, none


@dataclass(frozen=True, slots=True)
class Loaded:
    """A batch, and what could not be read while it was made: "folder/a.jpg: the file is empty".

    `draws` are its samples, where they have a name; `seen` those of which the batch has the picture.
    """

    batch: Batch
    broken: tuple[str, ...] = ()
    draws: tuple[Draw | None, ...] = ()
    seen: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        """Samples."""
        return len(self.draws)

    def pin_memory(self) -> Loaded:
        """In memory that a GPU copies from while it computes; the DataLoader asks for it."""
        return replace(self, batch={key: value.pin_memory() for key, value in self.batch.items()})


class Pictures(Dataset[Any]):
    """Transformed pictures in order. A broken one is its DataError: raised in a worker it would lose its fields."""

    def __init__(self, pairs: PairSet, transform: Transform) -> None:
        self.pairs = pairs
        self.transform = transform

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Tensor | DataError:
        pair = self.pairs[index]
        try:
            return self.transform(open_image(pair.image, pair.place))
        except DataError as error:
            return error


class TrainingSamples(Dataset[Any]):
    """Samples as a run of this seed sees them: the same ones whatever the number of workers or the order.

    Another pair of the data, drawn by the dice of the place, stands in for a broken one. With `views` each picture has
    so many, which take turns.
    """

    def __init__(self, pairs: PairSet, transform: Transform, seed: int, views: int | None = None) -> None:
        self.pictures = Pictures(pairs, transform)
        self.seed, self.views = seed, views

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, draw: Draw) -> Sample | DataError:
        position = draw.position
        broken: list[str] = []
        for attempt in range(_ATTEMPTS):
            dice = f"{self.seed}/{draw.epoch}/{draw.position}" + (f"/{attempt}" if attempt else "")
            if attempt:
                position = random.Random(dice).randrange(len(self))
            pair = self.pictures.pairs[position]
            caption = _caption(pair, self.pictures.pairs.templates, random.Random(dice))
            if draw.known:
                return Sample(None, caption, pair.label, draw=draw)
            image = self._view(draw, position, dice)
            if isinstance(image, Tensor):
                return Sample(image, caption, pair.label, tuple(broken), None if attempt else draw)
            broken.append(reason(image))
        return none_whole(f"{len(broken)} pictures in a row are broken", broken)

    @cached_property
    def random(self) -> bool:
        """Whether a picture is another one each time."""
        return draws_numbers(self.pictures.transform)

    def view(self, draw: Draw) -> int:
        """Which of a picture's views, from 0, where they take turns."""
        return draw.epoch % self.views if self.views is not None and self.random else 0

    def picture(self, draw: Draw) -> Tensor:
        """(3, H, W), as in the sample of this draw; DataError where it is broken."""
        image = self._view(draw, draw.position, f"{self.seed}/{draw.epoch}/{draw.position}")
        if isinstance(image, DataError):
            raise image
        return image

    def _view(self, draw: Draw, position: int, dice: str) -> Tensor | DataError:
        with thrown(dice if self.views is None else f"{self.seed}/view {self.view(draw)}/{position}"):
            return self.pictures[position]


class Steps(Sampler[list[Draw]]):
    """A rank's draws of each step. All ranks together take of the epoch's order what one process with a batch `world`
    times as large would take, in the same place."""

    def __init__(self, size: int, seed: int, batch_size: int, rank: int, world: int) -> None:
        self.size, self.seed, self.batch_size, self.rank, self.world = size, seed, batch_size, rank, world
        self.epoch = self.skip = 0
        self.knows: Callable[[Draw], bool] = lambda draw: False

    def __len__(self) -> int:
        return self.size // (self.batch_size * self.world)

    def __iter__(self) -> Iterator[list[Draw]]:
        epoch, skip, order = self.epoch, self.skip, _order(self.size, self.seed, self.epoch)
        for step in range(skip, len(self)):
            start = (step * self.world + self.rank) * self.batch_size
            draws = [Draw(epoch, position) for position in order[start : start + self.batch_size]]
            yield [draw._replace(known=self.knows(draw)) for draw in draws]


class Tokenizer:
    """The model's tokenizer, held to the model: ids inside its vocabulary, length its context."""

    def __init__(self, tokenize: Callable[[list[str]], Tensor], model: Any) -> None:
        text = getattr(model, "text", model)  # CLIP has its text tower spread over the top level
        self.tokenize = tokenize
        self.vocabulary = int(text.vocab_size)
        self.context = int(text.context_length)
        self.shorter_fits = isinstance(text, HFTextEncoder)  # its context is a maximum, and it masks padding

    def __call__(self, texts: list[str]) -> Tensor:
        """texts -> (B, L) token ids."""
        ids = self.tokenize(texts)
        fix = "take the model's own tokenizer: open_clip.get_tokenizer with the model's name"
        if ids.shape[1] > self.context or (ids.shape[1] < self.context and not self.shorter_fits):
            raise DataError(f"the tokenizer makes {ids.shape[1]} tokens, the model's context is {self.context}", fix)
        if not 0 <= int(ids.min()) <= int(ids.max()) < self.vocabulary:
            what = f"token ids from {int(ids.min())} to {int(ids.max())}, the model's vocabulary has {self.vocabulary}"
            raise DataError(what, fix)
        return ids


class Collate:
    """Samples to a batch, with the pictures there are; the first broken sample to its error. Text needs a tokenizer;
    labels come if asked for.
    """

    def __init__(self, tokenizer: Tokenizer | None, labels: bool = False) -> None:
        self.tokenizer, self.labels = tokenizer, labels

    def __call__(self, samples: list[Sample | DataError]) -> Batch | DataError:
        good: list[Sample] = []
        for sample in samples:
            if isinstance(sample, DataError):
                return sample
            good.append(sample)
        seen = [sample.image for sample in good if sample.image is not None]
        batch = {"image": torch.stack(seen)} if seen else {}
        if self.tokenizer is not None:
            try:
                batch["text"] = text = self.tokenizer([sample.caption for sample in good])
            except DataError as error:
                return error
            batch["concepts"] = torch.tensor([_concept(s.label, ids) for s, ids in zip(good, text, strict=True)])
        if self.labels:
            batch["label"] = torch.tensor([sample.label for sample in good])
        return batch


class Load:
    """Samples to a loaded batch, with all that was broken on the way."""

    def __init__(self, collate: Collate) -> None:
        self.collate = collate

    def __call__(self, samples: list[Sample | DataError]) -> Loaded | DataError:
        batch = self.collate(samples)
        if isinstance(batch, DataError):
            return batch
        good = [sample for sample in samples if isinstance(sample, Sample)]
        return Loaded(
            batch,
            tuple(name for sample in good for name in sample.broken),
            tuple(sample.draw for sample in good),
            tuple(row for row, sample in enumerate(good) if sample.image is not None),
        )


class TrainingLoader:
    """The batches of each epoch, of exactly `batch_size` a rank, as many on every rank; what is left over is dropped.

    Order, captions and augmentation come from seed, epoch and place, so they are the same whatever the workers, and
    two ranks see what one rank sees that takes both their batches. A broken picture is named in `Loaded.broken`, and
    another pair takes its place. Without a tokenizer batches hold no text; `labels` asks for the pairs' labels.
    """

    def __init__(
        self,
        pairs: PairSet,
        transform: Transform,
        tokenizer: Tokenizer | None,
        *,
        batch_size: int,
        seed: int,
        num_workers: int,
        labels: bool = False,
        rank: int = 0,
        world: int = 1,
        views: int | None = None,
    ) -> None:
        """DataError when the data do not fill one batch of all ranks."""
        check_batch(pairs.name, len(pairs), batch_size, world)
        self._steps = Steps(len(pairs), seed, batch_size, rank, world)
        self.samples = TrainingSamples(pairs, transform, seed, views)
        self._loader: DataLoader[Any] = DataLoader(
            self.samples,
            batch_sampler=self._steps,
            collate_fn=Load(Collate(tokenizer, labels)),
            **worker_settings(num_workers),
        )

    def __len__(self) -> int:
        """Steps an epoch, the same on every rank."""
        return len(self._steps)

    def leave_out(self, knows: Callable[[Draw], bool]) -> None:
        """From now on, load no picture of which `knows` says that it is not needed."""
        self._steps.knows = knows

    def batches(self, epoch: int, skip: int = 0) -> Iterator[Loaded]:
        """Those of an epoch, from the one after the first `skip` on."""
        self._steps.epoch, self._steps.skip = epoch, skip
        yield from unbroken(self._loader)


def check_batch(name: str, size: int, batch_size: int, world: int = 1) -> None:
    """DataError unless a batch has something to tell apart and the data fill one of all ranks."""
    whole = batch_size * world
    if whole < 2:
        raise DataError(f"a batch of {whole} has nothing to tell apart", "--batch-size 2 or more")
    if size < whole:
        what = f"a batch of {whole} is larger than the data: {name} has {size} pictures"
        raise DataError(what, f"--batch-size {size} or less" if size > 1 else "give more pictures")


class EvaluationLoader:
    """The pictures of a set, each once and in order: all, or those of `rows`. Broken ones are left out."""

    def __init__(
        self,
        pairs: PairSet,
        transform: Transform,
        *,
        batch_size: int,
        num_workers: int,
        rows: Sequence[int] | None = None,
    ) -> None:
        self._loader: DataLoader[Any] = DataLoader(
            Placed(pairs, transform),
            batch_size,
            sampler=range(len(pairs)) if rows is None else rows,
            collate_fn=split_broken,
            **worker_settings(num_workers),
        )

    def batches(self, broken: Broken) -> Iterator[tuple[Tensor, Tensor]]:
        """(B,) positions in the set and (B, ...) transformed pictures; `broken` is told what is missing."""
        for positions, images, names in unbroken(self._loader):
            broken.add(names)
            if len(positions):
                yield positions, images


class Placed(Pictures):
    """Pictures with their positions."""

    def __getitem__(self, index: int) -> Any:
        return index, super().__getitem__(index)


def split_broken(placed: list[tuple[int, Tensor | DataError]]) -> tuple[Tensor, Tensor, list[str]]:
    """(B,) positions and (B, ...) pictures of what could be read, and the names of the rest."""
    good = {index: image for index, image in placed if isinstance(image, Tensor)}
    names = [reason(image) for _, image in placed if isinstance(image, DataError)]
    return torch.tensor(list(good)), torch.stack(list(good.values())) if good else torch.empty(0), names


def unbroken(loader: Any) -> Iterator[Any]:
    """The loader's batches; raises the error a broken sample left in place of one."""
    try:
        for batch in loader:
            if isinstance(batch, DataError):
                raise batch
            yield batch
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        fix = (
            'in a script, start under `if __name__ == "__main__":`, as Python\'s multiprocessing asks; or num_workers=0'
        )
        raise RunError(f"a worker process ended: {str(error).splitlines()[0]}", fix) from error


def worker_settings(num_workers: int) -> dict[str, Any]:
    """Of every DataLoader here."""
    return {
        "num_workers": num_workers,
        "persistent_workers": num_workers > 0,
        "pin_memory": torch.cuda.is_available(),
        "worker_init_fn": leave_signals_alone if num_workers else None,
        "generator": torch.Generator(),  # else each pass draws a number from the dice that dropout throws
    }


def leave_signals_alone(worker: int) -> None:
    """Launchers and schedulers signal a whole group, and the run still needs its workers to finish its step; they end
    with it."""
    for name in ("SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def _order(size: int, seed: int, epoch: int) -> list[int]:
    """All positions, as seed and epoch shuffle them."""
    order = list(range(size))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order


def draws_numbers(transform: Transform) -> bool:
    """Whether it draws any of the random numbers there are, of Python, NumPy and torch."""
    picture = Image.effect_noise((96, 64), 64).convert("RGB")

    def states() -> list[bytes]:
        return [pickle.dumps(random.getstate()), pickle.dumps(np.random.get_state()), bytes(torch.get_rng_state())]

    with thrown("draws"):
        before = states()
        transform(picture)
        return states() != before


def _caption(pair: Pair, templates: tuple[str, ...], dice: random.Random) -> str:
    return dice.choice(templates).format(dice.choice(pair.captions))


def _concept(label: int | None, ids: Tensor) -> int:
    """The label, or a hash of the caption as the model reads it: the same in every process."""
    if label is not None:
        return label
    return int.from_bytes(blake2b(ids.numpy().tobytes(), digest_size=8).digest(), "big", signed=True)


@contextmanager
def thrown(text: str) -> Iterator[None]:
    """Python's and torch's random numbers come from `text` inside, and go on outside as if nothing had been drawn."""
    seed = int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big", signed=True)
    before = random.getstate()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed CUDA too
        random.seed(text)
        try:
            yield
        finally:
            random.setstate(before)
