"""`clipfreeze apply POLICY`"""

from __future__ import annotations

import sys
from pathlib import Path
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
from clipfreeze.errors import PolicyError


def run(
    policy: PolicyArgument,
    model: ModelOption = PREVIEW_MODEL,
    pretrained: Annotated[
        str | None, typer.Option(metavar="TAG|PATH", help="open_clip tag or checkpoint file; only --out reads it")
    ] = None,
    settings: SetOption = [],  # noqa: B006 - typer reads it, nobody writes it
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the plan; load and change nothing")] = False,
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="apply for real and leave a folder for clipfreeze.load")
    ] = None,
    format: FormatOption = Format.table,  # noqa: A002 - the option's name
) -> None:
    """Preview a policy on a model (--dry-run), or apply it and prove it (--out FOLDER)."""
    if dry_run == (out is not None):
        raise PolicyError("apply does one of two things", "say --dry-run for a preview, or --out FOLDER to do it")
    plan = plan_for(policy, anatomy_of(model), knob_settings(settings))
    if format is Format.json:
        print_json(plan)
    else:
        print(plan)
    if out is not None:
        from clipfreeze.train.probe import build_and_prove

        for line in build_and_prove(plan, model, pretrained, out):
            print(line, file=sys.stderr)
