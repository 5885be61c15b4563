"""Why a parameter is treated as it is."""

from __future__ import annotations

from clipfreeze.anatomy.parts import Anatomy
from clipfreeze.errors import PlanError, Problem
from clipfreeze.plan.additions import extended
from clipfreeze.plan.match import Matcher
from clipfreeze.plan.value import Plan, PlannedParameter
from clipfreeze.policy.patterns import PatternError


def explain_parameters(plan: Plan, anatomy: Anatomy, pattern: str) -> tuple[PlannedParameter, ...]:
    """The planned parameters that a name, glob or role takes; their claims tell who decided and who was outvoted.

    Raises PlanError, with the nearest right thing, when it takes none.
    """
    matcher = Matcher(extended(anatomy, plan.sites))
    try:
        taken = {index for index, _ in matcher.addresses(pattern)}
    except PatternError as error:
        raise PlanError(Problem(str(error), error.fix)) from None
    if not taken:
        raise PlanError(f"{pattern!r} matches nothing in {anatomy.model}", matcher.nearest_right(pattern))
    return tuple(plan.parameters[index] for index in sorted(taken))
