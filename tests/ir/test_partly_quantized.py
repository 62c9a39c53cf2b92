"""Networks of which some weights are stored as codes, drawn at random: they are float, unless activations are not."""

from __future__ import annotations

import os

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from qconv.config.recipe import Recipe
from qconv.config.targets import TARGETS
from qconv.errors import QconvError
from qconv.ir.files import Source, holds_codes, is_quantized, refuse_quantized
from qconv.ir.load import load
from qconv.planning.planner import make_plan
from qconv.runtime.session import Session

DRAWS = int(os.environ.get("QCONV_DRAWS", "60"))


class Builder:
    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: list[onnx.TensorProto] = []

    def constant(self, array: NDArray) -> str:
        name = f"k{len(self.tensors)}"
        self.tensors.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def op(self, kind: str, *inputs: str, **attributes: object) -> str:
        name = f"n{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], **attributes))
        return name

    def weights(self, array: NDArray, axis: int) -> tuple[str, bool]:
        """Weights in one of many ways; returns also whether they are codes. axis: of outputs."""
        form = str(self.rng.choice(["float", "half", "tensor", "channel", "zero", "turned", "fake"]))
        if form == "float":
            return self.constant(array), False
        if form == "half":
            return self.op("Cast", self.constant(array.astype(np.float16)), to=TensorProto.FLOAT), False
        scale = np.float32(np.abs(array).max() / 127)
        if form == "fake":
            fixed = [self.constant(scale), self.constant(np.int8(0))]
            codes = self.op("QuantizeLinear", self.constant(array), *fixed)
            return self.op("DequantizeLinear", codes, *fixed), True
        codes = np.clip(np.rint(array / scale), -127, 127).astype(np.int8)
        if form == "tensor":
            return self.op("DequantizeLinear", self.constant(codes), self.constant(scale)), True
        if form == "zero":
            shifted = (codes.astype(np.int16) + 128).astype(np.uint8)
            parts = (self.constant(shifted), self.constant(scale), self.constant(np.uint8(128)))
            return self.op("DequantizeLinear", *parts), True
        scales = self.rng.uniform(0.5, 1.5, array.shape[axis]).astype(np.float32) * scale
        if form == "channel":
            return self.op("DequantizeLinear", self.constant(codes), self.constant(scales), axis=axis), True
        perm = list(range(array.ndim))[::-1]
        stored = self.constant(np.ascontiguousarray(codes.transpose(perm)))
        made = self.op("DequantizeLinear", stored, self.constant(scales), axis=array.ndim - 1 - axis)
        return self.op("Transpose", made, perm=perm), True


def draw(seed: int) -> tuple[onnx.ModelProto, list[bool], bool]:
    """A network; whether the weights of each layer are codes; whether an activation is quantized."""
    b = Builder(seed)
    name, width, coded, active = "x", 3, [], False
    for _ in range(int(b.rng.integers(1, 4))):
        out = int(b.rng.integers(2, 6))
        weight, codes = b.weights((b.rng.normal(size=(out, width, 3, 3)) / 4).astype(np.float32), 0)
        coded.append(codes)
        name = b.op("Relu", b.op("Conv", name, weight, pads=[1, 1, 1, 1]))
        width = out
        if b.rng.integers(0, 6) == 0:
            fixed = [b.constant(np.float32(0.05)), b.constant(np.uint8(0))]
            name, active = b.op("DequantizeLinear", b.op("QuantizeLinear", name, *fixed), *fixed), True
    name = b.op("Flatten", b.op("GlobalAveragePool", name))
    weight, codes = b.weights(b.rng.normal(size=(width, 5)).astype(np.float32), 1)
    coded.append(codes)
    name = b.op("MatMul", name, weight)
    graph = helper.make_graph(
        b.nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3, 6, 6])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 5])],
        b.tensors,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), coded, active


@pytest.mark.parametrize("seed", range(DRAWS))
def test_only_quantizers_of_activations_make_a_model_quantized(seed: int) -> None:
    """What is left is computed as ONNX Runtime computes the file, and every layer can be quantized."""
    proto, coded, active = draw(seed)
    assert holds_codes(proto) == (active or any(coded))
    assert is_quantized(proto) == (active or all(coded))
    if active:
        with pytest.raises(QconvError, match="already quantized"):
            refuse_quantized(proto, "partly.onnx")
        return
    refuse_quantized(proto, "partly.onnx")
    x = {"x": np.random.default_rng(0).normal(size=(2, 3, 6, 6)).astype(np.float32)}
    (expected,) = Session(proto.SerializeToString(), optimize=False).run_all(x)
    model, _ = load(proto, Source("partly.onnx", None, b""))
    assert not {node.op_type for node in model.nodes()} & {"QuantizeLinear", "DequantizeLinear", "Cast"}
    (got,) = Session(model.proto().SerializeToString(), optimize=False).run_all(x)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    assert len(make_plan(model, Recipe(), TARGETS["ort-cpu"]).layers) == len(coded)


def test_a_file_by_this_project_is_quantized_where_its_weights_are() -> None:
    proto, *_ = draw(next(seed for seed in range(99) if draw(seed)[1][0] and not draw(seed)[2]))
    proto.metadata_props.add(key="qconv.version", value="1.0")
    with pytest.raises(QconvError, match="already quantized"):
        refuse_quantized(proto, "own.onnx")
