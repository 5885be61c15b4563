"""Files of torch.save, of which no code runs."""

from __future__ import annotations

import pickle
import struct
from pathlib import Path
from typing import Any

import torch

from clipfreeze.errors import ApplyError, Problem

_BROKEN = (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError)
_DAMAGED = (AssertionError, AttributeError, LookupError, TypeError, struct.error)
"""What torch's unpickler trips over where bytes were lost or changed."""


def read_pickle(path: Path, fix: str) -> Any:
    """Tensors, in tables and lists. Raises ApplyError, with `fix`, for a file that is none or has code in it."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (*_BROKEN, *_DAMAGED) as error:
        words = str(error).splitlines() or [type(error).__name__]
        raise ApplyError(Problem(f"cannot be read as plain tensors: {words[0]}", fix, str(path))) from error
