"""`clipfreeze eval FOLDER`"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from clipfreeze.cli.common import Format, FormatOption, print_json


def run(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="what `clipfreeze train` left")],
    data: Annotated[
        str | None, typer.Option(metavar="PATH", help="a table or folder; without it the run's own evaluation sets")
    ] = None,
    format: FormatOption = Format.table,  # noqa: A002 - the option's name
) -> None:
    """Load a run's weights onto its model and measure again."""
    from clipfreeze.cli.results import metrics_table
    from clipfreeze.train.runs import eval_run

    found = eval_run(folder, data)
    if format is Format.json:
        print_json({name: asdict(metrics) for name, metrics in found.items()})
    else:
        print(metrics_table(found))
