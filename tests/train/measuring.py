"""A process among others that measure together: python measuring.py RANK WORLD STORE writes what it found beside STORE.

STORE is a file through which the processes find each other.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import distributed

from clipfreeze.errors import DataError
from clipfreeze.train.batches import Tokenizer
from clipfreeze.train.evaluate import Encoder, measure
from clipfreeze.train.pairs import PairSet
from clipfreeze.train.together import Shard, this_shard

from hand import Words, colour_pairs, transform

VISION = {"layers": 2, "width": 32, "head_width": 16, "patch_size": 16, "image_size": 32}
TEXT = {"context_length": 16, "vocab_size": 64, "width": 32, "heads": 2, "layers": 2}


def first(count: int, labelled: bool) -> PairSet:
    pairs = colour_pairs(2, labelled)
    return replace(pairs, pairs=pairs.pairs[:count], templates=("{}", "a {} thing"))


def found(shard: Shard, batch_size: int) -> dict[str, Any]:
    """Metrics of sets of odd sizes, of one whose last process sees nothing but broken pictures, and of none at all."""
    torch.manual_seed(0)
    model = open_clip.CLIP(16, VISION, TEXT)
    encoder = Encoder(model, Tokenizer(Words(), model), transform(), batch_size, shard=shard)
    said: dict[str, Any] = {}
    for labelled in (True, False):
        for count in (1, 5, 9):
            said[f"{count} {labelled}"] = asdict(measure(encoder, first(count, labelled)))
        whole = first(5, labelled)
        bad = [replace(pair, image=b"no picture") for pair in whole]
        broken = replace(whole, pairs=(*whole.pairs[:2], *bad[2:4], whole.pairs[4]))
        said[f"broken {labelled}"] = asdict(measure(encoder, broken))
    try:
        measure(encoder, replace(whole, pairs=tuple(bad)))
    except DataError as error:
        said["all broken"] = [[problem.what, problem.fix] for problem in error.problems]
    return said


if __name__ == "__main__":
    rank, world, store = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    distributed.init_process_group(
        "gloo", f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    assert this_shard() == Shard(rank, world)
    for size in (2, 8):
        store.with_name(f"{size}-{rank}.json").write_text(json.dumps(found(this_shard(), size)))
    distributed.destroy_process_group()
