"""Zero-shot classification and retrieval, with standard errors, ties counted at their expected value."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import open_clip
import torch
from torch import Tensor, nn

from clipfreeze.errors import DataError, RunError
from clipfreeze.inject.head import ClassHead
from clipfreeze.inject.modes import evaluating
from clipfreeze.train.batches import EvaluationLoader, Tokenizer, Transform
from clipfreeze.train.broken import Broken
from clipfreeze.train.calibration import Bin, calibration_gaps, reliability
from clipfreeze.train.normalise import split_transform
from clipfreeze.train.pairs import PairSet
from clipfreeze.train.together import Shard

log = logging.getLogger(__name__)

_ROWS = 256  # of a score matrix looked at together
_CLASSES = 64
_MOST_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Score:
    """A mean over samples and its standard error."""

    value: float
    error: float


@dataclass(frozen=True, slots=True)
class Metrics:
    """What a model does on a set: scores by name, the main one first, over so many images and classes or captions.

    Images that cannot be read are not counted. `reliability` is of a classification alone: accuracy by confidence.
    """

    kind: str  # "zero-shot", "retrieval", "prompt" (zero-shot or retrieval with a learned prompt) or "head"
    images: int
    texts: int
    scores: dict[str, Score]
    reliability: tuple[Bin, ...] = ()

    @property
    def main(self) -> Score:
        """top1, or image_to_text_recall_at_1."""
        return next(iter(self.scores.values()))


@dataclass(frozen=True)
class Encoder:
    """A model with what turns pictures and words into its input; `shard` is this process's part of the encoding.

    Processes that measure together get the same numbers, each sample being counted once.
    """

    model: Any
    tokenizer: Tokenizer
    transform: Transform
    batch_size: int = 256
    num_workers: int = 0
    shard: Shard = field(default_factory=Shard)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        device: torch.device = next(self.model.parameters()).device
        return device


def measure(encoder: Encoder, pairs: PairSet) -> Metrics:
    """Zero-shot classification where the set has classes, retrieval otherwise. The model's modes are as before."""
    if not pairs.pairs:
        raise DataError(f"{pairs.name} is empty: nothing to evaluate on")
    with torch.no_grad(), evaluating(encoder.model):
        return zero_shot(encoder, pairs) if pairs.class_names else retrieval(encoder, pairs)


def zero_shot(encoder: Encoder, pairs: PairSet) -> Metrics:
    """top1, top5, nll, confidence and ece over the set's class names, a class's feature being its templates' mean.

    Probabilities are the softmax over the classes at the model's logit scale, also for a model trained with SigLIP's
    loss; a logit bias shifts all classes alike and plays no part. confidence is the mean of the top class's, ece the
    expected calibration error.
    """
    readable, images = image_features(encoder, pairs)
    logits = encoder.model.logit_scale.exp() * images @ class_features(encoder, pairs).T
    return _classified("zero-shot", logits, readable)


def by_head(encoder: Encoder, pairs: PairSet, head: ClassHead) -> Metrics:
    """As zero_shot, the logits being the head's for the set's class names, all of which it must know."""
    columns = [head.classes.index(name) for name in pairs.class_names]
    with torch.no_grad(), evaluating(encoder.model):
        readable, images = image_features(encoder, pairs)
        return _classified("head", _finite(head(images))[:, columns], readable)


def _classified(kind: str, logits: Tensor, pairs: PairSet) -> Metrics:
    """logits: (N, classes)."""
    labels = torch.tensor([pair.label for pair in pairs], device=logits.device)
    right = nn.functional.one_hot(labels, len(pairs.class_names)).bool()
    hits = {k: recall_at(logits, right, k) for k in (1, 5)}
    confidence = logits.double().softmax(1).amax(1)
    scores = {f"top{k}": _share(hits[k]) for k in hits} | {
        "nll": _mean(nn.functional.cross_entropy(logits.double(), labels, reduction="none")),
        "confidence": _mean(confidence),
        "ece": _mean(calibration_gaps(confidence, hits[1])),
    }
    return Metrics(kind, len(pairs), len(pairs.class_names), scores, reliability(confidence, hits[1]))


def retrieval(encoder: Encoder, pairs: PairSet) -> Metrics:
    """Recall at 1, 5 and 10 both ways; an image's captions and a caption's images are all right answers."""
    pairs, images = image_features(encoder, pairs)
    texts = list(dict.fromkeys(caption for pair in pairs for caption in pair.captions))
    number = {text: index for index, text in enumerate(texts)}
    captions = text_features(encoder, texts)
    truth = torch.tensor([(row, number[caption]) for row, pair in enumerate(pairs) for caption in pair.captions])
    scores = {}
    for name, queries, answers, right in (
        ("image_to_text", images, captions, truth),
        ("text_to_image", captions, images, truth.flip(1)),
    ):
        for k, hits in _recalls(queries, answers, right.to(queries.device), (1, 5, 10)).items():
            scores[f"{name}_recall_at_{k}"] = _share(hits)
    return Metrics("retrieval", len(pairs), len(texts), scores)


