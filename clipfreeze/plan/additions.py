"""What a policy adds to a model: its actions resolved to sites, and the sites' parameters as part of the anatomy."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from clipfreeze.anatomy.parts import Anatomy, Parameter
from clipfreeze.errors import Problem
from clipfreeze.plan.adapter_sites import place_adapters
from clipfreeze.plan.cascade import Speech
from clipfreeze.plan.head_sites import place_head
from clipfreeze.plan.lora_sites import place_lora, refuse_without_products
from clipfreeze.plan.match import Address, Matcher
from clipfreeze.plan.prompt_sites import couple_problems, place_prompts
from clipfreeze.plan.sites import AdapterSite, AddedParameter, HeadSite, LoraSite, PromptSite, Site, SiteError
from clipfreeze.policy.actions import ACTIONS, Action
from clipfreeze.policy.loading import PlacedRule
from clipfreeze.policy.patterns import PatternError

SITES: dict[str, Callable[[Anatomy, Collection[Address], Any], Sequence[Site]]] = {
    "lora": place_lora,
    "adapter": lambda anatomy, matched, spec: place_adapters(anatomy, {index for index, _ in matched}, spec),
    "prompt": lambda anatomy, matched, spec: place_prompts(anatomy, {index for index, _ in matched}, spec),
    "head": lambda anatomy, matched, spec: place_head(anatomy, {index for index, _ in matched}, spec),
}
"""Of each action, where it goes."""


@dataclass(frozen=True, slots=True)
class Word:
    """One rule's action at one site; a later one at the same path takes its place."""

    rule: int
    site: Site


@dataclass(frozen=True, slots=True)
class Additions:
    """What is added in the end, by path, all words on each; of each rule the parameters its
    actions matched, and the rules whose actions fit nothing there."""

    words: dict[str, list[Word]]
    matched: dict[int, frozenset[int]]
    refused: frozenset[int]

    @property
    def sites(self) -> tuple[Site, ...]:
        """In the order of the rules and of the model."""
        return tuple(words[-1].site for words in self.words.values())


def find_additions(anatomy: Anatomy, rules: Sequence[PlacedRule], problems: list[Problem]) -> Additions:
    """The actions of all rules that are on; what does not fit is a problem at its rule."""
    matcher = Matcher(anatomy)
    words: dict[str, list[Word]] = {}
    matched: dict[int, frozenset[int]] = {}
    refused: set[int] = set()
    for number, placed in enumerate(rules, start=1):
        actions = _actions(placed)
        if not placed.active or not actions:
            continue
        try:
            taken = _matched(matcher, placed)
            matched[number] = frozenset(index for index, _ in taken)
            if not taken:
                continue  # the pattern's own problem, or optional
            for pattern in placed.rule.match if "lora" in actions and not placed.rule.optional else ():
                refuse_without_products(anatomy, matcher.addresses(pattern))
            for kind, spec in actions.items():
                for site in SITES[kind](anatomy, taken, spec):
                    words.setdefault(site.path, []).append(Word(number, site))
        except PatternError:
            matched.setdefault(number, frozenset())  # told where patterns are
        except SiteError as error:
            refused.add(number)
            if not placed.rule.optional:
                problems.append(Problem(str(error), error.fix, placed.path, placed.line))
    additions = Additions(words, matched, frozenset(refused))
    rule_of = {path: said[-1].rule for path, said in words.items()}
    for site, wrong in couple_problems(additions.sites):
        placed = rules[rule_of[site.path] - 1]
        problems.append(Problem(str(wrong), wrong.fix, placed.path, placed.line))
    return additions


def _actions(placed: PlacedRule) -> dict[str, Action]:
    return {kind: spec for kind in ACTIONS if (spec := getattr(placed.rule, kind)) is not None}


def _matched(matcher: Matcher, placed: PlacedRule) -> frozenset[Address]:
    rule = placed.rule
    taken: frozenset[Address] = frozenset()
    for pattern in rule.match:
        taken |= matcher.addresses(pattern, lenient=rule.optional)
    for pattern in rule.exclude:
        out = matcher.addresses(pattern, lenient=rule.optional)
        whole = {index for index, slot in out if slot is None}
        taken = frozenset(_without(taken, out, whole, matcher))
    return taken


def _without(
    taken: Iterable[Address], out: frozenset[Address], whole: Collection[int], matcher: Matcher
) -> Iterable[Address]:
    """`taken` less `out`; of a fused parameter of which one slot is taken out, the others stay."""
    for index, slot in taken:
        if index in whole or (index, slot) in out:
            continue
        thirds = {gone for other, gone in out if other == index}
        if slot is None and thirds:
            yield from ((index, each) for each in matcher.slots(index) if each not in thirds)
        else:
            yield index, slot


def extended(anatomy: Anatomy, sites: Iterable[Site]) -> Anatomy:
    """The anatomy with what is added behind the model's own parameters."""
    roles = {parameter.name: parameter.role for parameter in anatomy.parameters}
    added = tuple(_parameter(site, of, roles) for site in sites for of in site.added)
    return replace(anatomy, parameters=anatomy.parameters + added)


def _parameter(site: Site, of: AddedParameter, roles: dict[str, str]) -> Parameter:
    beside: str | None
    match site:
        case LoraSite():
            beside = roles[site.parameter]
        case AdapterSite():
            beside = f"{site.tower}.blocks" if site.block is not None else f"{site.tower}.proj"
        case PromptSite():
            beside = "text.embed" if site.tower == "text" else "vision.blocks"
        case HeadSite():
            beside = "head"
    return Parameter(
        name=f"{site.path}.{of.name}",
        shape=of.shape,
        dtype="float32",
        role=site.kind,
        block=0 if beside == "vision.blocks" and site.kind == "prompt" else site.block,
        tags=frozenset({"biases"} if of.bias else ()),
        beside=beside,
        lr_ratio=of.lr_scale,
    )


def speeches(additions: Additions, index_of: dict[str, int]) -> dict[int, list[Speech]]:
    """Of each rule, what its actions say of the parameters that are there in the end, by their index."""
    found: dict[int, list[Speech]] = {}
    for words in additions.words.values():
        for word in words:
            for of in word.site.added:
                index = index_of.get(f"{word.site.path}.{of.name}")
                if index is not None:
                    found.setdefault(word.rule, []).append(Speech(word.rule, _says(word.site, of), (index,)))
    return found


def _says(site: Site, of: AddedParameter) -> dict[str, Any]:
    spec = site.spec
    says: dict[str, Any] = {"train": True, site.kind: spec.model_dump(mode="json", exclude_defaults=True)}
    if spec.lr is not None:
        says["lr"] = spec.lr
    if of.bias:
        says["weight_decay"] = 0.0
    elif spec.weight_decay is not None:
        says["weight_decay"] = spec.weight_decay
    return says
