"""A folder that transformers loads as CLIPModel and CLIPProcessor, for models of the shape of OpenAI's CLIP."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor

from clipfreeze.errors import ExportError, Problem, RunError
from clipfreeze.export.config import config_of
from clipfreeze.export.files import whole_folder, write_json, write_tensors
from clipfreeze.export.proof import CAPTIONS, probe_outputs, probe_pictures, proved
from clipfreeze.models import Loaded

_HELD = frozenset(
    (
        *("layers", "width", "heads", "head_width", "mlp_ratio", "patch_size", "image_size"),
        *("context_length", "vocab_size", "hf_tokenizer_name", "tokenizer_kwargs", "tokenizer_mode"),
        *("act_kwargs", "norm_kwargs", "pool_type", "eos_id"),  # looked at one by one
        *("block_type", "final_ln_after_pool"),  # the same function: a norm is of each token by itself
        *("patch_dropout", "pad_id"),  # not in eval mode; not under a causal mask
        *("attn_pooler_queries", "attn_pooler_heads", "hf_model_pretrained", "hf_proj_type", "hf_pooler_type"),
        *("timm_model_pretrained", "timm_pool", "timm_proj", "timm_proj_bias", "timm_drop", "timm_drop_path"),
    )
)
"""Fields of open_clip's tower configs that may have any value here; of all others CLIPModel knows the default only."""

_RESAMPLE = {"bilinear": 2, "bicubic": 3, "random": 3}
"""Pillow's numbers. For evaluation open_clip takes `random` as bicubic."""

