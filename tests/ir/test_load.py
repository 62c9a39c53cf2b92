"""From files of all kinds to a model: what ONNX Runtime computes with the file is what it computes with the result."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from qconv.config.data_options import DataOptions
from qconv.config.recipe import Recipe
from qconv.errors import QconvError
from qconv.ir import files, load, subgraph
from qconv.ir.files import Source, file_bytes, read_proto
from qconv.ir.model import Model
from qconv.ir.operators import Operator
from qconv.pipeline.quantize import quantize
from qconv.runtime.session import Session
from tests.support.models import network, random_feeds, run, statistics

FLOAT, HALF, INT64, BOOL, TEXT = (
    TensorProto.FLOAT,
    TensorProto.FLOAT16,
    TensorProto.INT64,
    TensorProto.BOOL,
    TensorProto.STRING,
)
SHAPE = (1, 3, 8, 8)
OUT_SHAPE = (1, 4, 6, 6)
WEIGHT = np.random.default_rng(1).standard_normal((4, 3, 3, 3)).astype(np.float32)
CONV = helper.make_node("Conv", ["x", "w"], ["y"])
info = helper.make_tensor_value_info


def model_of(
    nodes: Sequence[onnx.NodeProto],
    *constants: onnx.TensorProto,
    inputs: Sequence[onnx.ValueInfoProto] = (info("x", FLOAT, SHAPE),),
    outputs: Sequence[onnx.ValueInfoProto] = (info("y", FLOAT, OUT_SHAPE),),
    opset: int = 17,
    ir: int = 8,
    functions: Sequence[onnx.FunctionProto] = (),
) -> onnx.ModelProto:
    """A model from its parts, nothing added."""
    graph = helper.make_graph(nodes, "g", inputs, outputs, constants)
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(f.domain, 1) for f in functions)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=ir, functions=functions)


def tensor(name: str, array: NDArray) -> onnx.TensorProto:
    return numpy_helper.from_array(array, name)


def reload(proto: onnx.ModelProto, tmp_path: Path, opset: int = 13) -> Model:
    """Through a file and back, as the pipeline does it."""
    path = tmp_path / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    source = Source(str(path), path)
    return load.load(read_proto(source), source, opset=opset)[0]


def same(proto: onnx.ModelProto, tmp_path: Path, feeds: dict[str, NDArray] | None = None) -> Model:
    """The loaded model, after checking that it is valid, keeps its edges and computes what the file does."""
    model = reload(proto, tmp_path)
    after = model.proto()
    onnx.checker.check_model(after)
    constants = {t.name for t in proto.graph.initializer}
    for before, kept in ((proto.graph.output, after.graph.output), (proto.graph.input, after.graph.input)):
        edge = [(v.name, v.type.tensor_type.elem_type) for v in before if v.name not in constants or before is not kept]
        assert [(v.name, v.type.tensor_type.elem_type) for v in kept] == [
            pair for pair in edge if kept is after.graph.output or pair[0] not in constants
        ]
    feeds = random_feeds(proto) if feeds is None else feeds
    want, got = run(proto, feeds), run(model, feeds)
    assert want.keys() == got.keys()
    for name, expected in want.items():
        assert got[name].dtype == expected.dtype
        np.testing.assert_allclose(got[name], expected, rtol=1e-5, atol=1e-5)
    return model


def ops(model: Model) -> list[str]:
    return [node.op_type for node in model.graph]


# -- opsets and other old habits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("ir", [3, 8])
def test_opset_7_is_raised(tmp_path: Path, ir: int) -> None:
    """Attributes that became inputs (Clip, Squeeze, Dropout), Softmax over all later axes, a broadcast bias."""
    stats = [tensor(name, array) for name, array in statistics(4).items()]
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"]),
        helper.make_node("BatchNormalization", ["c", "gamma", "beta", "mean", "var"], ["b"]),
        helper.make_node("Dropout", ["b"], ["d"], ratio=0.5),
        helper.make_node("Clip", ["d"], ["k"], min=0.0, max=6.0),
        helper.make_node("GlobalAveragePool", ["k"], ["p"]),
        helper.make_node("Squeeze", ["p"], ["s"], axes=[2, 3]),
        helper.make_node("Gemm", ["s", "g", "h"], ["z"], transB=1),
        helper.make_node("Softmax", ["z"], ["y"]),
    ]
    rng = np.random.default_rng(0)
    constants = [
        tensor("w", WEIGHT),
        *stats,
        tensor("g", rng.standard_normal((100, 4)).astype(np.float32)),
        tensor("h", rng.standard_normal((1,)).astype(np.float32)),
    ]
    inputs = [info("x", FLOAT, SHAPE)]
    if ir == 3:  # initializers had to be inputs as well
        inputs += [info(t.name, FLOAT, t.dims) for t in constants]
    proto = model_of(nodes, *constants, inputs=inputs, outputs=[info("y", FLOAT, (1, 100))], opset=7, ir=ir)
    model = same(proto, tmp_path, {"x": rng.standard_normal(SHAPE).astype(np.float32)})
    assert model.opset == 13
    assert [value.name for value in model.graph.inputs] == ["x"]
    assert {"w", "g", "gamma"} <= set(model.graph.initializers)


def test_a_newer_opset_stays(tmp_path: Path) -> None:
    proto = model_of([CONV], tensor("w", WEIGHT), opset=20)
    assert reload(proto, tmp_path, opset=13).opset == 20
    assert reload(model_of([CONV], tensor("w", WEIGHT), opset=13), tmp_path, opset=21).opset == 21


def test_initializers_listed_as_inputs_become_constants(tmp_path: Path) -> None:
    """A large and a small one, in a file of today's IR."""
    nodes = [helper.make_node("Conv", ["x", "w", "b"], ["y"])]
    large = np.random.default_rng(0).standard_normal((4, 3, 20, 20)).astype(np.float32)
    bias = np.float32([1, 2, 3, 4])
    proto = model_of(
        nodes,
        tensor("w", large),
        tensor("b", bias),
        inputs=[info("w", FLOAT, large.shape), info("x", FLOAT, (1, 3, 24, 24)), info("b", FLOAT, (4,))],
        outputs=[info("y", FLOAT, (1, 4, 5, 5))],
    )
    model = same(proto, tmp_path)
    assert [value.name for value in model.graph.inputs] == ["x"]


