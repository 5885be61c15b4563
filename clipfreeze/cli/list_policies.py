"""`clipfreeze list`"""

from __future__ import annotations

from clipfreeze.cli.common import Format, FormatOption, print_json


def run(format: FormatOption = Format.table) -> None:  # noqa: A002 - the option's name
    """List the built-in policies."""
    from clipfreeze.policy.loading import builtin_policies, load_policy

    policies = [load_policy(name) for name in builtin_policies()]
    if format is Format.json:
        print_json([{"name": p.name, "summary": p.summary, "params": dict(p.params)} for p in policies])
        return
    from tabulate import tabulate  # which every other verb would wait for

    rows = [(p.name, p.summary, ", ".join(p.params)) for p in policies]
    print(tabulate(rows, headers=("policy", "what it does", "knobs"), maxcolwidths=(None, 60, 60)))
    print("\n`clipfreeze show POLICY` prints one; `clipfreeze apply POLICY --dry-run` previews it on a model.")
