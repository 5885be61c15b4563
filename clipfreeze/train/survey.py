"""A look at a data set before training: what is in it, and what will go wrong."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from clipfreeze.train.batches import EvaluationLoader
from clipfreeze.train.broken import Broken
from clipfreeze.train.pairs import Pair, PairSet, picture_key
from clipfreeze.train.parts import part_names

_CHUNK = 1024  # texts tokenized together
_LONGER = 4  # times the context: what is longer counts as this long
_MOST_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Texts:
    """Captions in their templates, in tokens of a model."""

    context: int  # tokens that the model reads
    longest: int  # tokens
    cut: int  # captions that are longer than the context
    examples: tuple[str, ...]  # of those


@dataclass(frozen=True, slots=True)
class Survey:
    """What was found in a data set."""

    name: str
    pictures: int
    parts: dict[str, int]  # pictures by the part that the data name
    classes: int
    captions: int  # different ones
    duplicate_pictures: int  # equal to an earlier one
    duplicate_captions: int  # pictures that share a caption or class with another
    most_common: tuple[tuple[str, int], ...]  # captions or classes, with the pictures they are said of
    batch_size: int
    false_negatives: float  # expected pairs in a batch that say the same
    width: tuple[int, int, int]  # smallest, median, largest, pixels
    height: tuple[int, int, int]
    texts: Texts
    broken: tuple[str, ...]
    ignored: int
    ignored_names: tuple[str, ...]


def look_over(pairs: PairSet, tokenizer: Any, *, batch_size: int, num_workers: int = 0) -> Survey:
    """Decode every picture and tokenize every caption. `tokenizer` is open_clip's, of the model to be trained."""
    broken = Broken(len(pairs))
    loader = EvaluationLoader(pairs, picture_size, batch_size=64, num_workers=num_workers)
    sizes = torch.cat([torch.empty(0, 2, dtype=torch.long), *(size for _, size in loader.batches(broken))])
    said = Counter(what for pair in pairs for what in _said(pair, pairs))
    return Survey(
        name=pairs.name,
        pictures=len(pairs),
        parts={name: sum(pair.split == name for pair in pairs) for name in part_names(pairs)},
        classes=len(pairs.class_names),
        captions=len({caption for pair in pairs for caption in pair.captions}),
        duplicate_pictures=len(pairs) - len({picture_key(pair) for pair in pairs}),
        duplicate_captions=sum(any(said[what] > 1 for what in _said(pair, pairs)) for pair in pairs),
        most_common=tuple(entry for entry in said.most_common(_MOST_SHOWN) if entry[1] > 1),
        batch_size=batch_size,
        false_negatives=expected_false_negatives([_said(pair, pairs) for pair in pairs], batch_size),
        width=_spread(sizes[:, 0].tolist()),
        height=_spread(sizes[:, 1].tolist()),
        texts=measure_texts(pairs, tokenizer),
        broken=broken.names,
        ignored=pairs.ignored,
        ignored_names=pairs.ignored_names,
    )


def picture_size(picture: Image.Image) -> Tensor:
    """(2,) width and height."""
    return torch.tensor(picture.size)


def expected_false_negatives(said: Sequence[Sequence[str]], batch_size: int) -> float:
    """Expected pairs in a batch whose drawn captions are equal, pictures drawn without and captions with equal chance.

    A contrastive loss that takes only a picture's own caption for right pushes these apart; ours does not.
    """
    size = len(said)
    drawn = min(batch_size, size)
    if drawn < 2:
        return 0.0
    chances: dict[str, list[float]] = {}
    for captions in said:
        for caption in captions:
            chances.setdefault(caption, []).append(1 / len(captions))
    shared = (chance for chance in chances.values() if len(chance) > 1)
    equal = sum(sum(chance) ** 2 - sum(p * p for p in chance) for chance in shared) / (size * (size - 1))
    return equal * drawn * (drawn - 1) / 2


def measure_texts(pairs: PairSet, tokenizer: Any) -> Texts:
    """The lengths of all captions, each in the template that makes it longest."""
    template = max(pairs.templates, key=len)
    captions = list(dict.fromkeys(caption for pair in pairs for caption in pair.captions))
    lengths: list[int] = []
    for start in range(0, len(captions), _CHUNK):
        texts = [template.format(caption) for caption in captions[start : start + _CHUNK]]
        lengths += token_counts(texts, tokenizer, _LONGER * tokenizer.context_length)
    cut = [caption for caption, length in zip(captions, lengths, strict=True) if length > tokenizer.context_length]
    return Texts(tokenizer.context_length, max(lengths, default=0), len(cut), tuple(cut[:_MOST_SHOWN]))


def token_counts(texts: list[str], tokenizer: Callable[..., Tensor], longest: int) -> list[int]:
    """Tokens of each text, start and end among them, as far as `longest`: what stands before the padding."""
    ids = tokenizer(["", *texts], context_length=longest)
    place = torch.arange(1, longest + 1)
    counts: list[int] = ((ids[1:] != ids[0, -1]) * place).amax(1).tolist()
    return counts


def _said(pair: Pair, pairs: PairSet) -> tuple[str, ...]:
    return pair.captions if pair.label is None else (pairs.class_names[pair.label],)


def _spread(values: Iterable[int]) -> tuple[int, int, int]:
    found = sorted(values) or [0]
    return found[0], int(statistics.median(found)), found[-1]
