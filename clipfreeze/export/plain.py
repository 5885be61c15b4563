"""The plain open_clip model that training leaves."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from clipfreeze.changes import Applied
from clipfreeze.errors import ExportError, Problem

_WAYS = {
    "adapter": "an adapter is no part of an open_clip model: keep the run folder, clipfreeze.load puts it on again",
    "prompt": "write the class features that the prompt gives: --to head",
    "head": "write the classifier: --to head",
}


def plain_model(applied: Applied) -> nn.Module:
    """Merge LoRA and take the policy off; the model keeps what it learned and nothing else of us.

    Raises ExportError for what a plain model cannot hold.
    """
    if problems := list(added_problems(applied, "a plain model")):
        raise ExportError(problems)
    if applied.additions:
        applied.merge()
    applied.remove()
    return applied.model


def added_problems(applied: Applied, holder: str) -> Iterator[Problem]:
    """What the policy adds besides LoRA, kind by kind, which `holder` has no place for."""
    for kind in dict.fromkeys(site.kind for site, _ in applied.additions if site.kind != "lora"):
        yield Problem(f"{holder} cannot hold what this policy adds: {kind}", _WAYS[kind])
