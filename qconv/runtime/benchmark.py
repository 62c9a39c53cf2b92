"""How long one run takes: models in turns, each in a process of its own, only one at work at any time.

Two sessions in one process disturb each other with threads that spin while they wait, and a machine's speed drifts from
second to second. So every model has a process, the parent gives them turns, and what is compared are the medians within
one round, which see the same machine. Processes are started anew a few times: where one finds its memory makes it some
percent faster or slower for its whole life.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from qconv.errors import QconvError
from qconv.runtime.cpu import Cpu, this_cpu

TURN_MS = 60.0  # how long a model is timed before the next one's turn
MOST_RUNS = 50
WARM_UP_RUNS = 3
RESTARTS = 3
SPREAD = (10, 50, 90)  # percentiles over rounds


@dataclass(frozen=True, slots=True)
class Conditions:
    """Under what a model is timed. threads: None for all cores; batch, size (H, W): None for the model's own."""

    threads: int | None = None
    batch: int | None = None
    size: tuple[int, int] | None = None
    rounds: int = 24


@dataclass(slots=True)
class Timing:
    """One model's times in ms: `turns` holds those of each round. shapes: of its inputs, by name."""

    path: str
    shapes: dict[str, list[int]] = field(default_factory=dict)
    turns: list[list[float]] = field(default_factory=list)

    @property
    def median_ms(self) -> float:
        """Of the rounds' medians."""
        return float(np.median(self.medians))

    @property
    def p90_ms(self) -> float:
        """What nine runs of ten stay below."""
        return float(np.percentile(np.concatenate(self.turns), 90))

    @property
    def medians(self) -> list[float]:
        """One a round."""
        return [float(np.median(turn)) for turn in self.turns]

    def ratio_to(self, other: Timing) -> tuple[float, float, float]:
        """Times of `other`'s time, round by round: the 10th, 50th and 90th percentile."""
        ratios = [own / its for own, its in zip(self.medians, other.medians, strict=True)]
        low, middle, high = np.percentile(ratios, SPREAD)
        return float(low), float(middle), float(high)


@dataclass(frozen=True, slots=True)
class Benchmark:
    """What was measured. version: of ONNX Runtime."""

    cpu: Cpu
    conditions: Conditions
    threads: int
    version: str
    timings: tuple[Timing, ...]

    def as_dict(self) -> dict[str, Any]:
        """The object that `--json` prints; `speedup` is the first model's median over the second's."""
        first = self.timings[0]
        models = [
            {
                "path": timing.path,
                "inputs": timing.shapes,
                "median_ms": timing.median_ms,
                "p90_ms": timing.p90_ms,
                "ratio_to_first": list(timing.ratio_to(first)),
            }
            for timing in self.timings
        ]
        speedup = first.median_ms / self.timings[1].median_ms if len(self.timings) > 1 else None
        return {
            "schema": 1,
            "onnxruntime": self.version,
            "threads": self.threads,
            "rounds": self.conditions.rounds,
            "cpu": self.cpu.as_dict(),
            "models": models,
            "speedup": speedup,
        }


def benchmark(
    paths: Sequence[str],
    conditions: Conditions,
    *,
    version: str,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> Benchmark:
    """Time `paths` under the same conditions. Raises QconvError for a model that does not load or run."""
    for path in paths:
        if not os.path.isfile(path):
            raise QconvError(f"{path} does not exist, or is no file.", "check the path of the model.")
    cpu = this_cpu()
    threads = conditions.threads or cpu.cores
    timings = tuple(Timing(path) for path in paths)
    left, done = conditions.rounds, 0
    for restart in range(min(RESTARTS, conditions.rounds)):
        rounds = -(-left // (RESTARTS - restart)) if conditions.rounds >= RESTARTS else 1
        left -= rounds
        with contextlib.ExitStack() as stack:
            workers = []
            for timing in timings:
                worker = Worker(timing.path, conditions, threads)
                stack.callback(worker.close)
                timing.shapes = worker.shapes
                workers.append(worker)
            runs = [_runs_a_turn(worker) for worker in workers]
            for turn in range(rounds):
                order = range(len(workers)) if turn % 2 == 0 else reversed(range(len(workers)))
                for index in order:
                    timings[index].turns.append(workers[index].time(runs[index]))
                done += 1
                progress("benchmark", done, conditions.rounds)
    return Benchmark(cpu, conditions, threads, version, timings)


def _runs_a_turn(worker: Worker) -> int:
    worker.time(WARM_UP_RUNS)
    return int(np.clip(TURN_MS / np.median(worker.time(WARM_UP_RUNS)), 1, MOST_RUNS))


class Worker:
    """The parent's end of a process that holds one model. Raises QconvError where it cannot be loaded or run."""

    def __init__(self, path: str, conditions: Conditions, threads: int) -> None:
        self.path = path
        # -P: a folder called numpy where the user stands must not be taken for the library
        command = [sys.executable, "-P", "-m", "qconv.runtime.worker"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        wishes = {"model": path, "threads": threads, "batch": conditions.batch, "size": conditions.size}
        try:
            answer = self._ask(json.dumps(wishes))
            if "error" in answer:
                raise QconvError(*answer["error"])
        except BaseException:
            self.close()
            raise
        self.shapes: dict[str, list[int]] = answer["shapes"]

    def time(self, runs: int) -> list[float]:
        """Milliseconds of each of `runs` runs."""
        return list(map(float, self._ask(str(runs))))

    def _ask(self, line: str) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(f"{line}\n")
            self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            status = self._process.wait()
            raise QconvError(
                f"The process that ran {self.path} ended with status {status}.",
                "it may have run out of memory: try a smaller --batch.",
            )
        return json.loads(answer)

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.kill()  # it may be in the middle of a long run
        self._process.wait()
        self._process.stdout.close()
