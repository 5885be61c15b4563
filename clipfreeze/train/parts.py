"""What a run trains on and what it is measured on: two parts of one data set, or two data sets."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from clipfreeze.errors import DataError, did_you_mean
from clipfreeze.train.columns import TableFormat
from clipfreeze.train.pairs import PairSet, picture_key, split_pairs
from clipfreeze.train.sources import HELD_OUT_NAMES, TRAIN_NAMES, read_data
from clipfreeze.train.stream import PairStream, read_stream

log = logging.getLogger(__name__)

_SHARE = re.compile(r"(\d+(?:\.\d+)?)\s*%")
_TENTH = 0.1


def read_parts(
    data: str, val: str | None = None, layout: TableFormat | None = None, seed: int = 0
) -> tuple[PairSet, PairSet]:
    """Training and validation data. `val` is a share ("5%"), the name of a part ("test"), or other data.

    Null is the part that the data themselves call validation or test, else a tenth. A split column of a table,
    subfolders train and val, and the splits of a hub data set name parts. What the data call by other names than the
    training part's is never trained on. A share never has equal pictures on both sides; where the data are divided by
    others, a warning counts those that are.
    """
    pairs = read_data(data, layout)
    if share := _SHARE.fullmatch((val or "").strip()):
        percent = float(share[1])
        if not 0 < percent < 100:
            raise DataError(f"a validation share of {val} leaves one side empty", "--val 10%")
        return split_pairs(training_part(pairs), percent / 100, seed)
    names = part_names(pairs)
    if val is None:
        own = next((name for name in _known(names, HELD_OUT_NAMES) if set(names) - {name}), None)
        return split_pairs(pairs, _TENTH, seed) if own is None else _warned(*_by_name(pairs, own))
    if val in names:
        return _warned(*_by_name(pairs, val))
    if names and not _may_be_data(val):
        raise DataError(f"{pairs.name} has no part {val!r}", f"{did_you_mean(val, names)} Or a share: --val 10%")
    return _warned(training_part(pairs), measuring_part(read_data(val, layout)))


def stream_parts(
    urls: str, samples_per_epoch: int | None, val: str | None, layout: TableFormat | None = None
) -> tuple[PairStream, PairSet]:
    """A stream to train on, and other data to measure on: nothing of a stream can be held out."""
    stream = read_stream(urls, samples_per_epoch or 0, layout)
    if val is None or is_share(val):
        what = f"{urls} is a stream, of which nothing can be held out" + (f": --val {val}" if val else "")
        raise DataError(what, "give other data to measure on: --val PATH")
    return stream, measuring_part(read_data(val, layout))


def is_share(val: str) -> bool:
    """Whether it is a share, like "5%"."""
    return _SHARE.fullmatch(val.strip()) is not None


def part_names(pairs: PairSet) -> list[str]:
    """The parts that the data name, in order."""
    return list(dict.fromkeys(pair.split for pair in pairs if pair.split is not None))


def part_of(pairs: PairSet, name: str) -> PairSet:
    """The pairs of one part; classes keep their numbers."""
    return replace(pairs, name=f"{pairs.name} {name}", pairs=tuple(pair for pair in pairs if pair.split == name))


def shared_pictures(train: PairSet, held_out: PairSet) -> int:
    """How many pictures of `held_out` are in `train` too, under whatever name."""
    seen = {picture_key(pair) for pair in train}
    return sum(picture_key(pair) in seen for pair in held_out)


def _by_name(pairs: PairSet, name: str) -> tuple[PairSet, PairSet]:
    """All of the training part; without one, all but the parts that are for measuring."""
    held_out = part_of(pairs, name)
    train = training_part(replace(pairs, pairs=tuple(pair for pair in pairs if pair.split != name)))
    if not train.pairs:
        raise DataError(f"{pairs.name} has no part but {name}", "give other data to train on, or a share: --val 10%")
    return train, replace(held_out, ignored=0, ignored_names=())


def training_part(pairs: PairSet) -> PairSet:
    """The part called train; else all but those that are for measuring, if anything is left; else all."""
    names = part_names(pairs)
    if train := _known(names, TRAIN_NAMES):
        return part_of(pairs, train[0])
    rest = tuple(pair for pair in pairs if not _known([pair.split or ""], HELD_OUT_NAMES))
    return replace(pairs, pairs=rest) if rest else pairs


def measuring_part(pairs: PairSet) -> PairSet:
    """The part that is for measuring, else all."""
    held_out = _known(part_names(pairs), HELD_OUT_NAMES)
    return part_of(pairs, held_out[0]) if held_out else pairs


def _known(names: Sequence[str], usual: Sequence[str]) -> list[str]:
    """Those of the names that are usual, in the order of `usual`."""
    return [name for word in usual for name in names if name.casefold() == word]


def _may_be_data(val: str) -> bool:
    return Path(val).exists() or not val.isidentifier()


def _warned(train: PairSet, held_out: PairSet) -> tuple[PairSet, PairSet]:
    if count := shared_pictures(train, held_out):
        log.warning(
            "%d of %d pictures of %s are in the training data too: what is measured on them is no generalisation",
            count,
            len(held_out),
            held_out.name,
        )
    return train, held_out