def image_features(encoder: Encoder, pairs: PairSet) -> tuple[PairSet, Tensor]:
    """The pairs whose pictures can be read, and (N, D) normalised. A warning names the others; DataError if all are."""
    broken, lost = Broken(len(pairs)), set[int]()
    as_bytes, normalise = split_transform(encoder.transform)

    def encode(rows: Sequence[int]) -> Tensor:
        loader = EvaluationLoader(
            pairs, as_bytes, batch_size=encoder.batch_size, num_workers=encoder.num_workers, rows=rows
        )
        places, parts = [torch.empty(0, dtype=torch.long)], []
        for positions, images in loader.batches(broken):
            places.append(positions)
            images = normalise(images.to(encoder.device, non_blocking=True))
            parts.append(encoder.model.encode_image(images, normalize=True))
        read = torch.isin(torch.tensor(rows), torch.cat(places))
        lost.update(row for row, there in zip(rows, read.tolist(), strict=True) if not there)
        if not parts:
            return torch.zeros(len(rows), 0, device=encoder.device)
        features = torch.cat(parts)
        whole = features.new_zeros(len(rows), features.shape[1])
        whole[read.to(encoder.device)] = features
        return whole

    features = _encoded(encoder, len(pairs), encoder.batch_size, encode)
    told = encoder.shard.told((lost, broken.names))
    lost, names = set().union(*(rows for rows, _ in told)), [name for _, names in told for name in names]
    if len(lost) == len(pairs):
        raise DataError(f"no picture of {pairs.name} can be read: {names[0]}", "look it over: clipfreeze data PATH")
    if lost and encoder.shard.rank == 0:
        shown = "; ".join(names[:_MOST_SHOWN])
        log.warning("%d of %d pictures of %s are broken and left out: %s", len(lost), len(pairs), pairs.name, shown)
    kept = [row for row in range(len(pairs)) if row not in lost]
    return replace(pairs, pairs=tuple(pairs[row] for row in kept)), features[kept] if lost else features


def text_features(encoder: Encoder, texts: Sequence[str]) -> Tensor:
    """(N, D) normalised."""
    size = encoder.batch_size

    def encode(rows: Sequence[int]) -> Tensor:
        own = [texts[row] for row in rows]
        ids = (encoder.tokenizer(own[start : start + size]) for start in range(0, len(own), size))
        return torch.cat([encoder.model.encode_text(chunk.to(encoder.device), normalize=True) for chunk in ids])

    return _encoded(encoder, len(texts), size, encode)


def class_features(encoder: Encoder, pairs: PairSet) -> Tensor:
    """(C, D) normalised: open_clip's zero-shot classifier of the set's class names in its templates."""

    def encode(rows: Sequence[int]) -> Tensor:
        own = [pairs.class_names[row] for row in rows]
        columns: Tensor = open_clip.build_zero_shot_classifier(
            encoder.model, encoder.tokenizer, own, pairs.templates, _CLASSES, encoder.device
        )
        return columns.T.contiguous()

    return _encoded(encoder, len(pairs.class_names), _CLASSES, encode)


def _encoded(encoder: Encoder, count: int, size: int, encode: Callable[[Sequence[int]], Tensor]) -> Tensor:
    return _finite(encoder.shard.together(count, size, encoder.device, encode))


def _finite(features: Tensor) -> Tensor:
    if not features.isfinite().all():
        raise RunError("the model's features are not finite numbers", "start from other weights, or a lower lr")
    return features


def _recalls(queries: Tensor, answers: Tensor, truth: Tensor, ks: tuple[int, ...]) -> dict[int, Tensor]:
    """recall_at for each k, in chunks. queries: (N, D), answers: (M, D), truth: (P, 2) of right (query, answer)."""
    hits: dict[int, list[Tensor]] = {k: [] for k in ks}
    for start in range(0, len(queries), _ROWS):
        scores = queries[start : start + _ROWS] @ answers.T
        rows = truth[(truth[:, 0] >= start) & (truth[:, 0] < start + _ROWS)]
        right = torch.zeros_like(scores, dtype=torch.bool)
        right[rows[:, 0] - start, rows[:, 1]] = True
        for k in ks:
            hits[k].append(recall_at(scores, right, k))
    return {k: torch.cat(parts) for k, parts in hits.items()}


def recall_at(scores: Tensor, right: Tensor, k: int) -> Tensor:
    """(N,) chance that a right answer is among the k best, equal scores standing in random order.

    scores: (N, M), right: (N, M) bool with at least one true a row. A model that says the same of everything so gets
    what guessing gets, not a full mark.
    """
    best = scores.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
    above = (scores > best).sum(1)
    level = scores == best
    right_level, wrong_level = (level & right).sum(1).double(), (level & ~right).sum(1).double()
    missed = torch.ones_like(right_level)
    for place in range(k):  # the chance that each place left after `above` goes to a wrong answer
        drawn = (place - above).clamp(min=0)
        left = right_level + wrong_level - drawn
        chance = torch.where(left > 0, (wrong_level - drawn).clamp(min=0) / left.clamp(min=1), 0.0)
        missed = torch.where(above <= place, missed * chance, missed)
    return 1 - missed


def _share(hits: Tensor) -> Score:
    value = hits.mean().item()
    return Score(value, (value * (1 - value) / len(hits)) ** 0.5)


def _mean(values: Tensor) -> Score:
    spread = values.std().item() if len(values) > 1 else 0.0
    return Score(values.mean().item(), spread / len(values) ** 0.5)
