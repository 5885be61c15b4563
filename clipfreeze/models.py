"""open_clip models by name: on the meta device for previews, or with weights, transforms and tokenizer."""

from __future__ import annotations

import json
import logging
import os
import pickle
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.convert import convert_state_dict
from open_clip.factory import _find_checkpoint_in_dir, parse_model_name
from open_clip.model import convert_to_custom_text_state_dict, resize_pos_embed, resize_text_pos_embed
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from clipfreeze import demo
from clipfreeze.errors import ModelError, did_you_mean

WRAPPER_PREFIXES = ("module.", "_orig_mod.")
"""What DistributedDataParallel and torch.compile put before every name of a state dict."""


_NUMPY = (".npz", ".npy")

_DRAWN = (
    *(Tensor.normal_, Tensor.uniform_, Tensor.erfinv_),
    *(nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_),
)
"""What gives a tensor random values; the last ones are asked whole, before they come to the first."""


@dataclass(frozen=True)
class Loaded:
    """A model ready to use, with what belongs to it.

    `tokenizer` turns captions into ids of shape (B, context_length); `train_transform` augments, `transform` does not.
    `name` and `pretrained` build the same model again; `notes` are for the user to read; `random` says that no weights
    were loaded.
    """

    model: nn.Module
    tokenizer: Callable[..., Tensor]
    train_transform: Callable[..., Tensor]
    transform: Callable[..., Tensor]
    name: str
    pretrained: str | None
    context_length: int
    notes: tuple[str, ...] = ()
    random: bool = False


def model_names() -> list[str]:
    """The architectures open_clip has a config for."""
    names: list[str] = open_clip.list_models()
    return names


def canonical_name(text: str) -> str:
    """The name open_clip takes for what the user wrote.

    An exact name, also in OpenAI's spelling with a slash (`ViT-B/32`); `local-dir:FOLDER`; `hf-hub:OWNER/NAME`; or
    `demo` for the model that comes with clipfreeze. Raises ModelError with the nearest names for anything else.
    """
    if text == "demo":
        return f"local-dir:{demo.model_dir()}"
    if text.startswith(("local-dir:", "hf-hub:")):
        if text.endswith(":"):
            raise ModelError(f"{text!r} names no model", "write local-dir:FOLDER or hf-hub:OWNER/NAME")
        return text
    names = model_names()
    if (name := text.replace("/", "-")) in names:
        return name
    if text and os.path.isdir(text):  # noqa: PTH112 - unlike Path, it takes any text for an answer
        raise ModelError(f"{text!r} is a folder, not a model name", f"write local-dir:{text}")
    raise ModelError(f"open_clip has no model {text!r}", did_you_mean(name, [*names, "demo"]))


def model_config(name: str) -> dict[str, Any]:
    """open_clip's config for a canonical name, yours to change; a network is needed for `hf-hub:` alone."""
    schema, place = parse_model_name(name)
    if schema == "local-dir" and not Path(place).is_dir():
        raise ModelError(f"there is no folder {place!r}", "write local-dir:FOLDER with open_clip_config.json in it")
    try:
        config = open_clip.get_model_config(name)
    except (OSError, ValueError, RuntimeError) as error:
        if schema == "local-dir":
            raise ModelError(
                f"{Path(place, 'open_clip_config.json')} cannot be read: {_first_line(error)}",
                "open_clip writes this file with save_for_hf, clipfreeze with export --to open_clip",
            ) from error
        raise _no_network(f"the config of {name}", error) from error
    if not isinstance(config, dict) or not {"embed_dim", "vision_cfg", "text_cfg"} <= config.keys():
        raise ModelError(f"{name}: its open_clip_config.json has no model_cfg with embed_dim, vision_cfg and text_cfg")
    return config


def build_on_meta(text: str) -> nn.Module:
    """The model without weights: shapes and names only, in a fraction of a second whatever its size.

    Needs the network for `hf-hub:` names and for configs whose text tower is a Hugging Face model.
    """
    name = canonical_name(text)
    config = model_config(name)
    with tempfile.TemporaryDirectory() as folder, torch.device("meta"):
        # From a folder without weights, so that nothing can be downloaded but a Hugging Face config.
        Path(folder, "open_clip_config.json").write_text(json.dumps({"model_cfg": config}), encoding="utf-8")
        return _create(name, f"local-dir:{folder}", None, "fp32", "meta", load_weights=False)[0]


