"""Networks of float16, float64 and mixtures, drawn at random, against ONNX Runtime on the file as it is."""

from __future__ import annotations

import os

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from qconv.errors import Change
from qconv.ir.files import Source
from qconv.ir.load import load
from qconv.ir.original import open_original
from qconv.runtime.session import Session

DRAWS = int(os.environ.get("QCONV_DRAWS", "60"))
KINDS = {np.float16: TensorProto.FLOAT16, np.float32: TensorProto.FLOAT, np.float64: TensorProto.DOUBLE}
SAID = "the network runs in float32 from here on; inputs and outputs keep their type"


def draw(seed: int) -> tuple[onnx.ModelProto, bool]:
    """A network of dense layers, whose types change by Cast. Returns also whether anything is computed in another type
    than float32 that counts: float64 counts where a layer or the input has it."""
    rng = np.random.default_rng(seed)
    kinds = list(KINDS)
    edge = kinds[rng.integers(3)]
    nodes, tensors = [], []
    name, kind, width = "x", edge, 6
    counts = edge is not np.float32
    for index in range(int(rng.integers(1, 5))):
        wish = kinds[rng.integers(3)]
        if wish is not kind:
            nodes.append(helper.make_node("Cast", [name], [f"c{index}"], to=KINDS[wish]))
            name, kind = f"c{index}", wish
            counts = counts or wish is np.float16
        if rng.integers(0, 3):
            out = int(rng.integers(3, 8))
            stored = kinds[rng.integers(3)]
            weights = (rng.normal(size=(width, out)) / 3).astype(stored)
            tensors.append(numpy_helper.from_array(weights, f"s{index}"))
            nodes.append(helper.make_node("Cast", [f"s{index}"], [f"w{index}"], to=KINDS[kind]))
            nodes.append(helper.make_node("MatMul", [name, f"w{index}"], [f"m{index}"]))
            name, width = f"m{index}", out
            counts = counts or kind is not np.float32
        tensors.append(numpy_helper.from_array(rng.normal(size=width).astype(kind), f"b{index}"))
        nodes.append(helper.make_node(str(rng.choice(["Add", "Mul"])), [name, f"b{index}"], [f"a{index}"]))
        name = f"a{index}"
    inputs = [helper.make_tensor_value_info("x", KINDS[edge], ["N", 6])]
    outputs = [helper.make_tensor_value_info(name, KINDS[kind], ["N", width])]
    graph = helper.make_graph(nodes, "g", inputs, outputs, tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), counts


def outputs(session: Session) -> NDArray:
    (_, dtype, _), *_ = session.inputs
    x = np.random.default_rng(0).normal(size=(3, 6)).astype(dtype)
    (found,) = session.run_all({session.inputs[0][0]: x})
    return found


@pytest.mark.parametrize("seed", range(DRAWS))
def test_networks_of_any_float_type_become_float32(seed: int) -> None:
    proto, counts = draw(seed)
    source = Source("mixed.onnx", None, proto.SerializeToString())
    expected = outputs(open_original(source, 1))
    model, changes = load(proto, source)
    got = outputs(Session(model.proto().SerializeToString(), optimize=False))
    assert got.dtype == expected.dtype
    np.testing.assert_allclose(got, expected, rtol=0.02, atol=0.02)
    assert [change.what for change in changes if change.where.startswith("float")] == [SAID] * counts
    layers = {value.dtype for node in model.nodes() if node.op_type == "MatMul" for value in node.inputs if value}
    assert {str(kind) for kind in layers} <= {"FLOAT"}


def test_a_layer_that_the_runtime_lacks_in_float64_is_run_in_float32() -> None:
    """ONNX Runtime has no Conv of float64; NumPy computes the one place of the result."""
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(1, 3, 3, 3)), rng.normal(size=(2, 3, 3, 3))
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.DOUBLE, [1, 3, 3, 3])],
        [helper.make_tensor_value_info("y", TensorProto.DOUBLE, [1, 2, 1, 1])],
        [numpy_helper.from_array(w, "w")],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    session = open_original(Source("double.onnx", None, proto.SerializeToString()), 1)
    (found,) = session.run_all({"x": x})
    assert found.dtype == np.float64
    np.testing.assert_allclose(found.reshape(2), np.einsum("ochw,chw->o", w, x[0]), rtol=1e-5)


def test_float64_of_places_and_numbers_beyond_float32_stay_finite() -> None:
    """Computations beside the layers keep their type, bounds of float64 become the largest float32."""
    nodes = [
        helper.make_node("Cast", ["x"], ["d"], to=TensorProto.DOUBLE),
        helper.make_node("Clip", ["d", "low", "high"], ["c"]),
        helper.make_node("Cast", ["c"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["f", "w"], ["y"]),
    ]
    most = np.finfo(np.float64).max
    for kind in (TensorProto.FLOAT, TensorProto.DOUBLE):
        tensors = [numpy_helper.from_array(np.array(v), n) for n, v in (("low", -most), ("high", most))]
        graph = helper.make_graph(
            nodes,
            "g",
            [helper.make_tensor_value_info("x", kind, ["N", 6])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 4])],
            [*tensors, numpy_helper.from_array(np.ones((6, 4), np.float32), "w")],
        )
        proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        expected = outputs(Session(proto.SerializeToString()))
        model, changes = load(proto, Source("bounds.onnx", None, b""))
        np.testing.assert_allclose(outputs(Session(model.proto().SerializeToString())), expected, rtol=1e-5)
        kinds = {str(value.dtype) for node in model.nodes() if node.op_type == "Clip" for value in node.inputs if value}
        assert kinds == ({"FLOAT"} if kind == TensorProto.DOUBLE else {"DOUBLE"})
        assert any(isinstance(c, Change) and c.where == "float64" for c in changes) == (kind == TensorProto.DOUBLE)
