"""Param groups: parameters that are treated alike in every stretch of the run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

from clipfreeze.plan.value import PhaseGroup, PlannedGroup, PlannedParameter
from clipfreeze.policy.schema import Schedule


class Treatment(NamedTuple):
    """How one parameter trains in one stretch; a schedule of None is the policy's."""

    lr: float
    weight_decay: float
    schedule: str | Schedule | None

    def __str__(self) -> str:
        schedule = f" {schedule_text(self.schedule)}" if self.schedule is not None else ""
        return f"lr={_digits(self.lr)} wd={_digits(self.weight_decay)}{schedule}"


Treatments = tuple[Treatment | None, ...]
"""Of one parameter in each stretch; None where it is frozen."""


def group_name(treatments: Treatments) -> str:
    """Tells all that makes the group: "lr=1e-05 wd=0.1"; "2-3: lr=1e-05 wd=0.1" where that is so in some phases."""
    texts = [str(treatment) for treatment in treatments if treatment is not None]
    if len(texts) == len(treatments) and len(set(texts)) == 1:
        return texts[0]
    runs = groupby(enumerate(treatments, start=1), key=lambda pair: str(pair[1]))
    return "; ".join(_in_phases([number for number, _ in run], text) for text, run in runs if text != "None")


def planned_groups(trainable: Sequence[PlannedParameter]) -> Iterator[PlannedGroup]:
    """The groups in the order of their first parameter."""
    members: dict[str, list[PlannedParameter]] = {}
    for parameter in trainable:
        assert parameter.group is not None
        members.setdefault(parameter.group, []).append(parameter)
    for name, group in members.items():
        first = group[0]
        assert first.lr is not None
        assert first.weight_decay is not None
        yield PlannedGroup(
            name=name,
            lr=first.lr,
            weight_decay=first.weight_decay,
            schedule=first.schedule,
            tensors=len(group),
            parameters=sum(parameter.size for parameter in group),
        )


def phase_groups(treatments: dict[str, Treatments], stretch: int) -> Iterator[PhaseGroup]:
    """The groups that train in a stretch, by its index; `treatments` are those of each group."""
    for name, of_group in treatments.items():
        if (treatment := of_group[stretch]) is not None:
            yield PhaseGroup(name=name, **treatment._asdict())


def schedule_text(schedule: str | Schedule) -> str:
    """In one line: "StepLR step_size=100 warmup=5%"."""
    if isinstance(schedule, str):
        return schedule
    said = schedule.model_dump(exclude_defaults=True, exclude={"name"})
    return " ".join((schedule.name, *(f"{name}={value}" for name, value in said.items())))


def _in_phases(numbers: list[int], text: str) -> str:
    return f"{numbers[0]}: {text}" if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}: {text}"


def _digits(number: float) -> str:
    """Short where it is exact, so that no two groups share a name."""
    return short if float(short := f"{number:g}") == number else repr(number)
