"""Policy files to a Policy: extends, knobs, conditions and types, with every problem of the files in one answer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tomli
from pydantic import BaseModel, ValidationError

from clipfreeze.errors import PolicyError, Problem, did_you_mean
from clipfreeze.policy.actions import ACTIONS
from clipfreeze.policy.classes import CLASS_WORDS, read_classes
from clipfreeze.policy.document import Document
from clipfreeze.policy.filling import Active, Filling
from clipfreeze.policy.knobs import KnobValue, as_text, knob_values, references
from clipfreeze.policy.lines import Where, key_lines, line_of
from clipfreeze.policy.schema import Anchor, Knob, Optimizer, Phase, PhaseRule, PolicyFile, Rule, Schedule
from clipfreeze.policy.span import parse_span


@dataclass(frozen=True, slots=True)
class PlacedRule:
    """A rule with its knobs put in, and where it stands: its file, and the name shown for it.

    `active` is false where its `when` switches it off.
    """

    rule: Rule
    file: Path
    path: str
    line: int
    active: bool

    @property
    def source(self) -> str:
        """`file:line`."""
        return f"{self.path}:{self.line}"


@dataclass(frozen=True, slots=True)
class PlacedPhase:
    """A phase that is on, its rules, and where it stands."""

    phase: Phase
    path: str
    line: int
    rules: tuple[PlacedRule, ...]


@dataclass(frozen=True, slots=True)
class Policy:
    """A policy ready to resolve: its parents' rules first, then its own; all knobs have values.

    `phases` are those of the last file that has some.
    """

    name: str
    summary: str
    default: Literal["freeze", "train"]
    default_source: str
    knobs: Mapping[str, Knob]
    params: Mapping[str, KnobValue]
    rules: tuple[PlacedRule, ...]
    optimizer: Optimizer
    optimizer_source: str
    schedule: Schedule
    schedule_source: str
    sources: tuple[str, ...]
    phases: tuple[PlacedPhase, ...] = ()
    anchor: Anchor = field(default_factory=Anchor)
    anchor_source: str = ""

    @property
    def all_rules(self) -> tuple[PlacedRule, ...]:
        """The policy's own rules, then those of each phase: a rule's number counts through them."""
        return self.rules + tuple(rule for phase in self.phases for rule in phase.rules)


def load_policy(source: str | Path, /, **knobs: KnobValue) -> Policy:
    """A built-in policy by name, or a policy file by path, with knobs set.

    Raises PolicyError with all problems found, each with file and line.
    """
    return _read(_chain(source), knobs)


def builtin_policies() -> dict[str, Path]:
    """Names of the policies that ship, in order, and their files."""
    return {path.stem: path for path in sorted(_policies_folder().glob("*.toml"))}


def policy_text(source: str | Path) -> str:
    """The text of a policy's own file."""
    return _locate(source)[0].read_text(encoding="utf-8-sig")


def _policies_folder() -> Path:
    package = Path(__file__).parents[1]
    packaged = package / "policies"
    return packaged if packaged.is_dir() else package.parent / "policies"  # in a checkout they lie beside the package


def _locate(source: str | Path, base: Path | None = None) -> tuple[Path, str]:
    """File and the name to show for it; `base` is the folder of the policy that asks."""
    text = str(source)
    if text in (builtin := builtin_policies()):
        return builtin[text], f"clipfreeze/policies/{text}.toml"
    looks_like_path = text.endswith(".toml") or "/" in text or "\\" in text
    path = Path(text) if base is None else base / text
    try:
        if path.is_file():
            return path.resolve(), str(path)
    except (OSError, ValueError):  # no system takes such a name
        looks_like_path = False
    if looks_like_path:
        what = f"{path} is a folder" if path.is_dir() else f"no policy file {path}"
        raise PolicyError(what, _near_file(path))
    raise PolicyError(f"no policy {text!r}", f"{did_you_mean(text, list(builtin))} (`clipfreeze list` shows all)")


def _near_file(path: Path) -> str | None:
    folder = path.parent
    found = sorted(file.name for file in folder.glob("*.toml")) if folder.is_dir() else []
    names = found or list(builtin_policies())
    return f"{did_you_mean(path.name if found else path.stem, names)}" if names else None


def _chain(source: str | Path) -> list[Document]:
    """The files `source` is built from, parents first, each once."""
    documents: dict[Path, Document] = {}
    problems: list[Problem] = []

    def visit(document: Document, asked_by: tuple[Document, ...]) -> None:
        trail = (*asked_by, document)
        for parent in _parents(document):
            try:
                path, shown = _locate(parent, document.path.parent)
                if path in documents:
                    continue
                paths = [asking.path for asking in trail]
                if path in paths:
                    circle = [*(asking.shown for asking in trail[paths.index(path) :]), shown]
                    raise PolicyError(
                        "extends goes in a circle: " + " -> ".join(circle), "take one of these extends out"
                    )
                visit(_parse(path, shown), trail)
            except PolicyError as error:
                problems.extend(p if p.path else document.problem(("extends",), p.what, p.fix) for p in error.problems)
        documents[document.path] = document

    visit(_parse(*_locate(source)), ())
    if problems:
        raise PolicyError(problems)
    return list(documents.values())


