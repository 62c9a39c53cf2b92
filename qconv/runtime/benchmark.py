"""Measures the latency of models in turns, each in a process of its own, and describes the CPU.

Two sessions in one process disturb each other with spinning threads, and a machine's speed drifts from second to
second. So every model has a process, the parent gives turns, and only medians within one round are compared.
Processes restart a few times: the place of a process in memory makes it some percent faster or slower for its whole
life.

Two kinds of instruction decide whether 8 bits pay: wide vectors (AVX2, AVX512, NEON), and a dot product of bytes that
accumulates in 32 bits (VNNI on x86, DotProd and I8MM on ARM). An x86 without VNNI adds pairs in 16 bits, which
saturates.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from qconv.config.choices import check_run_options, require_range, require_size, take_types
from qconv.errors import QconvError
from qconv.reporter import Reporter

X86_FEATURES = {
    "avx2": ("avx2",),
    "avx512": ("avx512f",),
    "vnni": ("avx512_vnni", "avx_vnni"),
    "amx_int8": ("amx_int8",),
}

ARM_FEATURES = {
    "neon": ("asimd", "advsimd", "neon"),
    "dot_product": ("asimddp", "feat_dotprod"),
    "i8mm": ("i8mm", "feat_i8mm"),
}

X86_MACHINES = frozenset({"x86_64", "amd64", "i386", "i686"})

FEATURE_NAMES = {
    "avx2": "AVX2",
    "avx512": "AVX512",
    "vnni": "VNNI",
    "amx_int8": "AMX",
    "neon": "NEON",
    "dot_product": "dot product",
    "i8mm": "I8MM",
}


@dataclass(frozen=True, slots=True)
class Cpu:
    """A processor. features: the instruction sets that matter, each with whether it is there; None where unknown.

    cores: those that this process may use.
    """

    name: str
    machine: str
    cores: int
    features: dict[str, bool | None]

    @property
    def saturates(self) -> bool | None:
        """Whether products of u8 and s8 are added in 16 bits; None where that is not known."""
        if self.machine not in X86_MACHINES:
            return False
        vnni = self.features["vnni"]
        return None if vnni is None else not vnni

    def as_dict(self) -> dict[str, object]:
        """What `--json` prints."""
        return {"name": self.name, "machine": self.machine, "cores": self.cores, "features": self.features}

    def in_words(self) -> str:
        """One line: the name, the features it has and those it lacks."""
        parts = []
        for there, word in ((True, "has"), (False, "lacks"), (None, "not known:")):
            found = [FEATURE_NAMES[name] for name, has in self.features.items() if has is there]
            if found:
                parts.append(f"{word} {', '.join(found)}")
        return f"{self.name}, {self.cores} cores; {'; '.join(parts) or 'no feature of it is known'}"

    def advice(self) -> str:
        """Advice for integer networks on this CPU; empty where none is needed."""
        if self.saturates:
            return (
                "this CPU lacks VNNI: it multiplies 8 bits no faster than AVX2 allows, and adds pairs of products in "
                "16 bits, which saturates where weights are large"
            )
        if self.features.get("dot_product") is False:
            return "this CPU lacks the dot product instructions: expect little from 8 bits"
        return ""


def detect_cpu() -> Cpu:
    """The CPU of this machine. Sources: /proc/cpuinfo, on macOS sysctl."""
    machine = platform.machine().lower()
    name, flags = read_cpuinfo(Path("/proc/cpuinfo")) if platform.system() != "Darwin" else _read_sysctl()
    return parse_cpu_flags(machine, name, flags)


def parse_cpu_flags(machine: str, name: str, flags: set[str]) -> Cpu:
    """The CPU by the kernel's names of its features. An empty set leaves them unknown."""
    table = X86_FEATURES if machine in X86_MACHINES else ARM_FEATURES
    features = {feature: bool(flags.intersection(names)) if flags else None for feature, names in table.items()}
    return Cpu(name or machine or "unknown", machine, _count_cores(), features)


def read_cpuinfo(cpuinfo: Path) -> tuple[str, set[str]]:
    """Name and flags of the first processor in /proc/cpuinfo; empty where there is none."""
    try:
        lines = cpuinfo.read_text(errors="replace").splitlines()
    except OSError:
        return "", set()
    found = {key.strip().lower(): text.strip() for key, _, text in (line.partition(":") for line in reversed(lines))}
    return found.get("model name", ""), set((found.get("flags") or found.get("features") or "").lower().split())


def _read_sysctl() -> tuple[str, set[str]]:
    done = subprocess.run(["sysctl", "-a"], capture_output=True, text=True, check=False)
    found = dict(line.partition(": ")[::2] for line in done.stdout.splitlines())
    words = f"{found.get('machdep.cpu.features', '')} {found.get('machdep.cpu.leaf7_features', '')}".lower().split()
    on = {
        key.rpartition(".")[2].lower() for key, text in found.items() if key.startswith("hw.optional.") and text == "1"
    }
    return found.get("machdep.cpu.brand_string", ""), {*words, *on}