_PLACES = (
    ("visual.transformer.resblocks.", "vision_model.encoder.layers."),
    ("visual.conv1.weight", "vision_model.embeddings.patch_embedding.weight"),
    ("visual.class_embedding", "vision_model.embeddings.class_embedding"),
    ("visual.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    ("visual.ln_pre.", "vision_model.pre_layrnorm."),
    ("visual.ln_post.", "vision_model.post_layernorm."),
    ("visual.proj", "visual_projection.weight"),
    ("transformer.resblocks.", "text_model.encoder.layers."),
    ("token_embedding.weight", "text_model.embeddings.token_embedding.weight"),
    ("positional_embedding", "text_model.embeddings.position_embedding.weight"),
    ("ln_final.", "text_model.final_layer_norm."),
    ("text_projection", "text_projection.weight"),
    ("logit_scale", "logit_scale"),
)
_IN_BLOCKS = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn": "self_attn",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def write_hf(loaded: Loaded, folder: Path) -> float:
    """Write the plain model as transformers' CLIPModel in float32, with the files of its CLIPProcessor.

    Returns the largest feature difference between the model and the folder loaded back, on pictures of the model's
    size: others are resized by Pillow here and by torchvision there, a grey level or two apart. CLIPProcessor's
    tokenizer does not mend broken Unicode and HTML entities, which open_clip's does. Raises ExportError with all that
    CLIPModel cannot hold.
    """
    try:
        import transformers
    except ImportError as error:
        raise ExportError("this format is proved with transformers", "pip install transformers") from error

    config = config_of(loaded)
    tensors, unplaced = _tensors(loaded.model.state_dict())
    if problems := list(_problems(loaded, **config)) or unplaced:
        problems[-1] = replace(problems[-1], fix="export it with --to open_clip, which holds every model")
        raise ExportError(problems)
    tokenizer: Any = loaded.tokenizer
    with whole_folder(folder) as part:
        write_json(part / "config.json", _model_config(config["model_cfg"], tokenizer))
        write_tensors(part / "model.safetensors", tensors)
        write_json(part / "preprocessor_config.json", _preprocessor_config(**config))
        _write_tokenizer(part, tokenizer)
        return _loaded_back(transformers, loaded, part)


def reload_line(folder: Path) -> str:
    """The expression that builds the exported model and its processor."""
    return ", ".join(f"transformers.{kind}.from_pretrained({str(folder)!r})" for kind in ("CLIPModel", "CLIPProcessor"))


def _problems(loaded: Loaded, model_cfg: dict[str, Any], preprocess_cfg: dict[str, Any]) -> Iterator[Problem]:
    """What transformers' CLIPModel and CLIPProcessor cannot hold."""
    vision, text = model_cfg["vision_cfg"], model_cfg["text_cfg"]
    if "timm_model_name" in vision:
        yield Problem(
            f"the vision tower is timm's {vision['timm_model_name']}; CLIPModel holds only open_clip's own ViT"
        )
    elif isinstance(vision.get("layers"), (list, tuple)):
        yield Problem("the vision tower is a ResNet; CLIPModel holds only open_clip's own ViT")
    else:
        yield from _tower_problems("vision_cfg", vision, open_clip.CLIPVisionCfg, {"tok"}, model_cfg)
        for key in ("image_size", "patch_size"):
            if not isinstance(size := vision.get(key, 0), int):
                yield Problem(f"vision_cfg.{key} is {size!r}; CLIPModel has squares only")
    if text.get("hf_model_name"):
        yield Problem(f"the text tower is {text['hf_model_name']}; CLIPModel holds only open_clip's own")
    else:
        yield from _tower_problems("text_cfg", text, open_clip.CLIPTextCfg, {"argmax", "eos"}, model_cfg)
        yield from _tokenizer_problems(loaded.tokenizer, text)
    if "multimodal_cfg" in model_cfg:
        yield Problem("the model has a captioning decoder; CLIPModel has none")
    if "init_logit_bias" in model_cfg:
        yield Problem("the model has a logit_bias; CLIPModel has none, and its similarities would be others")
    if preprocess_cfg.get("resize_mode") == "longest":
        yield Problem("pictures are resized by their longest side and padded; CLIPProcessor cannot pad")


def _tower_problems(
    section: str, config: dict[str, Any], kind: type[Any], pools: set[str], model: dict[str, Any]
) -> Iterator[Problem]:
    for field in fields(kind):
        if field.name not in _HELD and (value := config.get(field.name, field.default)) != field.default:
            yield Problem(f"{section}.{field.name} is {value!r}; CLIPModel knows only {field.default!r}")
    pool = config.get("pool_type", kind.pool_type)
    if pool not in pools:
        yield Problem(f"{section}.pool_type is {pool!r}; CLIPModel knows only {' and '.join(sorted(pools))}")
    if (norm := config.get("norm_kwargs") or {}).keys() - {"eps"}:
        yield Problem(f"{section}.norm_kwargs is {norm!r}; CLIPModel knows only eps")
    if _activation(config, model) is None:
        yield Problem(f"{section}.act_kwargs is {config['act_kwargs']!r}; CLIPModel has no such activation")


def _tokenizer_problems(tokenizer: Any, text: dict[str, Any]) -> Iterator[Problem]:
    other = text.get("hf_tokenizer_name") or text.get("tokenizer_kwargs")
    if other or not isinstance(tokenizer, open_clip.SimpleTokenizer):
        what = f"{type(tokenizer).__name__} of {other}" if other else type(tokenizer).__name__
        yield Problem(f"the tokenizer is {what}; CLIPProcessor holds only open_clip's SimpleTokenizer, without options")
    elif text.get("pool_type") == "eos" and text.get("eos_id", 2) != tokenizer.eot_token_id:
        what = f"text_cfg.eos_id is {text.get('eos_id', 2)}, which the tokenizer never ends with"
        yield Problem(f"{what}; CLIPModel pools where the text ends")


def _activation(tower: dict[str, Any], model: dict[str, Any]) -> str | None:
    """What transformers calls it; None where it has none."""
    options = tower.get("act_kwargs") or {}
    if model["quick_gelu"]:
        return "quick_gelu" if not options else None
    names = {"none": "gelu", "tanh": "gelu_pytorch_tanh"}
    return names.get(options.get("approximate", "none")) if not options.keys() - {"approximate"} else None


def _tensors(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[Problem]]:
    """The weights under transformers' names, and what has no place there."""
    tensors: dict[str, Tensor] = {}
    unplaced = []
    for name, tensor in state.items():
        value = tensor.detach().to(torch.float32)
        place = _place(name.removeprefix("text."))  # of CustomTextCLIP
        if place is None:
            unplaced.append(name)
        elif place.endswith((".in_proj_weight", ".in_proj_bias")):
            stem, kind = place.rsplit(".in_proj_", 1)
            tensors |= {f"{stem}.{slot}_proj.{kind}": part for slot, part in zip("qkv", value.chunk(3), strict=True)}
        elif place in ("visual_projection.weight", "text_projection.weight") and not name.endswith(".weight"):
            tensors[place] = value.T  # open_clip multiplies by it, a Linear by its transpose
        else:
            tensors[place] = value.reshape(()) if place == "logit_scale" else value
    if not unplaced:
        return tensors, []
    shown = ", ".join(unplaced[:3]) + (f" and {len(unplaced) - 3} more" if len(unplaced) > 3 else "")
    return tensors, [Problem(f"CLIPModel has no place for {shown}")]


def _place(name: str) -> str | None:
    if name == "text_projection.weight":  # a Linear, as transformers has it
        return name
    for ours, theirs in _PLACES:
        if name == ours or (ours.endswith(".") and name.startswith(ours)):
            return _place_in_block(theirs, name.removeprefix(ours))
    return None


def _place_in_block(stack: str, rest: str) -> str | None:
    if not stack.endswith(".layers."):
        return stack + rest
    index, _, inside = rest.partition(".")
    module, _, kind = inside.rpartition(".")
    if module not in _IN_BLOCKS or kind not in ("weight", "bias", "in_proj_weight", "in_proj_bias"):
        return None
    return f"{stack}{index}.{_IN_BLOCKS[module]}.{kind}"


def _model_config(model: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """config.json"""
    vision = open_clip.CLIPVisionCfg(**model["vision_cfg"])
    text = open_clip.CLIPTextCfg(**model["text_cfg"])
    towers = {
        "vision_config": {
            "model_type": "clip_vision_model",
            "num_attention_heads": vision.width // vision.head_width,
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
        },
        "text_config": {
            "model_type": "clip_text_model",
            "num_attention_heads": text.heads,
            "max_position_embeddings": text.context_length,
            "vocab_size": text.vocab_size,
            "bos_token_id": tokenizer.sot_token_id,
            "eos_token_id": tokenizer.eot_token_id,
            "pad_token_id": tokenizer.eot_token_id,
        },
    }
    for section, tower in (("vision_config", vision), ("text_config", text)):
        towers[section] |= {
            "hidden_size": tower.width,
            "intermediate_size": int(tower.width * tower.mlp_ratio),
            "num_hidden_layers": tower.layers,
            "projection_dim": model["embed_dim"],
            "hidden_act": _activation(vars(tower), model),
            "layer_norm_eps": (tower.norm_kwargs or {}).get("eps", 1e-5),
        }
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": model["embed_dim"],
        "torch_dtype": "float32",
        **towers,
    }


def _preprocessor_config(model_cfg: dict[str, Any], preprocess_cfg: dict[str, Any]) -> dict[str, Any]:
    """preprocessor_config.json"""
    size = model_cfg["vision_cfg"]["image_size"]
    square = {"height": size, "width": size}
    squash = preprocess_cfg["resize_mode"] == "squash"
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": square if squash else {"shortest_edge": size},
        "resample": _RESAMPLE[preprocess_cfg["interpolation"]],
        "do_center_crop": not squash,
        "crop_size": square,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": preprocess_cfg["mean"],
        "image_std": preprocess_cfg["std"],
    }


