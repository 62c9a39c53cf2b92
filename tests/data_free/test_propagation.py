"""What tensors are like by BatchNormalization alone: ONNX Runtime says it, over inputs that really are normal."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from qconv.data_free.propagation import MOST_GUESSED_IN_A_ROW, channel_bounds, propagate_stats, propagate_through_layer
from qconv.ir.channel_stats import REACH_DEVIATIONS, ChannelDistribution, infer_before_relu, normal_quantiles
from qconv.ir.layers import read_layer
from qconv.ir.model import Model
from qconv.passes.equalize import apply_scales
from qconv.passes.fold import run_float_passes
from qconv.passes.scale_groups import find_scale_groups
from tests.support.models import loaded, network, run

CHANNELS, SIZE, COUNT = 4, 6, 4096
MEANS, STDS = np.array([0.3, -0.5, 1.0, 0.0]), np.array([1.0, 0.5, 2.0, 1.5])
FRONT = "c = Conv(x, p) n = BatchNormalization(c, g, b, m, v)"
rng = np.random.default_rng(3)
MIX = np.diag([1.5, -0.7, 0.4, 1.1])  # channels stay independent of each other
SAMPLE = rng.normal(MEANS, STDS, (COUNT, SIZE, SIZE, CHANNELS)).transpose(0, 3, 1, 2).astype(np.float32)
CONSTANTS: dict[str, NDArray[Any]] = {
    "p": np.float32(MIX)[:, :, None, None],
    "g": np.float32([1.0, -0.7, 1.5, 0.5]),
    "b": np.float32([0.5, 1.0, -1.0, 0.0]),
    "m": np.float32(MIX @ MEANS),
    "v": np.float32(MIX**2 @ STDS**2),
    "zero": np.float32(0),
    "six": np.float32(1.5),
    "w": np.float32(rng.normal(size=(5, CHANNELS, 1, 1))),
    "wide": np.float32(rng.normal(size=(CHANNELS, 1, 1))),
    "parts": np.int64([1, 3]),
    "pads": np.int64([0, 0, 1, 1, 0, 0, 1, 1]),
    "grey": np.float32(0.25),
    "small": np.float32(rng.normal(size=(CHANNELS, CHANNELS, 1, 1))),
}
# name -> what leads from the normalised tensor n to y
BODIES = {
    "nothing": "y = Identity(n)",
    "relu": "y = Relu(n)",
    "clip": "y = Clip(n, zero, six)",
    "sigmoid": "y = Sigmoid(n)",
    "hard sigmoid": "y = HardSigmoid<alpha=0.3>(n)",
    "tanh": "y = Tanh(n)",
    "leaky relu": "y = LeakyRelu<alpha=0.1>(n)",
    "hard swish": "y = HardSwish(n)",
    "swish": "s = Sigmoid(n) y = Mul(n, s)",
    "relu of a clip": "r = Clip(n, zero, six) s = Mul(r, wide) y = Identity(s)",
    "a layer alone": "y = Conv(n, w)",
    "relu of a layer alone": "c2 = Conv(n, w) y = Relu(c2)",
    "side by side": "r = Relu(n) y = Concat<axis=1>(n, r)",
    "a part": "first, y = Split<axis=1>(n, parts)",
    "copied places": 'r = Relu(n) y = Resize<mode="nearest">(r, , scales)',
}


def folded(body: str, outputs: tuple[str, ...] = ("y",), **more: NDArray[Any]) -> tuple[onnx.ModelProto, Model]:
    constants = CONSTANTS | more
    used = {name: numbers for name, numbers in constants.items() if name in _words(body)}
    proto = network(body, ("N", CHANNELS, SIZE, SIZE), outputs, opset=17, **used)
    model = loaded(proto)
    run_float_passes(model)
    return proto, model


def _words(body: str) -> set[str]:
    return set("".join(letter if letter.isalnum() else " " for letter in body).split())


def known_of(model: Model, name: str) -> ChannelDistribution | str:
    found = propagate_stats(model, {model.graph.inputs[0]: pictures()})
    (value,) = (value for value in found if value.name == name)
    return found[value]


def pictures() -> ChannelDistribution:
    return ChannelDistribution(MEANS, STDS, guesses=MOST_GUESSED_IN_A_ROW)


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_moments_and_reach_are_those_of_a_large_sample(body: str) -> None:
    outputs = ("y", "n") if "= Conv(n, w)" in body else ("y",)  # so that both layers do not become one
    proto, model = folded(f"{FRONT} {body}", outputs, scales=np.float32([1, 1, 2, 2]))
    seen = run(proto, {"x": SAMPLE})["y"].astype(np.float64)
    found = known_of(model, "y")
    assert isinstance(found, ChannelDistribution)
    assert found.std is not None
    size = 0.01 * np.abs(seen).max()
    np.testing.assert_allclose(found.mean, seen.mean(axis=(0, 2, 3)), atol=size)
    np.testing.assert_allclose(found.std, seen.std(axis=(0, 2, 3)), atol=size)
    low, high = channel_bounds(found)
    assert np.all(low <= seen.min(axis=(0, 2, 3)) + 1e-3)
    assert np.all(high >= seen.max(axis=(0, 2, 3)) - 1e-3)


def of(model: Model, name: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and deviation."""
    found = known_of(model, name)
    assert isinstance(found, ChannelDistribution)
    assert found.std is not None
    return found.mean, found.std


