"""Prompts of all classes, tokenized once: a template for each step."""

from __future__ import annotations

import random

from torch import Tensor

from clipfreeze.train.batches import Tokenizer
from clipfreeze.train.stream import TrainingData


class ClassTexts:
    """The class names of a data set in its templates."""

    def __init__(self, tokenizer: Tokenizer, data: TrainingData, seed: int) -> None:
        self.ids = [tokenizer([template.format(name) for name in data.class_names]) for template in data.templates]
        self.seed = seed

    def at(self, step: int) -> Tensor:
        """(classes, L) ids, in a template that seed and step give."""
        return random.Random(f"{self.seed}/{step}").choice(self.ids)
