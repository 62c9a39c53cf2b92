"""Indices of a MaxPool, which must not move where numbers become codes. Oracle: ONNX Runtime on the float network."""

from __future__ import annotations

import os

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from qconv.auditing.fusion_rules import find_float_reason
from tests.support.models import network
from tests.support.quantized import SAME, Feeds, Quantized, quantized, sqnr

DRAWN = int(os.environ.get("QCONV_DRAWN_GRAPHS", "24"))
"""How many networks are drawn; more to search for faults."""

BETWEEN = {
    "nothing": "p = Identity(c)",
    "relu": "p = Relu(c)",
    "leaky relu": "p = LeakyRelu<alpha=0.1>(c)",
    "clip": "p = Clip(c, zero, six)",
    "norm": "n = BatchNormalization(c, one, none, none, one) p = Relu(n)",
    "relu, then norm": "n = Relu(c) p = BatchNormalization(n, one, none, none, one)",
    "silu": "n = Sigmoid(c) p = Mul(c, n)",
    "scale": "n = Relu(c) p = Mul(n, six)",
    "residual": f"r = Relu(c) d = Conv<{SAME}>(r, v) t = Relu(d) n = Add(t, r) p = Relu(n)",
    "joined": f"d = Conv<{SAME}>(x, w) j = Concat<axis=1>(c, d) i, h = Split<axis=1>(j) n = Add(h, i) p = Relu(n)",
    "joined and cut": f"d = Conv<{SAME}>(x, w) j = Concat<axis=1>(c, d) i, h = Split<axis=1>(j) p = Relu(i)",
    "two readers": "p = Relu(c)",
    "turned": "n = Transpose<perm=[0,1,3,2]>(c) p = Relu(n)",
    "average": "n = Relu(c) p = AveragePool<kernel_shape=[3,3], pads=[1,1,1,1]>(n)",
}
CHANNELS, SIDE = 8, 16


def smooth(seed: int) -> list[Feeds]:
    """Pictures with neighbours that are much alike."""
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(0, 1, (4, 2, 3, 5, 5))
    maps = np.apply_along_axis(_widened, 4, np.apply_along_axis(_widened, 3, coarse))
    maps = maps + rng.uniform(0, 0.02, (4, 2, 3, SIDE, SIDE))
    return [{"x": batch.astype(np.float32)} for batch in maps]


def _widened(row: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.interp(np.linspace(0, len(row) - 1, SIDE), np.arange(len(row)), row)


def unpooled(between: str, seed: int) -> onnx.ModelProto:
    """Encoder and decoder that share the places of a MaxPool, as SegNet does; `places` are given out, too."""
    rng = np.random.default_rng(seed)
    deep = f"b = Conv<{SAME}>(m, v) k = Relu(b)" if rng.integers(2) else "k = Identity(m)"
    end = f"s = Conv<{SAME}>(p, v) e = Add(u, s)" if between == "two readers" else "e = Identity(u)"
    weights = {
        name: (rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)
        for name, shape in {"w": (CHANNELS, 3, 3, 3), "v": (CHANNELS, CHANNELS, 3, 3)}.items()
    }
    proto = network(
        f"""c = Conv<{SAME}>(x, w) {BETWEEN[between]}
        m, places = MaxPool<kernel_shape=[2,2], strides=[2,2]>(p) {deep}
        u = MaxUnpool<kernel_shape=[2,2], strides=[2,2]>(k, places, whole) {end}
        y = Conv<{SAME}>(e, v)""",
        x=(2, 3, SIDE, SIDE),
        outputs=("y", "places"),
        zero=0.0,
        six=6.0,
        one=np.ones(CHANNELS, np.float32),
        none=np.zeros(CHANNELS, np.float32),
        whole=np.int64([2, CHANNELS, SIDE, SIDE]),
        **weights,
    )
    shape = onnx.helper.make_tensor_type_proto(onnx.TensorProto.FLOAT, (2, CHANNELS, SIDE, SIDE))
    proto.graph.output[0].type.CopyFrom(shape)  # onnx does not infer it
    return proto


def drawn(seed: int) -> tuple[str, Quantized]:
    between = list(BETWEEN)[seed % len(BETWEEN)]
    return between, quantized(unpooled(between, seed), smooth(seed))


@pytest.mark.parametrize("seed", range(DRAWN))
def test_places_stay(seed: int) -> None:
    """Numbers that differ by less than a code would share one, and the first place would be taken of all of them."""
    _, result = drawn(seed)
    moved = np.mean(result.expected["places"] != result.got["places"])
    assert moved < 0.03
    assert sqnr(result.expected["y"], result.got["y"]) >= 15


def test_the_reason_is_told() -> None:
    _, result = drawn(1)
    reasons = {island.node: island.why for island in result.audit.islands}
    assert reasons["m"] == "its indices are read"
    assert reasons["c"] == "the indices of MaxPool m hang on what it writes"
    assert result.plan.kept["c"].why == reasons["c"]
    assert find_float_reason(next(node for node in result.model.nodes() if node.name == "m")).rule == "indices"


def place_giver(layer: str, **weights: NDArray) -> onnx.ModelProto:
    """A MaxPool whose places are given out, behind a layer of 8 x 8 places."""
    return network(
        f"{layer} m, places = MaxPool<kernel_shape=[2,1], strides=[2,1]>(c)",
        x=(2, 3, 8, 8),
        outputs=("m", "places"),
        **weights,
    )


def codes_of(found: Quantized) -> int:
    return sum(tensor.data_type == onnx.TensorProto.INT8 for tensor in found.proto.graph.initializer)


@pytest.mark.parametrize("asked", [True, False])
def test_a_layer_in_front_of_places_is_stored_as_codes_unless_it_is_to_stay_float(asked: bool) -> None:
    rng = np.random.default_rng(0)
    layer = place_giver(f"c = Conv<{SAME}>(x, w)", w=rng.normal(size=(4, 3, 3, 3)).astype(np.float32))
    found = quantized(layer, keep_float=("c",) if asked else ())
    assert bool(codes_of(found)) is not asked
    assert found.sqnr("m") > 30


def test_a_layer_that_has_no_codes_has_none_in_front_of_places_either() -> None:
    """A MatMul by three matrices, one a channel."""
    rng = np.random.default_rng(0)
    matrices = place_giver("c = MatMul(x, w)", w=rng.normal(size=(3, 8, 8)).astype(np.float32))
    assert codes_of(quantized(matrices)) == 0


def test_a_product_with_a_vector_in_front_of_places() -> None:
    """A MatMul with a constant of one axis has no axis of outputs."""
    rng = np.random.default_rng(0)
    vector = place_giver(
        f"d = Conv<{SAME}>(x, w) e = MatMul(d, v) c = Reshape(e, shape)",
        w=rng.normal(size=(4, 3, 3, 3)).astype(np.float32),
        v=rng.normal(size=8).astype(np.float32),
        shape=np.int64([2, 4, 8, 1]),
    )
    found = quantized(vector)
    assert (found.got["places"] == found.expected["places"]).mean() > 0.9
