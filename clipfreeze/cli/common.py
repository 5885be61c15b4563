"""Arguments and output that verbs share."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clipfreeze.errors import ClipfreezeError, DataError, PolicyError, Problem

if TYPE_CHECKING:
    from clipfreeze.anatomy.parts import Anatomy
    from clipfreeze.plan.value import Plan
    from clipfreeze.policy.knobs import KnobValue
    from clipfreeze.policy.loading import Policy

PREVIEW_MODEL = "ViT-B-32"


class Format(str, Enum):
    """How to print: a table for people, JSON for programs."""

    table = "table"
    json = "json"


PolicyArgument = Annotated[str, typer.Argument(metavar="POLICY", help="a built-in policy's name, or a policy file")]
ModelOption = Annotated[
    str,
    typer.Option("--model", "-m", metavar="MODEL", help="an open_clip name, local-dir:FOLDER, hf-hub:NAME, or demo"),
]
PretrainedOption = Annotated[
    str | None, typer.Option(metavar="TAG|PATH", help="one of open_clip's tags, or a checkpoint file")
]
SetOption = Annotated[list[str], typer.Option("--set", metavar="KNOB=VALUE", help="set a knob; may be repeated")]
FormatOption = Annotated[Format, typer.Option("--format", help="how to print")]


def knob_settings(settings: Iterable[str]) -> dict[str, KnobValue]:
    """`--set` options as knobs; a value is read as TOML, else as text."""
    from clipfreeze.policy.knobs import parse_value

    knobs: dict[str, KnobValue] = {}
    problems = []
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or not name.strip() or not value.strip():
            problems.append(Problem(f"--set {setting}", "write --set knob=value"))
        elif name.strip() in knobs:
            problems.append(Problem(f"--set {setting}: {name.strip()} is set twice", "say one"))
        else:
            knobs[name.strip()] = parse_value(value.strip())
    if problems:
        raise PolicyError(problems)
    return knobs


def named_paths(said: Iterable[str]) -> dict[str, str]:
    """`--data` options as sets by name: NAME=PATH, or a path that names its set by its own last part."""
    paths: dict[str, str] = {}
    problems = []
    for option in said:
        name, equals, path = option.partition("=")
        if not equals or "/" in name or Path(option).exists():  # a path may hold a sign of equality
            name, path = Path(option).resolve().stem, option
        if not name.strip() or not path.strip():
            problems.append(Problem(f"--data {option}", "write --data PATH or --data NAME=PATH"))
        elif name in paths:
            problems.append(Problem(f"--data {option}: there is a set {name} already", f"--data OTHER_NAME={path}"))
        else:
            paths[name] = path
    if problems:
        raise DataError(problems)
    return paths


def anatomy_of(model: str) -> Anatomy:
    """The anatomy of a model by name, built on the meta device without weights."""
    from clipfreeze import models
    from clipfreeze.anatomy.partition import describe

    name = models.canonical_name(model)
    return describe(models.build_on_meta(name), model if model == "demo" else name)


def plan_for(policy: str, anatomy: Anatomy, knobs: dict[str, KnobValue]) -> Plan:
    """The plan of a policy by name, its optimizer and schedule checked by name and options too."""
    from clipfreeze.policy.loading import load_policy

    return plan_of(load_policy(policy, **knobs), anatomy)


def plan_of(loaded: Policy, anatomy: Anatomy) -> Plan:
    """The plan of a policy, its optimizer and schedule checked by name and options too."""
    from clipfreeze.optim.checks import check_optimizer
    from clipfreeze.plan.build import resolve

    problems: list[Problem] = []
    plan = None
    try:
        plan = resolve(loaded, anatomy)
    except ClipfreezeError as error:
        problems.extend(error.problems)
    dims = {len(parameter.shape) for parameter in plan.trainable} if plan else {2}
    problems.extend(check_optimizer(loaded, dims))
    if problems or plan is None:
        raise PolicyError(problems)
    return plan


def print_json(value: Any) -> None:
    """JSON alone on stdout. Pydantic values write themselves."""
    if hasattr(value, "model_dump_json"):
        sys.stdout.write(value.model_dump_json(indent=2) + "\n")
    else:
        sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