def load(text: str, pretrained: str | None = None, *, precision: str = "fp32", device: str = "cpu") -> Loaded:
    """The model with its weights, transforms and tokenizer.

    `pretrained` is one of open_clip's tags for this model or a checkpoint file. Without it, `local-dir:` and `hf-hub:`
    models have the weights that lie beside their config, and others random ones, which `notes` says.
    """
    name = canonical_name(text)
    model_config(name)
    schema, place = parse_model_name(name)
    file = _file_beside_config(place) if schema == "local-dir" and not pretrained else _file_asked_for(name, pretrained)
    tag = pretrained if file is None else None
    by_open_clip = file is None and schema != "local-dir"
    filled = file is not None and file.suffix not in _NUMPY  # strictly, by all that the model holds
    with warnings.catch_warnings(record=True) as caught, _Undrawn() if filled else nullcontext():
        warnings.simplefilter("always")
        model, train_transform, transform = _create(name, name, tag, precision, device, load_weights=by_open_clip)
    notes = list(_activation_notes(name, caught))
    random = file is None and tag is None and schema != "hf-hub"
    if file is not None:
        notes += load_weights(model, file)
    elif random:
        notes.append(f"{text} has random weights: no pretrained ones were asked for")
        if (decoder := getattr(model, "text_decoder", None)) is not None:
            nn.init.zeros_(decoder.text_projection)  # open_clip leaves it as it found the memory
    tokenizer = _tokenizer(name)
    length = tokenizer.context_length
    return Loaded(model, tokenizer, train_transform, transform, name, pretrained, length, tuple(notes), random)


def tokenizer_of(text: str) -> Any:
    """The tokenizer of a model by name, without the model; its `context_length` is the model's."""
    name = canonical_name(text)
    model_config(name)
    return _tokenizer(name)


def load_weights(model: nn.Module, path: str | Path) -> list[str]:
    """Load a checkpoint file into `model`, strictly, and return remarks for the user.

    Takes what open_clip takes (its own and other published layouts, position embeddings of another image size), and
    files saved from wrapped models. Raises ModelError, with the model as it was, when the file does not fit.
    """
    if Path(path).suffix in _NUMPY:
        open_clip.load_checkpoint(model, str(path))  # big_vision's SigLIP weights
        return []
    state, own, notes = _bare_names(_read_state(path)), model.state_dict(), []
    if "logit_bias" in own and "logit_bias" not in state:
        state["logit_bias"] = torch.zeros_like(own["logit_bias"])
        notes.append(f"{path} has no logit_bias: it is 0, which leaves all similarities as they were")
    try:
        with _silent_root_logger():
            given, state = state, _fitted(model, dict(state))
    except (RuntimeError, ValueError, KeyError, AttributeError, AssertionError) as error:
        raise ModelError(f"{path} does not fit the model: {_first_line(error)}", _FITTING) from error
    if misfit := _misfit(own, state):
        raise ModelError(f"{path} does not fit the model: {misfit}", _FITTING)
    model.load_state_dict(state)
    for name in given.keys() & state.keys():
        if "positional" in name and given[name].shape != state[name].shape:
            notes.append(f"{name} of {path} was resized from {len(given[name])} to {len(state[name])} positions")
    return notes


