"""Pairs to batches: decoded, transformed, a caption drawn, tokens made; in this process or in workers."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, NamedTuple

import torch
from open_clip.hf_model import HFTextEncoder
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from clipfreeze.errors import DataError, RunError
from clipfreeze.train.pairs import PairSet
from clipfreeze.train.pictures import open_image

Transform = Callable[[Image.Image], Tensor]
Batch = dict[str, Tensor]
"""image: (B, 3, H, W); text: (B, L) ids and concepts: (B,) equal where pairs say the same; label: (B,) classes."""


class Draw(NamedTuple):
    """Which pair, in which pass over the data: all that a sample's dice depend on, beside the run's seed."""

    epoch: int
    position: int


@dataclass(frozen=True, slots=True)
class Sample:
    image: Tensor  # (3, H, W)
    caption: str
    label: int | None


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
    """Samples as a run of this seed sees them: the same ones whatever the number of workers or the order."""

    def __init__(self, pairs: PairSet, transform: Transform, seed: int) -> None:
        self.pictures = Pictures(pairs, transform)
        self.seed = seed

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, draw: Draw) -> Sample | DataError:
        pairs = self.pictures.pairs
        pair = pairs[draw.position]
        with _dice(f"{self.seed}/{draw.epoch}/{draw.position}"):
            caption = random.choice(pairs.templates).format(random.choice(pair.captions))
            image = self.pictures[draw.position]
        return image if isinstance(image, DataError) else Sample(image, caption, pair.label)


class Shuffled(Sampler[Draw]):
    """Every pair once an epoch, in an order that seed and epoch give."""

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """accelerate's loaders call this before each pass."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[Draw]:
        order = list(range(self.size))
        random.Random(f"{self.seed}/{self.epoch}").shuffle(order)
        return (Draw(self.epoch, position) for position in order)


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
    """Samples to a batch; the first broken sample to its error. Text needs a tokenizer; labels come if asked for."""

    def __init__(self, tokenizer: Tokenizer | None, labels: bool = False) -> None:
        self.tokenizer, self.labels = tokenizer, labels

    def __call__(self, samples: list[Sample | DataError]) -> Batch | DataError:
        good: list[Sample] = []
        for sample in samples:
            if isinstance(sample, DataError):
                return sample
            good.append(sample)
        batch = {"image": torch.stack([sample.image for sample in good])}
        if self.tokenizer is not None:
            try:
                batch["text"] = text = self.tokenizer([sample.caption for sample in good])
            except DataError as error:
                return error
            batch["concepts"] = torch.tensor([_concept(s.label, ids) for s, ids in zip(good, text, strict=True)])
        if self.labels:
            batch["label"] = torch.tensor([sample.label for sample in good])
        return batch


def training_loader(
    pairs: PairSet,
    transform: Transform,
    tokenizer: Tokenizer | None,
    *,
    batch_size: int,
    seed: int,
    num_workers: int,
    labels: bool = False,
) -> DataLoader[Any]:
    """Batches of exactly `batch_size`: what is left over at the end of an epoch is dropped, so that each step has the
    same number of negatives. Without a tokenizer they hold no text; `labels` asks for the pairs' labels. DataError when
    the data do not fill one batch."""
    if batch_size < 2:
        raise DataError(f"a batch of {batch_size} has nothing to tell apart", "--batch-size 2 or more")
    if len(pairs) < batch_size:
        what = f"a batch of {batch_size} is larger than the data: {pairs.name} has {len(pairs)} pictures"
        raise DataError(what, f"--batch-size {len(pairs)} or less" if len(pairs) > 1 else "give more pictures")
    return DataLoader(
        TrainingSamples(pairs, transform, seed),
        batch_size,
        sampler=Shuffled(len(pairs), seed),
        drop_last=True,
        collate_fn=Collate(tokenizer, labels),
        **_worker_settings(num_workers),
    )


def picture_loader(pairs: PairSet, transform: Transform, *, batch_size: int, num_workers: int) -> DataLoader[Any]:
    """All pictures in order as (B, 3, H, W)."""
    return DataLoader(
        Pictures(pairs, transform), batch_size, collate_fn=stack_pictures, **_worker_settings(num_workers)
    )


def stack_pictures(images: list[Tensor | DataError]) -> Tensor | DataError:
    """(3, H, W) each to (B, 3, H, W); the first broken one to its error."""
    good: list[Tensor] = []
    for image in images:
        if isinstance(image, DataError):
            return image
        good.append(image)
    return torch.stack(good)


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


def _worker_settings(num_workers: int) -> dict[str, Any]:
    return {
        "num_workers": num_workers,
        "persistent_workers": num_workers > 0,
        "pin_memory": torch.cuda.is_available(),
        "generator": torch.Generator(),  # else each pass draws a number from the dice that dropout throws
    }


def _concept(label: int | None, ids: Tensor) -> int:
    """The label, or a hash of the caption as the model reads it: the same in every process."""
    if label is not None:
        return label
    return int.from_bytes(blake2b(ids.numpy().tobytes(), digest_size=8).digest(), "big", signed=True)


@contextmanager
def _dice(text: str) -> Iterator[None]:
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
