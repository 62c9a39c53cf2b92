"""Networks of the newest opsets, drawn at random, against ONNX Runtime on the float file, and the table of opsets."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, defs, helper, numpy_helper

from qconv import Recipe
from qconv.config.data_options import DataOptions
from qconv.config.targets import HIGHEST_OPSET, LOWERED_OPSET, OPSETS
from qconv.errors import QconvError
from qconv.ir.files import Source
from qconv.ir.load import load
from qconv.ir.newest import lower_opset
from qconv.ir.original import open_original
from qconv.pipeline.quantize import quantize
from qconv.runtime.session import RUNTIME_VERSION, Session
from tests.bench.compat import numbers, small_network
from tests.support.quantized import sqnr

DRAWS = int(os.environ.get("QCONV_DRAWS", "12"))
NEWEST = defs.onnx_opset_version()
SHAPE = (1, 3, 8, 8)
STEPS = ("Relu", "Gelu", "Swish", "Mish", "HardSwish", "Celu", "DepthToSpace", "SpaceToDepth", "Cast", "Resize")


def draw(seed: int) -> onnx.ModelProto:
    """Layers with some of the operators that are new, or have a newer version, between them."""
    rng = np.random.default_rng(seed)
    nodes: list[onnx.NodeProto] = []
    tensors: list[onnx.TensorProto] = []
    name, channels, side = "x", 3, 8

    def constant(array: np.ndarray) -> str:
        tensors.append(numpy_helper.from_array(array, f"k{len(tensors)}"))
        return tensors[-1].name

    def add(kind: str, *inputs: str, **attributes: object) -> None:
        nonlocal name
        nodes.append(helper.make_node(kind, [name, *inputs], [f"t{len(nodes)}"], **attributes))
        name = nodes[-1].output[0]

    for _ in range(int(rng.integers(1, 4))):
        w = (rng.normal(size=(8, channels, 3, 3)) / np.sqrt(9 * channels)).astype(np.float32)
        add("Conv", constant(w), pads=[1, 1, 1, 1])
        channels, kind = 8, str(rng.choice(STEPS))
        if kind == "DepthToSpace":
            add(kind, blocksize=2)
            channels, side = 2, 2 * side
        elif kind == "SpaceToDepth":
            add(kind, blocksize=2)
            channels, side = 32, side // 2
        elif kind == "Cast":
            add(kind, to=TensorProto.DOUBLE)
            add(kind, to=TensorProto.FLOAT)
        elif kind == "Resize":
            add(kind, "", "", constant(np.array([1, channels, 2 * side, 2 * side])), mode="nearest")
            side *= 2
        else:
            add(kind, **({"alpha": 1.25} if kind in ("Swish", "Celu") else {}))
        if side < 4 or side > 32:
            break
    add("GlobalAveragePool")
    add("Flatten")
    add("MatMul", constant(rng.normal(size=(channels, 5)).astype(np.float32)))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, SHAPE)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 5])],
        tensors,
    )
    opset = int(rng.integers(24, NEWEST + 1)) if NEWEST > 24 else NEWEST
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("samples")
    for index in range(6):
        np.save(folder / f"{index}.npy", np.random.default_rng(index).normal(size=SHAPE[1:]).astype(np.float32))
    return folder


@pytest.mark.skipif(NEWEST < 28, reason="needs onnx 1.23 or newer, which has opset 28")
@pytest.mark.parametrize("seed", range(DRAWS))
def test_networks_of_the_newest_opsets_are_quantized(seed: int, samples: Path, tmp_path: Path) -> None:
    proto = draw(seed)
    own = proto.opset_import[0].version
    path = tmp_path / "newest.onnx"
    path.write_bytes(proto.SerializeToString())
    report, result = quantize(path, None, Recipe(threads=1, effort="fast"), DataOptions((str(samples),)))
    assert result is not None
    assert report.opset == (own if own <= HIGHEST_OPSET else LOWERED_OPSET)
    assert report.needs == f"onnxruntime >= {OPSETS[report.opset].runtime}"
    source = Source(str(path), path)
    pictures = [{"x": np.load(sample)[None]} for sample in sorted(samples.iterdir())]
    sessions = open_original(source, 1), Session(result, threads=1)
    want, got = (np.concatenate([session.run_all(x)[0] for x in pictures]) for session in sessions)
    assert sqnr(want, got) > 20


def test_what_opset_27_lacks_is_named() -> None:
    proto = small_network()
    proto.graph.node.append(helper.make_node("DepthToSpace", ["x"], ["unread"], blocksize=2, newer=1))
    proto.opset_import[0].version = HIGHEST_OPSET + 1
    if NEWEST > HIGHEST_OPSET:
        with pytest.raises(QconvError, match="opset 27 has no such DepthToSpace") as caught:
            lower_opset(proto, "net.onnx")
        assert "opset 27 or lower" in caught.value.hint
    proto.graph.node.pop()
    lower_opset(proto, "net.onnx")
    assert proto.opset_import[0].version == LOWERED_OPSET


@pytest.mark.parametrize("opset", [o for o in OPSETS if o <= NEWEST])
def test_the_table_of_opsets_holds_for_this_runtime(opset: int, samples: Path, tmp_path: Path) -> None:
    """`make compat` asks other versions."""
    if numbers(OPSETS[opset].runtime) > numbers(RUNTIME_VERSION):
        pytest.skip(f"ONNX Runtime {RUNTIME_VERSION} is older than what opset {opset} needs")
    path = tmp_path / "net.onnx"
    path.write_bytes(small_network().SerializeToString())
    _, result = quantize(path, None, Recipe(threads=1, opset=opset), DataOptions((str(samples),)))
    assert result is not None
    proto = onnx.load_from_string(result)
    assert (proto.opset_import[0].version, proto.ir_version) == (opset, OPSETS[opset].ir_version)
    kinds = {node.op_type for node in proto.graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= kinds
    assert load(proto, Source("q.onnx", None, b""))[0].opset == opset
