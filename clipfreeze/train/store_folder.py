"""The folder of all stores: which there are, which are in use, and which go to make room.

A store is a subfolder named by a hex digest that holds our mark, whose time is that of its last use. Who has it open
keeps a file there that names its process, the lease, so that no run takes away what is in use, by another or by itself.
Nothing else in the folder is counted or touched.
"""

from __future__ import annotations

import os
import platform
import re
import secrets
import time
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path

import psutil

from clipfreeze.errors import DataError, Problem

MARK = "clipfreeze-store.txt"
_MARK_TEXT = "Activations that clipfreeze keeps for later epochs and runs. This folder may be deleted at any time.\n"
NAME = re.compile(r"[0-9a-f]{8,}")
_OURS = re.compile(r"[0-9a-f]{16}-\d+-[0-9a-f]{8}\.(rows|index)|open-[0-9a-f]{8}-\d+-[0-9a-f]{8}")
_FOREIGN_USE_SECONDS = 24 * 3600.0  # another machine's process cannot be asked whether it lives


def make_folder(folder: Path) -> None:
    """The folder of all stores; DataError if it cannot be made or looked into."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        next(folder.iterdir(), None)
    except OSError as error:
        what = "is a file" if folder.is_file() else f"cannot be used: {error.strerror}"
        raise DataError(Problem(f"the cache folder {what}", "name another: --cache-dir FOLDER", str(folder))) from error


class Use:
    """A store that this process has open."""

    def __init__(self, path: Path) -> None:
        """Make the store if it is not there, and mark it as used. OSError if nothing can be written here."""
        self._mark = path / MARK
        self._lease = path / f"open-{_machine()}-{os.getpid()}-{secrets.token_hex(4)}"
        path.mkdir(exist_ok=True)
        if not self._mark.exists():
            self._mark.write_text(_MARK_TEXT, encoding="utf-8")
        for left in _leases(path):
            if not _lives(left):
                with suppress(OSError):
                    left.unlink()
        self._lease.touch()
        self.renew()

    def renew(self) -> None:
        """Mark the store as used now. FileNotFoundError if somebody deleted it."""
        os.utime(self._mark)
        os.utime(self._lease)

    def end(self) -> None:
        """The process has it open no more."""
        with suppress(OSError):
            self._lease.unlink()


def make_room(keep: Path, most_bytes: int) -> int:
    """Delete stores beside `keep`, the least recently used first and none that is in use, until all hold at most
    `most_bytes` together or no other can go. Returns how many bytes they hold then."""
    held = {path: _bytes_of(path) for path in _stores(keep.parent)}
    for path in sorted(held, key=_last_used):
        if sum(held.values()) <= most_bytes:
            break
        if path != keep and not _in_use(path):
            _delete(path)
            held[path] = _bytes_of(path)
    return sum(held.values())


def _stores(folder: Path) -> list[Path]:
    try:
        return [path for path in folder.iterdir() if NAME.fullmatch(path.name) and _is_store(path)]
    except OSError:
        return []


def _is_store(path: Path) -> bool:
    return not path.is_symlink() and (path / MARK).is_file()


def _files(path: Path) -> list[Path]:
    try:
        return [file for file in path.iterdir() if _OURS.fullmatch(file.name)]
    except OSError:  # somebody deletes it now
        return []


def _bytes_of(path: Path) -> int:
    total = 0
    for file in _files(path):
        with suppress(OSError):
            total += file.stat().st_size
    return total


def _last_used(path: Path) -> float:
    try:
        return (path / MARK).stat().st_mtime
    except OSError:
        return 0.0


def _in_use(path: Path) -> bool:
    return any(map(_lives, _leases(path)))


def _leases(path: Path) -> list[Path]:
    return [file for file in _files(path) if file.name.startswith("open-")]


def _lives(lease: Path) -> bool:
    """Whether the process that left this file may still run."""
    _, machine, process, _ = lease.name.split("-")
    try:
        since = lease.stat().st_mtime
        if machine != _machine():
            return time.time() - since < _FOREIGN_USE_SECONDS
        started: float = psutil.Process(int(process)).create_time()
        return started <= since + 1  # else the number went to a later process
    except psutil.AccessDenied:
        return True
    except (OSError, psutil.NoSuchProcess):
        return False


def _machine() -> str:
    return blake2b(platform.node().encode(), digest_size=4).hexdigest()


def _delete(path: Path) -> None:
    """Our files, then our mark, then the folder if nothing of others is in it: what is left of a failure is still known
    as ours."""
    with suppress(OSError):
        for file in _files(path):
            file.unlink(missing_ok=True)
        (path / MARK).unlink(missing_ok=True)
        path.rmdir()