def test_a_gate_of_another_tensor_counts_as_independent() -> None:
    """E = m1 m2, E[y^2] = (s1^2 + m1^2)(s2^2 + m2^2)."""
    _, model = folded(f"{FRONT} d = BatchNormalization(x, g, b, m, v) s = Sigmoid(d) y = Mul(n, s)")
    (mean, std), (level, spread), (found, deviation) = (of(model, name) for name in ("c", "s", "y"))
    np.testing.assert_allclose(found, mean * level)
    np.testing.assert_allclose(deviation**2 + found**2, (std**2 + mean**2) * (spread**2 + level**2))


def test_means_over_a_map_keep_their_mean() -> None:
    proto, model = folded(f"{FRONT} r = Relu(n) y = GlobalAveragePool(r)")
    mean, std = of(model, "y")
    seen = run(proto, {"x": SAMPLE})["y"].astype(np.float64)
    np.testing.assert_allclose(mean, seen.mean(axis=(0, 2, 3)), atol=0.02)
    assert np.all(std >= seen.std(axis=(0, 2, 3)))  # neighbours that are alike vary more than these


@pytest.mark.parametrize("pool", ["MaxPool<kernel_shape=[2,2]>(r)", "GlobalMaxPool(r)"])
def test_the_largest_of_some_reaches_no_further(pool: str) -> None:
    _, model = folded(f"{FRONT} r = Relu(n) y = {pool}")
    before, behind = known_of(model, "r"), known_of(model, "y")
    assert isinstance(before, ChannelDistribution)
    assert isinstance(behind, ChannelDistribution)
    np.testing.assert_array_equal(channel_bounds(behind), channel_bounds(before))


def test_borders_of_another_number() -> None:
    _, model = folded(f"{FRONT} r = Relu(n) s = Sigmoid(r) y = Pad(s, pads, grey)")
    before, behind = known_of(model, "s"), known_of(model, "y")
    assert isinstance(before, ChannelDistribution)
    assert isinstance(behind, ChannelDistribution)
    assert channel_bounds(before)[0].min() >= 0.25
    assert channel_bounds(behind)[0].tolist() == [0.25] * CHANNELS


@pytest.mark.parametrize("gate", ["Sigmoid(c2)", "HardSigmoid(c2)", "Tanh(c2)"])
def test_what_saturates_needs_no_more_of_its_input(gate: str) -> None:
    """Further out its result is the same to 0.001, whatever the layers in front may do."""
    _proto, model = folded(f"{FRONT} c0 = Conv(n, small) c1 = Conv(c0, small) c2 = Conv(c1, small) y = {gate}")
    low, high = channel_bounds(known_of(model, "c2"))  # type: ignore[arg-type]
    probe = network(f"y = {gate.replace('c2', 'x')}", (1, 1))
    near, far = (
        [float(run(probe, {"x": np.float32([[at]])})["y"][0, 0]) for at in ends]
        for ends in ((low[0], high[0]), (-1e3, 1e3))
    )
    np.testing.assert_allclose(near, far, atol=0.001)
    assert isinstance(known_of(model, "y"), ChannelDistribution)


def test_not_where_others_read_that_input() -> None:
    _, model = folded(f"{FRONT} c0 = Conv(n, small) c1 = Conv(c0, small) s = Sigmoid(c1) y = Mul(c1, s)")
    assert isinstance(known_of(model, "c1"), str)
    assert isinstance(known_of(model, "y"), str)


def test_layers_are_guessed_once_and_never_of_pictures() -> None:
    _, model = folded(f"{FRONT} c0 = Conv(n, small) y = Conv(c0, small)", ("y", "n", "c0"))
    assert isinstance(known_of(model, "c0"), ChannelDistribution)
    assert known_of(model, "y") == "no BatchNormalization follows Conv y, nor those in front of it"
    _, model = folded("y = Conv(x, small)")
    assert "no BatchNormalization follows Conv y" in str(known_of(model, "y"))