def _count_cores() -> int:
    """The number of cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def peak_rss_mb() -> float | None:
    """The largest resident memory of this process so far; None where the system does not tell."""
    with contextlib.suppress(OSError, StopIteration):  # what getrusage tells on Linux may be the parent's
        lines = Path("/proc/self/status").read_text().splitlines()
        line = next(line for line in lines if line.startswith("VmHWM:"))
        return round(int(line.split()[1]) / 2**10, 1)
    if sys.platform == "win32":
        peak = _peak_working_set()
        return None if peak is None else round(peak / 2**20, 1)
    try:
        import resource  # not every system has it
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10), 1)


def _peak_working_set() -> int | None:
    """The peak working set on Windows, in bytes: GetProcessMemoryInfo (psapi.h, PROCESS_MEMORY_COUNTERS)."""
    import ctypes

    class Counters(ctypes.Structure):
        _fields_ = [
            ("cb", ctypes.c_uint32),
            ("PageFaultCount", ctypes.c_uint32),
            ("PeakWorkingSetSize", ctypes.c_size_t),
            ("others", ctypes.c_size_t * 7),
        ]

    counters = Counters()
    counters.cb = ctypes.sizeof(counters)
    try:
        kernel: Any = ctypes.CDLL("kernel32")
        kernel.GetCurrentProcess.restype = ctypes.c_void_p
        process = ctypes.c_void_p(kernel.GetCurrentProcess())
        told = kernel.K32GetProcessMemoryInfo(process, ctypes.byref(counters), counters.cb)
    except (OSError, AttributeError):
        return None
    return int(counters.PeakWorkingSetSize) if told else None


TURN_MS = 60.0  # how long a model is timed before the next one's turn

MOST_RUNS = 50

WARM_UP_RUNS = 3

RESTARTS = 3

TIMING_PERCENTILES = (10, 50, 90)  # percentiles over rounds


@dataclass(frozen=True, slots=True)
class TimingConditions:
    """The conditions of a benchmark. Raises QconvError for values that cannot be.

    threads: None for all cores. batch, size (H, W): None for the model's own.
    """

    threads: int | None = None
    batch: int | None = None
    size: tuple[int, int] | None = None
    rounds: int = 24

    def __post_init__(self) -> None:
        take_types(self)
        check_run_options(self.threads)
        require_range("--batch", self.batch, 1)
        require_size(self.size)
        require_range("--rounds", self.rounds, 1)


@dataclass(slots=True)
class Timing:
    """The times of one model in ms. path: what it is called. turns: those of each round. shapes: of its inputs."""

    path: str
    shapes: dict[str, list[int]] = field(default_factory=dict)
    turns: list[list[float]] = field(default_factory=list)

    @property
    def median_ms(self) -> float:
        """The median of the rounds' medians."""
        return float(np.median(self.medians))

    @property
    def p90_ms(self) -> float:
        """The 90th percentile of all runs."""
        return float(np.percentile(np.concatenate(self.turns), 90))

    @property
    def medians(self) -> list[float]:
        """The median of each round."""
        return [float(np.median(turn)) for turn in self.turns]

    def ratio_to(self, other: Timing) -> tuple[float, float, float]:
        """The ratio to `other`'s time, round by round: 10th, 50th and 90th percentile."""
        ratios = [own / its for own, its in zip(self.medians, other.medians, strict=True)]
        low, middle, high = np.percentile(ratios, TIMING_PERCENTILES)
        return float(low), float(middle), float(high)


@dataclass(frozen=True, slots=True)
class Benchmark:
    """The result of a benchmark. version: of ONNX Runtime."""

    cpu: Cpu
    conditions: TimingConditions
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
    conditions: TimingConditions,
    *,
    version: str,
    reporter: Reporter | None = None,
    names: Sequence[str] | None = None,
) -> Benchmark:
    """Time models under the same conditions.

    Args:
        paths: Their files.
        conditions: The conditions.
        version: Of ONNX Runtime.
        reporter: Hears of progress.
        names: What the models are called; None for their paths.

    Raises:
        QconvError: There is no model, or one does not load or run.
    """
    if not paths:
        raise QconvError("There is no model to time.", "pass one, or several to compare.")
    for path in paths:
        if not os.path.isfile(path):
            fact = "is no file" if os.path.exists(path) else "does not exist"
            raise QconvError(f"{path} {fact}.", "check the path of the model.")
    cpu = detect_cpu()
    threads = conditions.threads or cpu.cores
    timings = tuple(Timing(name) for name in names or paths)
    left, done = conditions.rounds, 0
    for restart in range(min(RESTARTS, conditions.rounds)):
        rounds = -(-left // (RESTARTS - restart)) if conditions.rounds >= RESTARTS else 1
        left -= rounds
        with contextlib.ExitStack() as stack:
            workers = []
            for path, timing in zip(paths, timings, strict=True):
                worker = Worker(path, conditions, threads, timing.path)
                stack.callback(worker.close)
                timing.shapes = worker.shapes
                workers.append(worker)
            runs = [_runs_per_turn(worker) for worker in workers]
            for turn in range(rounds):
                order = range(len(workers)) if turn % 2 == 0 else reversed(range(len(workers)))
                for index in order:
                    timings[index].turns.append(workers[index].time(runs[index]))
                done += 1
                if reporter is not None:
                    reporter.progress("benchmark", done, conditions.rounds)
    return Benchmark(cpu, conditions, threads, version, timings)


def _runs_per_turn(worker: Worker) -> int:
    worker.time(WARM_UP_RUNS)
    return int(np.clip(TURN_MS / np.median(worker.time(WARM_UP_RUNS)), 1, MOST_RUNS))


class Worker:
    """The parent's end of a process that holds one model. Raises QconvError where it cannot be loaded or run.

    name: what the model is called; None for its path.
    """

    def __init__(self, path: str, conditions: TimingConditions, threads: int, name: str | None = None) -> None:
        self.name = path if name is None else name
        # -P: a folder called numpy where the user stands must not be taken for the library
        command = [sys.executable, "-P", "-m", "qconv.runtime.benchmark_worker"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        request = {"model": path, "name": self.name, "threads": threads}
        request |= {"batch": conditions.batch, "size": conditions.size}
        try:
            answer = self._ask(json.dumps(request))
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
                f"The process that ran {self.name} ended with status {status}.",
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
