"""Shards that are read from their start, as webdataset does: remote ones, and more than a disk holds."""

from __future__ import annotations

import logging
import random
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, ClassVar

from braceexpand import braceexpand
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from clipfreeze.errors import DataError
from clipfreeze.train.batches import (
    Collate,
    Load,
    Loaded,
    Sample,
    Tokenizer,
    Transform,
    check_batch,
    thrown,
    unbroken,
    worker_settings,
)
from clipfreeze.train.broken import none_whole, reason
from clipfreeze.train.columns import TableFormat
from clipfreeze.train.pairs import LeftOut, Pair, PairSet
from clipfreeze.train.pictures import open_image
from clipfreeze.train.shard_samples import captions_of, image_key
from clipfreeze.train.shards import URL

log = logging.getLogger(__name__)

SCHEMES = ("pipe", "file", "http", "https", "sftp", "ftps", "scp", "gs", "hf", "ais", "htgs")
"""What webdataset opens."""


@dataclass(frozen=True)
class PairStream:
    """Shards by URL, and how many of their samples make an epoch. They are not counted, nor held in memory."""

    name: str
    urls: tuple[str, ...]
    samples_per_epoch: int
    encoding: str = "utf-8"
    templates: tuple[str, ...] = ("{}",)
    buffer: int = 1000  # samples, still encoded, that a worker draws from
    class_names: ClassVar[tuple[str, ...]] = ()  # nobody knows what all its captions are

    def __len__(self) -> int:
        return self.samples_per_epoch


TrainingData = PairSet | PairStream


def read_stream(urls: str, samples_per_epoch: int, layout: TableFormat | None = None) -> PairStream:
    """The shards of a brace pattern. DataError for what webdataset cannot open."""
    scheme = URL.match(urls)
    if scheme is None or scheme[1].lower() not in SCHEMES:
        shown = scheme[1] if scheme else urls
        raise DataError(
            f"no way to stream {shown}: webdataset opens {', '.join(SCHEMES)}",
            "let a command read it: pipe:aws s3 cp s3://BUCKET/{00000..00099}.tar -",
        )
    if samples_per_epoch < 1:
        raise DataError("a stream has no end: say how many samples make an epoch", "--samples-per-epoch N")
    try:
        expanded = tuple(braceexpand(urls, escape=False))
    except ValueError as error:
        raise DataError(f"{urls}: {error}", "write {00000..00099}.tar") from error
    return PairStream(urls, expanded, samples_per_epoch, (layout or TableFormat()).encoding)


