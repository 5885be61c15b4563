"""What a plan that adds a head or a text prompt asks of the data, and how it is measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from clipfreeze.changes import Applied
from clipfreeze.errors import DataError
from clipfreeze.inject.head import ClassHead
from clipfreeze.plan.sites import Site
from clipfreeze.train.classes import as_classes, bare, by_name, head_in, is_closed, relabelled, text_prompt_in
from clipfreeze.train.evaluate import Encoder, Metrics, by_head, measure
from clipfreeze.train.pairs import PairSet
from clipfreeze.train.stream import PairStream, TrainingData


def for_training(train: TrainingData, sites: Sequence[Site]) -> TrainingData:
    """`train` as the plan reads it: a learned prompt takes the place of templates, a class-specific one takes bare
    class names, and a head takes labels of its classes. Raises DataError for a caption that is none of the classes, and
    for a stream where there are classes.
    """
    if isinstance(train, PairStream):
        if is_closed(sites):
            what = f"{train.name} is a stream of captions, and the policy trains on classes"
            raise DataError(what, "give data with classes, or another policy")
        return bare(train) if text_prompt_in(sites) else train
    if prompt := text_prompt_in(sites):
        train = by_name(relabelled(train, prompt.classes)) if prompt.classes else bare(train)
    if head := head_in(sites):
        train = relabelled(train, head.classes)
    return train


def for_measuring(pairs: PairSet, sites: Sequence[Site]) -> PairSet:
    """`pairs` with classes in place of captions where the plan knows them all."""
    for site in (head_in(sites), text_prompt_in(sites)):
        if site and site.classes and (told := as_classes(pairs, site.classes)):
            return told
    return pairs


def measure_untuned(encoder: Encoder, pairs: PairSet, applied: Applied) -> Metrics:
    """What the model does without what the plan adds: by its own encoders, in the templates of the data."""
    with applied.disabled():
        return measure(encoder, for_measuring(pairs, applied.plan.sites))


def measure_tuned(encoder: Encoder, pairs: PairSet, applied: Applied) -> Metrics:
    """What the model does with it: by the head where it has all classes of the set; else by the encoders, of which a
    learned prompt takes the place of the templates; one for other classes is switched off.
    """
    sites = applied.plan.sites
    pairs = for_measuring(pairs, sites)
    head, prompt = head_in(sites), text_prompt_in(sites)
    if head and _knows(head.classes, pairs):
        (module,) = (addition for _, addition in applied.additions if isinstance(addition, ClassHead))
        return by_head(encoder, pairs, module)
    if prompt is None:
        return measure(encoder, pairs)
    if prompt.classes and not _knows(prompt.classes, pairs):
        return measure_untuned(encoder, pairs, applied)
    return replace(measure(encoder, bare(pairs)), kind="prompt")


def unknown_notes(name: str, pairs: PairSet, sites: Sequence[Site]) -> list[str]:
    """That a set is measured by other means than the plan's goal, since its classes are others."""
    head, prompt = head_in(sites), text_prompt_in(sites)
    pairs = for_measuring(pairs, sites)
    if head and not _knows(head.classes, pairs):
        return [f"{name} has other classes than the head: it is measured by the encoders, without the head"]
    if not head and prompt and prompt.classes and not _knows(prompt.classes, pairs):
        return [f"{name} has other classes than the prompt: it is measured without the prompt"]
    return []


def _knows(classes: Sequence[str], pairs: PairSet) -> bool:
    return bool(pairs.class_names) and set(pairs.class_names) <= set(classes)
