"""Time of one run, models in turns, by qconv's own benchmark: a process each, only one at work at any time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from qconv.runtime.benchmark import TimingConditions, benchmark

PAIRS = (("qconv", "peer"), ("float", "qconv"), ("float", "peer"))


def measure(models: Mapping[str, Path], size: tuple[int, int], threads: int, rounds: int) -> dict[str, Any]:
    """Median ms of each model, and the ratios of interest with their 10th and 90th percentile over rounds.

    size: height and width of pictures, where models leave them open.
    """
    conditions = TimingConditions(threads=threads, size=size, rounds=rounds)
    found = benchmark([str(path) for path in models.values()], conditions, version=ort.__version__)
    timings = dict(zip(models, found.timings, strict=True))
    result: dict[str, Any] = {"rounds": rounds, "cpu": found.cpu.in_words()}
    result["median_ms"] = {name: float(np.median(timing.medians)) for name, timing in timings.items()}
    for top, bottom in PAIRS:
        if top in timings and bottom in timings:
            result[f"{top}/{bottom}"] = list(timings[top].ratio_to(timings[bottom]))
    return result
