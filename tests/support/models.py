"""Tiny models for tests, written as ONNX text: the nodes in words, the weights as arrays or as shapes."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
import onnx
import onnx.parser
from numpy.typing import NDArray

from qconv.ir.files import Source
from qconv.ir.load import load
from qconv.ir.model import Model
from qconv.runtime.session import Session

Constant = NDArray | tuple[int, ...] | float | onnx.TensorProto


def network(
    body: str,
    x: Sequence[int | str] = (2, 3, 6, 6),
    outputs: Sequence[str] = ("y",),
    opset: int = 17,
    **constants: Constant,
) -> onnx.ModelProto:
    """A model of the input `x` and the nodes in `body`; a node is called after its output.

    constants: arrays, numbers, tensors as ONNX has them (for types that NumPy lacks), or shapes that are filled with
    random normal numbers.

        network("c = Conv(x, w)  y = Relu(c)", w=(4, 3, 3, 3))
    """
    shape = ",".join(map(str, x))
    proto = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["" : {opset}]> g (float[{shape}] x) => () {{ {body} }}'
    )
    for name, constant in constants.items():
        if not isinstance(constant, onnx.TensorProto):
            constant = onnx.numpy_helper.from_array(_array(name, constant), name)
        proto.graph.initializer.append(constant)
        proto.graph.initializer[-1].name = name
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
    typed = onnx.shape_inference.infer_shapes(proto).graph.output
    for output, found in zip(proto.graph.output, typed, strict=True):
        output.CopyFrom(found)
    return proto


def _array(name: str, constant: NDArray | tuple[int, ...] | float) -> NDArray:
    if isinstance(constant, tuple):
        return np.random.default_rng(zlib.crc32(name.encode())).standard_normal(constant).astype(np.float32)
    return constant if isinstance(constant, np.ndarray) else np.float32(constant)


def ints(*numbers: int) -> NDArray[np.int64]:
    """A constant of whole numbers: pads, axes, a shape."""
    return np.array(numbers, np.int64)


def statistics(channels: int, **instead: NDArray) -> dict[str, NDArray]:
    """Constants gamma, beta, mean and var of a BatchNormalization; some gains are negative."""
    rng = np.random.default_rng(channels)
    drawn = {
        "gamma": rng.normal(size=channels),
        "beta": rng.normal(size=channels),
        "mean": rng.normal(size=channels),
        "var": rng.uniform(0.5, 2.0, size=channels),
    }
    return {name: np.asarray(instead.get(name, numbers), np.float32) for name, numbers in drawn.items()}


def loaded(proto: onnx.ModelProto) -> Model:
    """The model as the passes get it; `proto` stays as it is."""
    copy = onnx.ModelProto.FromString(proto.SerializeToString())
    return load(copy, Source("the test's model", None, b""), opset=13)[0]


def run(model: onnx.ModelProto | Model, feeds: dict[str, NDArray]) -> dict[str, NDArray]:
    """Every output by name, from ONNX Runtime with its own optimizations off."""
    proto = model.proto() if isinstance(model, Model) else model
    session = Session(proto.SerializeToString(), optimize=False, threads=1)
    return dict(zip(session.outputs, session.run_all(feeds), strict=True))


def random_feeds(proto: onnx.ModelProto, seed: int = 0) -> dict[str, NDArray]:
    """Random normal numbers for every input; open dimensions become 2."""
    rng = np.random.default_rng(seed)
    constants = {tensor.name for tensor in proto.graph.initializer}
    return {
        value.name: rng.standard_normal([d.dim_value or 2 for d in value.type.tensor_type.shape.dim]).astype(np.float32)
        for value in proto.graph.input
        if value.name not in constants
    }


def op_types(model: Model) -> str:
    """The operators in order, separated by blanks."""
    return " ".join(node.op_type for node in model.nodes())
