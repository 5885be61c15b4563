"""The benchmarks measure what they say: peers compute the same loss, rows tell it, the README's block is whole."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from benchmarks.__main__ import with_row
from benchmarks.cells import STRATEGIES, Cell, Side
from benchmarks.floor import flop_counter
from benchmarks.ours import ours
from benchmarks.peers import peer
from benchmarks.table import BEGIN, END, compare, losses_apart, table, with_block
from clipfreeze.errors import RunError

TINY = {"model": "tiny", "batch_size": 4, "threads": 1}


def at_once():
    """Nobody to wait for."""


ONE_OF_EACH_PEER = {how.peer: strategy for strategy, how in STRATEGIES.items()}


@pytest.mark.parametrize("strategy", ONE_OF_EACH_PEER.values())
def test_the_peer_of_a_strategy_trains_as_we_do(strategy):
    if strategy == "lora":
        pytest.importorskip("peft")
    cell = Cell(**TINY, strategy=strategy, batches=2, epochs=2)
    first, second = ours(cell, at_once), peer(cell, at_once)
    row = compare(cell, first, second, rate=1e12, tolerance=1e-5)
    assert row["losses_apart"] < abs(first.losses[0] - 1.4)  # which features that say nothing come to
    assert first.trains == second.trains or strategy == "lora"  # PEFT's A is of q, k and v together


def test_a_row_has_steps_runs_memory_and_floor():
    cell = Cell(**TINY, strategy="projections", batches=2, epochs=2)
    turns = []
    first, second = ours(cell, lambda: turns.append("ours")), peer(cell, lambda: turns.append("peer"))
    assert turns == ["ours"] * 3 + ["peer"] * 2  # one more, in which operations are counted
    assert [len(epoch) for epoch in first.seconds] == [len(epoch) for epoch in second.seconds] == [2, 2]
    row = compare(cell, first, second, rate=1e12, tolerance=1e-5)
    assert row["floor_s"] > 0
    assert row["peak_mb"]["peer"] >= row["imported_mb"]["peer"] > 0
    assert table([row]).count("\n") == 2
    assert table(json.loads(json.dumps([row]))) == table([row])


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_backward_of_a_convolution_is_counted_as_two_forwards(groups):
    convolution = nn.Conv2d(8, 16, 3, groups=groups)
    x = torch.randn(2, 8, 9, 9, requires_grad=True)
    with flop_counter() as forward:
        out = convolution(x)
    with flop_counter() as backward:
        out.sum().backward()
    assert forward.get_total_flops() == 2 * 2 * 16 * 7 * 7 * (8 // groups) * 9
    assert backward.get_total_flops() == 2 * forward.get_total_flops()
    out = convolution(x.detach())
    with flop_counter() as of_weight:
        out.sum().backward()
    assert of_weight.get_total_flops() == forward.get_total_flops()


def test_a_run_is_what_was_measured_and_steady_steps_for_the_rest():
    side = Side([[5.0, 3.0], [1.0, 2.0], [2.0, 9.0]], [0.0], 1, 1.0, 1.0)
    assert side.step == 2
    assert [side.run(n) for n in (1, 3, 4)] == [8, 22, 26]
    assert Side([[5.0]], [0.0], 1, 1.0, 1.0).run(1) == 5


def test_losses_that_differ_make_no_row():
    assert losses_apart([1.0, 2.0], [1.0, 2.00005], 1e-4) == pytest.approx(5e-5)
    for other in (2.001, float("nan")):
        with pytest.raises(RunError, match="the loss of step 2"):
            losses_apart([1.0, 2.0], [1.0, other], 1e-4)


def test_a_row_takes_the_place_of_its_strategy_among_those_of_the_same_machine():
    here, there = {"cpu": "this"}, {"cpu": "that"}
    kept = with_row(None, here, {"strategy": "full", "commit": "a"})
    kept = with_row(kept, here, {"strategy": "logit_scale", "commit": "b"})
    kept = with_row(kept, here, {"strategy": "full", "commit": "c"})
    assert [(row["strategy"], row["commit"]) for row in kept["rows"]] == [("logit_scale", "b"), ("full", "c")]
    assert len(with_row(kept, there, {"strategy": "lora", "commit": "d"})["rows"]) == 1


PROSE = st.text(st.characters(exclude_characters="<"), max_size=20)


@given(before=PROSE, old=PROSE, after=PROSE, new=PROSE)
def test_the_block_of_a_page_is_replaced_and_nothing_else(before, old, after, new):
    written = with_block(f"{before}{BEGIN}{old}{END}{after}", new)
    assert written == f"{before}{BEGIN}\n{new.strip()}\n{END}{after}"
    assert with_block(written, new) == written


def test_a_page_without_marks_is_an_error():
    with pytest.raises(RunError, match="has no"):
        with_block(f"{END} {BEGIN}", "table")
