"""`clipfreeze train POLICY`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from clipfreeze import demo
from clipfreeze.cli.common import PolicyArgument, SetOption, anatomy_of, knob_settings, plan_of

DEMO_MODEL = "demo"


def run(
    policy: PolicyArgument,
    model: Annotated[
        str,
        typer.Option(
            "--model", "-m", metavar="MODEL", help="an open_clip name, local-dir:FOLDER, hf-hub:NAME, or demo"
        ),
    ] = DEMO_MODEL,
    pretrained: Annotated[
        str | None, typer.Option(metavar="TAG|PATH", help="one of open_clip's tags, or a checkpoint file")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="PATH", help="a CSV or TSV of image paths and captions, or a folder with a subfolder a class"
        ),
    ] = None,
    val: Annotated[
        str | None, typer.Option(metavar="PATH", help="likewise, to evaluate on; without it a tenth of the data")
    ] = None,
    settings: SetOption = [],  # noqa: B006 - typer reads it, nobody writes it
    epochs: Annotated[int | None, typer.Option(min=1, help="passes over the data")] = None,
    batch_size: Annotated[int | None, typer.Option(min=2, help="pairs in a step")] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=2**32 - 1, help="of shuffling, caption choice, augmentation and dropout")
    ] = 0,
    out: Annotated[Path | None, typer.Option(metavar="FOLDER", help="the run folder; else runs/POLICY-N")] = None,
    workers: Annotated[int | None, typer.Option(min=0, help="processes that decode pictures")] = None,
    image_column: Annotated[str | None, typer.Option(help="the table's column of image paths")] = None,
    caption_column: Annotated[str | None, typer.Option(help="the table's column of captions")] = None,
    separator: Annotated[
        str | None, typer.Option(help="of the table: comma, tab, semicolon, pipe or a character")
    ] = None,
    encoding: Annotated[str, typer.Option(help="of the table")] = "utf-8",
) -> None:
    """Train a policy and measure before and after. Without --data and --model: embedded pictures, embedded model."""
    knobs = knob_settings(settings)
    if model == DEMO_MODEL:  # far smaller than the models that published rates are for
        knobs = {**demo.KNOBS.get(policy, {}), **knobs}

    from clipfreeze.cli.results import result_table
    from clipfreeze.train.runs import run_policy, train_run
    from clipfreeze.train.spec import RunSpec
    from clipfreeze.train.table import TableFormat

    spec = RunSpec(
        policy=policy,
        params=knobs,
        model=model,
        pretrained=pretrained,
        data=data,
        val=val,
        table=TableFormat(
            image_column=image_column, caption_column=caption_column, separator=separator, encoding=encoding
        ),
        epochs=epochs or (demo.EPOCHS if data is None else 5),
        batch_size=batch_size or (demo.BATCH_SIZE if data is None else 64),
        seed=seed,
        num_workers=workers,
    )
    plan = plan_of(run_policy(spec), anatomy_of(model))
    print(plan, flush=True)
    result = train_run(spec, plan, out)
    print(f"\n{result.steps} steps in {result.seconds:.0f} s, loss {result.loss:.3f}\n")
    print(result_table(result.before, result.after))
    print(f"\nrun folder  {result.folder}\nnext        clipfreeze eval {result.folder}")
