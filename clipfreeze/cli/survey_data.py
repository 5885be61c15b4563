"""`clipfreeze data PATH`"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clipfreeze.cli.common import PREVIEW_MODEL, Format, FormatOption, ModelOption, print_json

if TYPE_CHECKING:
    from clipfreeze.train.survey import Survey

_MOST_SHOWN = 20


def run(
    data: Annotated[
        str, typer.Argument(metavar="PATH", help="a table, a folder, shards ({00000..00099}.tar) or hf:NAME")
    ],
    model: ModelOption = PREVIEW_MODEL,
    batch_size: Annotated[int, typer.Option(min=2, help="pairs in a step")] = 64,
    contact_sheet: Annotated[
        Path | None, typer.Option(metavar="FILE.jpg", help="write pictures with their captions there")
    ] = None,
    workers: Annotated[int, typer.Option(min=0, help="processes that decode pictures")] = 0,
    image_column: Annotated[str | None, typer.Option(help="the table's column of image paths")] = None,
    caption_column: Annotated[str | None, typer.Option(help="the table's column of captions")] = None,
    image_root: Annotated[str | None, typer.Option(help="folder that relative image paths start at")] = None,
    separator: Annotated[
        str | None, typer.Option(help="of the table: comma, tab, semicolon, pipe or a character")
    ] = None,
    encoding: Annotated[str, typer.Option(help="of the table")] = "utf-8",
    format: FormatOption = Format.table,  # noqa: A002 - the option's name
) -> None:
    """Look a data set over before training: counts, sizes, equal captions, captions too long, broken pictures."""
    from clipfreeze.models import tokenizer_of
    from clipfreeze.train.columns import TableFormat
    from clipfreeze.train.contact_sheet import check_format, write_contact_sheet
    from clipfreeze.train.sources import read_data
    from clipfreeze.train.survey import look_over

    if contact_sheet is not None:
        check_format(contact_sheet)
    tokenizer = tokenizer_of(model)
    layout = TableFormat(
        image_column=image_column,
        caption_column=caption_column,
        separator=separator,
        encoding=encoding,
        image_root=image_root,
    )
    pairs = read_data(data, layout)
    survey = look_over(pairs, tokenizer, batch_size=batch_size, num_workers=workers)
    if contact_sheet is not None:
        write_contact_sheet(pairs, contact_sheet)
    if format is Format.json:
        print_json(asdict(survey))
        return
    print("\n".join(_lines(survey)))
    if contact_sheet is not None:
        print(f"look at     {contact_sheet}")


def _lines(survey: Survey) -> Iterator[str]:
    kind = f", {survey.classes} classes" if survey.classes else ""
    yield f"{survey.name}: {survey.pictures:,} pictures, {survey.captions:,} different captions{kind}\n"
    if survey.parts:
        yield "parts       " + ", ".join(f"{name} {count:,}" for name, count in survey.parts.items())
    (least_wide, wide, most_wide), (least_high, high, most_high) = survey.width, survey.height
    yield f"width       {least_wide} to {most_wide} pixels, median {wide}"
    yield f"height      {least_high} to {most_high} pixels, median {high}"
    yield f"equal       {survey.duplicate_pictures:,} pictures are equal to an earlier one"
    often = ", ".join(f"{caption!r} {count:,}" for caption, count in survey.most_common)
    yield f"            {survey.duplicate_captions:,} share a caption" + (f", most often {often}" if often else "")
    yield (
        f"batch       of {survey.batch_size}: {survey.false_negatives:.3g} pairs with equal captions are expected, "
        "which our loss takes for right answers"
    )
    texts = survey.texts
    yield f"tokens      the longest caption has {texts.longest}, the model reads {texts.context}; {texts.cut:,} are cut"
    yield from _listed("cut", texts.examples, texts.cut)
    yield f"broken      {len(survey.broken):,} pictures"
    yield from _listed("broken", survey.broken, len(survey.broken))
    yield f"left out    {survey.ignored:,} files or rows that make no pair"
    yield from _listed("left out", survey.ignored_names, survey.ignored)


def _listed(kind: str, names: Sequence[str], count: int) -> Iterator[str]:
    yield from (f"  {name}" for name in names[:_MOST_SHOWN])
    if names and count > len(names[:_MOST_SHOWN]):
        yield f"  and {count - len(names[:_MOST_SHOWN]):,} more {kind}"
