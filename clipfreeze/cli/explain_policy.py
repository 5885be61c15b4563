"""`clipfreeze explain POLICY NAME-OR-GLOB`"""

from __future__ import annotations

from typing import Annotated

import typer

from clipfreeze.cli.common import (
    PREVIEW_MODEL,
    Format,
    FormatOption,
    ModelOption,
    PolicyArgument,
    SetOption,
    anatomy_of,
    knob_settings,
    plan_for,
    print_json,
)


def run(
    policy: PolicyArgument,
    pattern: Annotated[str, typer.Argument(metavar="NAME", help="a parameter's name, a glob or a role")],
    model: ModelOption = PREVIEW_MODEL,
    settings: SetOption = [],  # noqa: B006 - typer reads it, nobody writes it
    format: FormatOption = Format.table,  # noqa: A002 - the option's name
) -> None:
    """Tell why parameters are treated as they are: each rule that speaks of them, and which one wins."""
    from clipfreeze.plan.explain import explain_parameters
    from clipfreeze.plan.tables import explanation_table

    anatomy = anatomy_of(model)
    found = explain_parameters(plan_for(policy, anatomy, knob_settings(settings)), anatomy, pattern)
    if format is Format.json:
        print_json([parameter.model_dump(mode="json") for parameter in found])
    else:
        print(explanation_table(found))