def test_local_functions_are_inlined(tmp_path: Path) -> None:
    function = helper.make_function(
        "mine", "ConvRelu", ["a", "k"], ["r"],
        [helper.make_node("Conv", ["a", "k"], ["c"]), helper.make_node("Relu", ["c"], ["r"])],
        [helper.make_opsetid("", 17)],
    )  # fmt: skip
    call = helper.make_node("ConvRelu", ["x", "w"], ["y"], domain="mine")
    model = same(model_of([call], tensor("w", WEIGHT), functions=[function]), tmp_path)
    assert ops(model) == ["Conv", "Relu"]


def test_unused_and_unknown_opset_imports_do_not_stop_the_converter(tmp_path: Path) -> None:
    """ONNX Runtime's optimizer leaves dozens of them."""
    proto = model_of([CONV], tensor("w", WEIGHT), opset=11)
    proto.opset_import.append(helper.make_opsetid("com.nobody.knows", 1))
    assert reload(proto, tmp_path).opset == 13


# -- constants ---------------------------------------------------------------------------------------------------------


def test_constant_nodes_and_what_is_computed_from_them_become_initializers(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Constant", [], ["w0"], value=tensor("", WEIGHT)),
        helper.make_node("Neg", ["w0"], ["w1"]),
        helper.make_node("Constant", [], ["shape"], value_ints=[4]),
        helper.make_node("ConstantOfShape", ["shape"], ["b"], value=tensor("", np.float32([0.5]))),
        helper.make_node("Conv", ["x", "w1", "b"], ["c"]),
        helper.make_node("Constant", [], ["two"], value_float=2.0),
        helper.make_node("Mul", ["c", "two"], ["y"]),
    ]
    model = same(model_of(nodes), tmp_path)
    assert ops(model) == ["Conv", "Mul"]
    np.testing.assert_array_equal(model.graph.initializers["w1"].const_value.numpy(), -WEIGHT)
    assert model.graph.initializers["b"].const_value.numpy().tolist() == [0.5] * 4
    assert set(model.graph.initializers) == {"w1", "b", "two"}


def test_odd_constants_are_constants(tmp_path: Path) -> None:
    """An attribute of another type than its name says, one that nobody knows beside it, an output without a name."""
    nodes = [
        helper.make_node("Constant", [], ["two"], value_float=2, odd="?"),
        helper.make_node("Constant", [], [""], value_float=1.0),
        helper.make_node("Conv", ["x", "w"], ["c"]),
        helper.make_node("Mul", ["c", "two"], ["y"]),
    ]
    model = reload(model_of(nodes, tensor("w", WEIGHT)), tmp_path)
    assert ops(model) == ["Conv", "Mul"]
    assert model.graph.initializers["two"].const_value.numpy() == 2


def test_constants_that_the_model_returns_stay(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Constant", [], ["k"], value_floats=[1.0, 2.0]),
        helper.make_node("Add", ["k", "k"], ["k2"]),
        CONV,
    ]
    outputs = [info("y", FLOAT, OUT_SHAPE), info("k", FLOAT, (2,)), info("k2", FLOAT, (2,))]
    same(model_of(nodes, tensor("w", WEIGHT), outputs=outputs), tmp_path)


def test_random_and_sequence_nodes_are_no_constants(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("SequenceConstruct", ["k", "k"], ["s"]),
        helper.make_node("SequenceInsert", ["s", "x"], ["s2"]),
        helper.make_node("ConcatFromSequence", ["s2"], ["y"], axis=0),
        helper.make_node("RandomNormal", [], ["r"], shape=[2], seed=1.0),
        helper.make_node("Add", ["r", "x"], ["z"]),
    ]
    proto = model_of(
        nodes,
        tensor("k", np.float32([1, 2])),
        inputs=[info("x", FLOAT, (2,))],
        outputs=[info("y", FLOAT, (6,)), info("z", FLOAT, (2,))],
    )
    assert "SequenceConstruct" in ops(reload(proto, tmp_path))
    assert "RandomNormal" in ops(reload(proto, tmp_path))