def test_weights_of_neighbouring_places_add_up_or_cancel() -> None:
    """One channel: neighbours that are alike give 2 s, those that are not sqrt(2) s; the larger counts."""
    for kernel, factor in (([1.0, 1.0], 2.0), ([1.0, -1.0], math.sqrt(2))):
        proto = network("y = Conv(x, w)", (1, 1, 1, 4), w=np.float32(kernel).reshape(1, 1, 1, 2))
        layer = read_layer(loaded(proto).nodes()[0])
        found = propagate_through_layer(layer, ChannelDistribution(np.array([3.0]), np.array([0.5])))
        assert found.std is not None
        assert found.mean.tolist() == [3.0 * sum(kernel)]
        assert found.std == pytest.approx(factor * 0.5)


def test_a_relu_that_a_batchnormalization_reads() -> None:
    """What stands in front of the Relu follows from the mean and the deviation behind it."""
    body = "c = Conv(x, p) r = Relu(c) n = BatchNormalization(r, g, b, rm, rv) y = Conv(n, w)"
    cut = ChannelDistribution(CONSTANTS["m"].astype(float), np.sqrt(CONSTANTS["v"].astype(float))).clipped(0, math.inf)
    assert cut.std is not None
    _proto, model = folded(body, outputs=("y",), rm=np.float32(cut.mean), rv=np.float32(cut.std**2))
    mean, std = of(model, "c")
    np.testing.assert_allclose(mean / std, CONSTANTS["m"] / np.sqrt(CONSTANTS["v"]), atol=1e-3)
    levels = run(model_with(model, "r"), {"x": SAMPLE})["r"].astype(np.float64)
    found, deviation = of(model, "r")
    np.testing.assert_allclose(found, levels.mean(axis=(0, 2, 3)), rtol=0.03)
    np.testing.assert_allclose(deviation, levels.std(axis=(0, 2, 3)), rtol=0.03)


def model_with(model: Model, name: str) -> onnx.ModelProto:
    """As a file that returns one more tensor."""
    proto = model.proto()
    proto.graph.output.append(onnx.ValueInfoProto(name=name))
    proto.graph.output[-1].type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    return proto


@pytest.mark.parametrize("ratio", [-2.0, -0.5, 0.0, 1.0, 5.0])
def test_before_a_relu_is_the_inverse_of_a_relu(ratio: float) -> None:
    cut = ChannelDistribution(np.array([3 * ratio]), np.array([3.0])).clipped(0, math.inf)
    assert cut.std is not None
    found = infer_before_relu(cut.mean, cut.std)
    assert found.std is not None
    assert (found.mean[0], found.std[0]) == pytest.approx((3 * ratio, 3.0), rel=1e-6, abs=1e-6)


def test_what_was_never_above_zero_stays_there() -> None:
    found = infer_before_relu(np.zeros(1), np.zeros(1))
    assert found.std is not None
    assert (found.mean[0], found.std[0]) == (0, 0)


def test_statistics_that_were_never_measured_tell_nothing() -> None:
    plain = {"m": np.zeros(CHANNELS, np.float32), "v": np.ones(CHANNELS, np.float32)}
    _, model = folded(f"{FRONT} y = Relu(n)", **plain)
    assert isinstance(known_of(model, "y"), str)


def test_notes_follow_channels_that_are_scaled() -> None:
    """Equalization divides channels, and what is told of them."""
    body = (
        f"{FRONT} r = Relu(n) q = MaxPool<kernel_shape=[2,2]>(r) o = BatchNormalization(q, g, b, om, ov) y = Conv(o, w)"
    )
    more = {"om": np.float32([1, 2, 3, 4]), "ov": np.float32([1, 4, 9, 16])}
    _, model = folded(body, **more)
    before = {name: of(model, name) for name in ("c", "r", "q")}
    groups = find_scale_groups(model)
    scales = np.ones(groups.fixed.size)
    (channels,) = (classes for value, classes in groups.of.items() if value.name == "r")
    scales[channels] = [2.0, 4.0, 0.5, 1.0]
    apply_scales(model, groups, scales)
    for name, (mean, std) in before.items():
        now = of(model, name)
        np.testing.assert_allclose(now[0], mean / scales[channels], rtol=1e-6)
        np.testing.assert_allclose(now[1], std / scales[channels], rtol=1e-6)


def test_quantiles_are_those_of_a_normal_variable() -> None:
    z = normal_quantiles(4001)
    assert (z.mean(), z.std()) == pytest.approx((0, 1), abs=2e-3)
    assert [float(np.mean(z < at)) for at in (-1, 0, 1)] == pytest.approx([0.1587, 0.5, 0.8413], abs=5e-4)
    assert z.max() < REACH_DEVIATIONS