def _parents(document: Document) -> list[str]:
    extends = document.data.get("extends", [])
    parents = [extends] if isinstance(extends, str) else extends
    if not isinstance(parents, list) or not all(isinstance(parent, str) and parent for parent in parents):
        fix = 'write extends = "last_n" or extends = ["base", "./mine.toml"]'
        raise PolicyError(
            document.problem(("extends",), "extends takes a policy's name or path, or a list of them", fix)
        )
    return parents


def _parse(path: Path, shown: str) -> Document:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise PolicyError(Problem(f"cannot be read: {error.strerror}", path=shown)) from None
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise PolicyError(Problem("is UTF-16 text", "save it as UTF-8", shown, 1))
    try:
        text = raw.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise PolicyError(
            Problem(f"byte 0x{raw[error.start]:02x} is not UTF-8", "save it as UTF-8", shown, line)
        ) from None
    try:
        return Document(path, shown, tomli.loads(text), key_lines(text))
    except tomli.TOMLDecodeError as error:
        raise PolicyError(Problem(f"not TOML: {error.msg}", _toml_advice(error), shown, error.lineno)) from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets in thousands
        raise PolicyError(Problem(f"not TOML that can be read: {error}", path=shown)) from None


def _toml_advice(error: tomli.TOMLDecodeError) -> str | None:
    line = error.doc.split("\n")[error.lineno - 1]
    if "\\" in line and ("escape" in error.msg.lower() or "hex" in error.msg.lower() or "\\" in error.msg):
        return "a backslash starts an escape in double quotes: use single quotes, or forward slashes"
    if "*" in line.partition("=")[0]:
        return 'a pattern cannot be a key: write [[rule]] and match = "..."'
    if "overwrite" in error.msg.lower() or "twice" in error.msg.lower():
        return "the key or table stands here a second time: keep one"
    return None


def _read(documents: list[Document], given: Mapping[str, Any]) -> Policy:
    problems: list[Problem] = []
    knobs = _merged_knobs(documents, problems)
    last = documents[-1]
    values, errors = knob_values(knobs, given)
    problems.extend(last.problem(("params",), str(error), error.fix) for error in errors)
    declared = {name for document in documents for name in _params(document)}

    files: list[tuple[Document, PolicyFile]] = []
    active: Active = {}
    for document in documents:
        filling = Filling(document, knobs, values, declared - values.keys(), active)
        data = filling.filled()
        problems.extend(problem for problem in filling.faults.values() if problem)
        try:
            files.append((document, PolicyFile.model_validate(data)))
        except ValidationError as error:
            problems.extend(_explained(document, data, error, told=set(filling.faults)))
    problems.extend(_unread_knobs(documents, knobs))
    files = [(document, _with_classes(document, file, active, problems)) for document, file in files]
    problems.extend(
        document.problem(where, "this rule says nothing of what it matches", "write freeze, train or lr in it")
        for document, file in files
        for where, rule in _rules_of(file)
        if active[document.path, where] and not rule.said()
    )
    phases = next((_phases(*of, active, problems) for of in reversed(files) if of[1].phase), ())
    if problems:
        raise PolicyError(problems)

    rules = tuple(rule for document, file in files for rule in _placed(document, ("rule",), file.rule, active))
    optimizer, schedule = _merged_optimizer(files), _merged_section(files, "schedule")
    own = files[-1][1]
    return Policy(
        name=own.name or last.path.stem,
        summary=own.summary,
        default=next((file.default for _, file in reversed(files) if file.default), "freeze"),
        default_source=_source_of(files, "default"),
        knobs=knobs,
        params=values,
        rules=rules,
        optimizer=Optimizer.model_validate(optimizer),
        optimizer_source=_source_of(files, "optimizer"),
        schedule=Schedule.model_validate(schedule),
        schedule_source=_source_of(files, "schedule"),
        anchor=Anchor.model_validate(_merged_section(files, "anchor")),
        anchor_source=_source_of(files, "anchor"),
        sources=tuple(document.shown for document in documents),
        phases=phases,
    )


def _rules_of(file: PolicyFile) -> Iterator[tuple[Where, Rule]]:
    yield from ((("rule", number), rule) for number, rule in enumerate(file.rule))
    for place, phase in enumerate(file.phase):
        yield from ((("phase", place, "rule", number), rule) for number, rule in enumerate(phase.rule))


