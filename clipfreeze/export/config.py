"""The config of a model as it really is, whatever name and options it was built by."""

from __future__ import annotations

from typing import Any

import open_clip

from clipfreeze.errors import ExportError
from clipfreeze.models import Loaded, model_config


def config_of(loaded: Loaded) -> dict[str, Any]:
    """The content of open_clip_config.json: `model_cfg` and `preprocess_cfg`, what open_clip would infer included."""
    model: Any = loaded.model
    config = model_config(loaded.name)
    height, width = _pair(model.visual.image_size)
    config["vision_cfg"]["image_size"] = height if height == width else [height, width]
    config["text_cfg"]["context_length"] = loaded.context_length
    config["quick_gelu"] = _runs_quick_gelu(model, config)
    config.pop("init_logit_bias", None)
    if model.logit_bias is not None:
        config["init_logit_bias"] = model.logit_bias.item()
    return {"model_cfg": config, "preprocess_cfg": open_clip.get_model_preprocess_cfg(model)}


def _runs_quick_gelu(model: Any, config: dict[str, Any]) -> bool:
    """open_clip's own blocks have their activation at `mlp.gelu`; timm and Hugging Face towers heed no such flag."""
    kinds = {type(module).__name__ for name, module in model.named_modules() if name.endswith(".mlp.gelu")}
    if len(kinds) > 1:
        raise ExportError(
            f"the blocks of the model have unlike activations ({', '.join(sorted(kinds))})",
            "open_clip's config has one flag for both towers: build the model with one activation",
        )
    return "QuickGELU" in kinds if kinds else bool(config.get("quick_gelu", False))


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