def _write_tokenizer(folder: Path, tokenizer: Any) -> None:
    """The vocabulary and merges of open_clip's tokenizer in the files of transformers' CLIPTokenizer."""
    start, end = "<|startoftext|>", "<|endoftext|>"
    theirs = {tokenizer.sot_token_id: start, tokenizer.eot_token_id: end}
    write_json(folder / "vocab.json", {theirs.get(index, token): index for token, index in tokenizer.encoder.items()})
    merges = "".join(f"{' '.join(pair)}\n" for pair in tokenizer.bpe_ranks)
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}", encoding="utf-8")
    special = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": end}
    write_json(folder / "special_tokens_map.json", special)
    write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "CLIPTokenizer", "model_max_length": tokenizer.context_length, "do_lower_case": True}
        | special,
    )


def _loaded_back(transformers: Any, loaded: Loaded, part: Path) -> float:
    visual: Any = loaded.model.visual
    pictures = probe_pictures(*visual.image_size)
    ours = probe_outputs(loaded, pictures)
    bars = transformers.utils.logging
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        model, report = transformers.CLIPModel.from_pretrained(part, local_files_only=True, output_loading_info=True)
        processor = transformers.CLIPProcessor.from_pretrained(part, local_files_only=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise RunError(f"the export cannot be loaded back: {error}") from error
    finally:
        if shown:
            bars.enable_progress_bar()
    if lost := [name for names in report.values() for name in names]:
        raise RunError(f"the export cannot be loaded back: {len(lost)} tensors do not fit, {lost[0]} among them")
    device = ours["logit_scale"].device
    inputs = processor(
        text=list(CAPTIONS), images=pictures, return_tensors="pt", padding="max_length", truncation=True
    ).to(device)
    model = model.to(device).eval()
    with torch.no_grad():
        image = model.vision_model(pixel_values=inputs["pixel_values"]).pooler_output
        text = model.text_model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).pooler_output
        theirs = {
            "image features": model.visual_projection(image),
            "text features": model.text_projection(text),
            "logit_scale": model.logit_scale,
        }
    return proved(loaded.model, ours, theirs)
