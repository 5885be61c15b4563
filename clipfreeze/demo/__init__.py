"""The embedded default: emoji pictures in several styles, and a tiny CLIP model that has seen some of them.

A task without a download: the model was pretrained on the train split of PRETRAIN_STYLES; tune it on the train split
of TARGET_STYLE, test on the test split of that style, and read off the test split of a pretraining style what was
forgotten. A style's split holds whole families of concepts out of that style alone: a test picture shows what the model
knows by name from other styles, in a drawing it has never seen. `scripts/build_demo_pictures.py` and
`scripts/train_demo_model.py` rebuild it all; each style's licence lies beside its pictures.
"""

from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path

STYLES = ("noto", "twemoji", "fluent", "openmoji", "openmoji_black")
PRETRAIN_STYLES = ("noto", "twemoji", "fluent")
TARGET_STYLE = "openmoji"
CLOSED_STYLE = "openmoji_black"
"""TARGET_STYLE's drawings as outlines, with the same splits: what a head trained on that style can be tested on, since
no split of one style shows another's concepts."""
SPLITS = ("train", "val", "test")
TEMPLATES = ("{}", "an emoji of {}.", "a picture of {}.", "a drawing of {}.", "an icon of {}.")
"""The prompts of pretraining; a class's zero-shot feature is the mean over them."""
EPOCHS = 10
BATCH_SIZE = 128
KNOBS: dict[str, dict[str, float | str]] = {
    "full": {"lr": 1e-4, "lr_projections": 1e-3, "lr_logit_scale": 1e-2},
    "lp_ft": {"lr": 1e-4, "lr_projections": 1e-3, "lr_logit_scale": 1e-2},
    "gradual": {"lr": 1e-4, "lr_projections": 1e-3, "lr_logit_scale": 1e-2},
    "text_only": {"lr": 3e-4, "lr_projections": 1e-3, "lr_logit_scale": 1e-2},
    "vision_only": {"lr": 1e-4, "lr_projections": 1e-3, "lr_logit_scale": 1e-2},
    "projections": {"lr": 3e-3, "lr_logit_scale": 1e-2},
    "last_n": {"lr": 3e-4, "lr_projections": 1e-3, "lr_logit_scale": 1e-2},
    "first_n": {"lr": 1e-4, "lr_logit_scale": 1e-2},
    "differential": {"lr": 1e-4, "lr_text": 1e-5, "lr_projections": 1e-3, "lr_logit_scale": 1e-2},
    "norm_bias": {"lr": 2e-2},
    "logit_scale": {"lr": 3e-2},
    "lora": {"targets": "q,k,v,out,fc1,fc2", "rank": 4, "alpha": 4.0, "dropout": 0.0, "lr": 3e-3},
    "adapter": {"lr": 3e-3},
    "prompt": {"init": "an emoji of", "length": 3, "depth": 3, "visual": 4, "lr": 1e-2},
    "lora_prompt": {"init": "an emoji of", "length": 3, "dropout": 0.0, "lr": 1e-2, "lr_prompt": 1e-2},
    "head": {"classes": "data", "lr": 1e-2},
}
"""Policy: the knobs for tuning on TARGET_STYLE, found on its val split (the head's on the drawings of its val and test
splits in CLOSED_STYLE: the run itself is measured on those of the train split; those of lp_ft and gradual are full's).
A model this small takes larger steps than the published rates, which are for ViT-B and larger; a policy not here keeps
its own."""


@dataclass(frozen=True)
class Picture:
    image: bytes  # WebP, 64 x 64 RGB on white
    name: str  # CLDR short name in lower case, "grinning face"; one a concept, so it can serve as the class
    captions: tuple[str, ...]  # the name, then the name with one keyword each
    code: str  # hex code points, "1F600"
    family: str  # the concept's near-duplicates share it, and with it the style's split


def model_dir() -> Path:
    """The folder that open_clip's `local-dir:` takes, for model, transforms and tokenizer (by train_demo_model.py)."""
    return _data_path("model")


def load_pictures(style: str, split: str | None = None) -> list[Picture]:
    """The pictures of one of STYLES in Unicode's order, of one of SPLITS or of all (by build_demo_pictures.py)."""
    from pyarrow import parquet

    if style not in STYLES:
        raise ValueError(f"no style {style!r}; there are {', '.join(STYLES)}")
    if split not in (None, *SPLITS):
        raise ValueError(f"no split {split!r}; there are {', '.join(SPLITS)}")
    table = parquet.read_table(_data_path("pictures") / f"{style}.parquet")
    return [
        Picture(row["image"], row["name"], tuple(row["captions"]), row["code"], row["family"])
        for row in table.to_pylist()
        if split in (None, row["split"])
    ]


def _data_path(folder: str) -> Path:
    with as_file(files(__name__) / folder) as path:  # a real folder: wheels are installed unpacked
        return path
