"""Wall time and peak memory of whole commands: qconv, a bare float inference, and the peer, interleaved."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.bench.cases import REPOSITORY

OWN_SECONDS, TIMES_BARE = 1.5, 2.0
OWN_MB, TIMES_BARE_RSS = 200.0, 1.5

BYTECODE = Path(tempfile.gettempdir()) / "qconv-bench-bytecode"
"""Where modules are compiled to, once, as an installation does."""

Measured = dict[str, Any]


def spawn(command: Sequence[str], tree: Path = REPOSITORY) -> Measured:
    """{"status", "seconds", "cpu_seconds", "rss_mb"} of a command, started from a small process in the repository.

    tree: whose `qconv` and `tests` the command imports.
    """
    launcher = [sys.executable, "-m", "tests.bench.spawn", *command]
    environment = {**os.environ, "PYTHONPATH": str(tree), "PYTHONPYCACHEPREFIX": str(BYTECODE)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    done = subprocess.run(launcher, cwd=tree, capture_output=True, text=True, check=True, env=environment)
    return dict(json.loads(done.stdout))


def measure(commands: Mapping[str, Sequence[str]], rounds: int) -> dict[str, Any]:
    """Median seconds and MB of each command over interleaved rounds; None for one that fails."""
    runs = [{name: spawn(command) for name, command in commands.items()} for _ in range(rounds)]
    found: dict[str, Any] = {}
    for name in commands:
        own = [run[name] for run in runs]
        if any(run["status"] for run in own):
            found[name] = None
            continue
        medians = {key: float(np.median([run[key] for run in own])) for key in ("seconds", "rss_mb")}
        found[name] = {**medians, "all_seconds": [run["seconds"] for run in own]}
    return {**found, **_limits(found)}


def _limits(found: Mapping[str, Measured | None]) -> dict[str, Any]:
    ours, bare = found.get("qconv"), found.get("bare")
    if not ours or not bare:
        return {}
    seconds = OWN_SECONDS + TIMES_BARE * bare["seconds"]
    rss = OWN_MB + TIMES_BARE_RSS * bare["rss_mb"]
    return {
        "time": {"got": ours["seconds"], "most": seconds, "held": ours["seconds"] <= seconds},
        "memory": {"got": ours["rss_mb"], "most": rss, "held": ours["rss_mb"] <= rss},
    }
