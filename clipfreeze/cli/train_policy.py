"""`clipfreeze train POLICY`"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clipfreeze import demo
from clipfreeze.cli.common import Format, ModelOption, PretrainedOption, SetOption, anatomy_of, knob_settings, plan_of
from clipfreeze.errors import DataError

if TYPE_CHECKING:
    from clipfreeze.train.loop import Result

DEMO_MODEL = "demo"

_STRETCH = '"1 epochs", "200 steps" or "10%"'


def run(
    context: typer.Context,
    policy: Annotated[
        str | None, typer.Argument(metavar="POLICY", help="a built-in policy's name, or a policy file")
    ] = None,
    model: ModelOption = DEMO_MODEL,
    pretrained: PretrainedOption = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="CSV, TSV, JSONL or Parquet of image paths and captions; a folder with a subfolder a class or with "
            "metadata.csv; shards ({00..99}.tar); hf:NAME[:SPLIT]; a stream of shards (pipe:COMMAND, https:...)",
        ),
    ] = None,
    val: Annotated[
        str | None,
        typer.Option(
            metavar="PATH|SHARE|PART",
            help='to evaluate on: other data, "5%" of the data, or the name of a part of them; without it the part '
            "that they call so, else a tenth",
        ),
    ] = None,
    samples_per_epoch: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="pairs of a stream that count as an epoch")
    ] = None,
    retain: Annotated[
        str | None, typer.Option(metavar="PATH", help="data that the model shall go on to know, measured too")
    ] = None,
    settings: SetOption = [],  # noqa: B006 - typer reads it, nobody writes it
    epochs: Annotated[int | None, typer.Option(min=1, help="passes over the data")] = None,
    batch_size: Annotated[
        str | None, typer.Option(metavar="N|auto", help="pairs in a step, over all ranks; auto: as many as fit")
    ] = None,
    micro_batch: Annotated[
        int | None, typer.Option(min=1, help="pairs through the encoders at once, with the whole batch's gradients")
    ] = None,
    shard: Annotated[
        bool | None,
        typer.Option("--shard/--no-shard", help="split weights, gradients and moments over the ranks (FSDP2)"),
    ] = None,
    checkpoint_activations: Annotated[
        bool, typer.Option("--checkpoint-activations", help="compute blocks again in backward: less memory, more time")
    ] = False,
    compile_blocks: Annotated[
        bool, typer.Option("--compile", help="run the blocks that train as torch.compile makes them")
    ] = False,
    objective: Annotated[str, typer.Option(help="contrastive, classes (cross-entropy over class prompts), auto")] = (
        "auto"
    ),
    clip_grad: Annotated[float | None, typer.Option(help="the gradient's largest norm")] = None,
    precision: Annotated[str, typer.Option(help="of autocast: fp32, bf16, fp16, auto")] = "auto",
    ema: Annotated[float | None, typer.Option(help="decay of an average of the weights, which is then kept")] = None,
    views: Annotated[
        int | None, typer.Option(min=1, help="augmented views of each picture, kept and shown in turn; else no end")
    ] = None,
    cache_ram: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="of memory, for what frozen parts made; else half of what is free"),
    ] = None,
    cache_dir: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="keep that on disk too: for other runs and ranks")
    ] = None,
    cache_disk: Annotated[str, typer.Option(metavar="SIZE", help="the most that this folder may hold")] = "50GB",
    cache_dtype: Annotated[str, typer.Option(help="of what is kept: fp32, bf16, fp16; auto: as computed")] = "auto",
    max_bad: Annotated[float, typer.Option(help="share of pictures that may be broken and left out")] = 0.01,
    evaluate_every: Annotated[str | None, typer.Option(metavar="STRETCH", help=f"measure too: {_STRETCH}")] = None,
    save_every: Annotated[str, typer.Option(metavar="STRETCH", help=f"between checkpoints: {_STRETCH}")] = "1 epochs",
    keep: Annotated[int, typer.Option(min=1, help="checkpoints to keep, beside the best")] = 1,
    best: Annotated[
        str | None, typer.Option(metavar="[SET/]SCORE", help="keep the weights with the best top1, nll, ...")
    ] = None,
    patience: Annotated[
        int | None, typer.Option(min=1, help="end after so many evaluations without a better score")
    ] = None,
    retain_floor: Annotated[
        float | None, typer.Option(metavar="SHARE", help="end when the retained set's score falls below this share")
    ] = None,
    on_floor: Annotated[
        str | None, typer.Option(help="then: rollback (the default) to the last weights above it, or stop")
    ] = None,
    track: Annotated[
        list[str], typer.Option(metavar="NAME", help="tensorboard, wandb, mlflow or trackio; may be repeated")
    ] = [],  # noqa: B006
    seed: Annotated[
        int, typer.Option(min=0, max=2**32 - 1, help="of shuffling, caption choice, augmentation and dropout")
    ] = 0,
    out: Annotated[Path | None, typer.Option(metavar="FOLDER", help="the run folder; else runs/POLICY-N")] = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="go on with a run that was stopped, from its last checkpoint")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=0, help="processes that decode pictures")] = None,
    image_column: Annotated[str | None, typer.Option(help="the table's column of image paths")] = None,
    caption_column: Annotated[str | None, typer.Option(help="the table's column of captions")] = None,
    image_root: Annotated[str | None, typer.Option(help="folder that image paths start at, if not the table's")] = None,
    separator: Annotated[
        str | None, typer.Option(help="of the table: comma, tab, semicolon, pipe or a character")
    ] = None,
    encoding: Annotated[str, typer.Option(help="of the table")] = "utf-8",
) -> None:
    """Train a policy and measure before and after. Without --data and --model: embedded pictures, embedded model."""
    if resume is not None:
        _resume(context, resume, shard)
        return
    if policy is None:
        raise DataError("train what?", "name a policy: clipfreeze list; or --resume FOLDER")
    knobs = knob_settings(settings)
    if model == DEMO_MODEL:  # far smaller than the models that published rates are for
        knobs = {**demo.KNOBS.get(policy, {}), **knobs}

    from clipfreeze.train.runs import run_policy, train_run
    from clipfreeze.train.spec import run_spec

    spec = run_spec(
        policy=policy,
        params=knobs,
        model=model,
        pretrained=pretrained,
        data=data,
        val=val,
        samples_per_epoch=samples_per_epoch,
        retain=retain,
        table={
            "image_column": image_column,
            "caption_column": caption_column,
            "image_root": image_root,
            "separator": separator,
            "encoding": encoding,
        },
        epochs=epochs or (demo.EPOCHS if data is None else 5),
        batch_size=_size(batch_size) if batch_size is not None else (demo.BATCH_SIZE if data is None else 64),
        micro_batch=micro_batch,
        shard=bool(shard),
        checkpoint_activations=checkpoint_activations,
        compile=compile_blocks,
        objective=objective,
        clip_grad=clip_grad,
        precision=precision,
        ema=ema,
        views=views,
        cache_ram=cache_ram,
        cache_dir=cache_dir,
        cache_disk=cache_disk,
        cache_dtype=cache_dtype,
        max_bad=max_bad,
        evaluate_every=evaluate_every,
        save_every=save_every,
        keep=keep,
        best=best,
        patience=patience,
        retain_floor=retain_floor,
        on_floor=on_floor,
        trackers=tuple(track),
        seed=seed,
        num_workers=workers,
    )
    plan = plan_of(run_policy(spec), anatomy_of(model))
    print(plan, flush=True)
    _print(train_run(spec, plan, out), retain_floor)


def _resume(context: typer.Context, folder: Path, shard: bool | None) -> None:
    """DataError for any other option: the run goes on as it was started, on as many ranks as there are now."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    said = [name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]
    if also := sorted(name.replace("_", "-") for name in said if name not in ("resume", "shard")):
        what = f"--resume goes on with a run as it was started: it takes no {', '.join(also)}"
        raise DataError(what, "leave them out, or start a new run")

    from clipfreeze.train.runs import resume_run
    from clipfreeze.train.spec import read_spec

    _print(resume_run(folder, shard=shard), read_spec(folder).retain_floor)


def _print(result: Result, retain_floor: float | None) -> None:
    from clipfreeze.cli.frontier import print_frontier
    from clipfreeze.cli.results import result_table

    kept = f", kept are the weights of step {result.kept_step}" if result.kept_step != result.steps else ""
    print(
        f"\n{result.steps} steps in {result.seconds:.0f} s ({result.data_wait:.0%} waiting for data), "
        f"loss {result.loss:.3f}{kept}\n"
    )
    print(result_table(result.before, result.after))
    if result.broken:
        print(f"\n{len(result.broken)} broken pictures were left out: run.log names them")
    print(f"\nrun folder  {result.folder}\nnext        clipfreeze eval {result.folder}")
    if retain_floor is not None and result.folder is not None and result.interpolates:
        print()
        print_frontier(result.folder, {}, retain_floor, Format.table)


def _size(said: str) -> Any:
    """As the settings take it; they say what is wrong with anything else."""
    return int(said) if said.isdigit() else said
