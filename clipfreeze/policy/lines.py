"""Where in a TOML text each key stands: tomli gives values without places."""

from __future__ import annotations

import re

Where = tuple[str | int, ...]
_BARE = re.compile(r"[A-Za-z0-9_-]+")
_STRINGS = ('"""', "'''", '"', "'")


def key_lines(text: str) -> dict[Where, int]:
    """Line, from 1, of every table header and key of a *valid* TOML text; () is line 1.

    Array tables count: ("rule", 0, "lr") is `lr` in the first `[[rule]]`. Keys inside inline tables are not listed:
    ask `line_of`, which falls back to the nearest key around.
    """
    return _Scanner(text).run()


def line_of(lines: dict[Where, int], path: Where) -> int:
    """The line of `path`, or of the nearest key around it."""
    while path not in lines:
        path = path[:-1]
    return lines[path]


class _Scanner:
    def __init__(self, text: str) -> None:
        self.text, self.at, self.line = text, 0, 1
        self.lines: dict[Where, int] = {(): 1}
        self.counts: dict[Where, int] = {}

    def run(self) -> dict[Where, int]:
        table: Where = ()
        while self._next_statement():
            line = self.line
            if self.text.startswith("[[", self.at):
                table = self._header(2)
                number = self.counts.get(table, 0)
                self.counts[table] = number + 1
                self._note(table, line)
                table = (*table, number)
            elif self.text.startswith("[", self.at):
                table = self._header(1)
            else:
                self._note((*table, *self._dotted_key("=")), line)
                self._skip_value()
                continue
            self._note(table, line)
        return self.lines

    def _note(self, path: Where, line: int) -> None:
        """Also for the tables that a dotted key makes on its way."""
        for depth in range(1, len(path) + 1):
            self.lines.setdefault(path[:depth], line)

    def _advance(self, to: int) -> None:
        self.line += self.text.count("\n", self.at, to)
        self.at = to

    def _next_statement(self) -> bool:
        while self.at < len(self.text):
            if self.text[self.at] == "#":
                end = self.text.find("\n", self.at)
                self._advance(len(self.text) if end < 0 else end)
            elif self.text[self.at].isspace():
                self._advance(self.at + 1)
            else:
                return True
        return False

    def _header(self, brackets: int) -> Where:
        self._advance(self.at + brackets)
        path: Where = ()
        for part in self._dotted_key("]"):
            if path in self.counts:  # a table below the last element of an array of tables
                path = (*path, self.counts[path] - 1)
            path = (*path, part)
        self._advance(self.at + brackets - 1)
        return path

    def _dotted_key(self, end: str) -> list[str]:
        """Reads a key up to and past `end`."""
        parts = []
        while self.text[self.at] != end:
            quote = self.text[self.at]
            if quote in "\"'":
                close = self._string_end(quote)
                parts.append(self.text[self.at + 1 : close - 1])
                self._advance(close)
            elif word := _BARE.match(self.text, self.at):
                parts.append(word[0])
                self._advance(word.end())
            else:
                self._advance(self.at + 1)
        self._advance(self.at + 1)
        return parts

    def _string_end(self, quote: str) -> int:
        """Index past the string that opens at the cursor."""
        at = self.at + len(quote)
        while not self.text.startswith(quote, at):
            at += 2 if self.text[at] == "\\" and quote[0] == '"' else 1
        at += len(quote)
        while len(quote) == 3 and self.text.startswith(quote[0], at):  # a quote may touch the closing three
            at += 1
        return at

    def _skip_value(self) -> None:
        depth = 0
        while self.at < len(self.text):
            char = self.text[self.at]
            quote = next((mark for mark in _STRINGS if self.text.startswith(mark, self.at)), None)
            if quote:
                self._advance(self._string_end(quote))
                continue
            if char == "#":
                end = self.text.find("\n", self.at)
                self._advance(len(self.text) if end < 0 else end)
                continue
            if char in "[{":
                depth += 1
            elif char in "]}":
                depth -= 1
            elif char == "\n" and depth == 0:
                return
            self._advance(self.at + 1)
