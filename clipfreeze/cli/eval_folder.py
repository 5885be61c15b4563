"""`clipfreeze eval FOLDER`"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from clipfreeze.cli.common import Format, FormatOption, named_paths, print_json
from clipfreeze.cli.frontier import print_frontier
from clipfreeze.errors import DataError


def run(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="what `clipfreeze train` left")],
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]PATH", help="a table or folder, may be repeated; without it the run's own evaluation sets"
        ),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.svg", help="draw accuracy by confidence: a reliability diagram")
    ] = None,
    frontier: Annotated[
        bool, typer.Option("--frontier", help="measure between the base (alpha 0) and what was trained (1): WiSE-FT")
    ] = False,
    retain_floor: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE", help="with --frontier: what all sets but the first must keep of their score at alpha 0"
        ),
    ] = None,
    format: FormatOption = Format.table,  # noqa: A002 - the option's name
) -> None:
    """Load a run's weights onto its model and measure again."""
    from clipfreeze.cli.diagram import check_plot_path, write_diagrams
    from clipfreeze.cli.results import metrics_table
    from clipfreeze.train.runs import eval_run

    if plot is not None:
        check_plot_path(plot)
    sets = named_paths(data or ())
    if frontier:
        if plot is not None:
            raise DataError("--plot draws one model, --frontier measures many", "leave out one of them")
        print_frontier(folder, sets, retain_floor, format)
        return
    if retain_floor is not None:
        raise DataError("--retain-floor chooses among the points of a frontier", "add --frontier")
    found = eval_run(folder, sets)
    if format is Format.json:
        print_json({name: asdict(metrics) for name, metrics in found.items()})
    else:
        print(metrics_table(found))
    if plot is not None:
        write_diagrams(found, plot)
