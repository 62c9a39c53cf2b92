"""Noise by calibration's statistics: against rounding itself, and end to end on a network with one loud tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qconv.calibration.observer import observe, open_observed_session
from qconv.calibration.range_estimators import sketch_contents_for
from qconv.config.data_options import DataOptions
from qconv.config.recipe import Recipe
from qconv.config.targets import TARGETS
from qconv.ir.files import Source
from qconv.pipeline.quantize import quantize
from qconv.planning.planner import make_plan
from qconv.quantizer import QuantSpec
from qconv.results.quantize import Report
from qconv.search.candidate import FoldedNetwork
from qconv.search.local_noise import estimate_noises, relative_noise
from tests.support.models import loaded, network

FAST = Recipe(effort="fast", threads=1)
BODY = """a = Conv<pads=[1,1,1,1]>(x, w) s = Sigmoid(a) b = Mul(a, s)
          c = Conv<pads=[1,1,1,1]>(b, v) t = Sigmoid(c) d = Mul(c, t) y = Conv<pads=[1,1,1,1]>(d, u)"""
SIDE, CHANNELS = 48, 64


def weights(loud: float) -> dict[str, np.ndarray]:
    """One channel of the first layer reaches `loud` times as far as the others, which its reader makes up for."""
    rng = np.random.default_rng(0)
    w, v, u = (
        (rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)
        for shape in ((CHANNELS, 3, 3, 3), (CHANNELS, CHANNELS, 3, 3), (4, CHANNELS, 3, 3))
    )
    w[0] *= loud
    v[:, 0] /= loud
    return {"w": w, "v": v, "u": u}


def batches(count: int) -> list[dict[str, np.ndarray]]:
    xs = np.random.default_rng(1).standard_normal((count, 1, 3, SIDE, SIDE)).astype(np.float32)
    return [{"x": x} for x in xs]


def test_the_noise_of_a_tensor_is_that_of_rounding_it() -> None:
    """Oracle: the numbers rounded, those beyond the range clipped, over the sum of squares."""
    model = loaded(network(BODY, ("N", 3, SIDE, SIDE), **weights(1.0)))
    plan = make_plan(model, FAST, TARGETS["ort-cpu"])
    observers = list(plan.observers(sketch_contents_for(FAST)))
    feeds = batches(8)
    sketches = observe(open_observed_session(model, observers, 1), observers, iter(feeds))
    x = np.stack([feed["x"] for feed in feeds])
    for low, high in ((-4.0, 4.0), (-1.0, 1.0), (-0.5, 3.0)):
        params = QuantSpec(8, signed=False, symmetric=False).from_range(low, high)
        rounded = params.dequantize(params.quantize(x))
        want = float(np.sum((x - rounded) ** 2) / np.sum(x**2))
        assert relative_noise(sketches["x"], params) == pytest.approx(want, rel=0.1)
    folded = FoldedNetwork(model, plan, sketches, {})
    found = {own.members[0].name: own.noise for own in estimate_noises(folded, FAST)}
    assert found.keys() >= {"x", "a", "b", "d"}
    assert all(0 < noise < 0.01 for noise in found.values())


def run_fast(folder: Path, loud: float, **options: Any) -> Report:
    for index, feed in enumerate(batches(16)):
        np.save(folder / f"{index}.npy", feed["x"][0])
    proto = network(BODY, ("N", 3, SIDE, SIDE), **weights(loud))
    recipe = Recipe(effort="fast", threads=1, equalize=False, **options)
    report, _ = quantize(Source("m", None, proto.SerializeToString()), None, recipe, DataOptions((str(folder),)))
    return report


def test_a_loud_tensor_is_left_in_float_at_the_fast_effort(tmp_path: Path) -> None:
    """The channel that reaches 200 times as far takes all codes of x * Sigmoid(x) from the others."""
    divided, whole = (run_fast(tmp_path, 200.0, float_budget=budget) for budget in (1.0, 0.0))
    assert whole.precision is None
    assert whole.verify.sqnr_db < 20
    assert divided.precision is not None
    assert divided.precision.chosen.nodes > 0
    assert divided.verify.sqnr_db > whole.verify.sqnr_db + 2
    kept = {island.node: island.why for island in divided.audit.placed}
    assert kept
    assert all(why.startswith("accuracy: ") for why in kept.values())


def test_nothing_is_spent_on_a_network_without_loud_tensors(tmp_path: Path) -> None:
    report = run_fast(tmp_path, 1.0)
    assert report.verify.sqnr_db > 20
    assert not report.audit.placed
    assert report.precision is not None
    assert [point.chosen for point in report.precision.points] == [True]
