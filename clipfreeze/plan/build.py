"""A policy and an anatomy in, the plan out: no weight is read or touched."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING, Any

from clipfreeze.anatomy.parts import TOWER_PARTS, TOWERS, Anatomy, Parameter
from clipfreeze.errors import PlanError, Problem
from clipfreeze.plan.additions import extended, find_additions
from clipfreeze.plan.additions import speeches as action_speeches
from clipfreeze.plan.cascade import Speech, Word, winner
from clipfreeze.plan.closed_form import closed_form_problems
from clipfreeze.plan.grouping import Treatment, Treatments, group_name, phase_groups, planned_groups
from clipfreeze.plan.lint import lint_warnings
from clipfreeze.plan.match import Matcher
from clipfreeze.plan.stretches import Stretch, find_stretches
from clipfreeze.plan.value import (
    Claim,
    Estimate,
    ModelFacts,
    Plan,
    PlannedParameter,
    PlannedPhase,
    PolicyFacts,
    RuleReport,
    Totals,
)
from clipfreeze.policy.actions import ACTIONS, Action
from clipfreeze.policy.loading import PlacedRule, Policy
from clipfreeze.policy.patterns import PatternError
from clipfreeze.policy.schema import SETTINGS, TRAINING_SETTINGS, Schedule

if TYPE_CHECKING:
    from torch import nn

_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
_STATE_TENSORS = {
    **dict.fromkeys(("adam", "adamw", "nadam", "nadamw", "radam", "adamax", "lamb", "adan"), 2),
    **dict.fromkeys(("lion", "rmsprop", "adagrad"), 1),
    "lbfgs": 0,
}
"""Tensors of a parameter's size that an optimizer keeps; SGD's depends on its momentum."""


def resolve(policy: Policy, model: nn.Module | Anatomy) -> Plan:
    """What `policy` does to `model`, which may be real, on the meta device, or its anatomy alone; changes nothing.

    Raises PlanError with all problems found (a pattern or rule without effect, a setting on what stays frozen,
    nothing that trains), ModelError where the model has parts without a name.
    """
    if isinstance(model, Anatomy):
        anatomy = model
    else:
        from clipfreeze.anatomy.partition import describe

        anatomy = describe(model)
    return _Resolution(policy, anatomy).plan()


class _Resolution:
    def __init__(self, policy: Policy, anatomy: Anatomy) -> None:
        self.policy = policy
        self.problems: list[Problem] = []
        self.claims: dict[tuple[str, int, str, tuple[int, ...]], Claim] = {}
        self.rules = policy.all_rules
        self.additions = find_additions(anatomy, self.rules, self.problems)
        self.anatomy = extended(anatomy, self.additions.sites)
        self.matched = self._matched()
        added = action_speeches(
            self.additions, {parameter.name: index for index, parameter in enumerate(self.anatomy.parameters)}
        )
        speeches: dict[int, list[Speech]] = {}
        for number, (rule, matched) in enumerate(zip(self.rules, self.matched, strict=True), start=1):
            if rule.active:
                said = {name: value for name, value in rule.rule.said().items() if name not in ACTIONS}
                speeches[number] = [Speech(number, said, matched if said else ()), *added.get(number, ())]
        self.stretches = find_stretches(policy, self.anatomy.parameters, speeches)
        self.trains = [any(of) for of in zip(*(stretch.trains for stretch in self.stretches), strict=True)]

    def plan(self) -> Plan:
        decided = self._decided()
        self._check_effects(decided)
        if not self.problems:
            self.problems += [self._nothing_trains(of) for of in self.stretches if not any(of.trains)]
            self.problems += self._idle_anchors()
        if self.problems:
            raise PlanError(self.problems)
        parameters = tuple(self._planned(index) for index in range(len(self.anatomy.parameters)))
        if self.problems:
            raise PlanError(self.problems)
        trainable = [parameter for parameter in parameters if parameter.trainable]
        total, trains = sum(p.size for p in parameters), sum(p.size for p in trainable)
        injected = sum(p.size for p in parameters if p.origin != "model")
        plan = Plan(
            policy=PolicyFacts(name=self.policy.name, sources=self.policy.sources, params=dict(self.policy.params)),
            model=ModelFacts(name=self.anatomy.model, family=self.anatomy.family, parameters=total - injected),
            totals=Totals(parameters=total, trainable=trains, injected=injected, frozen=total - trains),
            parameters=parameters,
            sites=self.additions.sites,
            groups=tuple(planned_groups(trainable)),
            optimizer=self.policy.optimizer,
            schedule=self.policy.schedule,
            anchor=self.policy.anchor,
            rules=tuple(
                RuleReport(
                    rule=number,
                    source=rule.source,
                    phase=self._phase_of(number),
                    match=rule.rule.match,
                    says={name: _plain(value) for name, value in rule.rule.said().items()},
                    active=rule.active,
                    matched=len(matched),
                    decided=len(decided[number - 1]),
                )
                for number, (rule, matched) in enumerate(zip(self.rules, self.matched, strict=True), start=1)
            ),
            frontier=self._frontiers(self.trains),
            estimate=_estimate(parameters, self.stretches, self.policy),
            phases=tuple(self._phases(parameters)) if self.policy.phases else (),
        )
        path, _, line = self.policy.optimizer_source.rpartition(":")
        if problems := [Problem(*told, path, int(line)) for told in closed_form_problems(plan)]:
            raise PlanError(problems)
        return plan.model_copy(update={"warnings": tuple(lint_warnings(plan, self.anatomy))})

    def _idle_anchors(self) -> Iterator[Problem]:
        """Features that no training moves need no anchor."""
        training = {p.role for p, trains in zip(self.anatomy.parameters, self.trains, strict=True) if trains}
        towers = {site.tower for site in self.additions.sites} | {role.split(".")[0] for role in training}
        path, _, line = self.policy.anchor_source.rpartition(":")
        for tower in TOWERS:
            if getattr(self.policy.anchor, tower) and tower not in towers:
                yield Problem(f"anchor on the {tower} tower, which stays frozen", "take it out", path, int(line))

    def _matched(self) -> list[frozenset[int]]:
        """What each rule matches; nothing for one that is switched off."""
        matcher = Matcher(self.anatomy)
        matched: list[frozenset[int]] = []
        for rule in self.rules:
            taken: frozenset[int] = frozenset()
            if rule.active and not rule.rule.said().keys() - ACTIONS.keys():
                taken = self._matched_by_actions(len(matched) + 1, rule, matcher)
            elif rule.active:
                for pattern in rule.rule.match:
                    taken |= self._select(matcher, rule, pattern)
                for pattern in rule.rule.exclude:
                    excluded = self._select(matcher, rule, pattern)
                    taken -= excluded
                    if excluded and not taken and not rule.rule.optional:
                        self._problem(rule, f"exclude = {pattern!r} takes out all that matched", "narrow it")
            matched.append(taken)
            self._check_added(len(matched), rule, matcher)
        return matched

    def _check_added(self, number: int, rule: PlacedRule, matcher: Matcher) -> None:
        """An action may not be left with nothing to act on where its patterns took something."""
        acts = rule.active and not rule.rule.optional and rule.rule.said().keys() & ACTIONS.keys()
        told = any((problem.path, problem.line) == (rule.path, rule.line) for problem in self.problems)
        if (
            not acts
            or told
            or self.additions.matched.get(number)
            or all(map(matcher.is_empty_by_count, rule.rule.match))
        ):
            return
        if rule.rule.exclude:
            self._problem(rule, f"exclude = {rule.rule.exclude[-1]!r} takes out all that matched", "narrow it")
        else:
            what = f"{rule.rule.match[0]!r} takes what the policy itself adds, to which nothing can be added"
            self._problem(rule, what, "match the model's own parameters")

    def _matched_by_actions(self, number: int, rule: PlacedRule, matcher: Matcher) -> frozenset[int]:
        """What a rule of actions alone matches, with the same answers to patterns that take nothing."""
        for pattern in (*rule.rule.match, *rule.rule.exclude):
            self._select(matcher, rule, pattern, fused=True)
        return self.additions.matched.get(number, frozenset())

    def _select(self, matcher: Matcher, rule: PlacedRule, pattern: str, *, fused: bool = False) -> frozenset[int]:
        try:
            if fused:
                taken = frozenset(index for index, _ in matcher.addresses(pattern, lenient=rule.rule.optional))
            else:
                taken = matcher.select(pattern, lenient=rule.rule.optional)
        except PatternError as error:
            self._problem(rule, str(error), error.fix)
            return frozenset()
        if not taken and not rule.rule.optional and not matcher.is_empty_by_count(pattern):
            what = f"{pattern!r} matches nothing in {self.anatomy.model}"
            self._problem(rule, what, matcher.nearest_right(pattern) + " (optional = true to let it pass)")
        return taken

    def _problem(self, rule: PlacedRule, what: str, fix: str | None) -> None:
        self.problems.append(Problem(what, fix, rule.path, rule.line))

    def _decided(self) -> list[dict[int, set[str]]]:
        """Of each rule, the parameters of which it decides something in some stretch, and what."""
        decided: list[dict[int, set[str]]] = [{} for _ in self.rules]
        for stretch in self.stretches:
            for index, decisions in enumerate(stretch.decisions):
                for setting in decisions:
                    if word := winner(decisions, setting):
                        decided[word.rule - 1].setdefault(index, set()).add(setting)
        return decided

    def _phase_of(self, number: int) -> int | None:
        """The phase that a rule stands in, from 1."""
        if number <= len(self.policy.rules):
            return None
        return next(place for place, stretch in enumerate(self.stretches, start=1) if number in stretch.rules)

    def _where(self, number: int) -> list[Stretch]:
        """The stretches that a rule speaks in."""
        return [stretch for stretch in self.stretches if number in stretch.rules]

    def _check_effects(self, decided: list[dict[int, set[str]]]) -> None:
        """No rule may be without effect: outvoted on all it matches, or tuning what stays frozen.

        A later *file* that outvotes an earlier one is what `extends` is for, so only rules of one file are compared.
        """
        anything_trains = any(self.trains)
        for number, (rule, matched) in enumerate(zip(self.rules, self.matched, strict=True), start=1):
            if not matched or rule.rule.optional or number in self.additions.refused:
                continue
            if not decided[number - 1]:
                over = self._over(number, rule, matched)
                if all(self.rules[other - 1].file == rule.file for other in over):
                    where = ", ".join(f"line {self.rules[other - 1].line}" for other in sorted(over))
                    what = f"this rule decides nothing: later rules ({where}) say otherwise of all it matches"
                    self._problem(rule, what, "take it out, or move it below them")
                continue
            for setting in rule.rule.said():
                of = [index for index, settings in decided[number - 1].items() if setting in settings]
                if of and setting in TRAINING_SETTINGS and anything_trains and not self._tunes(number, setting, of):
                    self._check_idle(number, setting, of)
                if setting == "dropout" and rule.rule.dropout:
                    self._check_dropout(rule, of)

    def _tunes(self, number: int, setting: str, of: list[int]) -> bool:
        """Does anything train, in some stretch, for which this rule decides the setting there?"""
        return any(
            stretch.trains[index] and (word := winner(stretch.decisions[index], setting)) and word.rule == number
            for stretch in self._where(number)
            for index in of
        )

    def _over(self, number: int, rule: PlacedRule, matched: frozenset[int]) -> set[int]:
        """The rules that outvote all that this one says."""
        over = {
            words[-1].rule
            for words in self.additions.words.values()
            if any(word.rule == number for word in words) and words[-1].rule != number
        }
        if not rule.rule.said().keys() - ACTIONS.keys():
            return over
        return over | {self._last_word(index, rule, of) for of in self._where(number) for index in matched}

    def _check_dropout(self, rule: PlacedRule, of: list[int]) -> None:
        for parameter in (self.anatomy.parameters[index] for index in of):
            if not parameter.role.endswith(".proj"):
                self._problem(rule, f"dropout on {parameter.name}, which is no projection", 'write match = "@proj"')
                return

    def _last_word(self, index: int, rule: PlacedRule, stretch: Stretch) -> int:
        """The last rule to outvote `rule` on some setting of a parameter in a stretch."""
        said = (setting for setting in rule.rule.said() if setting not in ACTIONS)
        settings = ("train" if setting == "freeze" else setting for setting in said)
        words = [stretch.decisions[index][setting][-1] for setting in settings]
        if "lr_scale" in rule.rule.said() and "lr" in stretch.decisions[index]:
            words.append(stretch.decisions[index]["lr"][-1])
        return max(word.rule for word in words)

    def _check_idle(self, number: int, setting: str, of: list[int]) -> None:
        """A setting that only frozen parameters have; a later file may have frozen them."""
        rule = self.rules[number - 1]
        freezers = {
            word.rule
            for stretch in self._where(number)
            for index in of
            if (word := winner(stretch.decisions[index], "train")) and not word.value
        }
        if any(freezer > number and self.rules[freezer - 1].file != rule.file for freezer in freezers):
            return
        names = [self.anatomy.parameters[index].name for index in of]
        shown = names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
        if all(self.anatomy.parameters[index].fixed for index in of):
            self._problem(rule, f"{setting} on {shown}, which the model itself never trains", "take it out")
            return
        places = [self.rules[freezer - 1] for freezer in sorted(freezers)]
        by = ", ".join(place.source if place.file != rule.file else f"line {place.line}" for place in places)
        what = f"{setting} on what stays frozen: {shown} (by {by or 'default'})"
        actions = [name for name in ACTIONS if getattr(rule.rule, name) is not None]
        fix = "add train = true, take it out, or let it pass with optional = true"
        if actions and setting in ("lr", "weight_decay"):
            fix = f"of what the rule adds, write it inside: {actions[0]} = {{ {setting} = ... }}"
        self._problem(rule, what, fix)

    def _planned(self, index: int) -> PlannedParameter:
        parameter = self.anatomy.parameters[index]
        first = next((stretch for stretch in self.stretches if stretch.trains[index]), None)
        values = _values(first or self.stretches[0], index)
        common: dict[str, Any] = {
            "name": parameter.name,
            "shape": parameter.shape,
            "dtype": parameter.dtype,
            "role": parameter.role,
            "block": parameter.block,
            "origin": parameter.role if parameter.role in ACTIONS else "model",
            "trainable": first is not None,
            "fixed": parameter.fixed,
            "init": values.get("init"),
            "claims": tuple(self._claims(index)),
        }
        if first is None:
            return PlannedParameter(**common)
        treatments = self._treatments(index)
        return PlannedParameter(
            **common,
            **next(treatment for treatment in treatments if treatment is not None)._asdict(),
            clamp=values.get("clamp"),
            l2sp=values.get("l2sp") or None,
            dropout=values.get("dropout") or None,
            group=group_name(treatments),
        )

    def _treatments(self, index: int) -> Treatments:
        return tuple(
            self._treatment(self.anatomy.parameters[index], _values(stretch, index)) if stretch.trains[index] else None
            for stretch in self.stretches
        )

    def _treatment(self, parameter: Parameter, values: dict[str, Any]) -> Treatment:
        weight_decay = values.get("weight_decay", self.policy.optimizer.weight_decay)
        return Treatment(self._lr(parameter, values), weight_decay, self._schedule(values.get("schedule")))

    def _schedule(self, said: str | Schedule | None) -> str | Schedule | None:
        """A rule's schedule, its warmup the policy's unless said; None where it is no other than the policy's."""
        own = self.policy.schedule
        if isinstance(said, Schedule):
            whole = said if "warmup" in said.model_fields_set else said.model_copy(update={"warmup": own.warmup})
            return None if whole.model_dump() == own.model_dump() else whole
        return None if said == own.name else said

    def _phases(self, parameters: tuple[PlannedParameter, ...]) -> Iterator[PlannedPhase]:
        treatments = {
            planned.group: self._treatments(index) for index, planned in enumerate(parameters) if planned.group
        }
        for number, stretch in enumerate(self.stretches):
            training = [planned for planned, trains in zip(parameters, stretch.trains, strict=True) if trains]
            phase = stretch.phase.phase if stretch.phase else None
            yield PlannedPhase(
                name=(phase.name or str(number + 1)) if phase else "rest",
                until=phase.until if phase else None,
                warmup=phase.warmup if phase else 0,
                tensors=len(training),
                parameters=sum(planned.size for planned in training),
                groups=tuple(phase_groups(treatments, number)),
                frontier=self._frontiers(stretch.trains),
            )

    def _lr(self, parameter: Parameter, values: dict[str, Any]) -> float:
        lr = values.get("lr", self.policy.optimizer.lr)
        if lr is None:
            path, _, line = self.policy.optimizer_source.rpartition(":")
            problem = Problem(f"{parameter.name} trains and has no lr", "write lr under [optimizer]", path, int(line))
            if not self.problems:  # one is enough: the fix is the same for all
                self.problems.append(problem)
            return 0.0
        scaled: float = lr * values.get("lr_scale", 1.0) * parameter.lr_ratio
        if "layer_decay" in values:
            scaled *= values["layer_decay"] ** _blocks_above(parameter, self.anatomy)
        return scaled if scaled == lr else float(f"{scaled:.6g}")  # so that groups with one lr are one

    def _claims(self, index: int) -> Iterator[Claim]:
        for setting in ("train", *SETTINGS[2:]):  # freeze is train, said with false
            words: dict[int, list[Word]] = {}
            wins: dict[int, tuple[int, ...]] = {}
            for number, stretch in enumerate(self.stretches, start=1):
                decisions = stretch.decisions[index]
                said = decisions.get(setting, [])
                words |= {rule: list(of) for rule, of in groupby(said, key=lambda word: word.rule)}
                if best := winner(decisions, setting):
                    wins[best.rule] = (*wins.get(best.rule, ()), number)
            for rule in sorted(words):  # of one rule's words, an action's among them, the last is the one that counts
                *others, last = words[rule]
                yield from (self._claim(setting, word, ()) for word in others)
                yield self._claim(setting, last, wins.get(rule, ()))

    def _claim(self, setting: str, word: Word, phases: tuple[int, ...]) -> Claim:
        """One object for all the parameters a rule says this of."""
        key = (setting, word.rule, repr(word.value), phases)
        if key not in self.claims:
            self.claims[key] = Claim(
                setting=setting,
                value=_plain(word.value),
                rule=word.rule,
                source=self.rules[word.rule - 1].source,
                wins=bool(phases),
                phases=phases if self.policy.phases else None,
            )
        return self.claims[key]

    def _frontiers(self, trains: list[bool]) -> dict[str, str | None]:
        return {tower.name: self._frontier(tower.name, trains) for tower in self.anatomy.towers}

    def _frontier(self, tower: str, trains: list[bool]) -> str | None:
        """The first part of the tower, in the order of a forward pass, in which something trains."""
        trainable = [of for of, does in zip(self.anatomy.parameters, trains, strict=True) if does]
        for part in TOWER_PARTS:
            here = [parameter for parameter in trainable if parameter.place == f"{tower}.{part}"]
            if here and part == "blocks":
                return f"{tower}.blocks[{min(p.block for p in here if p.block is not None)}]"
            if here:
                return f"{tower}.{part}"
        return None

    def _nothing_trains(self, stretch: Stretch) -> Problem:
        rules = {word.rule for decisions in stretch.decisions if (word := winner(decisions, "train"))}
        path, _, line = self.policy.default_source.rpartition(":")
        if self.policy.phases:
            phase = stretch.phase or self.policy.phases[-1]
            what = "nothing trains in this phase" if stretch.phase else "nothing trains after this phase"
            fix = "add a [[phase.rule]] with train = true" if stretch.phase else "take out its until, or add a phase"
            return Problem(what, fix, phase.path, phase.line)
        if rules:
            last = self.rules[max(rules) - 1]
            path, line = last.path, str(last.line)
            what = f"nothing trains: this rule freezes {', '.join(last.rule.match)}"
        else:
            what = f"nothing trains: no rule trains anything, and default is {self.policy.default!r}"
        return Problem(what, "add a rule with train = true after it", path, int(line))


