"""One width for all ranges: against networks of which it is known what they need."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from qconv.calibration.observer import observe, open_observed_session
from qconv.calibration.range_estimators import sketch_contents_for
from qconv.config.choices import LayerBits, WeightGranularity
from qconv.config.recipe import Recipe
from qconv.config.targets import TARGETS
from qconv.metrics.output_parts import NO_PARTS
from qconv.planning.planner import make_plan
from qconv.quantization.parameters import NO_SET_RANGES
from qconv.reporter import Reporter
from qconv.runtime.session import Session
from qconv.search.candidate import FoldedNetwork
from qconv.search.loudest_images import PickedImages
from qconv.search.output_noise import OutputNoise, with_fine_weights
from qconv.search.range_widths import WIDTHS, _blend, choose_range_width
from tests.support.models import loaded, network

ONE = np.ones((1, 1, 1, 1), np.float32)
TOP = 40.0


def pictures() -> list[NDArray[np.float32]]:
    """Noise up to 1 in 40 images; the last one has an object in one place."""
    xs = np.random.default_rng(0).uniform(0, 1, (40, 1, 1, 16, 16)).astype(np.float32)
    xs[-1, 0, 0, 8, 8] = TOP
    return list(xs)


def chosen(body: str, set_ranges: dict[str, tuple[float, float]] | None = None, **weights: NDArray) -> dict[str, float]:
    """The upper ends of ranges that are chosen, by tensor; empty where the calibrator's own stay."""
    model, recipe = loaded(network(body, ("N", 1, 16, 16), w=ONE, v=ONE, **weights)), Recipe()
    plan, xs = make_plan(model, recipe, TARGETS["ort-cpu"]), pictures()
    observers = list(plan.observers(sketch_contents_for(recipe)))
    sketches = observe(open_observed_session(model, observers, 1), observers, ({"x": x} for x in xs))
    folded = FoldedNetwork(model, plan, sketches, set_ranges or NO_SET_RANGES)
    session = Session(model.proto().SerializeToString())
    last = [{"x": xs[-1]}, *({"x": x} for x in xs[:7])]
    images = PickedImages(last, [1.0] * 8, [session.run(["y"], feeds) for feeds in last])
    found = choose_range_width(folded, recipe, OutputNoise(["y"], images, NO_PARTS), Reporter())
    assert len(found.findings) == (found.ranges != folded.set_ranges)
    return {name: high for name, (_, high) in found.ranges.items()}


def test_ranges_reach_as_far_as_the_object_that_the_outputs_say() -> None:
    """The output is what stands out of the noise: clipped, it is lost on the only image that has some."""
    assert chosen("a = Conv(x, w) b = Relu(a) c = Conv(b, v) d = Sub(c, t) y = Relu(d)", t=np.float32(20))["b"] > 30


def test_ranges_stay_where_nothing_is_made_of_what_is_rare() -> None:
    body = "a = Conv(x, w) b = Relu(a) c = Conv(b, v) y = Clip(c, low, high)"
    assert chosen(body, low=np.float32(0), high=np.float32(1)) == {}


def test_what_is_set_stays() -> None:
    body = "a = Conv(x, w) b = Relu(a) c = Conv(b, v) d = Sub(c, t) y = Relu(d)"
    assert chosen(body, {"b": (0.0, 39.0)}, t=np.float32(20))["b"] == 39


def test_widths_are_steps_between_both_ends() -> None:
    """Half way in the geometric sense; an end at zero, or on the other side of it, stays."""
    low, high = _blend((-1.0, 2.0), (-4.0, 8.0), 0.5)
    assert (low, high) == pytest.approx((-2, 4))
    assert _blend((-1.0, 2.0), (-4.0, 8.0), 1.0) == pytest.approx((-4, 8))
    assert _blend((0.0, 2.0), (-4.0, 8.0), 0.5) == pytest.approx((0, 4))
    assert math.isclose(max(WIDTHS), 1)


@pytest.mark.parametrize(
    ("options", "bits", "pack"),
    [
        ({"weight_bits": 4, "pack": True, "edge_bits": 4}, 8, False),
        ({"weight_bits": 2, "bit_allocation": "both", "calibrator": "minmax"}, 8, False),
        ({"weight_bits": 3, "bit_allocation": "weights"}, 8, False),
        ({"weight_bits": 16}, 16, False),
        ({"layer_bits": (("a", LayerBits(4)), ("b", LayerBits(in_float=True))), "pack": True}, 8, False),
        ({"target_size": 0.2, "pack": True}, 8, False),
        ({"weight_bits": 4, "weight_granularity": WeightGranularity.PER_BLOCK}, 8, False),
    ],
)
def test_weights_of_few_bits_are_tried_with_8(options: dict[str, Any], bits: int, pack: bool) -> None:
    """Whatever goes with few bits alone is left out, so that the recipe is one that can be."""
    found = with_fine_weights(Recipe(**options))
    assert (found.weight_bits, found.pack) == (bits, pack)
    assert all(own.weights is None for _, own in found.layer_bits)
    assert found.allocates_activations == Recipe(**options).allocates_activations
    assert not found.allocates_weights
