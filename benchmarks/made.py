"""Models with random weights, pictures that compress as photographs do, and captions of 5 to 20 English words."""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import open_clip
import torch
from open_clip.transform import image_transform
from PIL import Image
from torch import Tensor

from clipfreeze.train.pairs import Pair, PairSet

MODELS = ("ViT-B-32", "RN50", "convnext_tiny", "ViT-B-16-SigLIP", "tiny")
"""open_clip's configs, but for "tiny", which tries a benchmark out in seconds."""

_TINY: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"layers": 3, "width": 64, "head_width": 32, "patch_size": 16, "image_size": 32},
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 3},
}

_WORDS = """
a the an two three several small large old young red blue green yellow white black brown wooden golden striped
photo picture drawing view man woman child people dog cat horse bird boat train car bicycle bridge street
market house garden kitchen table chair window door mountain river lake ocean beach forest field snow rain
cloud sunset flower tree bread apple orange coffee bottle cup plate book newspaper guitar piano umbrella
jacket hat shoes standing sitting running jumping walking sleeping holding carrying watching riding playing
eating painting waiting in on under over behind beside near with without between during after before while and
or of at from into across bright dark quiet crowded empty broken shiny wet dusty narrow wide distant colourful
photographed restaurant elephant skateboard refrigerator traffic lighthouse photographer playground vegetables
reflection
"""

CLASSES = (
    *("golden retriever", "tabby cat", "snow leopard", "barn owl", "hammerhead shark", "monarch butterfly"),
    *("acoustic guitar", "grand piano", "coffee mug", "mountain bike", "fire engine", "sailing boat"),
    *("suspension bridge", "lighthouse", "hot air balloon", "strawberry", "mushroom", "wall clock"),
    *("running shoe", "umbrella"),
)


def build(name: str) -> Any:
    """A model of MODELS on the CPU, the same random weights each time, giving its outputs by name.

    Drop-path is off, which would throw other dice on each side. The SigLIP config gets CLIP's vocabulary in place of
    one that has to be downloaded.
    """
    config = dict(_TINY if name == "tiny" else open_clip.get_model_config(name))
    config["vision_cfg"] = {k: v for k, v in config["vision_cfg"].items() if k != "timm_drop_path"}
    config["text_cfg"] = {k: v for k, v in config["text_cfg"].items() if not k.startswith(("hf_", "tokenizer_"))}
    config["text_cfg"]["vocab_size"] = 49408
    kind = open_clip.CustomTextCLIP if config.pop("custom_text", False) else open_clip.CLIP
    torch.manual_seed(0)
    return kind(**config, output_dict=True)


def tokenizer(model: Any) -> Callable[..., Tensor]:
    """CLIP's, at the model's context length."""
    return _tokenizer(model.context_length)


@cache
def _tokenizer(context: int) -> Callable[..., Tensor]:
    made: Callable[..., Tensor] = open_clip.SimpleTokenizer(context_length=context)
    return made


def transform(model: Any) -> Callable[[Image.Image], Tensor]:
    """Resized and normalised, the same each time."""
    size: Any = model.visual.image_size
    made: Callable[[Image.Image], Tensor] = image_transform(size, is_train=False)
    return made


def captioned(count: int) -> PairSet:
    """Pictures with a caption each, all distinct."""
    return PairSet("made", tuple(_pair(n, caption) for n, caption in enumerate(captions(count))))


def classified(count: int) -> PairSet:
    """Pictures of CLASSES in turn."""
    pairs = tuple(_pair(n, CLASSES[n % len(CLASSES)], n % len(CLASSES)) for n in range(count))
    return PairSet("made", pairs, CLASSES)


def captions(count: int) -> list[str]:
    """Distinct, of 5 to 20 words, the same each time."""
    dice, words = random.Random(0), _WORDS.split()
    found: dict[str, None] = {}
    while len(found) < count:
        found[" ".join(dice.choices(words, k=dice.randint(5, 20)))] = None
    return list(found)


def jpeg(dice: np.random.Generator, width: int, height: int) -> bytes:
    """A picture of blots and grain."""
    blots = Image.fromarray(dice.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    grain = dice.normal(0, 8, (height, width, 3))
    pixels = np.asarray(blots.resize((width, height), Image.Resampling.BICUBIC)) + grain
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def _pair(number: int, caption: str, label: int | None = None) -> Pair:
    return Pair(jpeg(np.random.default_rng(number), 224, 224), (caption,), f"picture {number}", label)
