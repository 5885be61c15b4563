"""A folder that open_clip loads by `local-dir:`, with a weights file that it loads by name."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import open_clip
from open_clip.transform import PreprocessCfg

from clipfreeze import models
from clipfreeze.errors import ClipfreezeError, RunError
from clipfreeze.export.config import config_of
from clipfreeze.export.files import whole_folder, write_json, write_tensors
from clipfreeze.export.proof import probe_outputs, probe_pictures, proved
from clipfreeze.models import Loaded

CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"


def write_open_clip(loaded: Loaded, folder: Path) -> float:
    """Write the plain model, its config and, where open_clip needs them, its tokenizer's files.

    Returns the largest feature difference between the model and the folder loaded back. A config with a Hugging Face
    text tower goes on naming it, so loading needs that name's config from the network or the cache, as before.
    """
    config = config_of(loaded)
    with whole_folder(folder) as part:
        write_json(part / CONFIG, config)
        write_tensors(part / WEIGHTS, loaded.model.state_dict())
        if not isinstance(loaded.tokenizer, open_clip.SimpleTokenizer):
            tokenizer: Any = loaded.tokenizer
            tokenizer.save_pretrained(part)
        return _loaded_back(loaded, part)


def reload_lines(loaded: Loaded, folder: Path) -> list[str]:
    """The expressions that build the exported model; for a model of open_clip's a second, by name and weights file."""
    lines = [_call(f"local-dir:{folder}", {})]
    if loaded.name in models.model_names():
        name, options = _name_and_options(loaded)
        lines.append(_call(name, {"pretrained": str(folder / WEIGHTS), **options}))
    return lines


def _call(name: str, options: dict[str, Any]) -> str:
    arguments = [repr(name), *(f"{key}={value!r}" for key, value in options.items())]
    return f"open_clip.create_model_and_transforms({', '.join(arguments)})"


def _name_and_options(loaded: Loaded) -> tuple[str, dict[str, Any]]:
    """The name with the model's activation, and what else the model does not share with that name's config."""
    actual = config_of(loaded)
    model, preprocess = actual["model_cfg"], actual["preprocess_cfg"]
    bare = loaded.name.removesuffix("-quickgelu")
    names = (loaded.name, bare, f"{bare}-quickgelu")
    known = {name: models.model_config(name) for name in names if name in models.model_names()}
    alike = [name for name, config in known.items() if config.get("quick_gelu", False) == model["quick_gelu"]]
    name = alike[0] if alike else loaded.name
    config, plain = known[name], asdict(PreprocessCfg())
    options = {
        "quick_gelu": (model["quick_gelu"], config.get("quick_gelu", False)),
        "init_logit_bias": (model.get("init_logit_bias"), config.get("init_logit_bias")),
        "force_image_size": (model["vision_cfg"]["image_size"], config["vision_cfg"].get("image_size", 224)),
        "force_context_length": (model["text_cfg"]["context_length"], config["text_cfg"].get("context_length", 77)),
        **{
            f"image_{key}": (preprocess.get(key, plain[key]), plain[key])
            for key in ("mean", "std", "interpolation", "resize_mode")
        },
    }
    return name, {key: own for key, (own, named) in options.items() if own != named}


def _loaded_back(loaded: Loaded, part: Path) -> float:
    pictures = probe_pictures(80, 60)
    ours = probe_outputs(loaded, pictures)
    try:
        back = models.load(f"local-dir:{part}", device=str(ours["logit_scale"].device))
    except ClipfreezeError as error:
        raise RunError(f"the export cannot be loaded back: {error.problems[0].what}") from error
    return proved(loaded.model, ours, probe_outputs(back, pictures))
