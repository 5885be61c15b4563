"""Signals that end a run early: it finishes its step, saves, and says how to go on."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

_NAMES = ("SIGINT", "SIGTERM", "SIGUSR1")
"""Ctrl-C; what SLURM and most others send before they kill; what SLURM sends when asked (`--signal=USR1@120`)."""


class Stopping:
    """While entered, the first signal is kept in `asked`; a second Ctrl-C interrupts at once.

    Not within a second: a launcher passes on to its processes the Ctrl-C that the terminal has sent them already.
    """

    def __init__(self) -> None:
        self.asked: str | None = None
        self._since = 0.0
        self._former: dict[int, Any] = {}

    def __enter__(self) -> Stopping:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers there alone
            for number in (getattr(signal, name) for name in _NAMES if hasattr(signal, name)):
                self._former[number] = signal.signal(number, self._keep)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, former in self._former.items():
            signal.signal(number, former)

    def _keep(self, number: int, frame: FrameType | None) -> None:
        if self.asked is None:
            self.asked, self._since = signal.Signals(number).name, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._since > 1:
            raise KeyboardInterrupt
