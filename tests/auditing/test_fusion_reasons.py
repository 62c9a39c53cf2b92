"""Files as other tools write them, drawn at random: of every node in float the audit knows why."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from qconv.auditing.audit import audit_file
from qconv.ir.files import Source
from qconv.results.quantize import FloatNode
from tests.support.libraries import needs

DRAWS = int(os.environ.get("QCONV_DRAWS", "60"))


class Writer:
    """A Q/DQ graph that grows node by node, as exporters spell it."""

    def __init__(self, rng: np.random.Generator, kind: type[np.generic] = np.uint8) -> None:
        self.rng, self.kind = rng, kind
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: list[onnx.TensorProto] = []
        self.outputs: list[str] = []

    def constant(self, array: NDArray | np.generic) -> str:
        self.tensors.append(numpy_helper.from_array(np.asarray(array), f"k{len(self.tensors)}"))
        return self.tensors[-1].name

    def op(self, kind: str, *inputs: str, **attributes: object) -> str:
        name = f"{kind.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], name=name, **attributes))
        return name

    def quantized(self, x: str, scale: float = 0.05, zero: int | None = None, *, zero_point: bool = True) -> str:
        middle = 128 if self.kind is np.uint8 else 0
        fixed = [self.constant(np.float32(scale))]
        fixed += [self.constant(self.kind(middle if zero is None else zero))] if zero_point else []
        return self.op("DequantizeLinear", self.op("QuantizeLinear", x, *fixed), *fixed)

    def weights(self, *shape: int, zero_point: bool = True) -> str:
        codes = self.rng.integers(-127, 128, shape).astype(np.int8)
        fixed = [self.constant(np.float32(0.01))] + ([self.constant(np.int8(0))] if zero_point else [])
        return self.op("DequantizeLinear", self.constant(codes), *fixed)

    def bias(self, count: int, form: str) -> list[str]:
        if form == "none":
            return []
        if form == "float":
            return [self.constant(self.rng.normal(size=count).astype(np.float32))]
        codes = self.rng.integers(-50, 50, count).astype(np.int32)
        fixed = [self.constant(np.float32(0.05 * 0.01)), self.constant(np.int32(0))]
        return [self.op("DequantizeLinear", self.constant(codes), *fixed)]

    def proto(self, y: str, shape: tuple[int, ...]) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes,
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in (y, *self.outputs)],
            self.tensors,
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def draw(seed: int) -> onnx.ModelProto:
    rng = np.random.default_rng(seed)
    w = Writer(rng, [np.uint8, np.int8][rng.integers(2)])
    dense = bool(rng.integers(0, 2))
    spelled = {name: rng.integers(0, 5) > 0 for name in ("data", "weight", "result")}
    form = str(rng.choice(["codes", "codes", "float", "none"]))
    x = w.quantized("x", zero_point=spelled["data"])
    if dense:
        if rng.integers(0, 3):
            y = w.op("Gemm", x, w.weights(5, 10, zero_point=spelled["weight"]), *w.bias(5, form), transB=1)
        else:
            y = w.op("MatMul", x, w.weights(10, 5, zero_point=spelled["weight"]))
    else:
        y = w.op("Conv", x, w.weights(4, 3, 3, 3, zero_point=spelled["weight"]), *w.bias(4, form))
    if rng.integers(0, 2):
        y = w.op("Relu", y)
        if rng.integers(0, 3) == 0:
            w.outputs.append(w.op("Exp", y))
    if rng.integers(0, 4):
        low = 0 if w.kind is np.uint8 else -128
        y = w.quantized(y, zero=low if w.nodes[-1].op_type in ("Relu", "Exp") else None, zero_point=spelled["result"])
        readers = int(rng.integers(1, 3))
        made = []
        for index in range(readers):
            if dense:
                z = w.op("MatMul", y, w.weights(5, 4))
            elif rng.integers(0, 2):
                z = w.op("Conv", y, w.weights(4, 4, 3, 3))
            else:
                z = w.op(str(rng.choice(["MaxPool", "AveragePool"])), y, kernel_shape=[2, 2])
            made.append(w.quantized(z, scale=0.05 + 0.01 * index))
        y, *others = made
        w.outputs += others
    return w.proto(y, (1, 10) if dense else (1, 3, 8, 8))


def islands(proto: onnx.ModelProto, folder: Path) -> list[FloatNode]:
    path = folder / "other.onnx"
    path.write_bytes(proto.SerializeToString())
    return list(audit_file(Source(str(path), path), threads=1, batch=None, size=None).audit.islands)


@needs("onnxruntime", "1.28", "older ones fuse less, for causes of their own")
@pytest.mark.parametrize("seed", range(DRAWS))
def test_no_cause_is_unknown(seed: int, tmp_path: Path) -> None:
    found = islands(draw(seed), tmp_path)
    assert [island for island in found if island.rule == "unknown"] == []


def gemm(
    *, zero_point: bool = True, bias: str = "codes", result: bool = True, kind: type = np.uint8
) -> onnx.ModelProto:
    w = Writer(np.random.default_rng(0), kind)
    x = w.quantized("x")
    y = w.op("Gemm", x, w.weights(5, 10, zero_point=zero_point), *w.bias(5, bias), transB=1)
    return w.proto(w.quantized(y) if result else y, (1, 10))


@pytest.mark.parametrize(
    ("options", "rule", "says"),
    [
        ({}, None, ""),
        ({"result": False}, None, ""),
        ({"bias": "float"}, None, ""),
        ({"bias": "none", "result": False}, None, ""),
        ({"zero_point": False}, "no-zero-point", "of its weights leaves out the zero point"),
        ({"zero_point": False, "bias": "none"}, "no-zero-point", "of its weights leaves out the zero point"),
        ({"bias": "float", "result": False}, "gemm-bias", "its bias is float and no quantizer stands behind it"),
    ],
)
def test_a_gemm_is_told_what_it_lacks(options: dict, rule: str | None, says: str, tmp_path: Path) -> None:
    """Its neighbours run in integers, so that it is this alone."""
    found = islands(gemm(**options), tmp_path)
    assert [island.rule for island in found] == ([] if rule is None else [rule])
    assert all(says in island.why and island.remedy for island in found)


def test_a_relu_with_two_readers_is_named(tmp_path: Path) -> None:
    w = Writer(np.random.default_rng(0))
    y = w.op("Relu", w.op("Conv", w.quantized("x"), w.weights(4, 3, 3, 3), *w.bias(4, "codes")))
    w.outputs.append(w.op("Exp", y))
    found = islands(w.proto(w.quantized(y, zero=0), (1, 3, 8, 8)), tmp_path)
    assert [island.rule for island in found] == ["several-readers", "no-kernel"]
    assert found[0].why.startswith("relu_")
    assert "behind it has several readers (exp_" in found[0].why


def test_int8_activations_with_two_readers_are_named(tmp_path: Path) -> None:
    """One reader is changed over to uint8, and runs in integers."""
    for readers, rules in ((1, []), (2, ["int8-activations"] * 3)):
        w = Writer(np.random.default_rng(0), np.int8)
        y = w.quantized(w.op("Conv", w.quantized("x"), w.weights(4, 3, 3, 3), *w.bias(4, "codes")))
        made = [w.quantized(w.op("Conv", y, w.weights(4, 4, 3, 3))) for _ in range(readers)]
        w.outputs += made[1:]
        found = islands(w.proto(made[0], (1, 3, 8, 8)), tmp_path)
        assert [island.rule for island in found] == rules