def _placed(document: Document, at: Where, rules: Sequence[Rule], active: Active) -> tuple[PlacedRule, ...]:
    places = [((*at, number), rule) for number, rule in enumerate(rules)]
    return tuple(
        PlacedRule(rule, document.path, document.shown, line_of(document.lines, where), active[document.path, where])
        for where, rule in places
    )


def _phases(document: Document, file: PolicyFile, active: Active, problems: list[Problem]) -> tuple[PlacedPhase, ...]:
    """The phases that are on. Ends told in one unit must come one after the other; the others wait for the run."""
    on = [place for place in range(len(file.phase)) if active[document.path, ("phase", place)]]
    latest: dict[str, float] = {}
    for place in on:
        until, where = file.phase[place].until, ("phase", place, "until")
        if until is None:
            if place != on[-1]:
                what = "a phase that lasts to the end, and others after it"
                problems.append(document.problem(where[:2], what, 'write its end: until = "20%"'))
            continue
        span = parse_span(until)
        if span.amount <= latest.get(span.unit, 0.0):
            what = f"until = {_toml(until)} is no later than the end of a phase before it"
            problems.append(document.problem(where, what, "phases stand in the order of the run"))
        latest[span.unit] = span.amount
    return tuple(
        PlacedPhase(
            file.phase[place],
            document.shown,
            line_of(document.lines, ("phase", place)),
            _placed(document, ("phase", place, "rule"), file.phase[place].rule, active),
        )
        for place in on
    )


def _source_of(files: list[tuple[Document, PolicyFile]], key: str) -> str:
    """Where the last file that speaks of `key` does so, else the policy's first line."""
    document = next((document for document, _ in reversed(files) if key in document.data), files[-1][0])
    return f"{document.shown}:{line_of(document.lines, (key,))}"


def _merged_section(files: list[tuple[Document, PolicyFile]], key: str) -> dict[str, Any]:
    """A section's keys, later files over earlier ones."""
    merged: dict[str, Any] = {}
    for _, file in files:
        if (section := getattr(file, key)) is not None:
            merged |= section.model_dump(exclude_unset=True)
    return merged


def _merged_optimizer(files: list[tuple[Document, PolicyFile]]) -> dict[str, Any]:
    """As `_merged_section`, but another optimizer does not inherit the former one's own options."""
    merged: dict[str, Any] = {}
    for _, file in files:
        if file.optimizer is None:
            continue
        own = file.optimizer.model_dump(exclude_unset=True)
        if own.get("name", merged.get("name")) != merged.get("name"):
            merged = {key: merged[key] for key in ("lr", "weight_decay", "warm_start") if key in merged}
        merged |= own
    return merged


def _merged_knobs(documents: list[Document], problems: list[Problem]) -> dict[str, Knob]:
    """All knobs; a later file may change parts of an earlier one's knob, such as its default."""
    merged: dict[str, dict[str, Any]] = {}
    knobs: dict[str, Knob] = {}
    for document in documents:
        if not isinstance(document.data.get("params", {}), dict):
            problems.append(document.problem(("params",), "params is a table of knobs", "write [params]"))
        for name, raw in _params(document).items():
            where = ("params", name)
            if not isinstance(raw, dict):
                fix = f"write {name} = {{ default = {_toml(raw)} }}"
                if name in PolicyFile.model_fields:
                    fix = "put it above the first table"
                problems.append(document.problem(where, f"knob {name!r} is no table", fix))
                continue
            merged[name] = merged.get(name, {}) | raw
            try:
                knobs[name] = Knob.model_validate(merged[name])
            except ValidationError as error:
                problems.extend(_explained(document, merged[name], error, where, Knob))
    return knobs


def _params(document: Document) -> dict[str, Any]:
    params = document.data.get("params")
    return params if isinstance(params, dict) else {}


def _with_classes(document: Document, file: PolicyFile, active: Active, problems: list[Problem]) -> PolicyFile:
    """The file with the classes that its rules read from other files put in.

    A path in the policy counts from the policy's folder, one that a knob brings from the user's.
    """
    rules = []
    for number, rule in enumerate(file.rule):
        for name in ("prompt", "head"):
            action = getattr(rule, name)
            said = action and action.classes
            if not isinstance(said, str) or said in CLASS_WORDS or not active[document.path, ("rule", number)]:
                continue
            raw = document.data["rule"][number][name]
            folder = Path() if references(raw["classes"]) else document.path.parent
            try:
                action = action.model_copy(update={"classes": read_classes(folder / said)})
                rule = rule.model_copy(update={name: action})
            except ValueError as error:
                fix = 'write a file of one name a line, a list of names, "imagenet" or "data"'
                problems.append(document.problem(("rule", number, name), f"classes: {error}", fix))
        rules.append(rule)
    return file.model_copy(update={"rule": tuple(rules)})


