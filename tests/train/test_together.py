"""Several processes measure what one does: to the digit, each sample once, and none waits for a lost one (B74)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from measuring import found
from torch import distributed

from clipfreeze.train.together import Shard, this_shard

HERE = Path(__file__).parent


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize(("count", "size"), [(0, 2), (1, 4), (5, 2), (9, 2), (12, 4)])
def test_each_row_is_one_process_s_and_batches_stay_whole(world: int, count: int, size: int) -> None:
    shares = [Shard(rank, world).rows(count, size) for rank in range(world)]
    assert sorted(row for rows in shares for row in rows) == list(range(count))
    batches = [rows[start : start + size] for rows in shares for start in range(0, len(rows), size)]
    assert sorted(batches) == [list(range(count))[start : start + size] for start in range(0, count, size)]


def test_a_process_alone_has_all() -> None:
    assert not distributed.is_initialized()
    assert this_shard() == Shard()
    assert Shard().rows(5, 2) == [0, 1, 2, 3, 4]


def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    ways = [HERE, HERE.parent, HERE.parents[1], os.environ.get("PYTHONPATH", "")]
    settings = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, ways)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", str(HERE / "measuring.py")]
    started = [
        subprocess.Popen(
            [*command, str(rank), "2", str(tmp_path / "store")], env=settings, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], errors
    for size in (2, 8):
        alone = json.loads(json.dumps(found(Shard(), size)))
        assert len(alone) == 9
        assert alone["broken True"]["images"] == 3
        assert [json.loads((tmp_path / f"{size}-{rank}.json").read_text()) for rank in range(2)] == [alone, alone]