def test_sparse_weights_become_dense(tmp_path: Path) -> None:
    """Indices of both kinds, as an initializer and as a Constant node."""
    values = tensor("w", np.float32([1, 2, 3]))
    places = [[0, 0, 0, 0], [1, 1, 2, 2], [3, 2, 0, 1]]
    flat = np.int64([np.ravel_multi_index(place, WEIGHT.shape) for place in places])
    dense = np.zeros(WEIGHT.shape, np.float32)
    dense.reshape(-1)[flat] = [1, 2, 3]
    as_initializer = model_of([CONV])
    as_initializer.graph.sparse_initializer.append(
        helper.make_sparse_tensor(values, tensor("", np.int64(places)), WEIGHT.shape)
    )
    sparse = helper.make_sparse_tensor(values, tensor("", flat), WEIGHT.shape)
    as_node = model_of([helper.make_node("Constant", [], ["w"], sparse_value=sparse), CONV])
    for proto in (as_initializer, as_node):
        model = same(proto, tmp_path, {"x": np.ones(SHAPE, np.float32)})
        np.testing.assert_array_equal(model.graph.initializers["w"].const_value.numpy(), dense)


def test_texts_and_truth_values_pass_through(tmp_path: Path) -> None:
    """Truth values kept in int32_data, a text initializer, and a text attribute."""
    flags = helper.make_tensor("flags", BOOL, [2], [True, False])
    assert list(flags.int32_data) == [1, 0]
    words = helper.make_tensor("words", TEXT, [2], [b"cat", b"dog"])
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["y"], auto_pad="VALID"),
        helper.make_node("Not", ["flags"], ["not_flags"]),
        helper.make_node("Identity", ["not_flags"], ["f"]),
        helper.make_node("Equal", ["words", "words"], ["e"]),
    ]
    outputs = [info("y", FLOAT, OUT_SHAPE), info("f", BOOL, (2,)), info("e", BOOL, (2,))]
    same(model_of(nodes, tensor("w", WEIGHT), flags, words, outputs=outputs, opset=19), tmp_path)


# -- odd graphs --------------------------------------------------------------------------------------------------------


def test_outputs_that_nothing_computes(tmp_path: Path) -> None:
    """The input itself, and a weight."""
    outputs = [info("y", FLOAT, OUT_SHAPE), info("x", FLOAT, SHAPE), info("w", FLOAT, WEIGHT.shape)]
    same(model_of([CONV], tensor("w", WEIGHT), outputs=outputs), tmp_path)


def test_an_output_without_a_shape_gets_one(tmp_path: Path) -> None:
    model = same(model_of([CONV], tensor("w", WEIGHT), outputs=[info("y", FLOAT, None)]), tmp_path)
    assert [d.dim_value for d in model.proto().graph.output[0].type.tensor_type.shape.dim] == list(OUT_SHAPE)


def test_a_graph_without_a_name_gets_one(tmp_path: Path) -> None:
    proto = model_of([CONV], tensor("w", WEIGHT))
    proto.graph.name = ""
    same(proto, tmp_path)


def test_nodes_get_names_of_their_own(tmp_path: Path) -> None:
    """Unnamed ones their output's; of two with one name, which no runtime accepts, the second another."""
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], name="n"),
        helper.make_node("Relu", ["c"], ["r"], name="n"),
        helper.make_node("Neg", ["r"], ["y"]),
    ]
    model = reload(model_of(nodes, tensor("w", WEIGHT)), tmp_path)
    assert [node.name for node in model.graph] == ["n", "n_2", "y"]


def branches(dtype: int) -> onnx.NodeProto:
    """An If whose bodies read `c`, a layer's result, and `k`, a constant computed outside."""
    numpy_type = helper.tensor_dtype_to_np_dtype(dtype)
    then = helper.make_graph(
        [
            helper.make_node("Constant", [], ["two"], value=tensor("", np.asarray(2, numpy_type))),
            helper.make_node("Mul", ["c", "two"], ["t"]),
            helper.make_node("Add", ["t", "k"], ["then_out"]),
        ],
        "then",
        [],
        [info("then_out", dtype, OUT_SHAPE)],
    )
    other = helper.make_graph(
        [helper.make_node("Add", ["c", "three"], ["else_out"])],
        "else",
        [],
        [info("else_out", dtype, OUT_SHAPE)],
        [tensor("three", np.asarray([3], numpy_type))],
    )
    return helper.make_node("If", ["flag"], ["y"], then_branch=then, else_branch=other)


def loop(dtype: int) -> onnx.NodeProto:
    """Three rounds of state = state * 2 + c."""
    numpy_type = helper.tensor_dtype_to_np_dtype(dtype)
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go"], ["go_on"]),
            helper.make_node("Mul", ["state", "two"], ["twice"]),
            helper.make_node("Add", ["twice", "c"], ["next"]),
        ],
        "body",
        [info("i", INT64, ()), info("go", BOOL, ()), info("state", dtype, OUT_SHAPE)],
        [info("go_on", BOOL, ()), info("next", dtype, OUT_SHAPE)],
        [tensor("two", np.asarray([2], numpy_type))],
    )
    return helper.make_node("Loop", ["rounds", "", "c"], ["y"], body=body)


