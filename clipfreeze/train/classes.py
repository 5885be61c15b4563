"""Policies for a closed set of classes: heads and class-specific prompts, and data told in their classes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TypeVar

from clipfreeze.errors import DataError, did_you_mean
from clipfreeze.plan.sites import HeadSite, PromptSite, Site
from clipfreeze.policy.actions import Head, Prompt
from clipfreeze.policy.loading import PlacedRule, Policy
from clipfreeze.train.pairs import Pair, PairSet
from clipfreeze.train.stream import PairStream, TrainingData

_DATA = "data"

Data = TypeVar("Data", PairSet, PairStream)


def asks_for_classes(policy: Policy) -> bool:
    """Whether a rule that is on leaves its classes to the data."""
    return any(spec.classes == _DATA for placed in policy.rules if placed.active for spec in _specs(placed))


def with_classes(policy: Policy, train: TrainingData) -> Policy:
    """The policy with the classes of `train` where it leaves them to the data, and its templates where it says none."""
    rules = tuple(_filled(placed, classes_of(train), train.templates) for placed in policy.rules)
    return replace(policy, rules=rules)


def classes_of(pairs: TrainingData) -> tuple[str, ...]:
    """Names of class folders, or the distinct captions, sorted. DataError for a stream, which may have any."""
    if isinstance(pairs, PairStream):
        raise DataError(f"{pairs.name} is a stream, whose classes are not known", "name them: --set classes=FILE")
    return tuple(sorted(pairs.class_names or {caption for pair in pairs for caption in pair.captions}))


def _specs(placed: PlacedRule) -> list[Head | Prompt]:
    return [spec for spec in (placed.rule.head, placed.rule.prompt) if spec is not None]


def _filled(placed: PlacedRule, names: tuple[str, ...], templates: tuple[str, ...]) -> PlacedRule:
    changes: dict[str, Head | Prompt] = {}
    for spec in _specs(placed):
        if spec.classes != _DATA:
            continue
        if isinstance(spec, Prompt):
            changes["prompt"] = spec.model_copy(update={"classes": names})
        else:
            own = {} if "templates" in spec.model_fields_set else {"templates": templates}
            changes["head"] = spec.model_copy(update={"classes": names, **own})
    return replace(placed, rule=placed.rule.model_copy(update=changes))


def head_in(sites: Iterable[Site]) -> HeadSite | None:
    """The head that a plan adds."""
    return next((site for site in sites if isinstance(site, HeadSite)), None)


def text_prompt_in(sites: Iterable[Site]) -> PromptSite | None:
    """The prompt that a plan puts into texts."""
    return next((site for site in sites if isinstance(site, PromptSite) and site.tower == "text"), None)


def is_closed(sites: Iterable[Site]) -> bool:
    """Whether a plan knows a set of classes and no others."""
    return any(isinstance(site, (HeadSite, PromptSite)) and site.classes for site in sites)


def relabelled(pairs: PairSet, classes: Sequence[str]) -> PairSet:
    """The pairs with their place in `classes` as labels: of its class name, or of the one caption that is a class.

    Raises DataError for a pair that is in none of the classes, or in several.
    """
    number = {name: label for label, name in reversed(list(enumerate(classes)))}
    labels = [_label(pair, pairs, number) for pair in pairs]
    told = tuple(replace(pair, label=label) for pair, label in zip(pairs, labels, strict=True))
    return replace(pairs, pairs=told, class_names=tuple(classes))


def _label(pair: Pair, pairs: PairSet, number: dict[str, int]) -> int:
    said = pair.captions if pair.label is None else (pairs.class_names[pair.label],)
    among = {name: number[name] for name in said if name in number}
    if not among:
        what = f"{pair.place}: {said[0]!r} is none of the policy's {len(number)} classes"
        raise DataError(what, f'{did_you_mean(said[0], list(number))} (or classes = "data": those of the data)')
    if len(among) > 1:
        first, second = list(among)[:2]
        raise DataError(f"{pair.place} is of several classes: {first!r} and {second!r}", "one class a picture")
    return next(iter(among.values()))


def as_classes(pairs: PairSet, classes: Sequence[str]) -> PairSet | None:
    """The pairs as a set of classes, if all of theirs are among `classes`; captions are classes where they can be."""
    if pairs.class_names:
        return pairs if set(pairs.class_names) <= set(classes) else None
    try:
        told = relabelled(pairs, classes)
    except DataError:
        return None
    seen = {pair.label for pair in told}
    return relabelled(pairs, [name for label, name in enumerate(classes) if label in seen])


def captions_as_classes(pairs: PairSet) -> PairSet:
    """The distinct captions as classes. DataError where they are no names of classes: most stand there once."""
    names = classes_of(pairs)
    if 2 * len(names) > len(pairs):
        what = f"{len(names)} captions of {len(pairs)} pictures are no class names"
        raise DataError(f"{pairs.name}: {what}", "objective contrastive, or data with classes")
    return relabelled(pairs, names)


def bare(pairs: Data) -> Data:
    """Without templates: a prompt takes their place."""
    return replace(pairs, templates=("{}",))


def by_name(pairs: PairSet) -> PairSet:
    """With the bare class names for captions."""
    told = (replace(pair, captions=(pairs.class_names[pair.label],)) for pair in pairs if pair.label is not None)
    return bare(replace(pairs, pairs=tuple(told)))
