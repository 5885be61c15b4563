"""Knobs put into a policy file: their values in its text, and which of its rules and phases they leave on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clipfreeze.errors import Problem
from clipfreeze.policy.document import Document
from clipfreeze.policy.knobs import KnobError, KnobValue, is_on, references, substitute
from clipfreeze.policy.lines import Where
from clipfreeze.policy.schema import SETTINGS, Knob

Active = dict[tuple[Path, Where], bool]
"""Of the rules and phases of each file, whether they are on."""

_Table = dict[str, Any]


@dataclass
class Filling:
    """Fills one document. `unknown` are knobs with a fault of their own: what reads them is passed over.

    `faults` by key; None for what is passed over. `active` learns which rules and phases are on.
    """

    document: Document
    knobs: Mapping[str, Knob]
    values: Mapping[str, KnobValue]
    unknown: AbstractSet[str]
    active: Active
    faults: dict[Where, Problem | None] = field(default_factory=dict)

    def filled(self) -> dict[str, Any]:
        """The document's data with knobs put in and without its `params`."""
        data = {key: value for key, value in self.document.data.items() if key != "params"}
        data |= self._tables(data, ("rule",), lambda where, rule: self._rule(where, rule, True))
        data |= self._tables(data, ("phase",), self._phase)
        for section in ("optimizer", "schedule", "anchor"):
            if isinstance(data.get(section), dict):
                data[section] = {key: self._put_in((section, key), value) for key, value in data[section].items()}
        if "default" in data:
            data["default"] = self._put_in(("default",), data["default"])
        return data

    def _tables(self, within: _Table, where: Where, change: Callable[[Where, _Table], _Table]) -> _Table:
        """The list of tables at the end of `where`, each changed; empty where it is none, which is a fault."""
        key, path = str(where[-1]), ".".join(part for part in where if isinstance(part, str))
        found = within.get(key)
        if not isinstance(found, (list, dict)):
            return {}
        if isinstance(found, dict) or not all(isinstance(table, dict) for table in found):
            single = f"[{path}] is one table, {key}s are a list"
            what = single if isinstance(found, dict) else f"a {key} is a table"
            self.faults[where] = self.document.problem(where, what, f"write [[{path}]]")
            return {key: []}
        return {key: [change((*where, number), table) for number, table in enumerate(found)]}

    def _phase(self, where: Where, phase: _Table) -> _Table:
        on = self._switch(where, phase, True)
        made = {
            key: value if key in ("when", "rule") else self._put_in((*where, key), value)
            for key, value in phase.items()
            if on or key in ("when", "rule") or not references(value)
        }
        return made | self._tables(made, (*where, "rule"), lambda at, rule: self._rule(at, rule, on))

    def _rule(self, where: Where, rule: _Table, above: bool) -> _Table:
        """`above` is false in a phase that is off."""
        on = self._switch(where, rule, above)
        return {
            key: value if key == "when" else self._put_in((*where, key), value)
            for key, value in rule.items()
            if on or key not in SETTINGS or not references(value)  # off: its knobs need make no sense
        }

    def _switch(self, where: Where, table: _Table, above: bool) -> bool:
        condition = table.get("when")
        on = True
        if isinstance(condition, str) and not references(condition) & self.unknown:
            try:
                on = is_on(condition, self.knobs, self.values)
            except KnobError as error:
                at = (*where, "when")
                self.faults[at] = self.document.problem(at, str(error), error.fix)
        self.active[self.document.path, where] = on and above
        return on and above

    def _put_in(self, where: Where, value: Any) -> Any:
        if references(value) & self.unknown:
            self.faults[where] = None
            return value
        try:
            return substitute(value, self.values)
        except KnobError as error:
            self.faults[where] = self.document.problem(where, str(error), error.fix)
            return value