@pytest.mark.parametrize("dtype", [FLOAT, HALF], ids=["float32", "float16"])
@pytest.mark.parametrize("flag", [True, False])
def test_bodies_of_if_read_what_they_read_before(tmp_path: Path, dtype: int, flag: bool) -> None:
    numpy_type = helper.tensor_dtype_to_np_dtype(dtype)
    nodes = [
        helper.make_node("Constant", [], ["k0"], value=tensor("", np.ones((1, 4, 1, 1), numpy_type))),
        helper.make_node("Neg", ["k0"], ["k"]),
        helper.make_node("Conv", ["x", "w"], ["c"]),
        branches(dtype),
    ]
    proto = model_of(
        nodes,
        tensor("w", np.round(WEIGHT).astype(numpy_type)),
        inputs=[info("x", dtype, SHAPE), info("flag", BOOL, ())],
        outputs=[info("y", dtype, OUT_SHAPE)],
    )
    x = np.random.default_rng(0).integers(-3, 4, SHAPE).astype(numpy_type)  # exact in float16, too
    model = same(proto, tmp_path, {"x": x, "flag": np.asarray(flag)})
    (choice,) = [node for node in model.graph if node.op_type == "If"]
    assert [node.op_type for node in choice.attributes["then_branch"].as_graph()] == ["Constant", "Mul", "Add"]


@pytest.mark.parametrize("dtype", [FLOAT, HALF], ids=["float32", "float16"])
def test_bodies_of_loop_read_what_they_read_before(tmp_path: Path, dtype: int) -> None:
    numpy_type = helper.tensor_dtype_to_np_dtype(dtype)
    proto = model_of(
        [helper.make_node("Conv", ["x", "w"], ["c"]), loop(dtype)],
        tensor("w", np.round(WEIGHT).astype(numpy_type)),
        tensor("rounds", np.asarray(3, np.int64)),
        inputs=[info("x", dtype, SHAPE)],
        outputs=[info("y", dtype, OUT_SHAPE)],
    )
    same(proto, tmp_path, {"x": np.random.default_rng(0).integers(-3, 4, SHAPE).astype(numpy_type)})


# -- float16 -----------------------------------------------------------------------------------------------------------


def half_in_int32(name: str, array: NDArray) -> onnx.TensorProto:
    """The way of older exporters: each number's 16 bits as one int32."""
    half = array.astype(np.float16)
    stored = TensorProto(name=name, data_type=HALF, dims=half.shape)
    stored.int32_data.extend(half.view(np.uint16).reshape(-1).astype(int).tolist())
    return stored


@pytest.mark.parametrize("store", [half_in_int32, lambda name, array: tensor(name, array.astype(np.float16))])
def test_float16_runs_in_float32_between_edges_of_its_own_type(
    tmp_path: Path, store: Callable[[str, NDArray], onnx.TensorProto]
) -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"]),
        helper.make_node("Cast", ["c"], ["f"], to=FLOAT),
        helper.make_node("Cast", ["f"], ["h"], to=HALF),
        helper.make_node("Relu", ["h"], ["y"]),
    ]
    proto = model_of(
        nodes,
        store("w", WEIGHT),
        inputs=[info("x", HALF, SHAPE)],
        outputs=[info("y", HALF, OUT_SHAPE), info("c", HALF, OUT_SHAPE)],
    )
    model = reload(proto, tmp_path)
    x = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float16)
    want, got = run(proto, {"x": x}), run(model, {"x": x})
    assert list(want) == list(got)
    for name in want:
        assert got[name].dtype == np.float16
        # 27 products rounded to 11 bits on the one side
        np.testing.assert_allclose(got[name], want[name], atol=2e-2, rtol=2e-3)
    types = {node.op_type: node.outputs[0].dtype.name for node in model.graph}
    assert types["Conv"] == types["Relu"] == "FLOAT"


def test_float16_edges_that_nothing_computes_keep_their_type(tmp_path: Path) -> None:
    constant = tensor("k", np.float16([1, 2]))
    outputs = [info("y", HALF, OUT_SHAPE), info("k", HALF, (2,)), info("x", HALF, SHAPE)]
    proto = model_of(
        [CONV],
        tensor("w", np.round(WEIGHT).astype(np.float16)),
        constant,
        inputs=[info("x", HALF, SHAPE)],
        outputs=outputs,
    )
    same(proto, tmp_path, {"x": np.ones(SHAPE, np.float16)})


# -- external data -----------------------------------------------------------------------------------------------------


