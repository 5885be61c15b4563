"""A policy's folder: the plan, and the tensors it changed, tied to their base by a digest. No pickle, whole files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from clipfreeze.errors import ApplyError, RunError
from clipfreeze.pieces import whole
from clipfreeze.plan.value import Plan

PLAN, WEIGHTS = "plan.json", "weights.safetensors"
_DIGESTS = "sha256 of the base and of these weights"
"""One entry of metadata, since safetensors writes several in any order."""


def write_policy(folder: Path, plan: Plan, tensors: Mapping[str, Tensor], base: str) -> None:
    """Plan and tensors, which are on the CPU; `base` is the digest of what they belong to. Raises RunError in the
    system's words.
    """
    with _saving(folder / WEIGHTS) as unfinished:
        save_file(dict(tensors), unfinished, {_DIGESTS: f"{base} {digest_of(tensors)}"})
    with _saving(folder / PLAN) as unfinished:
        unfinished.write_text(plan.model_dump_json(indent=1) + "\n", encoding="utf-8")


def read_plan(path: Path) -> Plan:
    """The plan of a folder. Raises ApplyError where there is none of this version."""
    try:
        return Plan.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ApplyError(f"cannot read {path}: {error.strerror}", "give a folder that save() wrote") from error
    except (ValidationError, UnicodeDecodeError) as error:
        first = str(error.errors()[0]["msg"]) if isinstance(error, ValidationError) else str(error)
        raise ApplyError(f"{path} is no plan of this version: {first}", "save it again") from error


def read_weights(path: Path) -> tuple[dict[str, Tensor], str, bool]:
    """The tensors, the digest of their base, and whether they are what was saved. Raises ApplyError."""
    try:
        with safe_open(path, "pt") as file:
            base, _, whole = (file.metadata() or {}).get(_DIGESTS, "").partition(" ")
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
    except (OSError, SafetensorError) as error:
        raise ApplyError(f"cannot read {path}: {error}", "give a folder that save() wrote whole") from error
    return tensors, base, whole == digest_of(tensors)


def kind_of(tensor: Tensor) -> str:
    """Type and shape, as a message shows them."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and bytes; of all pieces, so that every rank gets the same."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {kind_of(tensor)}\n".encode())
        digest.update(whole(tensor).detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A file to write beside `path`, which takes its place once it is whole."""
    unfinished = path.with_name(path.name + ".part")
    try:
        unfinished.touch()
        mode = unfinished.stat().st_mode
        yield unfinished
        unfinished.chmod(mode)  # safetensors lets only the owner read
        unfinished.replace(path)
    finally:
        with suppress(OSError):
            unfinished.unlink()


@contextmanager
def _saving(path: Path) -> Iterator[Path]:
    """A whole file in a folder that may have to be made; a failure is a RunError in the system's words."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as unfinished:
            yield unfinished
    except (OSError, SafetensorError) as error:
        what = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise RunError(f"cannot write {path}: {what}", "make room, or give another folder") from error
