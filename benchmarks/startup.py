"""Start-up: each command beside the import it cannot do without, alternating, medians.

python -m benchmarks.startup [--repeats 5]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time

IMPORT = [sys.executable, "-c", "import open_clip"]
BARE = [sys.executable, "-c", "pass"]
CLI = [sys.executable, "-m", "clipfreeze.cli.app"]
COMMANDS = {
    "apply last_n --dry-run": (IMPORT, "import open_clip", "within 1.3 times"),
    "roles ViT-B-32": (IMPORT, "import open_clip", ""),
    "--help": (BARE, "python -c pass", "under 0.3 s"),
    "list": (BARE, "python -c pass", "under 0.3 s"),
    "check last_n": (BARE, "python -c pass", "under 0.3 s"),
}


def seconds(command: list[str]) -> float:
    """Wall time of one run."""
    started = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    for words, (peer, peer_name, target) in COMMANDS.items():
        command = CLI + words.split()
        seconds(command), seconds(peer)  # warm up
        pairs = [(seconds(command), seconds(peer)) for _ in range(repeats)]
        own, other = (statistics.median(times) for times in zip(*pairs, strict=True))
        print(
            json.dumps(
                {"command": words, "seconds": round(own, 3), "peer": peer_name, "peer_seconds": round(other, 3),
                 "ratio": round(own / other, 2), "target": target}
            )
        )  # fmt: skip


if __name__ == "__main__":
    main()