def with_data(folder: Path, location: str = "weights.bin") -> tuple[Path, onnx.ModelProto]:
    """A model whose two weights lie in `weights.bin`, said to be at `location`. One is only read through Transpose."""
    gemm = np.random.default_rng(0).standard_normal((144, 10)).astype(np.float32)
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"]),
        helper.make_node("Flatten", ["c"], ["f"]),
        helper.make_node("Transpose", ["g"], ["gt"]),
        helper.make_node("Gemm", ["f", "gt"], ["y"], transB=1),
    ]
    plain = model_of(nodes, tensor("w", WEIGHT), tensor("g", gemm), outputs=[info("y", FLOAT, (1, 10))])
    proto = onnx.ModelProto.FromString(plain.SerializeToString())
    data = b""
    for stored in proto.graph.initializer:
        raw = stored.raw_data
        stored.ClearField("raw_data")
        stored.data_location = TensorProto.EXTERNAL
        for key, value in (("location", location), ("offset", str(len(data))), ("length", str(len(raw)))):
            stored.external_data.add(key=key, value=value)
        data += raw
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "weights.bin").write_bytes(data)
    path = folder / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    return path, plain


def samples(folder: Path, shape: tuple[int, ...] = SHAPE[1:], count: int = 3, dtype: type = np.float32) -> str:
    """A folder of preprocessed samples to calibrate with."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for index in range(count):
        np.save(folder / f"{index}.npy", rng.standard_normal(shape).astype(dtype))
    return str(folder)


def test_external_data_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative to the model, not to the working directory; also where a constant is computed from it."""
    path, plain = with_data(tmp_path / "there")  # 108 and 1440 numbers
    monkeypatch.chdir(tmp_path)
    relative = path.relative_to(tmp_path)
    source = Source(str(relative), relative)
    proto = read_proto(source)
    assert file_bytes(proto, source) == path.stat().st_size + (1440 + 108) * 4
    model, _ = load.load(proto, source)
    assert model.external
    assert ops(model) == ["Conv", "Flatten", "Gemm"]
    feeds = random_feeds(plain)
    with subgraph.runnable_with_outputs(model, ["c"]) as runnable:
        got, inner = Session(runnable, threads=1).run(["y", "c"], feeds)
    np.testing.assert_allclose(got, run(plain, feeds)["y"], rtol=1e-4, atol=1e-4)
    assert inner.shape == OUT_SHAPE


@pytest.mark.parametrize("limit", [files.PROTOBUF_LIMIT, 500], ids=["small", "too large for one protobuf"])
def test_external_data_goes_into_a_data_file_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    path, _ = with_data(tmp_path / "there")
    monkeypatch.setattr(files, "PROTOBUF_LIMIT", limit)
    out = tmp_path / "out.onnx"
    quantize(path, out, Recipe(threads=1), DataOptions((samples(tmp_path / "calib"),)))
    model, data = sorted(p.name for p in tmp_path.iterdir() if p.is_file())
    assert model == "out.onnx"
    assert re.fullmatch(r"out\.onnx\.[0-9a-f]{8}\.data", data)
    (got,) = Session(str(out), threads=1).run_all({"x": np.ones(SHAPE, np.float32)})
    assert got.shape == (1, 10)


def test_models_too_large_for_one_protobuf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit lowered to 500 bytes: calibration and result use data files, and the numbers are the usual ones."""
    path, calib = tmp_path / "model.onnx", samples(tmp_path / "calib")
    recipe, images = Recipe(threads=1), DataOptions((calib,))
    x = np.random.default_rng(9).standard_normal(SHAPE).astype(np.float32)

    def result(scale: float) -> tuple[set[str], NDArray]:
        path.write_bytes(model_of([CONV, helper.make_node("Relu", ["y"], ["z"])], tensor("w", WEIGHT * scale),
                                  tensor("unused", np.ones(200, np.float32)),
                                  outputs=[info("z", FLOAT, OUT_SHAPE)]).SerializeToString())  # fmt: skip
        quantize(path, tmp_path / "out.onnx", recipe, images)
        files = {p.name for p in tmp_path.iterdir() if p.is_file()} - {"model.onnx"}
        return files, Session(str(tmp_path / "out.onnx"), threads=1).run_all({"x": x})[0]

    usual, expected = result(1.0)
    assert usual == {"out.onnx"}
    monkeypatch.setattr(files, "PROTOBUF_LIMIT", 100)
    monkeypatch.setattr("onnx_ir.save", with_low_threshold())
    first, got = result(1.0)
    np.testing.assert_array_equal(got, expected)
    assert len(first) == 2
    (data,) = first - {"out.onnx"}
    assert data == f"out.onnx.{hashlib.sha256((tmp_path / data).read_bytes()).hexdigest()[:8]}.data"
    assert result(1.0)[0] == first  # named by its content
    second, _ = result(2.0)
    assert len(second) == 2  # the old data file went when its model was replaced
    assert "out.onnx" in second
    assert (tmp_path / data).exists() == (data in second)


def with_low_threshold() -> Callable[..., None]:
    """onnx-ir's save, keeping even small weights outside, so that tests need no large ones."""
    from functools import partial

    import onnx_ir

    return partial(onnx_ir.save, size_threshold_bytes=16)


