"""What is legal and probably not meant: warnings on a plan."""

from __future__ import annotations

import re
from collections.abc import Iterator

from clipfreeze.anatomy.parts import TOWERS, Anatomy
from clipfreeze.plan.value import Plan

HIGHEST_TOWER_LR = 1e-4
"""Past this, Adam-like steps undo what a pretrained tower knows: 5e-5 already harms a ViT (arXiv 2212.00638)."""

PUBLISHED_FROM = 50_000_000
"""Published rates are for models from ViT-B/32's size up; a much smaller one takes larger steps."""

_LOOSE_NUMBER = re.compile(r"\.(\d+)\*")


def lint_warnings(plan: Plan, anatomy: Anatomy) -> Iterator[str]:
    """Warnings, each one line with its place where it has one."""
    yield from _loose_numbers(plan)
    yield from _high_rates(plan)
    yield from _unreached(plan)
    yield from _dear_embeddings(plan, anatomy)
    yield from _fixed(plan)
    yield from _without_lora(plan)


def _loose_numbers(plan: Plan) -> Iterator[str]:
    """`resblocks.1*` takes 1, 10 and 11."""
    for report in plan.rules:
        for pattern in report.match if report.active else ():
            for loose in _LOOSE_NUMBER.finditer(pattern):
                stem = re.compile(re.escape(pattern[: loose.start()]).replace(r"\*", ".*") + r"\.(\d+)\.")
                numbers = {found[1] for p in plan.parameters if (found := stem.match(p.name))}
                taken = sorted((n for n in numbers if n.startswith(loose[1])), key=int)
                if len(taken) > 1:
                    alone = pattern[: loose.end() - 1] + ".*"
                    yield (
                        f"{report.source}: {pattern!r} takes {', '.join(taken)}; {alone!r} would take {loose[1]} alone"
                    )


def _high_rates(plan: Plan) -> Iterator[str]:
    if plan.optimizer.name.lower() == "sgd" or plan.model.parameters < PUBLISHED_FROM:
        return
    rates: dict[str | None, float] = {}
    for group in plan.settings:
        rates[group.name] = max(group.lr, rates.get(group.name, 0.0))
    towers = [p for p in plan.trainable if p.role.endswith((".embed", ".blocks"))]
    if high := [p for p in towers if rates[p.group] > HIGHEST_TOWER_LR]:
        fastest = max(high, key=lambda p: rates[p.group])
        sources = [claim.source for claim in fastest.claims if claim.setting == "lr" and claim.wins]
        place = f"{sources[-1]}: " if sources else ""
        yield (
            f"{place}lr {rates[fastest.group]:g} on {fastest.name} is above what fine-tuned towers take "
            f"(1e-6 to {HIGHEST_TOWER_LR:g})"
        )


def _unreached(plan: Plan) -> Iterator[str]:
    decoder = sum(p.size for p in plan.trainable if p.role == "decoder")
    if decoder:
        yield f"the decoder trains ({decoder:,} parameters), and the contrastive loss does not reach it"


def _dear_embeddings(plan: Plan, anatomy: Anatomy) -> Iterator[str]:
    """A lone parameter before the blocks makes backward cross them all."""
    for tower in anatomy.towers:
        embed = [p for p in plan.trainable if p.role == f"{tower.name}.embed"]
        blocks = {p.block for p in plan.trainable if p.role == f"{tower.name}.blocks"}
        if embed and tower.blocks and 0 not in blocks:
            yield f"{embed[0].name} trains, so backward crosses all {len(tower.blocks)} {tower.name} blocks"


def _fixed(plan: Plan) -> Iterator[str]:
    for parameter in plan.parameters:
        asked = any(claim.setting == "train" and claim.value and claim.wins for claim in parameter.claims)
        if parameter.fixed and asked:
            yield f"{parameter.name} stays as it is: the model itself never trains it"


def _without_lora(plan: Plan) -> Iterator[str]:
    """Targets that one of the towers a rule matched does not have."""
    towers = {site.tower for site in plan.sites if site.kind == "lora"}
    for report in plan.rules:
        if "lora" not in report.says or not report.active or not report.matched:
            continue
        spec = report.says["lora"]
        assert isinstance(spec, dict)
        for tower in TOWERS:
            if tower not in towers and any(tower in pattern for pattern in report.match):
                targets = ", ".join(spec.get("targets") or ())
                yield f"{report.source}: the {tower} tower has no {targets} in its blocks: no LoRA there"
