"""Gains of layers: lines against NumPy's own fit, networks whose outputs shrink against ONNX Runtime's float run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from copy import deepcopy

import numpy as np
import pytest
from numpy.typing import NDArray

from qconv.calibration.observer import observe, open_observed_session
from qconv.calibration.range_estimators import Range, sketch_contents_for
from qconv.config.choices import WeightGranularity
from qconv.config.recipe import Recipe
from qconv.config.targets import TARGETS
from qconv.planning.planner import make_plan
from qconv.quantization.gain_correction import GAINS, correct_gains, fit_lines
from qconv.quantization.layer import LayerParams
from qconv.reporter import Reporter
from qconv.runtime.session import Session
from qconv.search.candidate import FoldedNetwork, QuantizationSolution, build_quantized_model, round_to_nearest
from qconv.storage import ArrayStore, StoredArrays
from tests.support.models import loaded, network

EVERYTHING = (-np.inf, np.inf)
RNG = np.random.default_rng(3)
WEIGHTS = {
    "w": RNG.normal(size=(8, 3, 3, 3)).astype(np.float32),
    "v": RNG.normal(size=(8, 8, 3, 3)).astype(np.float32),
    "u": RNG.normal(size=(6, 8, 1, 1)).astype(np.float32),
}
BODY = "a = Conv(x, w) b = Relu(a) c = Conv(b, v) d = Relu(c) e = Conv(d, u) y = GlobalAveragePool(e)"
CLIPPED: dict[str, Range] = {"b": (0.0, 8.0), "d": (0.0, 60.0)}
"""An eighth of what is above zero is cut off."""

RECIPE = Recipe()
Solved = tuple[FoldedNetwork, Recipe, QuantizationSolution]


@contextlib.contextmanager
def held(*batches: Sequence[NDArray[np.float32]]) -> Iterator[list[StoredArrays]]:
    with contextlib.closing(ArrayStore(2**24)) as store:
        yield [StoredArrays([store.put(array) for array in arrays]) for arrays in batches]


def drawn(channels: int = 4) -> list[NDArray[np.float32]]:
    """Three batches of unlike size, around another mean in each channel."""
    rng = np.random.default_rng(1)
    means = 100 * np.arange(channels, dtype=np.float32)[:, None, None]
    return [rng.normal(size=(count, channels, 5, 6)).astype(np.float32) + means for count in (2, 1, 4)]


def by_channel(batches: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    return np.concatenate([np.moveaxis(x, 1, 0).reshape(x.shape[1], -1) for x in batches], axis=1)


def test_lines_are_least_squares() -> None:
    """Oracle: `numpy.polyfit` on all places of a channel at once."""
    wanted, rng = drawn(), np.random.default_rng(2)
    got = [(0.9 * x - 1 + 0.1 * rng.normal(size=x.shape)).astype(np.float32) for x in wanted]
    with held(wanted, got) as (y, q):
        lines = fit_lines(y, q, EVERYTHING)
    assert lines is not None
    expected = np.array([np.polyfit(b, a, 1) for a, b in zip(by_channel(wanted), by_channel(got), strict=True)])
    assert np.allclose(lines.gain, expected[:, 0], rtol=1e-3)
    assert np.allclose(lines.shift, expected[:, 1], atol=0.2)  # of 300
    after = by_channel([lines.applied(x) for x in got])
    assert np.allclose(after.mean(axis=1), by_channel(wanted).mean(axis=1), atol=1e-3)


def test_what_no_reader_sees_does_not_count() -> None:
    wanted = drawn(1)
    got = [np.where(x < 0, -5, x + 0.25).astype(np.float32) for x in wanted]
    with held(wanted, got) as (y, q):
        lines = fit_lines(y, q, (0.0, np.inf))
    assert lines is not None
    assert lines.gain == pytest.approx([1], abs=1e-4)
    assert lines.shift == pytest.approx([-0.25], abs=1e-4)


def test_a_channel_that_says_something_else_gets_the_mean_alone() -> None:
    wanted = drawn(2)
    got = [np.stack([np.random.default_rng(9).normal(size=x[:, 0].shape) - 3, x[:, 1]], axis=1) for x in wanted]
    with held(wanted, [x.astype(np.float32) for x in got]) as (y, q):
        lines = fit_lines(y, q, EVERYTHING)
    assert lines is not None
    assert lines.gain == pytest.approx([1, 1], abs=1e-5)
    assert lines.shift[0] == pytest.approx(by_channel(wanted)[0].mean() - by_channel(got)[0].mean(), abs=1e-4)
    assert lines.shift[1] == pytest.approx(0, abs=1e-4)


def test_gains_have_limits() -> None:
    wanted = drawn(2)
    got = [np.stack([x[:, 0] / 10, 10 * x[:, 1]], axis=1) for x in wanted]
    with held(wanted, got) as (y, q):
        lines = fit_lines(y, q, EVERYTHING)
    assert lines is not None
    assert lines.gain == pytest.approx([GAINS[1], GAINS[0]])


def test_few_places_say_nothing() -> None:
    few = [np.full((1, 3, 2, 2), 7.0, np.float32)]
    with held(few, [x / 2 for x in few]) as (y, q):
        assert fit_lines(y, q, EVERYTHING) is None


def test_noise_behind_a_relu_bends_no_line() -> None:
    """Places picked by the float network would: above zero there, noise of both signs is below it here."""
    rng = np.random.default_rng(4)
    q = [rng.normal(size=(8, 2, 20, 20)).astype(np.float32)]
    y = [(x + 0.5 * rng.normal(size=x.shape)).astype(np.float32) for x in q]
    with held(y, q) as (wanted, got):
        lines = fit_lines(wanted, got, (0.0, np.inf))
    assert lines is not None
    x = by_channel(q)[0]
    expected = np.polyfit(x[x > 0], np.maximum(by_channel(y)[0], 0)[x > 0], 1)
    assert (lines.gain[0], lines.shift[0]) == pytest.approx(tuple(expected), abs=1e-3)


@pytest.mark.parametrize("fault", ["shape", "infinite", "nothing"])
def test_no_lines_where_nothing_can_be_fitted(fault: str) -> None:
    wanted = drawn()
    got = [x.copy() for x in wanted]
    if fault == "shape":
        got[1] = got[1][:, :, :4]
    elif fault == "infinite":
        got[1][0, 0, 0, 0] = np.inf
    else:
        wanted = got = [x[:0] for x in wanted]
    with held(wanted, got) as (y, q):
        assert fit_lines(y, q, EVERYTHING) is None


def images(start: int, count: int = 12) -> list[dict[str, NDArray[np.float32]]]:
    return [
        {"x": np.random.default_rng(start + number).normal(size=(1, 3, 12, 12)).astype(np.float32)}
        for number in range(count)
    ]


def solved(body: str, ranges: dict[str, Range], recipe: Recipe = RECIPE) -> Solved:
    model = loaded(network(body, ("N", 3, 12, 12), **WEIGHTS))
    plan = make_plan(model, recipe, TARGETS[recipe.target])
    observers = list(plan.observers(sketch_contents_for(recipe)))
    sketches = observe(open_observed_session(model, observers, 1), observers, images(0))
    folded = FoldedNetwork(model, plan, sketches, ranges)
    return folded, recipe, round_to_nearest(folded, recipe)


def corrected(folded: FoldedNetwork, found: QuantizationSolution) -> tuple[list[LayerParams], int]:
    return correct_gains(folded.model, found.plan, found.params, images(0), 1, Reporter())


def noise(folded: FoldedNetwork, recipe: Recipe, found: QuantizationSolution) -> float:
    """Noise over power on images that nothing was fitted on, by ONNX Runtime."""
    quantized = Session(build_quantized_model(folded, recipe, found.params).proto().SerializeToString())
    reference = Session(folded.model.proto().SerializeToString())
    pairs = [(reference.run(["y"], feed)[0], quantized.run(["y"], feed)[0]) for feed in images(500)]
    return float(sum(np.sum((a - b) ** 2) for a, b in pairs) / sum(np.sum(a**2) for a, _ in pairs))


def test_what_clipping_takes_comes_back_without_another_code() -> None:
    folded, recipe, found = solved(BODY, CLIPPED)
    before, kept = noise(folded, recipe, found), deepcopy([layer.weight.scale for layer in found.params.layers])
    layers, changed = corrected(folded, found)
    assert changed == 3
    for layer, scale in zip(found.params.layers, kept, strict=True):
        assert np.array_equal(layer.weight.scale, scale), "what is given stays"
    for old, new in zip(found.params.layers, layers, strict=True):
        assert np.array_equal(old.codes, new.codes)
        assert new.bias is not None
        assert new.bias_params is not None, "it stays in integers"
    found.params.layers[:] = layers
    assert noise(folded, recipe, found) < 0.6 * before


def test_every_layer_is_fitted_behind_those_that_are_settled() -> None:
    """Fitted side by side, the second layer would take back once more what the first has."""
    folded, _, found = solved(BODY, CLIPPED)
    layers, _ = corrected(folded, found)
    found.params.layers[:] = layers
    again, _ = corrected(folded, found)
    for old, new in zip(layers, again, strict=True):
        assert new.weight.scale == pytest.approx(old.weight.scale, rel=0.02)


def test_weights_that_layers_share_and_scales_of_whole_tensors_stay() -> None:
    folded, _, found = solved(BODY.replace("Conv(d, u)", "Conv(d, v)"), CLIPPED)
    layers, changed = corrected(folded, found)
    assert changed == 1
    assert [new is old for old, new in zip(found.params.layers, layers, strict=True)] == [False, True, True]
    folded, _, found = solved(BODY, CLIPPED, Recipe(weight_granularity=WeightGranularity.PER_TENSOR))
    assert corrected(folded, found)[1] == 0