def test_a_result_too_large_for_standard_output_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(model_of([CONV], tensor("w", WEIGHT)).SerializeToString())
    monkeypatch.setattr(files, "PROTOBUF_LIMIT", 100)
    with pytest.raises(QconvError, match="too large for one file"):
        quantize(path, None, Recipe(threads=1), DataOptions((samples(tmp_path / "calib"),)))


def test_external_data_comes_along_to_standard_output(tmp_path: Path) -> None:
    """Even weights that stay float are then part of the file."""
    path, _ = with_data(tmp_path / "there")
    recipe, data = Recipe(threads=1, keep_float_op=("Gemm",)), DataOptions((samples(tmp_path / "calib"),))
    _, result = quantize(path, None, recipe, data)
    assert result is not None
    (got,) = Session(result, threads=1).run_all({"x": np.ones(SHAPE, np.float32)})
    assert got.shape == (1, 10)


@pytest.mark.parametrize("location", ["../weights.bin", "a/../../weights.bin", "/etc/hostname", "", "link/weights.bin"])
def test_external_data_outside_the_models_folder_is_refused(tmp_path: Path, location: str) -> None:
    path, _ = with_data(tmp_path / "there", location)
    (tmp_path / "weights.bin").write_bytes(bytes(100_000))
    (tmp_path / "there" / "a").mkdir()
    (tmp_path / "there" / "link").symlink_to(tmp_path)
    with pytest.raises(QconvError, match="outside its own folder"):
        read_proto(Source(str(path), path))


def test_a_link_inside_the_folder_is_fine(tmp_path: Path) -> None:
    path, _ = with_data(tmp_path / "there", "link.bin")
    (tmp_path / "there" / "link.bin").symlink_to("weights.bin")
    read_proto(Source(str(path), path))


def test_missing_and_short_external_data(tmp_path: Path) -> None:
    path, _ = with_data(tmp_path)
    data = tmp_path / "weights.bin"
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(QconvError, match=r"weights.bin is shorter than .*model.onnx says"):
        read_proto(Source(str(path), path))
    data.unlink()
    with pytest.raises(QconvError, match=r"needs the external data file weights.bin, which is missing"):
        read_proto(Source(str(path), path))


@pytest.mark.parametrize(
    ("key", "value"),
    [("offset", "-4"), ("length", "3"), ("length", "x"), ("location", "a\0b"), ("location", "n" * 5000)],
)
def test_absurd_external_data_is_damage(tmp_path: Path, key: str, value: str) -> None:
    path, _ = with_data(tmp_path)
    proto = onnx.load(path, load_external_data=False)
    next(entry for entry in proto.graph.initializer[0].external_data if entry.key == key).value = value
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(QconvError):
        read_proto(Source(str(path), path))


@pytest.mark.parametrize("name", [b"location", b"weights.bin", b"WORDS"])
def test_texts_within_a_tensor_that_are_no_utf_8(tmp_path: Path, name: bytes) -> None:
    path, _ = with_data(tmp_path)
    proto = onnx.load(path, load_external_data=False)
    del proto.graph.initializer[1:]
    proto.graph.initializer[0].doc_string = "WORDS"
    content = proto.SerializeToString()
    assert content.count(name) == 1
    path.write_bytes(content.replace(name, name[:-1] + b"\xff"))
    with pytest.raises(QconvError, match="or it is damaged"):
        read_proto(Source(str(path), path))


def test_external_data_of_a_model_on_standard_input(tmp_path: Path) -> None:
    path, _ = with_data(tmp_path)
    with pytest.raises(QconvError, match=r"keeps weights in another file \(weights.bin\)"):
        read_proto(Source("-", None, path.read_bytes()))


# -- no model, or a broken one -----------------------------------------------------------------------------------------


def refusal(tmp_path: Path, content: bytes) -> str:
    """The error's text, after checking that nothing was left behind."""
    path, out, calib = tmp_path / "bad.onnx", tmp_path / "out.onnx", samples(tmp_path / "calib")
    path.write_bytes(content)
    with pytest.raises(QconvError) as caught:
        quantize(path, out, Recipe(threads=1), DataOptions((calib,)))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.onnx", "calib"]
    assert caught.value.hint
    return caught.value.message


def chain() -> onnx.ModelProto:
    """Most of what a network is made of, in 2 KB."""
    return network(
        "c = Conv<pads=[1,1,1,1]>(x, w)  b = BatchNormalization(c, gamma, beta, mean, var)  r = Relu(b)"
        " p = MaxPool<kernel_shape=[2,2], strides=[2,2]>(r)  d = Add(p, k)  f = Flatten(d)  y = Gemm(f, g, h)",
        x=(1, *SHAPE[1:]), w=(4, 3, 3, 3), k=1.0, g=(64, 5), h=(5,), **statistics(4),
    )  # fmt: skip


def test_no_model_at_all(tmp_path: Path) -> None:
    assert "is empty" in refusal(tmp_path, b"")
    for content in (b"This is a text, and no model.\n" * 50, b"\n\n\n", bytes(1000), b"\x89PNG\r\n\x1a\n" * 9, b"{}"):
        assert refusal(tmp_path, content).endswith("is not an ONNX model, or it is damaged.")


