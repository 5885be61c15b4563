"""`clipfreeze schema`"""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import typer

from clipfreeze.cli.common import print_json


class Subject(str, Enum):
    """What to print the schema of."""

    policy = "policy"
    plan = "plan"


def run(subject: Annotated[Subject, typer.Argument(help="of what")] = Subject.policy) -> None:
    """Print the JSON schema of policy files (for editors), or of plans."""
    if subject is Subject.policy:
        from clipfreeze.policy.schema import policy_schema

        print_json(policy_schema())
        return
    from clipfreeze.plan.value import Plan

    print_json(Plan.model_json_schema())
