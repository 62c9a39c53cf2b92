"""Timing in turns: the arithmetic on made-up times, and the real command on small models. No test asserts on time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from qconv.errors import QconvError
from qconv.report.text import format_benchmark as printed
from qconv.runtime.benchmark import Benchmark, Timing, TimingConditions, Worker, benchmark, parse_cpu_flags
from qconv.runtime.session import Session, make_random_inputs
from tests.support.models import network

CIFAR = Path(__file__).parents[1] / "models" / "cifar_mobilenet.onnx"


def found(*turns: list[list[float]]) -> Benchmark:
    timings = tuple(Timing(f"{i}.onnx", {"x": [1, 3, 8, 8]}, turn) for i, turn in enumerate(turns))
    return Benchmark(
        parse_cpu_flags("x86_64", "cpu", {"avx2"}), TimingConditions(rounds=len(turns[0])), 2, "1.0", timings
    )


def test_ratios_are_taken_within_a_round() -> None:
    """The machine halves its speed in the middle: the ratio does not notice."""
    slow = [[10.0, 12.0, 11.0], [20.0, 22.0, 30.0]]  # medians 11, 22
    fast = [[5.5, 5.0, 6.0], [11.0, 1.0, 12.0]]  # medians 5.5, 11
    result = found(slow, fast)
    assert result.timings[1].ratio_to(result.timings[0]) == (0.5, 0.5, 0.5)
    assert result.as_dict()["speedup"] == pytest.approx(2.0)
    assert result.timings[0].median_ms == 16.5


def test_p90_is_over_all_runs() -> None:
    turns = [[float(n) for n in range(0, 6)], [float(n) for n in range(6, 11)]]
    assert Timing("a", {}, turns).p90_ms == pytest.approx(9.0)


def test_the_spread_is_that_of_rounds() -> None:
    rounds = np.linspace(1, 2, 11)
    result = found([[1.0]] * 11, [[float(r)] for r in rounds])
    assert result.timings[1].ratio_to(result.timings[0]) == pytest.approx((1.1, 1.5, 1.9))


def test_one_model_has_no_speedup() -> None:
    assert found([[1.0]]).as_dict()["speedup"] is None
    assert "times the first" not in printed(found([[1.0]]), verbose=True)


def test_the_text_says_who_is_faster_and_what_the_cpu_lacks() -> None:
    text = printed(found([[2.0], [2.0]], [[1.0], [4.0]]), verbose=False)
    assert "faster in 1 of 2 rounds" in text
    assert "lacks VNNI" in text
    assert "input x 1x3x8x8" in text


def test_models_are_timed_in_processes_of_their_own() -> None:
    result = benchmark([str(CIFAR), str(CIFAR)], TimingConditions(threads=1, rounds=4), version="1.0")
    assert [len(timing.turns) for timing in result.timings] == [4, 4]
    assert all(ms > 0 for timing in result.timings for turn in timing.turns for ms in turn)
    assert result.timings[0].shapes == {"input": [1, 3, 32, 32]}
    assert json.dumps(result.as_dict())


def test_no_worker_is_left_behind() -> None:
    worker = Worker(str(CIFAR), TimingConditions(), 1)
    number = worker._process.pid
    worker.close()
    with pytest.raises(ProcessLookupError):
        os.kill(number, 0)


def test_a_worker_ends_with_its_parent() -> None:
    lines = json.dumps({"model": str(CIFAR), "name": "m", "threads": 1, "batch": None, "size": None}) + "\n2\n"
    done = subprocess.run(
        [sys.executable, "-m", "qconv.runtime.benchmark_worker"],
        input=lines,
        capture_output=True,
        text=True,
        timeout=50,
        check=True,
    )
    ready, times = map(json.loads, done.stdout.splitlines())
    assert "shapes" in ready
    assert len(times) == 2


def test_a_worker_that_dies_is_told_of() -> None:
    worker = Worker(str(CIFAR), TimingConditions(), 1)
    worker._process.kill()
    with pytest.raises(QconvError, match="ended with status -9"):
        worker.time(1)
    worker.close()


@pytest.mark.parametrize(
    ("conditions", "fact"),
    [
        (TimingConditions(size=(16, 16)), "takes pictures of 32x32, not 16x16"),
        (TimingConditions(batch=2), "takes batches of 1, not 2"),
    ],
)
def test_what_the_model_fixes_cannot_be_wished_away(conditions: TimingConditions, fact: str, tmp_path: Path) -> None:
    model = tmp_path / "fixed.onnx"
    proto = onnx.load(CIFAR)
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    onnx.save(proto, model)
    with pytest.raises(QconvError, match=fact):
        benchmark([str(model)], conditions, version="")


def test_open_sizes_are_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "open.onnx"
    path.write_bytes(network("y = Relu(x)", x=("N", 3, "H", "W")).SerializeToString())
    session = Session(str(path))
    with pytest.raises(QconvError, match=r"open shape \?x3x\?x\?") as error:
        make_random_inputs(session, None, None)
    assert "--size" in error.value.hint
    assert make_random_inputs(session, 2, (5, 6))["x"].shape == (2, 3, 5, 6)


def test_a_missing_model_is_an_error() -> None:
    with pytest.raises(QconvError, match="does not exist"):
        benchmark(["none.onnx"], TimingConditions(), version="")


def test_what_does_not_fit_into_memory_is_an_error() -> None:
    with pytest.raises(QconvError, match="does not fit into memory"):
        Worker(str(CIFAR), TimingConditions(batch=10**9), 1)
