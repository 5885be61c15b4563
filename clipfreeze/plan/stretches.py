"""The cascade over the run: in each stretch of it the policy's rules go on with those of its phase."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from clipfreeze.anatomy.parts import Parameter
from clipfreeze.plan.cascade import Decisions, Speech, decide, winner
from clipfreeze.policy.loading import PlacedPhase, Policy
from clipfreeze.policy.span import Span, parse_span


@dataclass(frozen=True, slots=True)
class Stretch:
    """A part of the run, or all of it: what is said of each parameter and whether it trains.

    `phase` is None where the policy's own rules stand alone: in a run without phases, and behind the last one that ends
    before the run does. `rules` are the numbers of the rules that speak in it.
    """

    phase: PlacedPhase | None
    rules: frozenset[int]
    decisions: list[Decisions]
    trains: list[bool]


def find_stretches(
    policy: Policy, parameters: Sequence[Parameter], speeches: Mapping[int, Sequence[Speech]]
) -> tuple[Stretch, ...]:
    """The stretches of a run in order; `speeches` are what each rule says, by its number."""
    own = range(1, len(policy.rules) + 1)
    found = []
    number = own.stop
    for phase in policy.phases:
        further = range(number, number + len(phase.rules))
        found.append(_stretch(policy, parameters, speeches, phase, (*own, *further)))
        number = further.stop
    if not policy.phases or _ends_early(policy.phases[-1]):
        found.append(_stretch(policy, parameters, speeches, None, tuple(own)))
    return tuple(found)


def _ends_early(phase: PlacedPhase) -> bool:
    until = phase.phase.until
    return until is not None and parse_span(until) != Span(1.0, "share")


def _stretch(
    policy: Policy,
    parameters: Sequence[Parameter],
    speeches: Mapping[int, Sequence[Speech]],
    phase: PlacedPhase | None,
    rules: tuple[int, ...],
) -> Stretch:
    decisions = decide(len(parameters), [speech for number in rules for speech in speeches.get(number, ())])
    trains = []
    for parameter, decided in zip(parameters, decisions, strict=True):
        word = winner(decided, "train")
        trains.append(not parameter.fixed and (bool(word.value) if word else policy.default == "train"))
    return Stretch(phase, frozenset(rules), decisions, trains)
