"""What L-BFGS asks of a plan: its steps need the loss of all data at once, which constant features alone make cheap."""

from __future__ import annotations

from collections.abc import Iterator

from clipfreeze.plan.value import Plan
from clipfreeze.policy.schema import Optimizer, Schedule


def is_closed_form(optimizer: Optimizer) -> bool:
    """Whether a step of it is a minimum found, not a move downhill."""
    return optimizer.name.lower() == "lbfgs"


def closed_form_problems(plan: Plan) -> Iterator[tuple[str, str]]:
    """What does not go with lbfgs, each with its fix; nothing for another optimizer."""
    if not is_closed_form(plan.optimizer):
        return
    if others := [p.name for p in plan.trainable if p.role not in ("logit_scale", "logit_bias")]:
        what = f"lbfgs needs the loss of all data at once, and {others[0]} trains, which changes the features"
        yield what, 'name = "adamw", or train @logit_scale and @logit_bias alone'
        return
    if plan.phases:
        yield "lbfgs finds the minimum in one step, and the policy has phases", "take the phases out"
    if len(plan.groups) > 1:
        fix = "the same lr, weight_decay and schedule for @logit_scale and @logit_bias"
        yield f"lbfgs takes one param group, and this plan has {len(plan.groups)}", fix
    if any(group.weight_decay for group in plan.groups):
        yield "lbfgs has no weight decay, and the plan asks for it", "weight_decay = 0.0"
    if any(p.l2sp for p in plan.trainable):
        yield "lbfgs does not know the pull of l2sp", "take l2sp out"
    if any(not _is_constant(group.schedule, plan.schedule) for group in plan.groups):
        fix = '[schedule] name = "constant", warmup = 0, and a rule with lr = 1.0'
        yield "lbfgs finds the length of its steps itself, and the policy has a schedule", fix
    if plan.optimizer.warm_start_span.amount:
        yield "lbfgs has no moments that a warm start could fill", "warm_start = 0"


def _is_constant(own: str | Schedule | None, policy: Schedule) -> bool:
    if isinstance(own, Schedule):
        return own.name == "constant" and not own.warmup_span.amount
    return (own or policy.name) == "constant" and not policy.warmup_span.amount
