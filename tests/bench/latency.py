"""Time of one run, models interleaved: each in its own process with one thread, one at work at a time.

Two sessions with thread pools in one process disturb each other, and a machine's speed drifts; ratios within a round
see neither.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tests.bench.cases import REPOSITORY, Array

TURN_MS = 60.0  # how long a model is timed before the next one's turn
MOST_RUNS = 50
RESTARTS = 4  # where a process finds its memory makes it some percent faster or slower for its whole life


class Worker:
    """A process that holds one model and times it when told to."""

    def __init__(self, model: Path, sample: Path) -> None:
        command = [sys.executable, "-m", "tests.bench.latency", str(model), str(sample)]
        self.process = subprocess.Popen(
            command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def time(self, runs: int) -> list[float]:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(f"{runs}\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the latency worker ended with status {self.process.wait()}")
        return [float(ms) for ms in json.loads(line)]

    def close(self) -> None:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def measure(models: Mapping[str, Path], sample: Array, rounds: int) -> dict[str, Any]:
    """Median ms of each model, and the ratios of interest with their 10th and 90th percentile over rounds."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sample.npy"
        np.save(path, sample)
        turns = [turn for _ in range(RESTARTS) for turn in _turns(models, path, -(-rounds // RESTARTS))]
    found: dict[str, Any] = {"rounds": len(turns)}
    found["median_ms"] = {name: float(np.median([turn[name] for turn in turns])) for name in models}
    for top, bottom in (("qconv", "peer"), ("float", "qconv"), ("float", "peer")):
        if top in models and bottom in models:
            ratios = [turn[top] / turn[bottom] for turn in turns]
            found[f"{top}/{bottom}"] = [float(q) for q in np.percentile(ratios, (10, 50, 90))]
    return found


def _turns(models: Mapping[str, Path], sample: Path, rounds: int) -> list[dict[str, float]]:
    """Median ms of each model in each of some rounds."""
    workers = {name: Worker(model, sample) for name, model in models.items()}
    try:
        runs = {name: _runs_a_turn(worker) for name, worker in workers.items()}
        return [{name: float(np.median(w.time(runs[name]))) for name, w in workers.items()} for _ in range(rounds)]
    finally:
        for worker in workers.values():
            worker.close()


def _runs_a_turn(worker: Worker) -> int:
    worker.time(3)  # warm up
    return int(np.clip(TURN_MS / np.median(worker.time(3)), 1, MOST_RUNS))


def _serve(model: str, sample: str) -> None:
    """The worker's side: a line with a number of runs comes in, their times go out."""
    import time

    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    feeds = {session.get_inputs()[0].name: np.load(sample)}
    for line in sys.stdin:
        times = []
        for _ in range(int(line)):
            start = time.perf_counter()
            session.run(None, feeds)
            times.append(1000 * (time.perf_counter() - start))
        print(json.dumps(times), flush=True)


if __name__ == "__main__":
    _serve(sys.argv[1], sys.argv[2])
