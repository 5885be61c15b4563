"""Sources of data by names that hold from any working folder."""

from __future__ import annotations

import glob
from pathlib import Path
from urllib.parse import quote

from clipfreeze.train.hub import HUB, is_hub, name_and_split
from clipfreeze.train.shards import is_pattern, is_stream

_FILE = "file:"


def absolute(source: str) -> str:
    """What `read_data` or `read_stream` takes. Names of the hub, other URLs and a pipe's command stay as they are.

    Links stay links: images may lie beside the link, and not beside the file.
    """
    if is_hub(source):
        return _of_hub(source)
    if is_stream(source):
        return _of_stream(source)
    if not source.strip() or Path(source).is_absolute():
        return source
    if is_pattern(source) and not Path(source).exists():
        return f"{glob.escape(str(Path.cwd()))}/{source}"
    return str(Path(source).absolute())


def _of_hub(source: str) -> str:
    name, split = name_and_split(source)
    if not Path(name).exists():
        return source
    return f"{HUB}{Path(name).absolute()}" + (f":{split}" if split else "")


def _of_stream(source: str) -> str:
    """A file's URL is unquoted when it is opened, after its braces are expanded."""
    scheme, path = source[: len(_FILE)], source[len(_FILE) :]
    if scheme.lower() != _FILE or path.startswith("/"):
        return source
    return f"{scheme}{quote(str(Path.cwd()))}/{path}"
