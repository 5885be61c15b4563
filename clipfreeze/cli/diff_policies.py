"""`clipfreeze diff A B`"""

from __future__ import annotations

from typing import Annotated

import typer

from clipfreeze.cli.common import (
    PREVIEW_MODEL,
    Format,
    FormatOption,
    ModelOption,
    PolicyArgument,
    anatomy_of,
    knob_settings,
    plan_for,
    print_json,
)


def run(
    one: PolicyArgument,
    other: PolicyArgument,
    model: ModelOption = PREVIEW_MODEL,
    settings: Annotated[
        list[str], typer.Option("--set", metavar="KNOB=VALUE", help="set a knob of the second policy; may be repeated")
    ] = [],  # noqa: B006 - typer reads it, nobody writes it
    format: FormatOption = Format.table,  # noqa: A002 - the option's name
) -> None:
    """Show what two policies do differently on a model."""
    from clipfreeze.plan.diff import compare_plans
    from clipfreeze.plan.tables import difference_table

    anatomy = anatomy_of(model)
    plans = plan_for(one, anatomy, {}), plan_for(other, anatomy, knob_settings(settings))
    found = compare_plans(*plans)
    if format is Format.json:
        print_json(found)
    else:
        print(difference_table(found, (one, other)))
