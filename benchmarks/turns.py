"""Both sides of a cell in a process each, which take turns, an epoch at a time."""

from __future__ import annotations

import multiprocessing
import os
import statistics
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.cells import Cell, Gate, Side
from benchmarks.floor import product_rate
from clipfreeze.errors import RunError

_GO, _TURN = "go", "turn"


def in_turns(cell: Cell) -> tuple[Side, Side, float]:
    """Ours, the peer's, and the machine's FLOP/s, the median of what it was before each turn.

    RunError with the traceback of the side that failed.
    """
    rates = []
    with ExitStack() as ending:
        waiting = [_Started(side, cell, ending) for side in (_ours, _peer)]
        while any(side.result is None for side in waiting):
            rates.append(product_rate())
            for side in waiting:
                side.take_turn()
        first, second = (side.result for side in waiting)
        assert first is not None
        assert second is not None
        return first, second, statistics.median(rates)


class _Started:
    """A side in its process, waiting for its turn. It is built when this returns: the other may begin to build."""

    def __init__(self, side: Callable[[Cell, Gate], Side], cell: Cell, ending: ExitStack) -> None:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # threads that wait for their turn leave the cores to the other side
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(side, cell, theirs), daemon=True)
        self.process.start()
        theirs.close()  # so that the end of the process is the end of what can be read
        ending.callback(self.process.join)
        ending.callback(self.process.kill)
        self.name = side.__name__.strip("_")
        self.result: Side | None = None
        self._listen()

    def take_turn(self) -> None:
        """An epoch, if there is one left."""
        if self.result is None:
            self.connection.send(_GO)
            self._listen()

    def _listen(self) -> None:
        try:
            said: Any = self.connection.recv()
        except EOFError:
            raise RunError(f"the process of {self.name} ended") from None
        if isinstance(said, Side):
            self.result = said
            self.process.join()
        elif said != _TURN:
            raise RunError(f"{self.name} failed:\n{said}")


def _serve(side: Callable[[Cell, Gate], Side], cell: Cell, connection: Connection[Any, Any]) -> None:
    def gate() -> None:
        connection.send(_TURN)
        connection.recv()

    try:
        connection.send(side(cell, gate))
    except Exception:  # the parent tells it
        connection.send(traceback.format_exc())


def _ours(cell: Cell, gate: Gate) -> Side:
    from benchmarks.ours import ours  # each process has imported its own side alone when its memory is looked at

    return ours(cell, gate)


def _peer(cell: Cell, gate: Gate) -> Side:
    from benchmarks.peers import peer

    return peer(cell, gate)
