"""Operators that compute give in PyTorch what they give in ONNX Runtime, and gradients that small steps confirm."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from tests.support.models import ints, loaded, network, random_feeds, statistics

torch = pytest.importorskip("torch", reason="needs the extra: pip install 'qconv[torch]'")

from qconv.errors import QconvError
from qconv.training.network import TorchNetwork
from qconv.training.onnx_ops import COMPUTE_OPERATORS
from tests.support.torched import check, check_gradient, outputs

# fmt: off
UNARY = (
    "Relu", "LeakyRelu", "Elu", "Sigmoid", "HardSigmoid", "HardSwish", "Tanh", "Softplus", "Erf", "Exp", "Abs", "Neg",
    "Reciprocal", "Floor", "Ceil", "Round", "Softmax", "LogSoftmax", "Identity", "Dropout", "Clip",
    "GlobalAveragePool", "GlobalMaxPool", "ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin",
)
# fmt: on
POOLS = {
    "plain": "kernel_shape=[2,2]",
    "strides": "kernel_shape=[3,2], strides=[2,3]",
    "pads": "kernel_shape=[3,3], pads=[1,1,1,1]",
    "asymmetric pads": "kernel_shape=[3,3], strides=[2,2], pads=[0,1,2,1]",
    "one side": "kernel_shape=[3,3], strides=[2,2], pads=[0,0,1,1]",
    "ceil": "kernel_shape=[3,3], strides=[2,2], ceil_mode=1",
    "ceil, pads": "kernel_shape=[3,3], strides=[2,2], pads=[1,1,1,1], ceil_mode=1",
    "ceil, a window less": "kernel_shape=[2,2], strides=[3,3], pads=[1,1,1,1], ceil_mode=1",
    "ceil, asymmetric pads": "kernel_shape=[3,2], strides=[2,3], pads=[1,0,0,1], ceil_mode=1",
    "same upper": 'kernel_shape=[2,3], strides=[1,2], auto_pad="SAME_UPPER"',
    "same lower": 'kernel_shape=[2,3], strides=[1,2], auto_pad="SAME_LOWER"',
    "valid": 'kernel_shape=[3,3], strides=[2,2], auto_pad="VALID"',
}
REDUCTIONS = ("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin")
POSITIVE = "s = Abs(x) p = Add(s, tenth)"


def computing() -> Iterator[tuple[str, onnx.ModelProto]]:
    """`operator: what is special` and a model of it; the input is `x`, of shape (2, 3, 6, 6) mostly."""
    for kind in UNARY:
        yield kind, network(f"y = {kind}(x)")
    for pool in ("MaxPool", "AveragePool"):
        for name, attributes in POOLS.items():
            yield f"{pool}: {name}", network(f"y = {pool}<{attributes}>(x)", (2, 3, 7, 8))
        yield f"{pool}: 1-D", network(f"y = {pool}<kernel_shape=[3], strides=[2], pads=[1,0]>(x)", (2, 3, 7))
        yield f"{pool}: opset 22", network(f"y = {pool}<{POOLS['ceil, pads']}>(x)", (2, 3, 7, 8), opset=22)
    for name in ("pads", "asymmetric pads", "ceil", "ceil, pads", "same upper"):
        body = f"y = AveragePool<count_include_pad=1, {POOLS[name]}>(x)"
        yield f"AveragePool: {name}, counted", network(body, (2, 3, 7, 8))
        yield f"AveragePool: {name}, counted, opset 19", network(body, (2, 3, 7, 8), opset=19)
    for name, attributes in {
        "plain": "dilations=[2,1]",
        "pads": "dilations=[2,2], pads=[1,2,0,1]",
        "ceil": "dilations=[2,2], strides=[2,2], ceil_mode=1",
    }.items():
        yield f"MaxPool: dilated, {name}", network(f"y = MaxPool<kernel_shape=[2,3], {attributes}>(x)", (2, 3, 7, 8))
    for kind in REDUCTIONS:
        yield f"{kind}: axes", network(f"y = {kind}(x, a)", opset=18, a=ints(1, -1))
        yield f"{kind}: keepdims 0", network(f"y = {kind}<keepdims=0>(x, a)", opset=18, a=ints(2, 3))
        yield f"{kind}: all, keepdims 0", network(f"y = {kind}<keepdims=0>(x)", opset=18)
        yield f"{kind}: no axes", network(f"y = {kind}<noop_with_empty_axes=1>(x)", opset=18)
        if kind != "ReduceSum":
            yield f"{kind}: opset 13", network(f"y = {kind}<axes=[-2,1], keepdims=0>(x)", opset=13)
    for kind in ("Softmax", "LogSoftmax"):
        for axis in (0, 1, -2):
            yield f"{kind}: axis {axis}", network(f"y = {kind}<axis={axis}>(x)")
    yield from layers()
    yield from elements()
    yield from quantizers()


def layers() -> Iterator[tuple[str, onnx.ModelProto]]:
    for name, attributes in {
        "plain": "group=1",
        "strides": "strides=[2,3]",
        "dilations": "dilations=[2,1]",
        "pads": "pads=[1,2,1,2]",
        "asymmetric pads": "pads=[0,1,2,1], strides=[2,2]",
        "same upper": 'auto_pad="SAME_UPPER", strides=[2,1]',
        "same lower": 'auto_pad="SAME_LOWER", strides=[2,1]',
        "valid": 'auto_pad="VALID", strides=[2,1]',
    }.items():
        yield f"Conv: {name}", network(f"y = Conv<{attributes}>(x, w, b)", (2, 3, 7, 8), w=(4, 3, 3, 2), b=(4,))
    yield "Conv: no bias", network("y = Conv(x, w)", w=(4, 3, 3, 3))
    yield "Conv: groups", network("y = Conv<group=2>(x, w, b)", (2, 4, 6, 6), w=(6, 2, 3, 3), b=(6,))
    yield "Conv: depthwise", network("y = Conv<group=3, pads=[1,1,1,1]>(x, w)", w=(3, 1, 3, 3))
    yield "Conv: 1-D", network("y = Conv<pads=[2,0], strides=[2]>(x, w, b)", (2, 3, 9), w=(4, 3, 3), b=(4,))
    body = "y = Conv<pads=[1,0,1,1,1,0], strides=[1,2,1]>(x, w, b)"
    yield "Conv: 3-D", network(body, (1, 2, 4, 5, 4), w=(3, 2, 2, 3, 2), b=(3,))
    for name, attributes in {
        "plain": "group=1",
        "strides": "strides=[2,3]",
        "pads": "strides=[2,2], pads=[1,1,1,1]",
        "asymmetric pads": "strides=[2,2], pads=[0,1,2,0]",
        "output_padding": "strides=[2,3], output_padding=[1,2]",
        "output_padding, pads": "strides=[2,2], pads=[1,0,1,1], output_padding=[1,1]",
        "dilations": "dilations=[2,2], pads=[1,1,0,0]",
    }.items():
        body = f"y = ConvTranspose<{attributes}>(x, w, b)"
        yield f"ConvTranspose: {name}", network(body, (2, 3, 4, 5), w=(3, 4, 3, 2), b=(4,))
    body = "y = ConvTranspose<group=2, strides=[2,2]>(x, w)"
    yield "ConvTranspose: groups", network(body, (2, 4, 4, 4), w=(4, 3, 2, 2))
    body = "y = ConvTranspose<strides=[2], pads=[1,0], output_padding=[1]>(x, w, b)"
    yield "ConvTranspose: 1-D", network(body, (2, 3, 5), w=(3, 4, 3), b=(4,))
    yield "ConvTranspose: 3-D", network("y = ConvTranspose<strides=[2,1,2]>(x, w)", (1, 2, 2, 3, 2), w=(2, 3, 2, 2, 2))
    yield "Gemm", network("y = Gemm(x, w)", (4, 5), w=(5, 3))
    yield "Gemm: transposed", network("y = Gemm<transA=1, transB=1>(x, w, b)", (4, 5), w=(3, 4), b=(3,))
    yield "Gemm: scaled", network("y = Gemm<alpha=0.5, beta=1.5, transB=1>(x, w, b)", (4, 5), w=(3, 5), b=(4, 3))
    yield "MatMul", network("y = MatMul(x, w)", (4, 5), w=(5, 3))
    yield "MatMul: stacked", network("y = MatMul(x, w)", (2, 3, 4, 5), w=(3, 5, 2))
    yield "MatMul: vector", network("y = MatMul(x, w)", (2, 4, 5), w=(5,))
    body = "y = BatchNormalization<epsilon=0.01>(x, gamma, beta, mean, var)"
    yield "BatchNormalization", network(body, **statistics(3))
    yield "BatchNormalization: 2 axes", network(body, (4, 3), **statistics(3))
    yield "InstanceNormalization", network("y = InstanceNormalization<epsilon=0.01>(x, g, b)", g=(3,), b=(3,))
    yield "LRN", network("y = LRN<size=3, alpha=0.5, beta=0.6, bias=2.0>(x)", (2, 6, 3, 3))
    yield "LRN: default", network("y = LRN<size=5>(x)", (2, 6, 3, 3))


def elements() -> Iterator[tuple[str, onnx.ModelProto]]:
    for kind in ("Add", "Sub", "Mul", "Div", "Max", "Min", "Sum"):
        yield kind, network(f"y = {kind}(x, w)", w=(3, 1, 6))
        yield f"{kind}: other way", network(f"y = {kind}(w, x)", w=(6, 1))
    for kind in ("Max", "Min", "Sum"):
        yield f"{kind}: three", network(f"y = {kind}(x, v, w)", v=(3, 1, 6), w=(2, 1, 1, 1))
        yield f"{kind}: one", network(f"y = {kind}(x)")
    for kind in ("Log", "Sqrt"):
        yield kind, network(f"{POSITIVE} y = {kind}(p)", tenth=0.1)
    yield "Pow", network(f"{POSITIVE} y = Pow(p, w)", w=(3, 1, 1), tenth=0.1)
    yield "Pow: square", network("y = Pow(x, w)", w=2.0)
    yield "PRelu", network("y = PRelu(x, w)", w=(3, 1, 1))
    yield "PRelu: one slope", network("y = PRelu(x, w)", w=np.float32([0.3]))
    yield "LeakyRelu: alpha", network("y = LeakyRelu<alpha=0.3>(x)")
    yield "Elu: alpha", network("y = Elu<alpha=0.3>(x)")
    yield "HardSigmoid: alpha and beta", network("y = HardSigmoid<alpha=0.4, beta=0.3>(x)")
    yield "Gelu", network("y = Gelu(x)", opset=20)
    yield "Gelu: tanh", network('y = Gelu<approximate="tanh">(x)', opset=20)
    yield "Clip: both", network("y = Clip(x, a, b)", a=-0.5, b=0.7)
    yield "Clip: low", network("y = Clip(x, a)", a=-0.5)
    yield "Clip: high", network("y = Clip(x, , b)", b=0.7)
    yield "Round: ties", network("a = Mul(x, four) b = Floor(a) c = Mul(b, half) y = Round(c)", four=4.0, half=0.5)
    for name, to in {"int32": 6, "int64": 7}.items():
        yield f"Cast: {name}", network(f"a = Mul(x, ten) y = Cast<to={to}>(a)", ten=10.0)
        yield (
            f"Div: {name}",
            network(
                f"a = Mul(x, ten) b = Cast<to={to}>(a) y = Div(b, three)",
                ten=10.0,
                three=np.array(3, name),
            ),
        )
    yield "Cast: bool", network("a = Relu(x) y = Cast<to=9>(a)")
    yield "Cast: and back", network("a = Mul(x, ten) b = Cast<to=3>(a) y = Cast<to=1>(b)", ten=10.0)


CODES = {
    "uint8": (TensorProto.UINT8, 13, 131, 200),
    "int8": (TensorProto.INT8, 13, -7, 200),
    "uint16": (TensorProto.UINT16, 21, 30001, 60000),
    "int16": (TensorProto.INT16, 21, -77, 60000),
    "uint4": (TensorProto.UINT4, 21, 7, 20),
    "int4": (TensorProto.INT4, 21, -3, 20),
}
"""Element type, opset, a zero point, and half steps that random numbers reach, beyond the range of the type."""


def quantizers() -> Iterator[tuple[str, onnx.ModelProto]]:
    """Every other number lies between two codes."""
    for name, (kind, opset, zero, reach) in CODES.items():
        q, dq = "q = QuantizeLinear", "y = DequantizeLinear"
        halves = "f = Mul(x, reach) r = Round(f) h = Mul(r, half)"
        given = {"reach": float(reach), "half": np.float32(0.15), "one": 1.0, "opset": opset}
        steps = np.float32([0.3, 0.6, 0.15])
        zeros = (zero, zero + 1, zero - 2)
        for label, attributes, scale, shape in (
            ("per tensor", "axis=0", np.float32(0.3), ()),
            ("per channel", "axis=1", steps, (3,)),
            ("axis", "axis=-2", steps, (3,)),
            *([("per block", "axis=2, block_size=4", (2, 3, 2, 6), (2, 3, 2, 6))] if opset > 20 else []),
        ):
            if label == "per block":
                scale = np.resize(steps, shape)
            z = helper.make_tensor("z", kind, shape, np.resize(zeros, shape).reshape(-1))
            x = (2, 3, 3, 6) if label == "axis" else (2, 3, 7, 6)
            body = f"{halves} {q}<{attributes}>(h, s, z) {dq}<{attributes}>(q, s, z)"
            yield f"QuantizeLinear: {name}, {label}", network(body, x, **given, s=scale, z=z)
            back = f"{halves} {q}<{attributes}>(h, s, z) {dq}<{attributes}>(q, t, z)"
            yield f"DequantizeLinear: {name}, {label}", network(back, x, **given, s=scale, z=z, t=np.abs(scale) + 1)
    body = "q = QuantizeLinear(x, s) y = DequantizeLinear(q, s)"
    yield "QuantizeLinear: no zero point", network(body, s=0.01)
    body = "q = QuantizeLinear<output_dtype=5>(x, s) y = DequantizeLinear(q, s)"
    yield "QuantizeLinear: output type", network(body, opset=21, s=0.01)
    yield "QuantizeLinear: codes as output", network("y = QuantizeLinear(x, s)", s=0.01)
    body = "m = Relu(x) y = DequantizeLinear(c, s) z = Add(m, y)"
    codes = np.random.default_rng(0).integers(-(2**31), 2**31, (2, 3, 6, 6), np.int32)
    yield "DequantizeLinear: int32", network(body, outputs=("z",), c=codes, s=np.float32([1e-9, 2e-9, 3e-9]))
    body = "m = Relu(x) y = DequantizeLinear<axis=0>(c, s, o) z = Gemm<transB=1>(m, y)"
    codes = np.random.default_rng(0).integers(-127, 128, (4, 6), np.int8)
    scales, zeros = np.float32([0.1, 0.2, 0.3, 0.4]), np.int8([0, 1, 2, -3])
    yield "DequantizeLinear: weights", network(body, (2, 6), outputs=("z",), c=codes, s=scales, o=zeros)


CASES = dict(computing())
# a straight-through estimator is no slope, whole numbers have none, and codes are single precision
SMOOTH = [name for name in CASES if name.split(":")[0] not in ("QuantizeLinear", "DequantizeLinear", "Cast")]
SMOOTH = [name for name in SMOOTH if "int" not in name]


def test_every_operator_has_a_case() -> None:
    assert {name.split(":")[0] for name in CASES} == set(COMPUTE_OPERATORS)


@pytest.mark.parametrize("name", CASES)
def test_an_operator_gives_what_onnx_runtime_gives(name: str) -> None:
    check(name.split(":")[0], CASES[name])


@pytest.mark.parametrize("name", SMOOTH)
def test_gradients_are_slopes(name: str) -> None:
    check_gradient(CASES[name])


REFUSED = {
    "places of a MaxPool": network("y, z = MaxPool<kernel_shape=[2,2]>(x)"),
    "3-D MaxPool": network("y = MaxPool<kernel_shape=[2,2,2]>(x)", (1, 2, 4, 4, 4)),
    "3-D AveragePool": network("y = AveragePool<kernel_shape=[2,2,2]>(x)", (1, 2, 4, 4, 4)),
    "dilated AveragePool": network("y = AveragePool<kernel_shape=[2,2], dilations=[2,2]>(x)", opset=19),
    "dilated MaxPool that pads by itself": network(  # of known sides loading writes the pads out
        'y = MaxPool<kernel_shape=[2,2], dilations=[2,2], auto_pad="SAME_LOWER">(x)', (2, 3, "h", "w")
    ),
    "4-D Conv": network("y = Conv(x, w)", (1, 2, 3, 3, 3, 3), w=(2, 2, 2, 2, 2, 2)),
    "ConvTranspose of a shape": network("y = ConvTranspose<output_shape=[8,8]>(x, w)", w=(3, 4, 3, 3)),
    "ConvTranspose that pads by itself": network('y = ConvTranspose<auto_pad="SAME_UPPER">(x, w)', w=(3, 4, 3, 3)),
    "mask of a Dropout": network("y, z = Dropout(x)"),
    "Cast to text": network("y = Cast<to=8>(x)"),
    "codes of 8-bit floats": network("y = QuantizeLinear<output_dtype=17>(x, s)", opset=21, s=1.0),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_built_is_refused_by_name(name: str) -> None:
    network = TorchNetwork(loaded(REFUSED[name]))
    (node,) = REFUSED[name].graph.node
    with pytest.raises(QconvError, match=f"^{node.op_type} 'y' .*does not run in PyTorch"):
        outputs(network, random_feeds(REFUSED[name]))
