"""Ranges of weights. Oracles: brute force for every channel or block alone, and the closed forms."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from qconv.calibration.range_estimators import gauss_clipping_factor, laplace_clipping_factor
from qconv.config.choices import WEIGHT_CALIBRATORS
from qconv.quantization.weight_ranges import WEIGHT_RANGE_ESTIMATORS
from qconv.quantizer import Granularity, PerBlock, PerChannel, PerTensor, QuantSpec

GRANULARITIES = (PerTensor(), PerChannel(0), PerChannel(1), PerBlock(1, 16), PerBlock(1, 7), PerBlock(0, 4))


def weights(*shape: int) -> np.ndarray:
    """Some channels much wider than others, and one heavy tail."""
    rng = np.random.default_rng(5)
    drawn = rng.laplace(size=shape) * np.exp(rng.normal(size=(shape[0], *[1] * (len(shape) - 1))))
    drawn.flat[3] *= 8
    return drawn.astype(np.float32)


def squares(weight: np.ndarray, spec: QuantSpec, name: str) -> float:
    return float(
        np.square(spec.from_range(*WEIGHT_RANGE_ESTIMATORS[name](weight, spec)).fake_quantize(weight) - weight).sum()
    )


def test_the_recipe_knows_them_all() -> None:
    assert tuple(WEIGHT_RANGE_ESTIMATORS) == WEIGHT_CALIBRATORS


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_mse_is_never_worse_than_the_maximum(granularity: Granularity, bits: int, symmetric: bool) -> None:
    spec = QuantSpec(bits, signed=True, symmetric=symmetric, granularity=granularity)
    weight = weights(10, 30)
    least, largest = squares(weight, spec, "mse"), squares(weight, spec, "max")
    assert least <= largest * 1.01  # of a whole tensor, the search sees a histogram
    if bits < 4:
        assert least < 0.99 * largest


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_mse_of_each_channel_is_as_good_as_brute_force(bits: int) -> None:
    spec = QuantSpec(bits, signed=True, symmetric=True, granularity=PerChannel(0))
    weight = weights(6, 3, 5, 5)
    low, high = WEIGHT_RANGE_ESTIMATORS["mse"](weight, spec)
    alone = QuantSpec(bits, signed=True, symmetric=True)
    for channel, a, b in zip(weight, low, high, strict=True):
        found = np.square(alone.from_range(a, b).fake_quantize(channel) - channel).sum()
        reach = np.abs(channel).max()
        best = min(
            np.square(alone.from_range(-reach * s, reach * s).fake_quantize(channel) - channel).sum()
            for s in np.linspace(0.1, 1, 181)
        )
        assert found <= best * 1.05


def test_both_ends_of_asymmetric_weights_move_alone() -> None:
    """A long tail on one side."""
    spec = QuantSpec(3, signed=True, symmetric=False, granularity=PerChannel(0))
    weight = np.random.default_rng(0).gamma(1.5, size=(3, 400)).astype(np.float32) - 0.5
    low, high = WEIGHT_RANGE_ESTIMATORS["mse"](weight, spec)
    assert (np.abs(low / weight.min(axis=1) - high / weight.max(axis=1)) > 0.005).all()
    for row, a, b in zip(weight, low, high, strict=True):
        alone = QuantSpec(3, signed=True, symmetric=False)
        found = np.square(alone.from_range(a, b).fake_quantize(row) - row).sum()
        grid = itertools.product(np.linspace(0.2, 1, 17), np.linspace(0.1, 1, 46))
        best = min(
            np.square(alone.from_range(row.min() * s, row.max() * t).fake_quantize(row) - row).sum() for s, t in grid
        )
        assert found <= best * 1.1


@pytest.mark.parametrize("name", ["mse", "aciq"])
def test_blocks_are_channels_of_their_own(name: str) -> None:
    """A short last block, too: the zeros that fill it up do not count."""
    spec = QuantSpec(4, signed=True, symmetric=True, granularity=PerBlock(1, 16))
    weight = weights(3, 40) + np.float32(0.3)
    low, high = WEIGHT_RANGE_ESTIMATORS[name](weight, spec)
    assert low.shape == (3, 3)
    for block, part in enumerate((slice(0, 16), slice(16, 32), slice(32, 40))):
        by_channel = QuantSpec(4, signed=True, symmetric=True, granularity=PerChannel(0))
        alone = WEIGHT_RANGE_ESTIMATORS[name](weight[:, part], by_channel)
        np.testing.assert_allclose(low[:, block], alone[0], rtol=1e-5)
        np.testing.assert_allclose(high[:, block], alone[1], rtol=1e-5)


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(0)], ids=str)
@pytest.mark.parametrize(("draw", "factor"), [("normal", gauss_clipping_factor), ("laplace", laplace_clipping_factor)])
def test_aciq_is_the_closed_form(granularity: Granularity, draw: str, factor: object) -> None:
    weight = getattr(np.random.default_rng(0), draw)(size=(4, 20000)).astype(np.float32)
    spec = QuantSpec(4, signed=True, symmetric=True, granularity=granularity)
    low, high = WEIGHT_RANGE_ESTIMATORS["aciq"](weight, spec)
    expected = factor(4, one_sided=False)  # type: ignore[operator]
    np.testing.assert_allclose(high, expected, rtol=0.05)
    np.testing.assert_allclose(low, -expected, rtol=0.05)


@pytest.mark.parametrize("name", WEIGHT_RANGE_ESTIMATORS)
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
def test_zeros_and_constants_have_ranges(name: str, granularity: Granularity) -> None:
    weight = np.zeros((10, 30), np.float32)
    weight[3] = 2.0
    spec = QuantSpec(4, signed=True, symmetric=True, granularity=granularity)
    params = spec.from_range(*WEIGHT_RANGE_ESTIMATORS[name](weight, spec))
    assert np.isfinite(params.scale).all()
    if isinstance(granularity, PerChannel) and granularity.axis == 0:
        np.testing.assert_allclose(params.fake_quantize(weight), weight, rtol=1e-5)
