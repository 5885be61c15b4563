"""What the tests of this folder share: pictures, a tokenizer for the tiny models, and an applied plan made by hand."""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from open_clip.transform import image_transform
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from clipfreeze.policy.schema import Anchor, Optimizer, Schedule
from clipfreeze.train.pairs import Pair, PairSet

import tiny
from tiny import CONTEXT, VOCABULARY

COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "black", "gray")


def coloured(colour: str, size: tuple[int, int] = (32, 32), form: str = "PNG") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, colour).save(out, form)
    return out.getvalue()


def colour_pairs(copies: int = 1, labelled: bool = False) -> PairSet:
    """One picture a colour and copy, each a little different; the colour is caption or class."""
    pairs = [
        Pair(
            coloured(colour, (32 + copy, 32)),
            (colour if labelled else f"{colour} {copy}",),
            f"{colour} {copy}",
            COLOURS.index(colour) if labelled else None,
        )
        for copy in range(copies)
        for colour in COLOURS
    ]
    return PairSet("colours", tuple(pairs), COLOURS if labelled else ())


def save_tiny(folder: Path) -> str:
    """A model with the vocabulary of open_clip's own tokenizer, as `--model` takes it."""
    config = {"embed_dim": 16, "vision_cfg": tiny.VISION, "text_cfg": {**tiny.TEXT, "vocab_size": 49408}}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    torch.manual_seed(0)
    model = tiny.clip_vit(text={"vocab_size": 49408})
    save_file(dict(model.state_dict()), folder / "open_clip_model.safetensors")
    return f"local-dir:{folder}"


def transform(size: int = 32, train: bool = False) -> Callable[..., Tensor]:
    made: Callable[..., Tensor] = image_transform(size, train)
    return made


@dataclass(frozen=True)
class Words:
    """Start, one id a word, end, padding."""

    context_length: int = CONTEXT
    vocabulary: int = VOCABULARY

    def __call__(self, texts: list[str]) -> Tensor:
        ids = torch.zeros(len(texts), self.context_length, dtype=torch.long)
        for row, text in enumerate(texts):
            words = text.split()[: self.context_length - 2]
            ids[row, 0] = self.vocabulary - 2
            for place, word in enumerate(words, 1):
                ids[row, place] = 1 + zlib.crc32(word.encode()) % (self.vocabulary - 3)
            ids[row, len(words) + 1] = self.vocabulary - 1
        return ids


@dataclass
class ByHand:
    """What `clipfreeze.apply` returns, in little: the named parameters train, all at one lr."""

    model: nn.Module
    names: tuple[str, ...] = ()  # all if empty
    lr: float = 1e-3
    warmup: int | str = 0
    plan: Any = field(init=False)
    additions: tuple[Any, ...] = ()
    phase: None = None

    sites: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        names = [name for name, _ in self.model.named_parameters()]
        self.plan = SimpleNamespace(
            schedule=Schedule(name="constant", warmup=self.warmup),
            optimizer=Optimizer(),
            anchor=Anchor(),
            phases=(),
            sites=(),
            parameters=[SimpleNamespace(name=name, dropout=None) for name in names],
            trains_in=lambda phase: frozenset(self.names or names),
        )
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(not self.names or name in self.names)

    def disabled(self) -> Any:
        return nullcontext()

    def trainable(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def training(self) -> dict[str, nn.Parameter]:
        return self.trainable()

    def optimizer_state(self, optimizer: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {}, {}

    def optimizer(self) -> torch.optim.Optimizer:
        group = {"params": list(self.trainable().values()), "name": "all"}
        return torch.optim.AdamW([group], lr=self.lr, weight_decay=0.0, eps=1e-5)  # rounding is no gradient

    def scheduler(self, optimizer: Any, total_steps: int, steps_per_epoch: int | None = None) -> Any:
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / total_steps)

    def save(self, folder: Path) -> None:
        save_file(
            {name: p.detach().contiguous() for name, p in self.trainable().items()}, folder / "weights.safetensors"
        )
