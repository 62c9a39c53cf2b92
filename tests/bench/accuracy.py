"""A quantized file against the float one, on test pictures: SQNR, agreement, top-1.

SQNR = 10 log10(sum ref^2 / sum (ref - q)^2) per output over all pictures, in dB; None where nothing differs
agreement = share of argmax positions along axis 1 that are equal
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from qconv.metrics.similarity import mcnemar_p_value
from tests.bench.cases import Array, Case


def session(model: Path, *, reference: bool = False, threads: int = 1) -> ort.InferenceSession:
    """reference: without graph optimizations, so that Q/DQ are computed one by one, in float.

    One thread where two sessions work in turns: their spinning pools would slow each other down.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    if reference:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


@dataclass
class Tally:
    """Sums over pictures for one output."""

    signal: float = 0.0
    noise: float = 0.0
    equal: int = 0
    positions: int = 0

    def add(self, ref: Array, got: Array) -> None:
        wide = ref.astype(np.float64)
        self.signal += float(np.square(wide).sum())
        self.noise += float(np.square(wide - got).sum())
        same = ref.argmax(1) == got.argmax(1)
        self.equal += int(same.sum())
        self.positions += same.size

    @property
    def sqnr_db(self) -> float | None:
        if self.noise == 0:
            return None
        return 10 * math.log10(self.signal / self.noise) if self.signal else -math.inf


def score(
    case: Case,
    float_model: Path,
    quantized: Path,
    tests: Sequence[Path],
    labels: Sequence[int] | None,
    *,
    reference: bool = False,
) -> dict[str, Any]:
    """Run both models on every test picture. The float one is always run optimized."""
    ours, theirs = session(float_model), session(quantized, reference=reference)
    outputs = [output.name for output in ours.get_outputs()]
    tallies = {name: Tally() for name in outputs}
    right: list[tuple[bool, bool]] = []
    for index, path in enumerate(tests):
        x = case.prep(path)
        refs = ours.run(outputs, {ours.get_inputs()[0].name: x})
        gots = theirs.run(outputs, {theirs.get_inputs()[0].name: x})
        for name, ref, got in zip(outputs, refs, gots, strict=True):
            tallies[name].add(ref, got)
        if labels is not None:
            right.append((int(refs[0].argmax()) == labels[index], int(gots[0].argmax()) == labels[index]))
    return {"pictures": len(tests), **summary(case, tallies, right)}


def summary(case: Case, tallies: dict[str, Tally], right: Sequence[tuple[bool, bool]]) -> dict[str, Any]:
    """right: of each labelled picture, whether the float model and whether the quantized one had its class."""
    found = [
        {"name": n, "sqnr_db": t.sqnr_db, "agreement": t.equal / t.positions if case.class_scores else None}
        for n, t in tallies.items()
    ]
    return {**_lowest(found), "outputs": found, **_top1(right)}


def _lowest(outputs: list[dict[str, Any]]) -> dict[str, float | None]:
    lowest = {}
    for key in ("agreement", "sqnr_db"):
        numbers = [output[key] for output in outputs if output[key] is not None]
        lowest[key] = min(numbers) if numbers else None
    return lowest


def _top1(right: Sequence[tuple[bool, bool]]) -> dict[str, Any]:
    if not right:
        return {"top1": None, "flips": None}
    before, after = (100 * float(np.mean(column)) for column in zip(*right, strict=True))
    won, lost = sum(b > a for a, b in right), sum(a > b for a, b in right)
    flips = {"won": won, "lost": lost, "p_value": mcnemar_p_value(won, lost)}
    return {"top1": {"float": before, "quantized": after}, "flips": flips}
