"""Ranges from sketches. Oracles: NumPy on all numbers, recurrences written out, brute force at a layer's output."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from qconv.calibration import range_estimators
from qconv.calibration.range_estimators import (
    CALIBRATORS,
    EMA_MOMENTUM,
    CalibrationHints,
    input_channel_powers,
    search_least_output_error,
)
from qconv.calibration.sketch import Sketch, SketchBuilder, SketchContents, TensorView, make_histogram
from qconv.config.choices import CALIBRATOR_NAMES
from qconv.ir.layers import Layer
from qconv.quantizer import QuantSpec

SPEC = QuantSpec(8, signed=False, symmetric=False)
NODE: Any = None  # readers look at weights alone


def sketch(*pictures: NDArray[np.float32]) -> Sketch:
    """Pictures (C, X); their keys fall, so that the last comes first."""
    gathered = SketchBuilder(SketchContents.ALL)
    for index, x in enumerate(pictures):
        gathered.add(TensorView(x.min(axis=1), x.max(axis=1), x.sum(axis=1), x.shape[1], x), len(pictures) - index)
    return gathered.sketch()


def drawn(count: int = 6, channels: int = 4, size: int = 2000, low: float = -math.inf) -> list[NDArray[np.float32]]:
    rng = np.random.default_rng(0)
    return [np.maximum(rng.laplace(size=(channels, size)), low).astype(np.float32) for _ in range(count)]


def chosen(name: str, found: Sketch, spec: QuantSpec = SPEC, **hints: Any) -> tuple[float, float]:
    return CALIBRATORS[name].choose(found, spec, CalibrationHints(**hints))


def test_the_recipe_knows_them_all() -> None:
    assert tuple(CALIBRATORS) == CALIBRATOR_NAMES


@pytest.mark.parametrize("name", CALIBRATORS)
@pytest.mark.parametrize("bits", [2, 4, 8, 16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("low", [-math.inf, 0.0])
def test_no_range_is_wider_than_what_was_seen(name: str, bits: int, symmetric: bool, low: float) -> None:
    found = sketch(*drawn(low=low))
    least, largest = chosen(name, found, QuantSpec(bits, signed=False, symmetric=symmetric))
    assert found.low - 1e-6 <= least <= 0 < largest <= found.high + 1e-6


@pytest.mark.parametrize("name", CALIBRATORS)
@pytest.mark.parametrize("value", [0.0, 3.0, -3.0, 1e-42])
def test_a_tensor_of_one_value_keeps_it(name: str, value: float) -> None:
    """All zeros, constants, denormals: finite ranges, and the value comes back to half a step."""
    found = sketch(np.full((2, 5), value, np.float32), np.full((2, 5), value, np.float32))
    params = SPEC.from_range(*chosen(name, found))
    assert np.isfinite(params.scale)
    back = params.fake_quantize(np.full(3, value, np.float32))
    assert np.abs(back - np.float32(value)).max() <= abs(value) / 255 + 1e-37


def test_minmax_clips_nothing() -> None:
    x = drawn()
    assert chosen("minmax", sketch(*x)) == (np.stack(x).min(), np.stack(x).max())


def test_mean_extremes() -> None:
    x = np.stack(drawn())
    expected = x.min(axis=(1, 2)).mean(dtype=np.float64), x.max(axis=(1, 2)).mean(dtype=np.float64)
    assert chosen("mean-extremes", sketch(*x)) == pytest.approx(expected)


def test_the_moving_average_takes_pictures_in_the_order_of_their_keys() -> None:
    """Here the last first. high <- high + c (new - high)."""
    pictures = drawn()
    high = float(pictures[-1].max())
    for x in pictures[-2::-1]:
        high += EMA_MOMENTUM * (float(x.max()) - high)
    assert chosen("ema", sketch(*pictures))[1] == pytest.approx(high, rel=1e-12)


@pytest.mark.parametrize("share", [90.0, 99.0, 99.9, 100.0])
def test_percentiles_cut_both_tails_alike(share: float) -> None:
    """To the width of a bin, 1/128."""
    x = np.stack(drawn())
    cut = (100 - share) / 2
    expected = np.percentile(x, [cut, 100 - cut])
    assert chosen("percentile", sketch(*x), percentile=share) == pytest.approx(expected, rel=1 / 50)


def test_percentiles_of_what_is_never_negative_cut_the_top() -> None:
    x = np.stack(drawn(low=0.0))
    low, high = chosen("percentile", sketch(*x), percentile=99.0)
    assert low == 0
    assert high == pytest.approx(np.percentile(x, 99), rel=1 / 100)


def test_names_lead_to_their_methods() -> None:
    found = sketch(*drawn())
    ends = found.histogram(), SPEC, found.low, found.high
    assert chosen("mse", found) == range_estimators.search_least_squares(*ends)
    assert chosen("aciq", found) == range_estimators.aciq_closed_form(*ends)
    assert chosen("entropy", found) == range_estimators.search_least_divergence(*ends)


# -- the error at the layers that read ---------------------------------------------------------------------------------


def layer(*shape: int, seed: int = 0) -> Layer:
    """Weights (G, O/G, I/G, K)."""
    weight = np.random.default_rng(seed).standard_normal(shape)
    return Layer(NODE, weight, np.zeros(shape[0] * shape[1]))


def test_every_weight_that_a_channel_meets_counts() -> None:
    """Of grouped layers, too: each channel meets only its own group."""
    for reader in (layer(1, 6, 5, 9), layer(3, 2, 4, 9)):
        expected = np.square(reader.weight).sum(axis=(1, 3)).reshape(-1)
        assert input_channel_powers(reader).tolist() == pytest.approx(expected.tolist(), rel=1e-5)


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("shape", [(1, 6, 4, 1), (4, 1, 1, 9)])
def test_the_range_is_best_at_the_outputs(bits: int, shape: tuple[int, ...]) -> None:
    """Against a grid of ranges, by the variance of the reader's output itself; here channels are independent."""
    reader, spec = layer(*shape), QuantSpec(bits, signed=False, symmetric=False)
    columns = np.maximum(np.random.default_rng(2).laplace(size=(4000, 4)), 0).astype(np.float32)
    columns[:, 0] *= 5  # a channel that decides min and max
    if shape[0] == 1:
        reader.weight[:, :, 0] /= 50  # and that nobody listens to

    def lost(high: float) -> float:
        error = spec.from_range(0, high).fake_quantize(columns) - columns
        if shape[0] == 1:
            out = np.einsum("oik,ni->nok", reader.weight[0], error)
        else:
            out = np.einsum("ck,nc->nck", reader.weight[:, 0, 0], error)
        return float(out.var(axis=0).sum())

    low, high = search_least_output_error(columns, make_histogram(columns), [reader], spec, (0.0, float(columns.max())))
    best = min(lost(h) for h in np.linspace(columns.max() / 200, columns.max(), 200))
    assert low == 0
    assert lost(high) <= best * 1.05


def test_a_channel_that_nobody_reads_is_clipped() -> None:
    """Its own squared error would keep it."""
    x = np.abs(np.random.default_rng(0).normal(size=(4, 500))).astype(np.float32)
    x[0] *= 100
    reader = layer(1, 8, 4, 1)
    reader.weight[:, :, 0] = 0
    found = sketch(x, x)
    at_output = chosen("output-mse", found, readers=(reader,))[1]
    assert at_output < x[1:].max() * 1.1
    assert chosen("mse", found)[1] > 10 * at_output
    assert chosen("output-mse", found) == chosen("mse", found)
    assert chosen("output-mse", found, readers=(reader,), is_input=True) == (found.low, found.high)


def test_a_constant_channel_keeps_its_value() -> None:
    """It has no variance, whatever is done to it; but its mean counts a little."""
    x = np.full((4, 500), 3.0, np.float32)
    x[1:] = 0
    high = chosen("output-mse", sketch(x, x), readers=(layer(1, 8, 4, 1),))[1]
    assert high == pytest.approx(3.0, rel=0.01)