def test_no_file_at_all(tmp_path: Path) -> None:
    for path, fact in ((tmp_path / "none.onnx", "does not exist"), (tmp_path, "cannot be read")):
        with pytest.raises(QconvError, match=fact):
            quantize(path, tmp_path / "out.onnx", Recipe(threads=1), DataOptions((samples(tmp_path / "calib"),)))


@pytest.mark.parametrize("share", [0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99])
def test_a_model_that_was_cut(tmp_path: Path, share: float) -> None:
    data = chain().SerializeToString()
    assert refusal(tmp_path, data[: int(len(data) * share)]).endswith("is not an ONNX model, or it is damaged.")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # a flipped exponent makes a weight of 1e38
def test_flipped_bits_end_in_an_error_or_in_a_result(tmp_path: Path) -> None:
    """Where only a weight changed the model is as good as any. Never another exception, never a file half written."""
    data = chain().SerializeToString()
    path, out, calib = tmp_path / "bad.onnx", tmp_path / "out.onnx", samples(tmp_path / "calib")
    refused = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        flipped = np.frombuffer(data, np.uint8).copy()
        places = rng.integers(len(data), size=rng.integers(1, 8))
        flipped[places] ^= (1 << rng.integers(8, size=len(places))).astype(np.uint8)
        path.write_bytes(flipped.tobytes())
        out.unlink(missing_ok=True)
        try:
            quantize(path, out, Recipe(threads=1), DataOptions((calib,), samples=2))
        except QconvError:
            refused += 1
            assert not out.exists()
        else:
            Session(str(out))
        assert {p.name for p in tmp_path.iterdir()} <= {"bad.onnx", "calib", "out.onnx"}
    assert 10 < refused < 60


def damaged(change: Callable[[onnx.ModelProto], None]) -> bytes:
    proto = model_of([CONV], tensor("w", WEIGHT))
    change(proto)
    return proto.SerializeToString()


def _short(proto: onnx.ModelProto) -> None:
    proto.graph.initializer[0].raw_data = proto.graph.initializer[0].raw_data[:-4]


def _long(proto: onnx.ModelProto) -> None:
    proto.graph.initializer[0].dims[0] = 3


def _negative(proto: onnx.ModelProto) -> None:
    proto.graph.initializer[0].dims[0] = -4


def _untyped(proto: onnx.ModelProto) -> None:
    proto.graph.initializer[0].data_type = 99


def _few_floats(proto: onnx.ModelProto) -> None:
    proto.graph.initializer[0].ClearField("raw_data")
    proto.graph.initializer[0].float_data.extend([1.0, 2.0])


def _no_outputs(proto: onnx.ModelProto) -> None:
    del proto.graph.output[:]


def _no_opset(proto: onnx.ModelProto) -> None:
    proto.opset_import[0].domain = "com.example"


@pytest.mark.parametrize("change", [_short, _long, _negative, _untyped, _few_floats, _no_outputs, _no_opset])
def test_files_whose_parts_contradict_each_other(tmp_path: Path, change: Callable[[onnx.ModelProto], None]) -> None:
    assert refusal(tmp_path, damaged(change)).endswith("is not an ONNX model, or it is damaged.")


def test_texts_that_are_no_utf_8(tmp_path: Path) -> None:
    data = model_of([helper.make_node("Conv", ["x", "w"], ["y"], name="NAME")], tensor("w", WEIGHT))
    content = data.SerializeToString()
    assert content.count(b"NAME") == 1
    assert "damaged" in refusal(tmp_path, content.replace(b"NAME", b"N\xff\xfeE"))


def test_two_values_of_one_name(tmp_path: Path) -> None:
    proto = model_of([CONV, helper.make_node("Relu", ["x"], ["y"])], tensor("w", WEIGHT))
    assert "bad.onnx" in refusal(tmp_path, proto.SerializeToString())
    with pytest.raises(QconvError):
        reload(proto, tmp_path)


def test_a_loop_in_the_graph(tmp_path: Path) -> None:
    nodes = [helper.make_node("Add", ["y", "x"], ["a"]), helper.make_node("Relu", ["a"], ["y"])]
    assert "bad.onnx" in refusal(tmp_path, model_of(nodes).SerializeToString())


def test_unknown_operators_are_named(tmp_path: Path) -> None:
    custom = helper.make_node("DecodeJpeg", ["x"], ["y"], domain="ai.onnx.contrib")
    proto = model_of([custom])
    proto.opset_import.append(helper.make_opsetid("ai.onnx.contrib", 1))
    assert "DecodeJpeg" in refusal(tmp_path, proto.SerializeToString())
    assert "Sharpen" in refusal(tmp_path, model_of([helper.make_node("Sharpen", ["x"], ["y"])]).SerializeToString())


@pytest.mark.parametrize("op", ["QuantizeLinear", "QLinearConv", "ConvInteger", "DynamicQuantizeLinear"])
def test_an_already_quantized_model(tmp_path: Path, op: str) -> None:
    proto = model_of([CONV, helper.make_node(op, ["y"], ["z"])], tensor("w", WEIGHT))
    assert f"is already quantized (it has {op} nodes)" in refusal(tmp_path, proto.SerializeToString())