class StreamLoader:
    """As TrainingLoader, of a stream.

    An epoch's shards are shuffled by seed and epoch, divided over ranks and then over workers, and read again in
    another order when they are used up; a reader that gets none shares those of the others. Every rank yields the same
    number of batches. The order depends on seed, epoch, ranks and workers: a run that is resumed needs as many. A
    sample without picture or caption is passed over; a broken picture's place goes to another of its batch; a shard
    that cannot be read to its end is named like a broken picture.
    """

    def __init__(
        self,
        stream: PairStream,
        transform: Transform,
        tokenizer: Tokenizer | None,
        *,
        batch_size: int,
        seed: int,
        num_workers: int,
        labels: bool = False,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if labels:
            raise DataError(f"{stream.name} has captions and no classes", "a head needs data with classes")
        check_batch(stream.name, len(stream), batch_size, world)
        self._reader = _Reader(stream, transform, Load(Collate(tokenizer)), batch_size, seed, rank, world)
        self.num_workers = num_workers

    def __len__(self) -> int:
        """Steps an epoch, the same on every rank."""
        return self._reader.steps

    def batches(self, epoch: int, skip: int = 0) -> Iterator[Loaded]:
        """Those of an epoch, from the one after the first `skip` on; what is skipped is read and not decoded."""
        self._reader.epoch, self._reader.skip = epoch, skip
        settings = {**worker_settings(self.num_workers), "persistent_workers": False}  # they hold a copy of the epoch
        yield from unbroken(DataLoader(self._reader, batch_size=None, collate_fn=_as_it_is, **settings))


def _as_it_is(loaded: Any) -> Any:
    return loaded


class _Reader(IterableDataset[Any]):
    """The batches of one worker of one rank."""

    def __init__(
        self, stream: PairStream, transform: Transform, load: Load, batch_size: int, seed: int, rank: int, world: int
    ) -> None:
        self.stream, self.transform, self.load = stream, transform, load
        self.batch_size, self.seed, self.rank, self.world = batch_size, seed, rank, world
        self.epoch = self.skip = 0

    @property
    def steps(self) -> int:
        return len(self.stream) // (self.batch_size * self.world)

    def __iter__(self) -> Iterator[Loaded | DataError]:
        info = get_worker_info()
        workers = info.num_workers if info else 1
        # The DataLoader asks its workers in turn, from the first; after a skip the turn is another's.
        worker = ((info.id if info else 0) + self.skip) % workers
        failed: dict[str, None] = {}
        left_out = LeftOut()
        pairs = self._pairs(worker, workers, failed, left_out)
        try:
            for step in range(worker, self.steps, workers):
                drawn = [next(pairs) for _ in range(self.batch_size)]
                if step >= self.skip:
                    yield self._loaded(step, drawn, failed)
        except DataError as error:  # raised in a worker it would lose its fields
            yield error
        if left_out.count:
            log.warning("%s: samples without a picture or a caption, %s", self.stream.name, left_out.shown())

    def _loaded(self, step: int, pairs: list[Pair], failed: dict[str, None]) -> Loaded | DataError:
        """The batch of a step; those that are broken give their places to others of it."""
        samples: list[Sample] = []
        broken = list(failed)
        failed.clear()
        for place, pair in enumerate(pairs):
            with thrown(f"{self.seed}/{self.epoch}/{step}/{self.rank}/{place}"):
                caption = random.choice(self.stream.templates).format(random.choice(pair.captions))
                try:
                    samples.append(Sample(self.transform(open_image(pair.image, pair.place)), caption, None))
                except DataError as error:
                    broken.append(reason(error))
        if not samples:
            return none_whole(f"a whole batch of {len(pairs)} is broken", broken)
        dice = random.Random(f"{self.seed}/{self.epoch}/{step}/{self.rank}")
        samples += [dice.choice(samples) for _ in range(len(pairs) - len(samples))]
        loaded = self.load(list(samples))
        return loaded if isinstance(loaded, DataError) else replace(loaded, broken=tuple(broken))

    def _pairs(self, worker: int, workers: int, failed: dict[str, None], left_out: LeftOut) -> Iterator[Pair]:
        """Pairs without end. DataError when a pass over the shards gives none."""
        import webdataset

        dice = random.Random(f"{self.seed}/{self.epoch}/{self.rank}/{worker}")
        urls = self._urls(worker, workers)
        for _ in count():
            seen = 0
            dice.shuffle(urls)
            samples = webdataset.DataPipeline(
                _Shards(urls, failed), webdataset.shuffle(self.stream.buffer, initial=self.stream.buffer, rng=dice)
            )
            for sample in samples:
                if pair := self._pair(sample, left_out):
                    seen += 1
                    yield pair
            if not seen and len(urls) < len(self.stream.urls):
                urls = list(self.stream.urls)  # the other ranks wait for this one
            elif not seen:
                first = next(iter(failed), left_out.shown())
                what = f"{self.stream.name}: no sample with a picture and a caption in {len(urls)} shards; {first}"
                raise DataError(what, "look at one: tar tf SHARD, or the command's own message above")

    def _urls(self, worker: int, workers: int) -> list[str]:
        urls = list(self.stream.urls)
        random.Random(f"{self.seed}/{self.epoch}").shuffle(urls)
        urls = urls[self.rank :: self.world] or urls
        return urls[worker::workers] or urls

    def _pair(self, sample: dict[str, Any], left_out: LeftOut) -> Pair | None:
        place = f"{sample['__url__']}/{sample['__key__']}"
        image = image_key(sample)
        captions = captions_of(sample, f"{place}.{image}", self.stream.encoding) if image else ()
        if not image or not captions:
            left_out.add(place)
            return None
        return Pair(sample[image], captions, f"{place}.{image}")


class _Shards:
    """The samples of shards one after the other, each opened when its turn comes. What fails is noted in `failed`."""

    def __init__(self, urls: list[str], failed: dict[str, None]) -> None:
        self.urls, self.failed = urls, failed

    def __call__(self) -> Iterator[dict[str, Any]]:
        from webdataset.gopen import gopen
        from webdataset.tariterators import group_by_keys, tar_file_expander

        for url in self.urls:
            note = self._note(url)
            try:
                file = gopen(url)
            except (OSError, ValueError) as error:
                note(error)
                continue
            read = False
            try:
                with file:
                    watched = _Watched(file)
                    files = tar_file_expander([{"url": url, "stream": watched}], handler=note)
                    yield from group_by_keys(files, handler=note)
                    read = True
                    if watched.is_cut():
                        note(EOFError("no end mark"))
            except OSError as error:  # the command's exit status, when it is closed
                if not read:  # because nobody asks for more
                    return
                note(error)

    def _note(self, url: str) -> Callable[[Exception], bool]:
        def note(error: Exception) -> bool:
            what = str(error.args[0] if error.args else error).splitlines()[0]
            self.failed[f"{url}: the shard cannot be read to its end: {what}"] = None
            return True

        return note


class _Watched:
    """A tar as it is read. tarfile takes one that is cut in a header for whole."""

    def __init__(self, file: Any) -> None:
        self.file = file
        self.first = self.last = b""

    def read(self, size: int) -> bytes:
        data: bytes = self.file.read(size)
        self.first = self.first or data
        self.last = (self.last + data)[-tarfile.BLOCKSIZE :]
        return data

    def is_cut(self) -> bool:
        """Whether the last block is not the end mark's; of what is compressed, its own end tells."""
        while self.read(tarfile.RECORDSIZE):
            pass
        return self.first[257:262] == b"ustar" and any(self.last)
