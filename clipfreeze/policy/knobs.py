"""Knobs: their values, their places in a policy's text, and the conditions that read them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import tomli

from clipfreeze.errors import did_you_mean
from clipfreeze.policy.schema import Knob

KnobValue = bool | int | float | str
_REFERENCE = re.compile(r"\{([^{},]+)\}")  # {a,b} with a comma is a brace glob, {} the class in a caption
_SWITCH = re.compile(r"(?P<negated>not\s+)?\{(?P<knob>\w+)\}")
_COMPARISON = re.compile(r"\{(?P<knob>\w+)\}\s*(?P<operator>==|!=)\s*(?P<value>.+)")


class KnobError(ValueError):
    """Names a wrong knob or value; `fix` says what is right."""

    def __init__(self, what: str, fix: str | None = None) -> None:
        super().__init__(what)
        self.fix = fix


def parse_value(text: str) -> KnobValue:
    """A value as the command line gives it: TOML where it is TOML (4, 1e-5, true, "x"), else the text itself."""
    try:
        value = tomli.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):  # not TOML, or a number of thousands of digits
        return text
    return value if isinstance(value, (bool, int, float, str)) else text


def knob_values(knobs: Mapping[str, Knob], given: Mapping[str, Any]) -> tuple[dict[str, KnobValue], list[KnobError]]:
    """The value of each knob, the given one or its default, which may name another knob; and what is wrong.

    A knob whose value is wrong has none.
    """
    hint = "this policy has no knobs"
    errors = [
        KnobError(f"no knob {name!r}", did_you_mean(name, list(knobs)) if knobs else hint)
        for name in given
        if name not in knobs
    ]
    values: dict[str, KnobValue | None] = {}

    def value_of(name: str, asked_by: tuple[str, ...]) -> KnobValue | None:
        if name in asked_by:
            raise KnobError(f"knobs ask each other for a default: {' -> '.join((*asked_by, name))}")
        if name not in knobs:
            raise KnobError(f"the default of knob {asked_by[-1]!r} names {name!r}, which is no knob")
        if name not in values:
            knob = knobs[name]
            kind: KnobValue | None = knob.default
            if isinstance(kind, str) and (other := _REFERENCE.fullmatch(kind)):
                kind = value_of(other[1], (*asked_by, name))
            values[name] = None  # for good, where the value is wrong
            if kind is not None:
                values[name] = checked(name, knob, kind, given.get(name, kind))
        return values[name]

    for name in knobs:
        try:
            value_of(name, ())
        except KnobError as error:
            values.setdefault(name, None)
            errors.append(error)
    return {name: value for name, value in values.items() if value is not None}, errors


def checked(name: str, knob: Knob, kind: KnobValue, value: Any) -> KnobValue:
    """`value` if the knob takes it; `kind` is the default, whose type the value must have. Raises KnobError."""
    bounded = knob.min is not None or knob.max is not None
    number = _is_number(value)
    if knob.choices is not None and not (bounded and number):
        for choice in knob.choices:
            if choice == value and type(choice) is type(value):
                return choice
        words = ", ".join(map(as_text, knob.choices)) + (", or a number" if bounded else "")
        raise KnobError(f"knob {name!r} cannot be {value!r}", f"one of: {words}")
    if number and (bounded or _is_number(kind)):
        return _checked_number(name, knob, kind, value)
    if isinstance(value, (bool, str)) and type(value) is type(kind):
        return value
    wanted = {bool: "true or false", str: "text"}.get(type(kind), "a number")
    raise KnobError(f"knob {name!r} takes {wanted}, not {value!r}")


def _checked_number(name: str, knob: Knob, kind: KnobValue, value: float) -> KnobValue:
    whole = isinstance(kind, int) or (isinstance(kind, str) and isinstance(knob.min, int))
    if whole and not isinstance(value, int):
        raise KnobError(f"knob {name!r} takes a whole number, not {value!r}")
    if not math.isfinite(value):
        raise KnobError(f"knob {name!r} takes a finite number, not {value!r}")
    if knob.min is not None and value < knob.min:
        raise KnobError(f"knob {name!r} is {value:g}", f"it takes at least {knob.min:g}")
    if knob.max is not None and value > knob.max:
        raise KnobError(f"knob {name!r} is {value:g}", f"it takes at most {knob.max:g}")
    return float(value) if isinstance(kind, float) else value


def references(value: Any) -> set[str]:
    """Names in braces in any text within `value`."""
    if isinstance(value, str):
        return set(_REFERENCE.findall(value))
    if isinstance(value, Mapping):
        return set().union(*map(references, value.values()))
    return set().union(*map(references, value)) if isinstance(value, (list, tuple)) else set()


def substitute(value: Any, values: Mapping[str, KnobValue]) -> Any:
    """`value` with knobs put in: a text that is one knob takes the knob's type. Raises KnobError for a name unknown."""
    if isinstance(value, str):
        if whole := _REFERENCE.fullmatch(value):
            return _known(whole[1], values)
        return _REFERENCE.sub(lambda found: as_text(_known(found[1], values)), value)
    if isinstance(value, Mapping):
        return {key: substitute(item, values) for key, item in value.items()}
    return [substitute(item, values) for item in value] if isinstance(value, list) else value


def is_on(condition: str, knobs: Mapping[str, Knob], values: Mapping[str, KnobValue]) -> bool:
    """What a rule's `when` comes to. Raises KnobError for an unknown form or knob, or a value it never has."""
    if switch := _SWITCH.fullmatch(condition.strip()):
        value = _known(switch["knob"], values)
        if not isinstance(value, bool):
            raise KnobError(
                f"when = {condition!r}: knob {switch['knob']!r} is {value!r}, not true or false",
                f'compare it: when = "{{{switch["knob"]}}} == {value}"',
            )
        return value != bool(switch["negated"])
    comparison = _COMPARISON.fullmatch(condition.strip())
    if comparison and not re.search(r"[{}]|\b(and|or)\b", comparison["value"]):
        value, other = _known(comparison["knob"], values), parse_value(comparison["value"].strip())
        _check_comparable(comparison["knob"], knobs[comparison["knob"]], value, other)
        return (value == other) == (comparison["operator"] == "==")
    raise KnobError(
        f"when = {condition!r} is no condition", 'write "{knob}", "not {knob}", "{knob} == word" or "{knob} != word"'
    )


def _check_comparable(name: str, knob: Knob, value: KnobValue, other: KnobValue) -> None:
    """No comparison that can never hold."""
    if knob.choices is not None:
        checked(name, knob, value, other)
    elif _is_number(value) != _is_number(other) or isinstance(value, str) != isinstance(other, str):
        raise KnobError(f"when compares knob {name!r}, which is {as_text(value)}, with {other!r}: never the same kind")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _known(name: str, values: Mapping[str, KnobValue]) -> KnobValue:
    if name not in values:
        fix = did_you_mean(name, list(values)) if values else "declare it under [params]"
        raise KnobError(f"{{{name}}} is no knob of this policy", fix)
    return values[name]


def as_text(value: KnobValue) -> str:
    """As TOML has it, without quotes."""
    return str(value).lower() if isinstance(value, bool) else str(value)
