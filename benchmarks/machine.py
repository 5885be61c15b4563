"""Where and on what something was measured, and the most memory it took."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

_CPU_FACTS = Path("/proc/cpuinfo")
_MEMORY_FACTS = Path("/proc/self/status")


def device() -> torch.device:
    """The GPU where there is one, as `fit` takes it."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def machine() -> dict[str, Any]:
    """Facts beside every result; no names of hosts or folders."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout
    return {
        "commit": commit.strip(),
        "cpu": _fact(_CPU_FACTS, "model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
    }


def peak_mb() -> float:
    """The most memory that this process has had, in MB: of the GPU where there is one, else its resident set."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    if kilobytes := _fact(_MEMORY_FACTS, "VmHWM"):  # getrusage may tell of the process this one was started by
        return int(kilobytes.split()[0]) * 1024 / 1e6
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / 1e6 if sys.platform == "darwin" else most * 1024 / 1e6


def _fact(file: Path, name: str) -> str | None:
    """The value of the first line `name : value` of a file of the kernel's."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), None)
