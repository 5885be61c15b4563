"""Writing an export: the folder appears whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from clipfreeze.errors import DataError, RunError
from clipfreeze.stored import whole_file


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A folder to fill beside `out`, which takes its place once the block has ended; after a failure nothing is left.

    DataError when `out` holds files or cannot be made, RunError in the system's words when it cannot be written.
    """
    part = out.with_name(out.name + ".part")
    missing = [folder for folder in out.parents if not folder.exists()]
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            what = "is not empty" if out.is_dir() else "is a file"
            raise DataError(f"{out} {what}", "give another --out, or clear it; an export never writes over anything")
        part.mkdir(parents=True)
    except FileExistsError:
        what = f"{part} is in the way: another export writes it, or one was killed while it did"
        raise DataError(what, "clear it, or give another --out") from None
    except OSError as error:
        raise DataError(f"cannot write to {out}: {error.strerror}", "give another --out") from error
    finished = False
    try:
        yield part
        if out.is_dir():
            out.rmdir()
        part.rename(out)
        finished = True
    except (OSError, SafetensorError) as error:
        words = error.strerror if isinstance(error, OSError) else None
        raise RunError(f"cannot write {out}: {words or error}", "make room, or give another --out") from error
    finally:
        if not finished:
            shutil.rmtree(part, ignore_errors=True)
            for folder in missing:
                with suppress(OSError):  # somebody else put something there meanwhile
                    folder.rmdir()


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """For people to read, too."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file as open_clip and transformers read it; tied tensors are written under each of their names."""
    apart: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        storage = own.untyped_storage().data_ptr()
        apart[name] = own.clone() if storage in storages else own
        storages.add(storage)
    with whole_file(path) as unfinished:
        save_file(apart, unfinished, {"format": "pt"})
