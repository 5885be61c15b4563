"""Plans, explanations and differences as text for a terminal; equal neighbours share a row."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from tabulate import tabulate

from clipfreeze.anatomy.parts import SLOTS, TAGS, TOWER_PARTS, TOWERS, Anatomy, Parameter
from clipfreeze.plan.diff import ParameterDifference, PlanDifference, Settings
from clipfreeze.plan.grouping import schedule_text
from clipfreeze.plan.sites import Site
from clipfreeze.plan.value import Claim, Plan, PlannedParameter, RuleReport
from clipfreeze.policy.knobs import as_text
from clipfreeze.policy.schema import Schedule

Placed = TypeVar("Placed", PlannedParameter, ParameterDifference, Parameter)


def plan_table(plan: Plan) -> str:
    """The whole plan: parts, rules, groups, phases, frontier, memory, warnings."""
    totals = plan.totals
    share = 100 * totals.trainable / totals.parameters
    lines = [
        f"{plan.policy.name} on {plan.model.name} ({plan.model.family}): "
        f"{totals.trainable:,} of {totals.parameters:,} parameters train ({share:.3g} %)"
        + (f", {totals.injected:,} of them added" if totals.injected else ""),
        f"policy  {' + '.join(plan.policy.sources)}" + _knobs(plan.policy.params),
        "",
        grid(
            _part_rows(p for p in plan.parameters if p.origin == "model"),
            ("part", "tensors", "parameters", "trains", "lr", "weight decay", "also"),
        ),
        "",
        *_added(plan),
        grid(map(_rule_row, plan.rules), ("rule", "matches", "says", "matched", "decided")),
        "",
        grid(
            (
                (g.name, f"{g.lr:g}", f"{g.weight_decay:g}", _schedule(g.schedule), g.tensors, f"{g.parameters:,}")
                for g in plan.groups
            ),
            ("param group", "lr", "weight decay", "schedule", "tensors", "parameters"),
        ),
        "",
        *_phases(plan),
        f"optimizer  {plan.optimizer.name}{_options(plan.optimizer.options)}{_warm_start(plan)}; "
        f"schedule {plan.schedule.name}, warmup {_stretch(plan.schedule.warmup)}{_options(plan.schedule.options)}",
        *_anchor(plan),
        "backward   " + "; ".join(_frontier(tower, part) for tower, part in plan.frontier.items()),
        "once       " + "; ".join(_once(tower, part) for tower, part in plan.frontier.items()),
        f"memory     weights {_megabytes(plan.estimate.weights)}, gradients {_megabytes(plan.estimate.gradients)}, "
        f"optimizer {_megabytes(plan.estimate.optimizer)}",
        *(f"warning: {warning}" for warning in plan.warnings),
    ]
    return "\n".join(lines)


def _anchor(plan: Plan) -> list[str]:
    said = [f"{tower} {strength:g}" for tower, strength in plan.anchor.model_dump().items() if strength]
    return [f"anchor     {', '.join(said)} on features of the start"] if said else []


def explanation_table(parameters: Sequence[PlannedParameter]) -> str:
    """Of each parameter, every setting with the claim that won and those that lost."""
    return "\n\n".join(map(_explained, parameters))


def difference_table(found: PlanDifference, names: tuple[str, str]) -> str:
    """Where two plans differ, part by part."""
    rows: list[tuple[str, int | str, str]] = [
        (part, len(members), _changes_of(members)) for part, members in _folded(found.parameters, _changes_of)
    ]
    sections = (
        ("optimizer", found.optimizer),
        ("schedule", found.schedule),
        ("anchor", found.anchor),
        ("phases", found.phases),
    )
    rows += [(section, "", _changes([settings])) for section, settings in sections if settings]
    return grid(rows, ("part", "tensors", f"{names[0]} -> {names[1]}")) if rows else "no difference"


def anatomy_table(anatomy: Anatomy) -> str:
    """The roles of a model: parts with their parameters, then what else can be said of them."""
    parts = [
        (f"@{part}", len(members), f"{sum(p.size for p in members):,}", members[0].name)
        for part, members in _folded(anatomy.parameters, lambda part: None)
    ]
    tags = []
    for word in (*TAGS, *SLOTS):
        found = [p for p in anatomy.parameters if word in p.tags or word in p.slots]
        if found:
            tags.append((f"@{word}", len(found), f"{sum(p.size for p in found):,}", found[0].name))
    stages = [f"{tower.name} has {len(set(tower.stages))} stages" for tower in anatomy.towers if tower.stages]
    counts = [f"{len(tower.blocks)} {tower.name} blocks" for tower in anatomy.towers]
    headers = ("tensors", "parameters", "first")
    return "\n".join(
        (
            f"{anatomy.model} ({anatomy.family}): {', '.join(counts + stages)}",
            "",
            grid(parts, ("role", *headers)),
            "",
            grid(tags, ("also", *headers)),
            *("note: " + note for note in anatomy.notes),
        )
    )


def _changes_of(part: Sequence[ParameterDifference]) -> str:
    return _changes([difference.settings for difference in part])


def _changes(several: Sequence[Settings]) -> str:
    """Each setting that differs somewhere, with the ways it does."""
    told = []
    for setting in dict.fromkeys(setting for settings in several for setting in settings):
        pairs = (settings[setting] for settings in several if setting in settings)
        told.append(f"{setting} " + _join(f"{_word(one)} -> {_word(other)}" for one, other in pairs))
    return "; ".join(told)


def _explained(parameter: PlannedParameter) -> str:
    head = f"{parameter.name}  {tuple(parameter.shape)}  @{parameter.role}"
    if parameter.block is not None:
        head += f"[{parameter.block}]"
    state = f"trains, lr {parameter.lr:g}, weight decay {parameter.weight_decay:g}" if parameter.trainable else "frozen"
    if ": " in (parameter.group or ""):  # not the same in all phases
        state = f"trains, in phase {parameter.group}"
    if parameter.fixed:
        state += ", as the model itself has it"
    rows = [(claim.setting, _word(claim.value), claim.source, _outcome(claim)) for claim in parameter.claims]
    return f"{head}: {state}\n" + (
        grid(rows, ("setting", "value", "said at", "")) if rows else "  no rule speaks of it"
    )


def _outcome(claim: Claim) -> str:
    if claim.phases is None or not claim.wins:
        return "wins" if claim.wins else "outvoted"
    return f"wins in phase {', '.join(map(str, claim.phases))}"


def _part_rows(parameters: Iterable[PlannedParameter]) -> Iterator[tuple[Any, ...]]:
    for name, members in _folded(parameters, _treatment):
        yield (name, len(members), f"{sum(p.size for p in members):,}", *_state(members))


def _added(plan: Plan) -> Iterator[str]:
    """What the plan adds: equal sites in neighbouring blocks share a row."""
    if not plan.sites:
        return
    planned = {parameter.name: parameter for parameter in plan.parameters}
    runs: dict[tuple[Any, ...], list[list[Site]]] = {}
    for site in plan.sites:
        label = re.split(r"\.\d+\.", site.path)[-1].split(".")
        label = [step for step in label if step != site.kind] or [site.of]
        shapes = ", ".join(f"{of.name} {of.shape}" for of in site.added)
        of = [planned[name] for name in site.names]
        alike = (site.kind, ".".join(label), site.tower, shapes, *_state(of)[:3])
        here = runs.setdefault(alike, [])
        if here and site.block is not None and here[-1][-1].block == site.block - 1:
            here[-1].append(site)
        else:
            here.append([site])
    rows = []
    for (kind, label, tower, shapes, trains, lr, weight_decay), several in runs.items():
        for sites in several:
            blocks = [site.block for site in sites if site.block is not None]
            at = f"{tower}.blocks{_span(blocks)}" if blocks else tower or ""
            size = sum(planned[name].size for site in sites for name in site.names)
            names = sum(len(site.names) for site in sites)
            state = (lr, weight_decay) if trains != "frozen" else ("frozen", "")
            rows.append((f"+ {kind} {label}", at, shapes, names, f"{size:,}", *state))
    yield grid(rows, ("added", "at", "shapes", "tensors", "parameters", "lr", "weight decay"))
    yield ""


def _phases(plan: Plan) -> Iterator[str]:
    """Of each phase its stretch of the run, and what trains."""
    if not plan.phases:
        return
    rows = []
    begin = "start"
    for number, phase in enumerate(plan.phases):
        end = "end" if phase.until is None else _stretch(phase.until)
        warmup = _stretch(phase.warmup) if phase.warmup else ""
        lrs = _rates({group.lr for group in phase.groups})
        trains = _training_parts(plan.parameters, plan.trains_in(number))
        rows.append((phase.name, begin, end, trains, phase.tensors, f"{phase.parameters:,}", lrs, warmup))
        begin = end
    yield grid(rows, ("phase", "from", "until", "trains", "tensors", "parameters", "lr", "warmup"))
    yield ""


def _rates(lrs: Collection[float]) -> str:
    if len(lrs) > 3:
        return f"{min(lrs):g} to {max(lrs):g}"
    return ", ".join(f"{lr:g}" for lr in sorted(lrs))


def _training_parts(parameters: Sequence[PlannedParameter], trains: Collection[str]) -> str:
    if len(trains) == len(parameters):
        return "everything"
    found = _folded(parameters, lambda members: any(p.name in trains for p in members))
    return ", ".join(part for part, members in found if any(p.name in trains for p in members))


def _span(blocks: Sequence[int]) -> str:
    return f"[{blocks[0]}]" if len(blocks) == 1 else f"[{blocks[0]}:{blocks[-1] + 1}]"


def _folded(items: Iterable[Placed], treatment: Callable[[list[Placed]], Any]) -> Iterator[tuple[str, list[Placed]]]:
    """Parts in the order of a forward pass with their members; neighbouring blocks that are treated alike are one."""
    parts: dict[tuple[str, int | None], list[Placed]] = {}
    for item in sorted(items, key=_forward_order):
        parts.setdefault((item.role, item.block), []).append(item)
    runs: list[tuple[Any, str, list[int], list[Placed]]] = []
    for (role, block), members in parts.items():
        treated = treatment(members)
        former = runs[-1] if runs else None
        if former and former[:2] == (treated, role) and block is not None and former[2] and former[2][-1] + 1 == block:
            former[2].append(block)
            former[3].extend(members)
        else:
            runs.append((treated, role, [] if block is None else [block], list(members)))
    for _, role, blocks, members in runs:
        yield role + (_span(blocks) if blocks else ""), members


def _forward_order(item: PlannedParameter | ParameterDifference | Parameter) -> tuple[int, int, int]:
    tower, _, part = item.role.partition(".")
    return (
        TOWERS.index(tower) if tower in TOWERS else len(TOWERS),
        TOWER_PARTS.index(part) if part else 0,
        item.block or 0,
    )


def _treatment(part: list[PlannedParameter]) -> Any:
    """What is done to each tensor of a part, by its name within it."""
    alike = {(p.trainable, p.lr, p.weight_decay, _also(p)) for p in part}
    if len(alike) == 1:
        return alike
    return {(p.name.partition(f".{p.block}.")[2], p.trainable, p.lr, p.weight_decay, _also(p)) for p in part}


def _state(part: list[PlannedParameter]) -> tuple[str, str, str, str]:
    training = [p for p in part if p.trainable]
    if not training:
        return "frozen", "", "", _join(_also(p) for p in part)
    size = sum(p.size for p in training)
    return (
        "all" if len(training) == len(part) else f"{size:,} in {len(training)} tensors",
        _join(f"{p.lr:g}" for p in training),
        _join(f"{p.weight_decay:g}" for p in training),
        _join(_also(p) for p in part),
    )


def _also(parameter: PlannedParameter) -> str:
    told = {
        "schedule": _schedule(parameter.schedule) or None,
        "init": parameter.init,
        "clamp": parameter.clamp,
        "l2sp": parameter.l2sp,
        "dropout": parameter.dropout,
    }
    return ", ".join(f"{name} {_word(value)}" for name, value in told.items() if value is not None)


def _join(words: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(word for word in words if word))


def _rule_row(report: RuleReport) -> tuple[Any, ...]:
    says = ", ".join(name if value is True else f"{name} {_word(value)}" for name, value in report.says.items())
    source = report.source if report.phase is None else f"{report.source} (phase {report.phase})"
    if not report.active:
        return source, _short(report.match), "off", "", ""
    return source, _short(report.match), says, report.matched, report.decided


def _short(words: Sequence[str]) -> str:
    shown = ", ".join(words[:3])
    return shown if len(words) <= 3 else f"{shown}, and {len(words) - 3} more"


def _word(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, (tuple, list)):
        return f"[{_short(list(map(_word, value)))}]"
    if isinstance(value, Schedule):
        return schedule_text(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name} {_word(of)}" for name, of in value.items()) + "}"
    return f"{value:g}" if isinstance(value, float) else as_text(value)


def _knobs(params: dict[str, Any]) -> str:
    return "\nknobs   " + " ".join(f"{name}={_word(value)}" for name, value in params.items()) if params else ""


def _options(options: dict[str, Any]) -> str:
    return "".join(f", {name} {_word(value)}" for name, value in options.items())


def _stretch(span: int | str) -> str:
    return f"{span} steps" if isinstance(span, int) else span


def _warm_start(plan: Plan) -> str:
    span = plan.optimizer.warm_start
    return f", at lr 0 for the first {_stretch(span)}" if plan.optimizer.warm_start_span.amount else ""


def _schedule(schedule: str | Schedule | None) -> str:
    return "" if schedule is None else schedule_text(schedule)


def _frontier(tower: str, part: str | None) -> str:
    if part is None:
        return f"never enters the {tower} tower"
    return f"stops at {part}" if not part.endswith(".embed") else f"crosses the whole {tower} tower"


def _once(tower: str, part: str | None) -> str:
    """What our trainer runs once a sample: docs/speed.md."""
    if part is None:
        return f"all of the {tower} tower"
    return f"what stands before {part}" if not part.endswith(".embed") else f"nothing of the {tower} tower"


def _megabytes(count: int | None) -> str:
    return "not known" if count is None else f"{count / 1e6:,.1f} MB"


def grid(rows: Iterable[Sequence[Any]], headers: Sequence[str]) -> str:
    """Rows under their headers, as they are."""
    return str(tabulate(list(rows), headers=headers, disable_numparse=True))