def _unread_knobs(documents: list[Document], knobs: Mapping[str, Knob]) -> Iterator[Problem]:
    read = references(
        [
            document.data.get(key)
            for document in documents
            for key in ("rule", "phase", "optimizer", "schedule", "anchor", "default")
        ]
    )
    read |= references([knob.default for knob in knobs.values()])
    for document in documents:
        for name in _params(document):
            if name not in read:
                yield document.problem(
                    ("params", name), f"knob {name!r} is read by no rule", f"use {{{name}}}, or take it out"
                )


_OPPOSITES = {"train": "write freeze = true", "freeze": "write train = true"}

_TYPES = {
    "float_type": "a number",
    "int_type": "a whole number",
    "bool_type": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "dict_type": "a table",
    "model_type": "a table",
    "finite_number": "a finite number",
}


def _explained(
    document: Document,
    data: dict[str, Any],
    error: ValidationError,
    base: Where = (),
    model: type[BaseModel] = PolicyFile,
    told: AbstractSet[Where] = frozenset(),
) -> Iterator[Problem]:
    """Pydantic's errors in our words, at their lines; one for each key, none in what was `told` of before."""
    seen: set[Where] = set(told)
    for fault in error.errors():
        where = tuple(part for part in fault["loc"] if part not in ("float", "int", "str", "bool"))
        where = _existing(data, where)
        if fault["type"] == "extra_forbidden":
            yield _unknown_key(document, (*base, *where), _keys_at(where, model))
            continue
        if where in seen or any(where[:depth] in told for depth in range(len(where))):
            continue
        seen.add(where)
        name = next((str(part) for part in reversed(where) if isinstance(part, str)), "")
        value, kind = fault["input"], fault["type"]
        what, fix = f"{name}: {fault['msg'].removeprefix('Value error, ')}", None
        if name == "clamp":
            what = f"clamp = {_toml(value)}: two numbers are expected, the lower one first"
            fix = "write clamp = [low, high] with low < high"
        elif kind == "missing":
            what = f"{fault['loc'][-1]} is missing"
        elif kind == "finite_number":
            what = f"{name} = {value!r}: a finite number is expected"
        elif kind == "literal_error" and fault["ctx"]["expected"] == "True":
            what = f"{name} = {_toml(value)}"
            fix = f"write {name} = true without quotes" if value == "true" else _OPPOSITES.get(name)
        elif kind in _TYPES:
            what = f"{name} = {_toml(value)}: {_TYPES[kind]} is expected"
            fix = f"write {name} = {value} without quotes" if isinstance(value, str) and _is_number(value) else None
        elif kind != "value_error":
            what = f"{name} = {_toml(value)}: {fault['msg'][0].lower()}{fault['msg'][1:]}"
        elif not where or isinstance(where[-1], int):  # said of a whole rule
            what = fault["msg"].removeprefix("Value error, ")
        yield document.problem((*base, *where), what, fix)


def _existing(data: Any, where: Where) -> Where:
    """`where` as far as it goes into `data`: pydantic adds names of union members."""
    path: list[str | int] = []
    for part in where:
        try:
            data = data[part]
        except (KeyError, IndexError, TypeError):
            continue
        path.append(part)
    return tuple(path)


def _keys_at(where: Where, model: type[BaseModel]) -> list[str]:
    return list(_model_at(where, model).model_fields)


def _model_at(where: Where, model: type[BaseModel]) -> type[BaseModel]:
    match where:
        case ("rule", _, action, *_, _):
            return ACTIONS[str(action)]
        case ("rule", _, _):
            return Rule
        case ("phase", _, "rule", _, *_, _):
            return PhaseRule
        case ("phase", _, _):
            return Phase
    return model


def _unknown_key(document: Document, where: Where, known: list[str]) -> Problem:
    synonyms = {
        "learning_rate": "lr",
        "optim": "optimizer",
        "rules": "rule",
        "wd": "weight_decay",
        "scheduler": "schedule",
    }
    key = str(where[-1])
    if where[0] == "phase" and len(where) == 3 and key in Rule.model_fields:
        return document.problem(where, f"unknown key {key!r}", "it goes into a [[phase.rule]]")
    if len(where) > 1 and key in PolicyFile.model_fields and key not in known:
        return document.problem(where, f"unknown key {key!r}", "it goes above the first table")
    fix = f"did you mean {synonyms[key]}?" if synonyms.get(key) in known else did_you_mean(key, known)
    return document.problem(where, f"unknown key {key!r}", fix)


def _toml(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else as_text(value)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
