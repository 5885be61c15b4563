"""`clipfreeze check POLICY...`"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from clipfreeze.cli.common import Format, FormatOption, SetOption, anatomy_of, knob_settings, plan_for, print_json
from clipfreeze.errors import ClipfreezeError, PolicyError, Problem

if TYPE_CHECKING:
    from clipfreeze.policy.loading import Policy


def run(
    policies: Annotated[list[str], typer.Argument(metavar="POLICY...", help="built-in names or policy files")],
    model: Annotated[
        str | None, typer.Option("--model", "-m", metavar="MODEL", help="also resolve on this model")
    ] = None,
    settings: SetOption = [],  # noqa: B006 - typer reads it, nobody writes it
    format: FormatOption = Format.table,  # noqa: A002 - the option's name
) -> None:
    """Check policies, all problems at once; with --model also against a model."""
    from clipfreeze.policy.loading import load_policy

    knobs = knob_settings(settings)
    anatomy = anatomy_of(model) if model else None
    problems: list[Problem] = []
    answers = []
    for policy in policies:
        try:
            if anatomy is None:
                warnings: tuple[str, ...] = ()
                _check_without_model(load_policy(policy, **knobs))
            else:
                warnings = plan_for(policy, anatomy, knobs).warnings
            answers.append({"policy": policy, "ok": True, "warnings": list(warnings)})
        except ClipfreezeError as error:
            problems.extend(error.problems)
            answers.append({"policy": policy, "ok": False, "problems": [str(problem) for problem in error.problems]})
    if format is Format.json:
        print_json(answers)
    else:
        for answer in answers:
            if answer["ok"]:
                print(f"{answer['policy']}: ok" + (f" on {anatomy.model}" if anatomy else ""))
                for warning in answer["warnings"]:  # type: ignore[attr-defined]
                    print(f"  warning: {warning}")
    if problems:
        raise PolicyError(problems)


def _check_without_model(policy: Policy) -> None:
    """What is wrong on any model. Optimizer and schedule are checked by building them, which takes torch: not where a
    built-in policy has the same.
    """
    from clipfreeze.plan.match import pattern_problems
    from clipfreeze.policy.loading import builtin_policies, load_policy
    from clipfreeze.policy.schema import SCHEDULES

    def sections(of: Policy) -> tuple[object, ...]:
        own = [
            rule.rule.schedule for rule in of.all_rules if rule.active and rule.rule.schedule not in (None, *SCHEDULES)
        ]
        return of.optimizer.name, of.optimizer.options, of.optimizer.warm_start, of.schedule, own

    problems = list(pattern_problems(policy))
    if sections(policy) not in map(sections, map(load_policy, builtin_policies())):
        from clipfreeze.optim.checks import check_optimizer

        problems.extend(check_optimizer(policy))
    if problems:
        raise PolicyError(problems)