def _values(stretch: Stretch, index: int) -> dict[str, Any]:
    """What counts of all that is said of a parameter in a stretch."""
    decisions = stretch.decisions[index]
    return {setting: word.value for setting in decisions if (word := winner(decisions, setting))}


def _blocks_above(parameter: Parameter, anatomy: Anatomy) -> int:
    """Steps of layer decay: 0 past the last block, 1 in it, one more before the first (BEiT, arXiv 2106.08254)."""
    if parameter.tower is None:
        return 0
    count = len(anatomy.tower(parameter.tower).blocks)
    if parameter.block is not None:
        return count - parameter.block
    return count + 1 if parameter.place.endswith(".embed") else 0


def _plain(value: Any) -> Any:
    """A setting as the plan holds it: an action or a schedule is a table of what the rule says."""
    if isinstance(value, Action):
        return value.model_dump(mode="json", exclude_defaults=True)
    return value.model_dump(exclude_unset=True) if isinstance(value, Schedule) else value


def _estimate(parameters: tuple[PlannedParameter, ...], stretches: tuple[Stretch, ...], policy: Policy) -> Estimate:
    """Of the phase that takes the most."""
    sizes = [planned.size * _BYTES.get(planned.dtype, 4) for planned in parameters]
    gradients = max(
        sum(size for size, trains in zip(sizes, stretch.trains, strict=True) if trains) for stretch in stretches
    )
    name = policy.optimizer.name.lower()
    states = (1 if policy.optimizer.options.get("momentum") else 0) if name == "sgd" else _STATE_TENSORS.get(name)
    return Estimate(weights=sum(sizes), gradients=gradients, optimizer=None if states is None else states * gradients)
