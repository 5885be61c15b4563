"""`clipfreeze selftest POLICY`"""

from __future__ import annotations

from typing import Annotated

import typer

from clipfreeze.cli.common import (
    ModelOption,
    PolicyArgument,
    PretrainedOption,
    SetOption,
    anatomy_of,
    knob_settings,
    plan_for,
)
from clipfreeze.errors import RunError


def run(
    policy: PolicyArgument = "full",
    model: ModelOption = "demo",
    pretrained: PretrainedOption = None,
    settings: SetOption = [],  # noqa: B006 - typer reads it, nobody writes it
    batch_size: Annotated[int, typer.Option(min=2, help="pairs")] = 8,
    micro_batch: Annotated[int, typer.Option(min=1, help="pairs in a chunk")] = 3,
) -> None:
    """Prove on a model that --micro-batch gives the gradients of the whole batch."""
    from clipfreeze.plan.tables import grid
    from clipfreeze.train.selftest import TOLERANCE, check_chunks

    plan = plan_for(policy, anatomy_of(model), knob_settings(settings))
    checks = check_chunks(plan, model, pretrained, batch_size, micro_batch)
    rows = ((check.part, check.tensors, f"{check.difference:.1e}", "" if check.holds else "NO") for check in checks)
    print(grid(rows, ("part", "tensors", "difference", "")))
    if wrong := [check.part for check in checks if not check.holds]:
        raise RunError(
            f"chunks of {micro_batch} do not give the gradients of a batch of {batch_size}: {', '.join(wrong)}"
        )
    print(
        f"\na batch of {batch_size} in chunks of {micro_batch} has its own gradients, to {TOLERANCE:g} of the largest"
    )
