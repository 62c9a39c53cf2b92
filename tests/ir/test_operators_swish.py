"""Swish of opset 24, which a row of the table alone adds. Oracles: its formula, ONNX's reference implementation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator
from PIL import Image

from qconv.config.data_options import DataOptions
from qconv.config.recipe import Recipe
from qconv.config.targets import TARGETS
from qconv.errors import QconvError
from qconv.ir import load
from qconv.ir.files import Source
from qconv.ir.model import Model
from qconv.pipeline.quantize import quantize
from qconv.planning.plan import find_activation_gate
from qconv.planning.planner import make_plan
from qconv.runtime.session import Session

pytestmark = pytest.mark.skipif(not onnx.defs.has("Swish"), reason="Swish came with onnx 1.19")

X = np.random.default_rng(0).normal(0, 2, (1, 3, 8, 8)).astype(np.float32)


def swish_network(alpha: float | None) -> onnx.ModelProto:
    """Conv -> Swish -> Conv -> pool. alpha: None to leave it out, which means 1."""
    rng = np.random.default_rng(1)
    given = {} if alpha is None else {"alpha": alpha}
    nodes = [
        onnx.helper.make_node("Conv", ["x", "v"], ["c"], name="first"),
        onnx.helper.make_node("Swish", ["c"], ["s"], name="swish", **given),
        onnx.helper.make_node("Conv", ["s", "w"], ["d"], name="second"),
        onnx.helper.make_node("GlobalAveragePool", ["d"], ["y"], name="pool"),
    ]
    weights = {"v": rng.normal(0, 0.4, (8, 3, 3, 3)), "w": rng.normal(0, 0.2, (5, 8, 3, 3))}
    graph = onnx.helper.make_graph(
        nodes,
        "g",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 3, 8, 8])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1, 5, 1, 1])],
        [onnx.numpy_helper.from_array(w.astype(np.float32), name) for name, w in weights.items()],
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 24)], ir_version=10)


def loaded(proto: onnx.ModelProto) -> Model:
    return load.load(onnx.ModelProto.FromString(proto.SerializeToString()), Source("m", None, b""))[0]


def reference(proto: onnx.ModelProto, x: NDArray[np.float32]) -> NDArray[np.float32]:
    (y,) = ReferenceEvaluator(proto).run(None, {"x": x})
    return np.asarray(y)


@pytest.mark.parametrize("alpha", [None, 1.0, 1.7, -0.5])
def test_the_rewritten_network_computes_the_same(alpha: float | None) -> None:
    proto = swish_network(alpha)
    model = loaded(proto)
    assert "Swish" not in {node.op_type for node in model.nodes()}
    (found,) = Session(model.proto().SerializeToString()).run(["y"], {"x": X})
    np.testing.assert_allclose(found, reference(proto, X), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("alpha", [1.0, 1.7])
def test_the_reference_is_the_formula(alpha: float) -> None:
    node = onnx.helper.make_node("Swish", ["x"], ["y"], alpha=alpha)
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph([node], "g", [value("x", 1, None)], [value("y", 1, None)])
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 24)], ir_version=10)
    np.testing.assert_allclose(reference(proto, X), X / (1 + np.exp(-alpha * X)), rtol=1e-5, atol=1e-6)


def test_it_is_quantized_as_silu_is() -> None:
    """Its operators run on integers, and the range in front of it ends where it is nearly zero."""
    model = loaded(swish_network(None))
    plan = make_plan(model, Recipe(), TARGETS["ort-cpu"])
    assert {"Conv", "Sigmoid", "Mul"} <= {node.op_type for node in plan.integer}
    gated = next(node for node in model.nodes() if node.op_type == "Conv").outputs[0]
    assert find_activation_gate(model, gated) is not None


def test_a_network_with_swish_is_quantized_from_end_to_end(tmp_path: Path) -> None:
    images = tmp_path / "imgs"
    images.mkdir()
    for index in range(8):
        pixels = np.random.default_rng(index).integers(0, 255, (8, 8, 3), np.uint8)
        Image.fromarray(pixels).save(images / f"{index}.png")
    path = tmp_path / "m.onnx"
    onnx.save(swish_network(1.7), path)
    try:
        Session(str(path))
    except QconvError:
        pytest.skip("this ONNX Runtime does not run Swish, and the original must run")
    report, _ = quantize(path, tmp_path / "q.onnx", Recipe(effort="fast", threads=1), DataOptions((str(images),)))
    assert report.audit.integer >= 4
    assert report.verify is not None
    assert min(output.sqnr_db or 0 for output in report.verify.outputs) > 25
