"""`clipfreeze show POLICY`"""

from __future__ import annotations

from clipfreeze.cli.common import Format, FormatOption, PolicyArgument, print_json


def run(policy: PolicyArgument, format: FormatOption = Format.table) -> None:  # noqa: A002 - the option's name
    """Print a policy's file and its knobs."""
    from clipfreeze.plan.tables import grid
    from clipfreeze.policy.knobs import as_text
    from clipfreeze.policy.loading import load_policy, policy_text

    loaded = load_policy(policy)
    knobs = {
        name: {**knob.model_dump(exclude_none=True), "value": loaded.params[name]}
        for name, knob in loaded.knobs.items()
    }
    if format is Format.json:
        facts = {"name": loaded.name, "summary": loaded.summary, "sources": list(loaded.sources), "params": knobs}
        print_json(facts | {"text": policy_text(policy)})
        return
    print(policy_text(policy).rstrip())
    if knobs:
        rows = [(name, as_text(knob["default"]), _range(knob), knob.get("help", "")) for name, knob in knobs.items()]
        print("\n" + grid(rows, ("knob", "default", "takes", "what it does")))
        print(f"\nset one with --set {rows[0][0]}={rows[0][1]}")


def _range(knob: dict[str, object]) -> str:
    choices = ", ".join(str(choice) for choice in knob.get("choices", ()))  # type: ignore[attr-defined]
    low, high = knob.get("min"), knob.get("max")
    bounds = f"{low} to {high}" if low is not None and high is not None else f"from {low}" if low is not None else ""
    return " or ".join(part for part in (choices, bounds) if part)
