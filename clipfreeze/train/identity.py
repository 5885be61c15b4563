"""What a kept row depends on: names for weights, transform and sample that are the same in every process and run."""

from __future__ import annotations

from hashlib import blake2b
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from clipfreeze.stored import digest_of
from clipfreeze.train.pairs import Picture
from clipfreeze.train.spec import installed_version

_LIBRARIES = ("clipfreeze", "open_clip_torch", "timm", "torch", "transformers")


def prefix_name(model: nn.Module, names: tuple[str, ...], *more: object) -> str:
    """Of what stands below `names` in the model, by weights and by what its modules say of themselves; hex."""
    inside = tuple(f"{name}." for name in names)
    tensors = {
        name: value
        for name, value in model.state_dict().items()
        if f"{name}.".startswith(inside) and isinstance(value, Tensor)
    }
    modules = dict(model.named_modules())
    told = [repr(modules[name]) for name in names if name in modules]
    libraries = [installed_version(library) for library in _LIBRARIES]
    rest = repr((told, more, libraries, torch.get_float32_matmul_precision()))
    return digest_of(tensors)[:32] + short_digest(rest.encode()).hex()


def transform_name(transform: Any) -> str | None:
    """The same for the same transform; None where that cannot be told."""
    if parts := getattr(transform, "transforms", None):
        names = [transform_name(part) for part in parts]
        return None if None in names else repr((type(transform).__qualname__, names))
    if isinstance(transform, FunctionType):
        code = transform.__code__
        does = code.co_code, code.co_names, code.co_consts, transform.__defaults__, transform.__kwdefaults__
        told = repr((transform.__module__, transform.__qualname__, does))
        return None if transform.__closure__ or " at 0x" in told else told
    told = repr(transform)
    return None if " at 0x" in told else repr((type(transform).__module__, told))


def picture_name(picture: Picture) -> bytes:
    """Of a file by its place, size and time of change; of others by what they hold. 16 bytes."""
    if isinstance(picture, Path):
        facts = picture.stat()
        said = repr((str(picture.absolute()), facts.st_size, facts.st_mtime_ns)).encode()
    else:
        said = picture if isinstance(picture, bytes) else picture.read()
    return short_digest(said)


def short_digest(said: bytes) -> bytes:
    """16 bytes, by which rows are known."""
    return blake2b(said, digest_size=16).digest()