def _fitted(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict in the layout of the model, as `open_clip.load_checkpoint` brings it there."""
    fitted: dict[str, Tensor] = convert_state_dict(model, state)
    if "positional_embedding" in fitted and "text" in dict(model.named_children()):
        fitted = convert_to_custom_text_state_dict(fitted)
    for name, parameter in model.named_parameters(recurse=False):
        if name in ("logit_scale", "logit_bias") and name in fitted:  # stored with and without a dimension
            fitted[name] = fitted[name].reshape(parameter.shape)
    fitted.pop("text.transformer.embeddings.position_ids", None)  # written by transformers before 4.31
    resize_pos_embed(fitted, model)
    resize_text_pos_embed(fitted, model)
    return fitted


_FITTING = "name the model this file was saved from; a file with a logit_bias needs a model with init_logit_bias"


def _create(
    name: str, source: str, tag: str | None, precision: str, device: str, *, load_weights: bool
) -> tuple[nn.Module, Any, Any]:
    """open_clip's factory, silent, its errors turned into ours. `name` is for messages, `source` what is built."""
    try:
        with _silent_root_logger():
            created: tuple[nn.Module, Any, Any] = open_clip.create_model_and_transforms(
                source,
                tag,
                load_weights=load_weights,
                precision=precision,
                device=device,
                pretrained_text=load_weights,
            )
        return created
    except OSError as error:
        raise _no_network(f"the Hugging Face text tower of {name}", error) from error
    except RuntimeError as error:
        message = _first_line(error)
        if "download" in message or "HF Hub" in message:
            raise _no_network(f"weights of {name}", error) from error
        raise ModelError(f"{name} cannot be built: {message}") from error
    except (TypeError, ValueError, AssertionError) as error:
        raise ModelError(f"{name} cannot be built from its config: {_first_line(error)}") from error


def _file_asked_for(name: str, pretrained: str | None) -> Path | None:
    """The file `pretrained` names; None when it is a tag. Raises ModelError when it is neither."""
    if pretrained is None:
        return None
    path = Path(pretrained)
    if path.is_file():
        return path
    if path.is_dir():
        raise ModelError(
            f"{pretrained!r} is a folder, not a checkpoint file", f"as the model write local-dir:{pretrained}"
        )
    if open_clip.get_pretrained_cfg(name, pretrained):
        return None
    if path.suffix in (".pt", ".pth", ".bin", ".safetensors", ".npz") or len(path.parts) > 1:
        raise ModelError(f"there is no checkpoint file {pretrained!r}")
    tags: Sequence[str] = open_clip.list_pretrained_tags_by_model(name)
    fix = did_you_mean(pretrained, tags) if tags else "open_clip has no weights for it: give a checkpoint file"
    raise ModelError(f"there are no weights {pretrained!r} for {name}", fix)


def _file_beside_config(folder: str) -> Path | None:
    """The checkpoint in the folder of a config; of several, the one open_clip would take."""
    with _silent_root_logger():
        found = _find_checkpoint_in_dir(Path(folder))
    return Path(found) if found else None


def _activation_notes(name: str, caught: Iterable[warnings.WarningMessage]) -> Iterator[str]:
    """open_clip's warning that weights and config differ in QuickGELU, with the way out; the others go on."""
    for warning in caught:
        message = str(warning.message)
        if "QuickGELU" in message:
            twin = f"{name}-quickgelu"
            yield f"{message} Load {twin} instead." if twin in model_names() else message
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def _tokenizer(name: str) -> Any:
    try:
        with _silent_root_logger():
            return open_clip.get_tokenizer(name)
    except (OSError, ImportError, ValueError) as error:
        raise _no_network(f"the tokenizer of {name}", error) from error


def _read_state(path: str | Path) -> dict[str, Tensor]:
    try:
        if Path(path).suffix == ".safetensors":
            return load_file(path)
        mapped = zipfile.is_zipfile(path)  # as torch has saved since 1.6: pages of the file, not a second copy
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError, SafetensorError) as error:
        raise ModelError(f"{path} cannot be read as a checkpoint of plain tensors: {_first_line(error)}") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else None
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ModelError(f"{path} holds no state dict", "save model.state_dict(), or a dict with it as `state_dict`")
    return dict(state)


def _bare_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a wrapped model under the names of the bare one; only prefixes that all names share go."""
    while prefix := next((p for p in WRAPPER_PREFIXES if state and all(name.startswith(p) for name in state)), ""):
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def _misfit(own: dict[str, Tensor], given: dict[str, Tensor]) -> str:
    """What keeps one state dict from being loaded into the other; empty if nothing does."""
    shapes = [
        f"{name} is {tuple(given[name].shape)}, the model's {tuple(own[name].shape)}"
        for name in own
        if name in given and given[name].shape != own[name].shape
    ]
    found = []
    for what, names in (
        ("missing", [name for name in own if name not in given]),
        ("unexpected", [name for name in given if name not in own]),
        ("of another shape", shapes),
    ):
        if names:
            found.append(f"{len(names)} {what} ({'; '.join(names[:3])}{'; ...' if len(names) > 3 else ''})")
    return ", ".join(found)


def _no_network(what: str, error: Exception) -> ModelError:
    return ModelError(
        f"{what} cannot be fetched: {_first_line(error)}",
        "connect to the network, or use a model that needs none: `demo`, local-dir:FOLDER, a checkpoint file",
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


class _Undrawn(TorchFunctionMode):
    """Random start values are not drawn: most of the time that it takes to build a model whose weights lie at hand."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _DRAWN:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


@contextmanager
def _silent_root_logger() -> Iterator[None]:
    """open_clip logs through the root logger, which would install a handler and speak of what `notes` says."""
    root, handler, before = logging.getLogger(), logging.NullHandler(), logging.root.manager.disable
    root.addHandler(handler)
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)
        root.removeHandler(handler)
