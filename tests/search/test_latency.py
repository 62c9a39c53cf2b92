"""Placement by measured times: the fastest of what was tried is taken, on a clock made up."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

from qconv.config.data_options import DataOptions
from qconv.config.recipe import Recipe
from qconv.errors import QconvError
from qconv.ir.files import Source
from qconv.pipeline.quantize import quantize
from qconv.planning.operator_costs import NodeCost
from qconv.results.quantize import Report
from qconv.runtime.benchmark import Benchmark, Timing, TimingConditions, detect_cpu
from qconv.search import latency
from tests.support.models import network

SAME = "pads=[1,1,1,1]"
BODY = f"a = Conv<{SAME}>(x, w)  b = Relu(a)  c = Conv<group=8, {SAME}>(b, d)  y = Conv(c, p)"
WEIGHTS = {"w": (8, 3, 3, 3), "d": (8, 1, 3, 3), "p": (8, 8, 1, 1)}


def clock(monkeypatch: pytest.MonkeyPatch, costs: dict[str, tuple[float, float]], whole: dict[int, float]) -> None:
    """Single nodes take (float, integer) us; the file with the given number takes so many ms, others 10."""
    monkeypatch.setattr(
        latency, "_measure_costs", lambda *_: {name: NodeCost(*pair, measured=True) for name, pair in costs.items()}
    )

    def timed(paths: list[str], conditions: TimingConditions, **_: object) -> Benchmark:
        timings = tuple(Timing(path, {}, [[whole.get(i, 10.0)]]) for i, path in enumerate(paths))
        return Benchmark(detect_cpu(), conditions, 1, "", timings)

    monkeypatch.setattr(latency, "benchmark", timed)
    monkeypatch.setattr(latency, "place_by_cost_table", lambda *_: {})  # the table has nothing to say


@pytest.fixture
def samples(tmp_path: Path) -> str:
    folder = tmp_path / "samples"
    folder.mkdir()
    for number in range(4):
        np.save(folder / f"{number}.npy", np.random.default_rng(number).normal(size=(3, 16, 16)).astype(np.float32))
    return str(folder)


def tuned(samples: str) -> tuple[Report, onnx.ModelProto]:
    proto = network(BODY, (1, 3, 16, 16), **WEIGHTS)
    recipe, data = Recipe(threads=1, tune_latency=True), DataOptions((samples,))
    report, made = quantize(Source("m", None, proto.SerializeToString()), None, recipe, data)
    assert made is not None
    return report, onnx.load_from_string(made)


COSTS = {"a": (500.0, 100.0), "c": (10.0, 900.0), "y": (500.0, 100.0)}


def test_the_fastest_is_taken(monkeypatch: pytest.MonkeyPatch, samples: str) -> None:
    clock(monkeypatch, COSTS, {0: 9.0, 1: 8.0, 2: 7.0, 3: 4.0})
    report, _ = tuned(samples)
    assert [island.node for island in report.audit.placed] == ["c"]
    (change,) = (found for found in report.findings if found.step == "tune")
    assert "float 9.000 ms" in change.what
    assert "by times of single nodes 4.000 ms" in change.what
    assert report.recipe["tune_latency"] is True


def test_all_integers_are_taken_where_they_are_faster(monkeypatch: pytest.MonkeyPatch, samples: str) -> None:
    """Single nodes have promised what the whole does not keep."""
    clock(monkeypatch, COSTS, {0: 9.0, 1: 3.0, 2: 5.0, 3: 4.0})
    report, _ = tuned(samples)
    assert report.audit.placed == ()


def test_nothing_is_in_integers_where_that_is_fastest(monkeypatch: pytest.MonkeyPatch, samples: str) -> None:
    clock(monkeypatch, COSTS, {0: 1.0, 1: 3.0, 2: 1.0, 3: 4.0})
    report, _ = tuned(samples)
    assert report.audit.integer == 0
    assert {row.kind for row in report.tensors} == {"weight"}


def test_the_file_says_what_was_placed(monkeypatch: pytest.MonkeyPatch, samples: str) -> None:
    clock(monkeypatch, COSTS, {3: 1.0})
    _, proto = tuned(samples)
    carried = {entry.key: entry.value for entry in proto.metadata_props}
    assert json.loads(carried["qconv.placed"]) == {"faster in float": ["c"]}
    assert '"tune_latency": true' in carried["qconv.recipe"]


def test_it_really_measures(samples: str) -> None:
    report, _ = tuned(samples)
    (change,) = (found for found in report.findings if found.step == "tune")
    assert change.what.count(" ms") >= 2
    assert report.verify.sqnr_db is not None


def test_it_is_refused_where_nothing_can_be_placed() -> None:
    for options in ({"activation_bits": 4}, {"weight_bits": 16}, {"target": "generic"}):
        with pytest.raises(QconvError, match="--tune-latency"):
            Recipe(tune_latency=True, **options)  # type: ignore[arg-type]
