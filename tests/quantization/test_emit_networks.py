"""Networks of all kinds: the file means what it should in every way of storing it, and 8 bits run in integers."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from qconv.config.choices import Scheme, WeightGranularity
from qconv.runtime.session import Session
from tests.support.libraries import MOVES_CODES, needs, skip_without
from tests.support.models import ints, network
from tests.support.quantized import SAME, Wiring, interface, net, pictures, quantized

KINDS: dict[str, onnx.ModelProto] = {
    "gemm": network("c = Gemm(x, w, b) r = Relu(c) y = Gemm(r, v)", x=(2, 12), w=(12, 8), b=(8,), v=(8, 4)),
    "transposed gemm": network(
        "c = Gemm<transB=1>(x, w, b) r = Relu(c) y = Gemm<transB=1>(r, v)", x=(2, 12), w=(8, 12), b=(8,), v=(4, 8)
    ),
    "matmul and add": network(
        "m = MatMul(x, w) c = Add(m, b) r = Relu(c) n = MatMul(r, v) y = Add(u, n)",
        x=(2, 12),
        w=(12, 8),
        b=(8,),
        v=(8, 4),
        u=(4,),
    ),
    "matmul of three axes": network(
        "m = MatMul(x, w) c = Add(m, b) r = Relu(c) y = MatMul(r, v)", x=(2, 5, 12), w=(12, 8), b=(8,), v=(8, 4)
    ),
    "matmul of two activations": network(
        "a = MatMul(x, w) b = MatMul(x, v) t = Transpose<perm=[0,2,1]>(b) s = MatMul(a, t) y = MatMul(s, u)",
        x=(2, 5, 12),
        w=(12, 8),
        v=(12, 8),
        u=(5, 4),
    ),
    "conv of sequences": network(
        "c = Conv<pads=[1,1]>(x, w, b) r = Relu(c) y = Conv(r, v)", x=(2, 3, 9), w=(6, 3, 3), b=(6,), v=(4, 6, 1)
    ),
    "conv of volumes": network(
        "c = Conv(x, w, b) r = Relu(c) y = Conv(r, v)", x=(2, 3, 4, 5, 5), w=(6, 3, 2, 3, 3), b=(6,), v=(4, 6, 1, 1, 1)
    ),
    "grouped": network(
        "c = Conv<group=2>(x, w, b) y = Conv(c, v)", x=(2, 4, 6, 6), w=(6, 2, 3, 3), b=(6,), v=(4, 6, 1, 1)
    ),
    "depthwise with a multiplier": network("c = Conv<group=3>(x, w) y = Conv(c, v)", w=(6, 1, 3, 3), v=(4, 6, 1, 1)),
    "without bias": network("c = Conv(x, w) y = Conv(c, v)", w=(6, 3, 3, 3), v=(4, 6, 1, 1)),
    "dilated": network("c = Conv<dilations=[2,2]>(x, w, b) y = Conv(c, v)", w=(6, 3, 3, 3), b=(6,), v=(4, 6, 1, 1)),
    "strided": network("c = Conv<strides=[2,2]>(x, w, b) y = Conv(c, v)", w=(6, 3, 3, 3), b=(6,), v=(4, 6, 1, 1)),
    "auto pad": network(
        'c = Conv<auto_pad="SAME_UPPER", strides=[2,2]>(x, w, b) y = Conv(c, v)', w=(6, 3, 3, 3), b=(6,), v=(4, 6, 1, 1)
    ),
    "open sizes": network("c = Conv(x, w) y = Conv(c, v)", x=("N", 3, "H", "W"), w=(6, 3, 1, 1), v=(4, 6, 1, 1)),
    "shared weights": network(
        f"c = Conv<{SAME}>(x, w, b) r = Relu(c) d = Conv<{SAME}>(r, w, b) y = Conv(d, w, b)", w=(3, 3, 3, 3), b=(3,)
    ),
    "shared weights and data": network(
        "c = Conv(x, w) s = Mul(x, k) d = Conv(s, w) y = Add(c, d)", w=(3, 3, 3, 3), k=4.0
    ),
    "a constant for a layer and an addition": network(
        "c = Conv(x, w, b) d = Add(c, k) e = Mul(d, k) y = Conv(e, k)", w=(1, 3, 3, 3), b=(1,), k=(1, 1, 1, 1)
    ),
    "two readers": network(
        "c = Conv(x, w) a = Conv(c, v) b = Conv(c, u) y = Add(a, b)", w=(6, 3, 3, 3), v=(4, 6, 1, 1), u=(4, 6, 1, 1)
    ),
    "returned inside": network(
        "c = Conv(x, w) r = Relu(c) y = Conv(r, v)", outputs=("r", "y"), w=(6, 3, 3, 3), v=(4, 6, 1, 1)
    ),
    "returned before its activation": network(
        "c = Conv(x, w) r = Relu(c) y = Conv(r, v)", outputs=("y", "c"), w=(6, 3, 3, 3), v=(4, 6, 1, 1)
    ),
    "returned twice": network(
        "c = Conv(x, w) m = MaxPool<kernel_shape=[2,2]>(c) y = Conv(m, v)",
        outputs=("c", "m", "y"),
        w=(6, 3, 3, 3),
        v=(4, 6, 1, 1),
    ),
    "returned from a float operator": network(
        "c = Conv(x, w) t = Tanh(c) y = Conv(t, v)", outputs=("t", "y"), w=(6, 3, 3, 3), v=(4, 6, 1, 1)
    ),
    "returned input": network("y = Conv(x, w) z = Identity(x)", outputs=("y", "z"), w=(6, 3, 3, 3)),
    "a network of one conv": network("y = Conv(x, w, b)", w=(6, 3, 3, 3), b=(6,)),
    "pool first": network("m = MaxPool<kernel_shape=[2,2]>(x) y = Conv(m, w)", w=(6, 3, 3, 3)),
    "split": network(
        "c = Conv(x, w) a, b = Split<axis=1>(c) d = Conv(a, v) y = Concat<axis=1>(d, b)",
        outputs=("y", "b"),
        w=(6, 3, 3, 3),
        v=(4, 3, 1, 1),
    ),
    "channel shuffle": network(
        "c = Conv(x, w) a = Reshape(c, five) b = Transpose<perm=[0,2,1,3,4]>(a) d = Reshape(b, four) y = Conv(d, v)",
        w=(6, 3, 3, 3),
        v=(4, 6, 1, 1),
        five=ints(0, 2, 3, 4, 4),
        four=ints(0, 6, 4, 4),
    ),
    "upsampling": network(
        'c = Conv(x, w) a = Resize<mode="nearest">(c, , k) b = DepthToSpace<blocksize=2>(a) y = Conv(b, v)',
        w=(8, 3, 3, 3),
        v=(4, 2, 1, 1),
        k=np.float32([1, 1, 2, 2]),
    ),
    "linear upsampling": network(
        'c = Conv(x, w) a = Resize<mode="linear">(c, , k) y = Conv(a, v)',
        w=(8, 3, 3, 3),
        v=(4, 8, 1, 1),
        k=np.float32([1, 1, 2, 2]),
    ),
    "transposed": network(
        "c = Conv(x, w) r = Relu(c) a = ConvTranspose<strides=[2,2]>(r, v, b) y = Conv(a, u)",
        w=(8, 3, 3, 3),
        v=(8, 4, 2, 2),
        b=(4,),
        u=(4, 4, 1, 1),
    ),
    "squeeze and excite": network(
        "c = Conv(x, w) g = GlobalAveragePool(c) s = Conv(g, v) t = Sigmoid(s) m = Mul(c, t) y = Conv(m, u)",
        w=(6, 3, 3, 3),
        v=(6, 6, 1, 1),
        u=(4, 6, 1, 1),
    ),
    "hard squeeze and excite": network(
        "c = Conv(x, w) g = GlobalAveragePool(c) s = Conv(g, v) t = HardSigmoid(s) m = Mul(c, t) y = Conv(m, u)",
        w=(6, 3, 3, 3),
        v=(6, 6, 1, 1),
        u=(4, 6, 1, 1),
    ),
    "silu": network("c = Conv(x, w) s = Sigmoid(c) m = Mul(c, s) y = Conv(m, v)", w=(6, 3, 3, 3), v=(4, 6, 1, 1)),
    "hard swish": network("c = Conv(x, w) h = HardSwish(c) y = Conv(h, v)", w=(6, 3, 3, 3), v=(4, 6, 1, 1)),
    "leaky": network("c = Conv(x, w) h = LeakyRelu<alpha=0.1>(c) y = Conv(h, v)", w=(6, 3, 3, 3), v=(4, 6, 1, 1)),
    "scores": network(
        "c = Conv(x, w) g = GlobalAveragePool(c) f = Flatten(g) l = Gemm(f, v) y = Softmax(l)", w=(6, 3, 3, 3), v=(6, 4)
    ),
    "a constant beside": network(
        "c = Conv(x, w) d = Add(c, k) e = Concat<axis=1>(d, more) y = Conv(e, v)",
        w=(6, 3, 3, 3),
        k=(1, 6, 1, 1),
        more=(2, 2, 4, 4),
        v=(4, 8, 1, 1),
    ),
    "dense": network(
        f"""a = Conv<{SAME}>(x, w1) b = Relu(a) c = Concat<axis=1>(x, b) d = Conv<{SAME}>(c, w2) e = Relu(d)
            f = Concat<axis=1>(c, e) y = Conv(f, w3)""",
        w1=(4, 3, 3, 3),
        w2=(4, 7, 3, 3),
        w3=(4, 11, 1, 1),
    ),
    "attention": network("c = Conv(x, w) s = Softmax<axis=1>(c) y = Conv(s, v)", w=(6, 3, 3, 3), v=(4, 6, 1, 1)),
    "hard swish in small parts": network(
        "c = Conv(x, w) a = Add(c, three) b = Clip(a, zero, six) d = Mul(c, b) e = Div(d, six) y = Conv(e, v)",
        w=(6, 3, 3, 3),
        v=(4, 6, 1, 1),
        zero=0.0,
        three=3.0,
        six=6.0,
    ),
    "a relu beside": network("r = Relu(x) a = Conv(x, w) b = Conv(r, v) y = Add(a, b)", w=(4, 3, 3, 3), v=(4, 3, 3, 3)),
    "joined with itself": network(
        "c = Conv(x, w) k = Concat<axis=1>(c, c) y = Conv(k, v)", w=(6, 3, 3, 3), v=(4, 12, 1, 1)
    ),
    "pieces in another order": network(
        "c = Conv(x, w) p, q = Split<axis=1>(c) k = Concat<axis=1>(q, p) y = Conv(k, v)", w=(6, 3, 3, 3), v=(4, 6, 1, 1)
    ),
    "backwards": network(
        "c = Conv(x, w) k = Slice(c, from, to, axes, steps) y = Conv(k, v)",
        w=(6, 3, 3, 3),
        v=(4, 6, 1, 1),
        **{"from": ints(-1), "to": ints(-9), "axes": ints(3), "steps": ints(-1)},
    ),
    "one row": network(
        "c = Conv(x, w) r = Gather<axis=2>(c, row) u = Unsqueeze(r, two) y = Conv(u, v)",
        w=(6, 3, 3, 3),
        v=(4, 6, 1, 1),
        row=np.array(1),
        two=ints(2),
    ),
    "pool of sequences": network(
        "c = Conv(x, w) m = MaxPool<kernel_shape=[2]>(c) y = Conv(m, v)", x=(2, 3, 9), w=(6, 3, 3), v=(4, 6, 1)
    ),
    "maximum": network(
        "c = Conv(x, w) m = ReduceMax<axes=[2,3], keepdims=0>(c) y = Gemm(m, v)", w=(6, 3, 3, 3), v=(6, 4)
    ),
    "residual to itself": network("c = Conv(x, w) a = Add(c, c) y = Conv(a, v)", w=(6, 3, 3, 3), v=(4, 6, 1, 1)),
    "gather": network(
        "c = Conv(x, w) a = Gather<axis=1>(c, rows) y = Conv(a, v)", w=(6, 3, 3, 3), rows=ints(0, 5, 2), v=(4, 3, 1, 1)
    ),
    "dropped out": network(
        "c = Conv(x, w) d = Dropout(c) i = Identity(d) y = Conv(i, v)", w=(6, 3, 3, 3), v=(4, 6, 1, 1)
    ),
}
# 16 bits, blocks and weights only run in float.
WAYS: dict[str, dict[str, object]] = {
    "8 bits": {},
    "symmetric, per tensor": {
        "activation_scheme": Scheme.SYMMETRIC,
        "weight_granularity": WeightGranularity.PER_TENSOR,
    },
    "asymmetric": {"weight_scheme": Scheme.ASYMMETRIC},
    "7 bits": {"weight_bits": 7, "activation_bits": 7, "edge_bits": 7},
    "16 bits": {"weight_bits": 16, "activation_bits": 16},
    "blocks": {"weight_granularity": WeightGranularity.PER_BLOCK, "block_size": 4},
    "4-bit blocks": {
        "weight_granularity": WeightGranularity.PER_BLOCK,
        "block_size": 2,
        "weight_bits": 4,
    },
    "weights only": {"activation_bits": 32},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_networks_of_all_kinds(kind: str, way: str) -> None:
    """Right in every way of storing it; names, types and shapes of inputs and outputs stay."""
    proto = KINDS[kind]
    bits = WAYS[way].get("weight_bits", 8)
    result = quantized(proto, **WAYS[way])
    if kind == "matmul of two activations" and result.proto.opset_import[0].version >= 21:
        skip_without("onnxruntime", "1.20", "older ones lack the kernel of a MatMul of codes in opset 21")
    result.check(10 if bits == 4 else 20 if bits == 7 else 25)
    for before, after in (
        (proto.graph.input, result.proto.graph.input),
        (proto.graph.output, result.proto.graph.output),
    ):
        assert [interface(value) for value in before] == [interface(value) for value in after]


# What stays float in 8 bits, on purpose.
ISLANDS = {
    "returned from a float operator": {"Tanh"},
    "returned input": {"Identity"},
    "pool first": {"MaxPool"},  # 30 times as slow on codes that no convolution has written
    "linear upsampling": {"Resize"},
    "transposed": {"ConvTranspose"},
    "scores": {"Softmax"},
    "split": {"Concat"},  # behind the last layers, where joined tensors keep scales of their own
}


@needs("onnxruntime", "1.22", MOVES_CODES)
@pytest.mark.parametrize("kind", KINDS)
def test_8_bits_run_in_integers(kind: str) -> None:
    result = quantized(KINDS[kind])
    ours = {"FusedConv": "Conv", "FusedGemm": "Gemm"}
    found = {ours.get(op, op) for op in result.islands} - {"Transpose"}
    assert found <= ISLANDS.get(kind, set())


def test_dynamic_batch_runs_at_every_size() -> None:
    session = Session(net().proto.SerializeToString(), threads=1)
    for size in (1, 3, 7):
        (y,) = session.run_all(pictures((size, 3, 8, 8))[0])
        assert y.shape == (size, 5)
    value = net().proto.graph.input[0]
    assert interface(value) == ("x", onnx.TensorProto.FLOAT, ["N", 3, 8, 8])


def test_shared_weights_are_stored_once() -> None:
    result = quantized(KINDS["shared weights"], weight_bits=7, edge_bits=7)
    inputs = {node.input[1] for node in result.wiring.all("Conv")}
    assert len(inputs) == 1


def test_a_tensor_has_one_quantizer() -> None:
    """Two of them on one tensor would keep the integer kernel away."""
    for kind in ("two readers", "returned inside", "dense", "squeeze and excite"):
        wiring = quantized(KINDS[kind]).wiring
        read = [node.input[0] for node in wiring.all("QuantizeLinear")]
        assert len(read) == len(set(read))


def test_kept_layers_stay_exactly_as_they_were() -> None:
    proto = network("c = Conv(x, w) r = Relu(c) y = Conv(r, v)", w=(4, 3, 3, 3), v=(4, 4, 1, 1))
    result = quantized(proto, keep_float=("y",)).check()
    (kept,) = [node for node in result.wiring.all("Conv") if node.name == "y"]
    np.testing.assert_array_equal(result.wiring.constants[kept.input[1]], Wiring(proto).constants["v"])
    assert result.audit.islands
    assert result.audit.islands[0].why == "kept float by --keep-float"


PAIRED = {
    "Conv": network("y = Conv(x, w)", x=(2, 8, 6, 6), w=(8, 8, 3, 3)),
    "grey picture": network("y = Conv(x, w)", x=(2, 1, 6, 6), w=(8, 1, 3, 3)),
    "depthwise with a multiplier": network("y = Conv<group=4>(x, w)", x=(2, 4, 6, 6), w=(8, 1, 3, 3)),
    "Gemm": network("g = Gemm(x, w) y = Relu(g)", x=(2, 8), w=(8, 8)),
}


@pytest.mark.parametrize("granularity", [WeightGranularity.PER_TENSOR, WeightGranularity.PER_CHANNEL])
@pytest.mark.parametrize("kind", PAIRED)
def test_pairs_of_products_fit_into_16_bits(kind: str, granularity: WeightGranularity) -> None:
    """Every 8-bit layer that no depthwise kernel runs, with codes up to 255 everywhere: see quantization.saturation."""
    proto = onnx.ModelProto.FromString(PAIRED[kind].SerializeToString())
    (stored,) = proto.graph.initializer
    weight = np.random.default_rng(0).uniform(0.8, 1, stored.dims).astype(np.float32)
    stored.CopyFrom(onnx.numpy_helper.from_array(weight, "w"))
    shape = [d.dim_value for d in proto.graph.input[0].type.tensor_type.shape.dim]
    ends = [{"x": np.full(shape, end, np.float32)} for end in (0.0, 1.0)]
    (layer,) = quantized(proto, ends, weight_granularity=granularity).params.layers
    codes = layer.codes.astype(np.int64)
    rows = codes.T if codes.ndim == 2 else np.moveaxis(codes, 1, -1).reshape(len(codes), -1)
    even = rows[:, : rows.shape[1] // 2 * 2]
    assert (255 * np.abs(even[:, 0::2] + even[:, 1::2])).max() <= 32767


def test_one_matrix_is_a_network() -> None:
    """Nothing but its input needs to be watched."""
    quantized(network("y = Gemm(x, w, b)", x=(2, 5), w=(5, 4), b=(4,))).check()
