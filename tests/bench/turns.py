"""CPU time of files in turns, a process each: what other work on the machine takes does not count.

python -m tests.bench.turns MODEL INPUT.npz

Such a process answers each number of runs on its input with the mean CPU time of a run, in ms. One thread.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from tests.bench.accuracy import session
from tests.bench.cases import REPOSITORY, Array

RESTARTS = 3
"""The place of a process in memory makes it some percent faster or slower for its whole life."""
TURN_MS, MOST_RUNS = 100.0, 50

Turns = dict[str, list[float]]
"""CPU ms of a run in each turn, by model."""


def take_turns(models: Mapping[str, Path], feeds: Path, rounds: int) -> Turns:
    """Times models A B C A B C; `rounds` turns each, over RESTARTS processes. feeds: an .npz with the inputs."""
    found: Turns = {name: [] for name in models}
    for part in np.array_split(np.arange(rounds), RESTARTS):
        with contextlib.ExitStack() as stack:
            workers = {name: stack.enter_context(_started(path, feeds)) for name, path in models.items()}
            first = {name: _asked(worker, 2) for name, worker in workers.items()}
            runs = {name: int(np.clip(TURN_MS / ms, 1, MOST_RUNS)) for name, ms in first.items()}
            for _ in part:
                for name, worker in workers.items():
                    found[name].append(_asked(worker, runs[name]))
    return found


def _started(model: Path, feeds: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.bench.turns", str(model), str(feeds)]
    return subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _asked(worker: subprocess.Popen[str], runs: int) -> float:
    assert worker.stdin is not None
    assert worker.stdout is not None
    print(runs, file=worker.stdin, flush=True)
    return float(worker.stdout.readline())


def ratio(own: Sequence[float], other: Sequence[float]) -> tuple[float, float, float]:
    """The ratio of the medians between the least and the largest of a round."""
    each = np.divide(own, other)
    return float(each.min()), float(np.median(own) / np.median(other)), float(each.max())


def serve(model: Path, feeds: Mapping[str, Array]) -> None:
    """Answers until the input ends."""
    loaded = session(model)
    loaded.run(None, feeds)
    for line in sys.stdin:
        runs = int(line)
        loaded.run(None, feeds)  # caches hold another model
        start = time.process_time()
        for _ in range(runs):
            loaded.run(None, feeds)
        print(1000 * (time.process_time() - start) / runs, flush=True)


if __name__ == "__main__":
    with np.load(sys.argv[2]) as held:
        serve(Path(sys.argv[1]), dict(held))