def test_the_result_of_qconv_is_already_quantized(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(chain().SerializeToString())
    recipe, data = Recipe(threads=1), DataOptions((samples(tmp_path / "calib"),))
    quantize(tmp_path / "model.onnx", tmp_path / "once.onnx", recipe, data)
    with pytest.raises(QconvError, match="already quantized"):
        quantize(tmp_path / "once.onnx", tmp_path / "twice.onnx", recipe, data)


@pytest.mark.parametrize("shape", [(), (1,), (1, 3), (1, 3, 8), (1, 3, 8, 8, 8)], ids=len)
@pytest.mark.parametrize("reader", [load.load, load.load_unchanged])
@pytest.mark.parametrize("body", ["y = Conv(x, w)", "r = Relu(x) y = ConvTranspose(r, w)"])
def test_a_layer_of_other_axes_is_refused(body: str, reader: Callable[..., object], shape: tuple[int, ...]) -> None:
    """By ourselves: what a library does with it depends on its version."""
    proto = network(body, (1, 3, 8, 8), w=(3, 3, 3, 3))
    proto.graph.input[0].type.CopyFrom(helper.make_tensor_type_proto(TensorProto.FLOAT, shape))
    with pytest.raises(QconvError, match=f"weights of 4 axes and an input of {len(shape)}"):
        reader(proto, Source("the model", None, b""))


def test_shapes_that_a_file_only_claims_refuse_nothing() -> None:
    proto = network("r = Relu(x) y = Conv(r, w)", (1, 3, 8, 8), w=(4, 3, 3, 3))
    proto.graph.value_info.append(helper.make_tensor_value_info("r", TensorProto.FLOAT, (1, 3)))
    load.load(proto, Source("the model", None, b""))


def test_errors_say_nothing_on_standard_output(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """ONNX Runtime prints some of its failures there, where the result may be on its way."""
    for content in (chain().SerializeToString().replace(b"MaxPool", b"MaxP\xff\xfel"), damaged(_negative)):
        path = tmp_path / "bad.onnx"
        path.write_bytes(content)
        with pytest.raises(QconvError):
            Session(str(path))
    assert capfd.readouterr().out == ""


def test_float16_networks_are_quantized_and_keep_their_edges(tmp_path: Path) -> None:
    proto = model_of(
        [helper.make_node("Conv", ["x", "w"], ["c"]), helper.make_node("Relu", ["c"], ["y"])],
        tensor("w", WEIGHT.astype(np.float16)),
        inputs=[info("x", HALF, SHAPE)],
        outputs=[info("y", HALF, OUT_SHAPE)],
    )
    (tmp_path / "model.onnx").write_bytes(proto.SerializeToString())
    calib = samples(tmp_path / "calib", dtype=np.float16)
    report, result = quantize(tmp_path / "model.onnx", None, Recipe(threads=1), DataOptions((calib,)))
    x = np.load(os.path.join(calib, "0.npy"))[None]
    (got,) = Session(result or b"", threads=1).run_all({"x": x})
    want = run(proto, {"x": x})["y"]
    assert got.dtype == np.float16
    # 8 bits over the output's range, two quantizers on the way
    assert np.abs(got.astype(np.float32) - want).max() <= (want.max() - want.min()) * 0.02
    assert report.audit.integer >= 1


# -- operators that are made of others ---------------------------------------------------------------------------------


@pytest.mark.parametrize("outputs", [("y",), ("y", "e")])
def test_a_row_says_what_an_operator_is_made_of(monkeypatch: pytest.MonkeyPatch, outputs: tuple[str, ...]) -> None:
    """Elu, as if a row said that it is Exp(x) - 1 below zero: oracle is the runtime's own Elu."""

    def rewrite(build: Callable[..., Any], x: Any, get: Callable[[str, Any], Any]) -> Any:
        below = build("Sub", build("Exp", build("Min", x, 0.0)), 1.0)
        return build("Add", build("Max", x, 0.0), build("Mul", below, get("alpha", 1.0)))

    proto = network("c = Conv(x, w)  e = Elu <alpha = 0.7> (c)  y = Relu(e)", w=(4, 3, 3, 3), outputs=outputs)
    monkeypatch.setattr(load, "operator", lambda op_type: Operator(rewrite=rewrite if op_type == "Elu" else None))
    model, changes = load.load(onnx.ModelProto.FromString(proto.SerializeToString()), Source("m", None, b""))
    assert [node.op_type for node in model.nodes()][1:-1] == ["Min", "Exp", "Sub", "Max", "Mul", "Add"]
    assert [change.what for change in changes] == ["Elu made of Min, Exp, Sub, Max, Mul, Add"]
    x = {"x": np.random.default_rng(0).normal(0, 2, (2, 3, 6, 6)).astype(np.float32)}
    wanted, found = (Session(made.SerializeToString()).run(list(outputs), x) for made in (proto, model.proto()))
    for one, other in zip(wanted, found, strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-6)
