"""What others saved, as a plan for a model and the tensors of what it adds."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from clipfreeze.anatomy.partition import describe
from clipfreeze.foreign.clip_lora import read_clip_lora
from clipfreeze.foreign.factors import Factors
from clipfreeze.foreign.peft_folder import CONFIG, read_peft_folder
from clipfreeze.plan.build import resolve
from clipfreeze.plan.sites import LoraSite
from clipfreeze.plan.value import Plan
from clipfreeze.policy.actions import Lora
from clipfreeze.policy.loading import PlacedRule, Policy
from clipfreeze.policy.schema import Optimizer, Rule, Schedule

_LR = 1e-4
"""For those who train on: what LoRA on more than few shots takes."""


def is_foreign(path: Path) -> bool:
    """Is it a PEFT folder, or a file, and not a folder of ours?"""
    return path.is_file() or (path / CONFIG).is_file()


def read_foreign(path: Path, model: nn.Module) -> tuple[Plan, dict[str, Tensor]]:
    """The plan that adds the same LoRA to `model`, and the values of what it adds by their names in it, fp32.

    Raises ApplyError, with the file, for what is no LoRA of PEFT's or CLIP-LoRA's, or does not fit the model.
    """
    anatomy = describe(model)
    read = read_clip_lora if path.is_file() else read_peft_folder
    found = {(factors.parameter, factors.slot): factors for factors in read(path, anatomy)}
    plan = resolve(_policy(path, list(found.values())), anatomy)
    slots = {parameter.name: parameter.slots for parameter in anatomy.parameters}
    tensors: dict[str, Tensor] = {}
    for site in plan.sites:
        assert isinstance(site, LoraSite)
        slot = None
        if site.rows:
            start, stop = site.rows
            slot = slots[site.parameter][start // (stop - start)]
        factors = found[site.parameter, slot]
        tensors |= {f"{site.path}.A": factors.A, f"{site.path}.B": factors.B}
        if factors.magnitude is not None:
            tensors[f"{site.path}.magnitude"] = factors.magnitude.contiguous()
    return plan, tensors


def _policy(path: Path, found: list[Factors]) -> Policy:
    """A rule for all that is alike."""
    slots: dict[tuple[str, Lora], list[str]] = {}
    for factors in found:
        slots.setdefault((factors.parameter, factors.spec), []).extend([factors.slot] if factors.slot else [])
    names: dict[tuple[Lora, tuple[str, ...]], list[str]] = {}
    for (parameter, spec), own in slots.items():
        names.setdefault((spec, tuple(own)), []).append(parameter)
    rules = (
        Rule(match=tuple(matched), lora=spec.model_copy(update={"targets": targets or None}))
        for (spec, targets), matched in names.items()
    )
    source = f"{path}:1"
    return Policy(
        name=path.stem,
        summary="",
        default="freeze",
        default_source=source,
        knobs={},
        params={},
        rules=tuple(PlacedRule(rule, path, str(path), 1, True) for rule in rules),
        optimizer=Optimizer(lr=_LR),
        optimizer_source=source,
        schedule=Schedule(),
        schedule_source=source,
        sources=(str(path),),
    )
