"""`clipfreeze roles MODEL`"""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from clipfreeze.cli.common import PREVIEW_MODEL, Format, FormatOption, anatomy_of, print_json


def run(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="as for --model")] = PREVIEW_MODEL,
    format: FormatOption = Format.table,  # noqa: A002 - the option's name
) -> None:
    """List the roles of a model with their parameters."""
    from clipfreeze.plan.tables import anatomy_table

    anatomy = anatomy_of(model)
    if format is Format.json:
        facts = asdict(anatomy)
        for parameter in facts["parameters"]:
            parameter["tags"] = sorted(parameter["tags"])
        print_json(facts)
        return
    print(anatomy_table(anatomy))
