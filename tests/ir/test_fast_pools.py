"""AveragePools of codes as depthwise layers. Oracle: ONNX Runtime with the file as it is, and what a pool gives."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from qconv.ir.fast_forms import take_back_fast_forms
from qconv.ir.fast_pools import CODE
from qconv.ir.files import Source
from qconv.ir.load import load_unchanged
from qconv.ir.model import attribute
from qconv.ir.packed_codes import pack_codes
from qconv.runtime.session import Session
from tests.support.libraries import skip_without
from tests.support.models import network
from tests.support.quantized import Quantized, pictures, quantized

X = (2, 16, 9, 8)
WEIGHTS = {"w": (16, 16, 1, 1), "b": (16,), "v": (8, 16, 1, 1)}

POOLS = {
    "plain": "kernel_shape=[2,3], strides=[2,1]",
    "padded, zeros counted": "kernel_shape=[3,3], pads=[1,0,1,1], count_include_pad=1",
    "valid": 'kernel_shape=[2,2], strides=[2,2], auto_pad="VALID"',
    "largest": "kernel_shape=[8,8]",
}

STAY = {
    "zeros not counted": "kernel_shape=[3,3], pads=[1,1,1,1]",
    "a window cut off": "kernel_shape=[2,2], strides=[2,2], ceil_mode=1",
    "padded by itself": 'kernel_shape=[2,2], strides=[2,2], auto_pad="SAME_UPPER"',
    "a single place": "kernel_shape=[1,1], strides=[2,2]",
    "too large": "kernel_shape=[9,8], pads=[0,1,0,1], count_include_pad=1",
}


def made(pool: str, **options: object) -> Quantized:
    body = f"c = Conv(x, w, b) d = Relu(c) e = AveragePool<{pool}>(d) g = Conv(e, v) y = Relu(g)"
    return quantized(network(body, x=X, **WEIGHTS), pictures(X), **options)


def pool_of(result: Quantized) -> str:
    return next(node.op_type for node in result.proto.graph.node if node.name == "e")


@pytest.mark.parametrize("kind", POOLS)
def test_a_pool_between_codes_is_a_layer_that_gives_the_same(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = made(POOLS[kind]).check()
    assert pool_of(layer) == "Conv"
    assert layer.runs.count("QLinearConv") == 3
    assert "QLinearAveragePool" not in layer.runs
    monkeypatch.setattr("qconv.quantization.write_fast_forms.pool_to_layer", lambda *_: False)
    pool = made(POOLS[kind]).check()
    assert pool_of(pool) == "AveragePool"
    step = max(float(found.scale.max()) for found in layer.params.activations.values())
    assert np.abs(layer.got["y"] - pool.got["y"]).max() <= 2 * step
    assert [value.name for value in layer.params.activations] == [value.name for value in pool.params.activations]


def test_the_audit_tells_of_it() -> None:
    (told,) = made(POOLS["plain"]).audit.on_codes
    assert (told.node, told.op, told.rule) == ("e", "Conv", "window")
    assert told.why == "an AveragePool, written as a depthwise Conv of equal weights"


def test_its_weights_are_packed_with_those_of_layers_and_not_counted() -> None:
    """Codes of the layers here are too few, but for those of a wide one."""
    skip_without("onnxruntime", "1.22", "this form of packed codes does")
    for channels, count in ((8, 0), (256, 1)):
        body = f"c = Conv(x, w, b) d = Relu(c) e = AveragePool<{POOLS['largest']}>(d) g = Conv(e, v) y = Relu(g)"
        proto = network(body, x=X, **{**WEIGHTS, "v": (channels, 16, 1, 1)})
        plain = quantized(proto, pictures(X), weight_bits=4, edge_bits=4).proto
        packed = load_unchanged(onnx.ModelProto.FromString(plain.SerializeToString()), Source("it", None, b""))
        assert len(pack_codes(packed, (1, 22))) == count
        shifts = [node for node in packed.nodes() if node.op_type == "BitShift"]
        assert len(shifts) == 2 * count
        x = pictures(X)[0]["x"]
        results = [Session(p.SerializeToString(), threads=1).run(["y"], {"x": x})[0] for p in (plain, packed.proto())]
        np.testing.assert_array_equal(*results)


@pytest.mark.parametrize("kind", STAY)
def test_a_pool_stays_where_its_average_is_another_or_nothing_is_gained(kind: str) -> None:
    assert pool_of(made(STAY[kind])) == "AveragePool"


@pytest.mark.parametrize("target", ["generic", "openvino", "tensorrt"])
def test_other_runtimes_keep_their_pools(target: str) -> None:
    assert pool_of(made(POOLS["plain"], target=target)) == "AveragePool"


def test_few_channels_stay() -> None:
    body = f"c = Conv(x, w) e = AveragePool<{POOLS['plain']}>(c) y = Conv(e, v)"
    proto = network(body, x=X, w=(8, 16, 1, 1), v=(8, 8, 1, 1))
    assert pool_of(quantized(proto, pictures(X))) == "AveragePool"


def test_bits_are_those_of_a_pool() -> None:
    """What it reads has eight bits although layers have few, and its weights are no weights of the network."""
    found = made(POOLS["plain"], weight_bits=4, activation_bits=4, edge_bits=4)
    bits = {value.name: params.spec.bits for value, params in found.params.activations.items()}
    assert (bits["d"], bits["e"]) == (8, 4)
    assert [layer.node.name for layer in found.plan.layers] == ["c", "g"]
    assert pool_of(found) == "Conv"


def test_pools_kept_float_stay_pools() -> None:
    found = made(POOLS["plain"], keep_float_op=("AveragePool",))
    assert pool_of(found) == "AveragePool"


def test_the_largest_pair_of_products_fits_into_16_bits() -> None:
    assert 2 * 255 * CODE < 2**15


@pytest.mark.parametrize("kind", POOLS)
def test_a_file_read_beside_its_float_model_has_its_pools_again(kind: str) -> None:
    model = made(POOLS[kind]).model
    take_back_fast_forms(model)
    pool = next(node for node in model.nodes() if node.name == "e")
    assert pool.op_type == "AveragePool"
    assert len(pool.inputs) == 1
    assert attribute(pool, "count_include_pad", 0) == (kind == "padded, zeros counted")
    assert not any((value or "").endswith("_window") for value in model.graph.initializers)
