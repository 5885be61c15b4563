"""Loading: pictures decoded a second by the number of workers, and how long a tiny model waits for them.

python -m benchmarks.loading [--pictures 2000] [--size 320x240]

JPEGs of noise and shapes, decoded, cropped to 224 pixels and normalised as open_clip does it for training. The model is
small on purpose: what it waits for is all that a larger one would never notice.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import open_clip
import torch
from open_clip.transform import image_transform

import clipfreeze
from benchmarks.made import jpeg
from clipfreeze.train.batches import Tokenizer, TrainingLoader
from clipfreeze.train.loop import fit
from clipfreeze.train.pairs import Pair, PairSet

BATCH = 64
VISION = {"layers": 2, "width": 64, "head_width": 32, "patch_size": 32, "image_size": 224}
TEXT = {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2}


def made_pictures(folder: Path, count: int, size: tuple[int, int]) -> PairSet:
    """JPEGs that compress about as photographs do."""
    dice = np.random.default_rng(0)
    pairs = []
    for number in range(count):
        path = folder / f"{number}.jpg"
        path.write_bytes(jpeg(dice, *size))
        pairs.append(Pair(path, (f"picture number {number} of some thing",), str(path)))
    return PairSet("made", tuple(pairs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=2000)
    parser.add_argument("--size", default="320x240")
    options = parser.parse_args()
    width, height = map(int, options.size.split("x"))
    train = image_transform(224, is_train=True)
    with tempfile.TemporaryDirectory() as folder:
        pairs = made_pictures(Path(folder), options.pictures, (width, height))
        for workers in (0, 1, 2):
            torch.manual_seed(0)
            model = open_clip.CLIP(32, VISION, TEXT)
            words = open_clip.SimpleTokenizer(context_length=16)
            loader = TrainingLoader(
                pairs, train, Tokenizer(words, model), batch_size=BATCH, seed=0, num_workers=workers
            )
            started = time.perf_counter()
            count = sum(len(loaded.batch["image"]) for loaded in loader.batches(0))
            decoded = count / (time.perf_counter() - started)
            applied = clipfreeze.apply(clipfreeze.resolve(clipfreeze.load_policy("full"), model), model)
            result = fit(
                applied, pairs, tokenizer=words, transform=train, batch_size=BATCH, epochs=1, num_workers=workers
            )
            print(
                json.dumps(
                    {
                        "workers": workers,
                        "cpus": os.cpu_count(),
                        "decoded_per_s": round(decoded, 1),
                        "trained_per_s": round(count / result.seconds, 1),
                        "share_waiting": round(result.data_wait, 3),
                    }
                ),
                flush=True,
            )


if __name__ == "__main__":
    main()
