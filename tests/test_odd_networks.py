"""Networks as users reported them, rebuilt: what each command makes of them. Oracle: ONNX Runtime on the float file."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

import qconv
from qconv.config.data_options import PreprocessingOptions
from qconv.config.recipe import Recipe, make_request
from qconv.errors import QconvError, Skipped
from qconv.pipeline.quantize import quantize
from qconv.reporter import Reporter
from qconv.results.quantize import Report
from tests.support.grown import BOOL, FLOAT, INT64, Case, Grower, as_case

CONTRIB = "com.microsoft"


def quantized(case: Case, effort: str = "balanced") -> Report:
    return qconv.quantize(case.proto.SerializeToString(), None, Recipe(effort=effort, threads=1), case.calibration)


def sqnr_on_others(case: Case, report: Report) -> float:
    against = case.proto.SerializeToString()
    found = qconv.evaluate(report.model_bytes, case.others, against=against, threads=1)
    return min(score.value for score in found.worst if score.name == "sqnr_db" and score.value is not None)


# -- types that onnx does not infer ------------------------------------------------------------------------------------


def contrib_gelu() -> Case:
    """An operator that only ONNX Runtime has, between two layers."""
    g = Grower(1)
    x = g.input([1, 3, 16, 16])
    t = g.op("Gelu", g.conv(x, 3, 16, strides=[2, 2]), domain=CONTRIB)
    t = g.op("Relu", g.conv(t, 16, 16))
    g.output(g.conv(t, 16, 4, 1), [1, 4, 8, 8])
    return as_case(g)


def split_by_sequence() -> Case:
    """A chunk as torch writes it, with two layers behind its parts."""
    g = Grower(2)
    x = g.input([1, 3, 16, 16])
    t = g.op("Relu", g.conv(x, 3, 16, strides=[2, 2]))
    pieces = g.op("SplitToSequence", t, g.ints(8, 8), axis=1)
    a, b = (g.op("SequenceAt", pieces, g.const(np.array(place))) for place in (0, 1))
    t = g.op("Mul", g.conv(a, 8, 8), g.op("Sigmoid", g.conv(b, 8, 8)))
    g.output(g.conv(t, 8, 4, 1), [1, 4, 8, 8])
    return as_case(g)


def optimized_first() -> Case:
    """A file that ONNX Runtime has optimized and saved: all Convs are its own FusedConv."""
    g = Grower(3)
    x = g.input([1, 3, 16, 16])
    t = g.op("Relu", g.conv(g.op("Relu", g.conv(x, 3, 16, strides=[2, 2])), 16, 16))
    t = g.op("Flatten", g.op("GlobalAveragePool", g.op("LeakyRelu", g.conv(t, 16, 16), alpha=0.1)))
    g.output(g.gemm(t, 16, 10), [1, 10])
    case, options = as_case(g), ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        ort.InferenceSession(case.proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
        proto = onnx.load(options.optimized_model_filepath)
    assert "FusedConv" in {node.op_type for node in proto.graph.node}
    return Case(proto, case.calibration, case.others)


def newest_operators() -> Case:
    """Operators of opset 23 that onnx has no shapes for, and a Resize by sizes along two axes."""
    g = Grower(4, 23, 11)
    x = g.input(["N", 3, 16, 16])
    t = g.op("Gelu", g.conv(x, 3, 16, strides=[2, 2]), approximate="tanh")
    t = g.op("GroupNormalization", g.conv(t, 16, 16), g.const(np.ones(16)), g.const(np.zeros(16)), num_groups=4)
    t = g.op("Transpose", g.op("Mish", t), perm=[0, 2, 3, 1])
    t = g.op("MatMul", g.op("RMSNormalization", t, g.const(np.ones(16)), axis=-1), g.const(g.weights(16, 16)))
    t = g.conv(g.op("Transpose", t, perm=[0, 3, 1, 2]), 16, 8)
    t = g.op("Resize", t, "", "", g.ints(16, 16), mode="linear", axes=[2, 3])
    g.output(g.conv(t, 8, 4), ["N", 4, 16, 16])
    return as_case(g)


@pytest.mark.parametrize("make", [contrib_gelu, split_by_sequence, optimized_first, newest_operators])
def test_a_default_run_is_no_worse_than_a_fast_one(make) -> None:
    case = make()
    default, fast = (sqnr_on_others(case, quantized(case, effort)) for effort in ("balanced", "fast"))
    assert default >= fast - 1
    assert default > 20


# -- shapes that depend on the data ------------------------------------------------------------------------------------


def rows_by_data() -> Case:
    """Places above the mean, picked out of a map, go through two Gemms: another number of them on every picture."""
    g = Grower(5)
    x = g.input([1, 3, 32, 32])
    t = g.op("Relu", g.conv(x, 3, 16, strides=[2, 2]))
    score = g.op("Reshape", g.conv(t, 16, 1, 1), g.ints(256))
    rows = g.op("Transpose", g.op("Reshape", t, g.ints(16, 256)), perm=[1, 0])
    high = g.op("Greater", score, g.op("ReduceMean", score, keepdims=1))
    picked = g.op("Gather", rows, g.op("Reshape", g.op("NonZero", high), g.ints(-1)), axis=0)
    g.output(g.gemm(g.op("Relu", g.gemm(picked, 16, 32)), 32, 5), ["m", 5])
    g.output(score, [256])
    return as_case(g)


def test_rows_that_the_data_select_are_left_out_and_all_else_is_compared() -> None:
    case, reporter = rows_by_data(), Reporter()
    rows, score = (value.name for value in case.proto.graph.output)
    data = case.proto.SerializeToString()
    report = qconv.quantize(data, None, Recipe(threads=1), case.calibration, reporter)
    kept = {f.where: f.why for f in report.findings if isinstance(f, Skipped) and "the data select other rows" in f.why}
    assert len(kept) == 2  # both Gemms keep their nearest codes
    found = qconv.evaluate(report.model_bytes, case.others, against=data, threads=1, reporter=reporter)
    told = {output.name: output.remark for output in found.outputs}
    assert told == {rows: "its shape depends on the data, so it was not compared", score: ""}
    assert f"output {rows}: its shape depends on the data, so it was not compared." in reporter.warnings
    assert min(s.value for o in found.outputs for s in o.scores if s.name == "sqnr_db") > 30
    compared = qconv.compare(data, report.model_bytes, case.others, threads=1, reporter=reporter)
    assert any("had another shape in the quantized network" in warning for warning in reporter.warnings)
    assert {row.op for row in compared.layers} >= {"Conv"}
    assert qconv.diagnose(data, Recipe(threads=1), case.calibration).causes is not None


def boxes_sometimes_none(limit: float) -> Case:
    """Boxes above a limit, times a constant, through two Gemms."""
    g = Grower(6)
    x = g.input([1, 3, 16, 16])
    t = g.op("Relu", g.conv(x, 3, 16, strides=[2, 2]))
    score = g.op("Reshape", g.op("Sigmoid", g.conv(t, 16, 1, 1)), g.ints(64))
    boxes = g.op("Transpose", g.op("Reshape", g.conv(t, 16, 4, 1), g.ints(4, 64)), perm=[1, 0])
    keep = g.op("Reshape", g.op("NonZero", g.op("Greater", score, g.const(np.float32(limit)))), g.ints(-1))
    picked = g.op("Mul", g.op("Gather", boxes, keep, axis=0), g.const(np.float32(64)))
    g.output(g.gemm(g.op("Relu", g.gemm(picked, 4, 8)), 8, 4), ["m", 4])
    g.output(score, [64])
    return as_case(g)


def numbers_of_rows(case: Case) -> set[int]:
    session = ort.InferenceSession(case.proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return {len(session.run(None, feeds)[0]) for feeds in case.calibration}


@pytest.mark.parametrize(("limit", "sometimes"), [(0.99, True), (2.0, False)])
def test_pictures_without_rows(limit: float, sometimes: bool) -> None:
    case = boxes_sometimes_none(limit)
    counts = numbers_of_rows(case)
    assert 0 in counts
    assert (len(counts) > 1) is sometimes
    data = case.proto.SerializeToString()
    for effort in ("fast", "balanced"):
        report = quantized(case, effort)
        assert sqnr_on_others(case, report) > 20
    qconv.compare(data, report.model_bytes, case.others, threads=1)
    rows = case.proto.graph.output[0].name
    remark = next(o.remark for o in report.verify.outputs if o.name == rows)
    if not sometimes:
        assert remark == "it is empty on all pictures, so there was nothing to compare"


def test_an_evaluation_of_rows_alone_says_that_nothing_can_be_compared() -> None:
    case = boxes_sometimes_none(2.0)
    del case.proto.graph.output[1]
    report = quantized(case, "fast")
    with pytest.raises(QconvError, match="There is nothing to compare"):
        qconv.evaluate(report.model_bytes, case.others, against=case.proto.SerializeToString(), threads=1)


# -- tensors of no elements --------------------------------------------------------------------------------------------


def empty_slice() -> Case:
    """A Slice that takes no channels, joined with the tensor that it takes them from."""
    g = Grower(7)
    x = g.input([1, 3, 16, 16])
    t = g.op("Relu", g.conv(x, 3, 8))
    t = g.op("Concat", g.op("Slice", t, g.ints(8), g.ints(16), g.ints(1)), t, axis=1)
    g.output(g.conv(t, 8, 4), [1, 4, 16, 16])
    return as_case(g)


def empty_split() -> Case:
    """A Split into 8 and 0 channels; the empty part is an output."""
    g = Grower(8)
    x = g.input([1, 3, 16, 16])
    a, b = g.op("Split", g.op("Relu", g.conv(x, 3, 8)), g.ints(8, 0), outputs=2, axis=1)
    g.output(g.conv(a, 8, 4), [1, 4, 16, 16])
    g.output(g.op("Relu", b), [1, 0, 16, 16])
    return as_case(g)


@pytest.mark.parametrize("make", [empty_slice, empty_split])
def test_empty_tensors_cost_nothing(make) -> None:
    case = make()
    assert not [warning for warning in quantized(case, "fast").warnings if "zero everywhere" in warning]
    default, fast = (sqnr_on_others(case, quantized(case, effort)) for effort in ("balanced", "fast"))
    assert fast > 30
    assert default > fast - 1


# -- one axis ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op_type", ["Mul", "Div", "Add", "Sub"])
def test_tensors_of_one_axis_with_a_constant(op_type: str) -> None:
    """As onnx's own backend tests have them: nothing to quantize, and `inspect` says so."""
    g = Grower(9)
    g.output(g.op(op_type, g.input([3]), g.const([4.0, 5.0, 6.0])), [3])
    case = as_case(g)
    assert not qconv.inspect(case.proto.SerializeToString()).as_dict().get("layers")
    with pytest.raises(QconvError, match="has nothing to quantize"):
        quantized(case)


def test_a_layer_without_a_bias_keeps_its_means() -> None:
    """MatMuls behind LayerNormalization with biases: they have none to take back what rounding does to means.

    Second-order rounding gains 4 dB or more here beside nearest codes; blind to means it gains less than 2.
    """
    g, width = Grower(10), 32
    x = g.input([1, 3, 16, 16])
    t = g.op("Conv", x, g.const(g.weights(width, 3, 4, 4)), g.const(g.rng.standard_normal(width)), strides=[4, 4])
    t = g.op("Transpose", g.op("Reshape", t, g.ints(1, width, 16)), perm=[0, 2, 1])
    for _ in range(3):
        scale, shift = g.const(1 + 0.3 * g.rng.standard_normal(width)), g.const(g.rng.standard_normal(width))
        hidden = g.op("MatMul", g.op("LayerNormalization", t, scale, shift), g.const(g.weights(width, 64)))
        t = g.op("Add", t, g.op("MatMul", g.op("Relu", hidden), g.const(g.weights(64, width))))
    g.output(g.op("MatMul", t, g.const(g.weights(width, 10))), [1, 16, 10])
    case = as_case(g)
    default, fast = (sqnr_on_others(case, quantized(case, effort)) for effort in ("balanced", "fast"))
    assert default > fast + 3


# -- outputs that are declared wrong -----------------------------------------------------------------------------------


@pytest.mark.parametrize("declared", [[], None, [7], [1, 5], ["n", "k", 3]])
@pytest.mark.parametrize("known", [True, False])
def test_the_shape_of_an_output_is_set_from_a_run(declared: list[int | str] | None, known: bool) -> None:
    """Where no inference tells even its rank, too: it is reshaped to sizes that the data leave in."""
    g = Grower(11)
    x = g.input([1, 3, 8, 8])
    t = g.gemm(g.op("Flatten", g.op("GlobalAveragePool", g.op("Relu", g.conv(x, 3, 8)))), 8, 6)
    if not known:
        sizes = g.op("Concat", g.op("Shape", t), g.ints(0), axis=0)
        t = g.op("Reshape", t, g.op("Compress", sizes, g.op("Greater", sizes, g.ints(0)), axis=0))
    g.output(t, declared)
    report = quantized(as_case(g), "fast")
    (output,) = onnx.ModelProto.FromString(report.model_bytes or b"").graph.output
    assert [d.dim_value for d in output.type.tensor_type.shape.dim] == [1, 6]


UNIT = PreprocessingOptions(preset="unit", size=(16, 16))


@pytest.mark.parametrize("pictures", [True, False])
def test_statistics_alone_settle_an_output_of_a_network_of_any_size(pictures: bool, tmp_path: Path) -> None:
    """Of a size that the statistics know, or of one that is made up: the rank is all that a run tells."""
    g = Grower(13)
    g.output(g.op("Relu", g.conv(g.input(["n", 3, "h", "w"]), 3, 8)), [])
    path, out, calib = tmp_path / "net.onnx", tmp_path / "out.onnx", tmp_path / "calib"
    calib.mkdir()
    path.write_bytes(as_case(g).proto.SerializeToString())
    rng = np.random.default_rng(0)
    for index in range(4):
        if pictures:
            Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(calib / f"{index}.png")
        else:
            np.save(calib / f"{index}.npy", rng.normal(size=(1, 3, 16, 16)).astype(np.float32))
    stats, size = str(tmp_path / "stats.npz"), {"preprocessing": UNIT} if pictures else {}
    quantize(path, out, *make_request({"calib": (str(calib),), "threads": 1, "save_stats": stats, **size}))
    quantize(path, out, *make_request({"threads": 1, "stats": stats}))
    assert [d.dim_value for d in onnx.load(out).graph.output[0].type.tensor_type.shape.dim] == [0, 8, 0, 0]


# -- bodies ------------------------------------------------------------------------------------------------------------


def layers_inside() -> Case:
    """Two layers in the branches of an If and one in a Loop, one name for all."""
    g = Grower(12)
    x = g.input([1, 3, 16, 16])
    t = g.op("Relu", g.conv(x, 3, 8, strides=[2, 2]))
    branches = []
    for made in ("yes", "no"):
        weight = g.const(g.weights(8, 8, 3, 3))
        node = helper.make_node("Conv", [t, weight], [made], "Conv_7", pads=[1, 1, 1, 1])
        branches.append(g.body([node], [(made, FLOAT)]))
    high = g.op("Greater", g.op("ReduceMean", t, keepdims=0), g.const(np.float32(0)))
    t = g.op("If", high, then_branch=branches[0], else_branch=branches[1])
    nodes = [
        helper.make_node("Conv", ["state", g.const(g.weights(8, 8, 3, 3) / 2)], ["d"], "Conv_7", pads=[1, 1, 1, 1]),
        helper.make_node("Tanh", ["d"], ["bent"]),
        helper.make_node("Add", ["state", "bent"], ["after"]),
        helper.make_node("Identity", ["go"], ["on"]),
    ]
    step = g.body(nodes, [("on", BOOL), ("after", FLOAT)], [("i", INT64), ("go", BOOL), ("state", FLOAT)])
    t = g.op("Loop", g.const(np.array(2)), "", t, body=step)
    g.output(g.conv(g.op("Relu", t), 8, 4), [1, 4, 8, 8])
    return as_case(g)


def test_layers_inside_bodies_are_named_and_all_others_compared() -> None:
    case = layers_inside()
    data = case.proto.SerializeToString()
    report = quantized(case)
    compared = qconv.compare(data, report.model_bytes, case.others, threads=1)
    assert compared.inside == ("Conv Conv_7",) * 3
    assert len([row for row in compared.layers if row.op == "Conv"]) == 2
    assert all(row.sqnr_db is None or row.sqnr_db > 20 for row in compared.layers)
    diagnosis = qconv.diagnose(data, Recipe(threads=1), case.calibration)
    (cause,) = (cause for cause in diagnosis.causes if cause.kind == "bodies")
    assert cause.harmless
    assert "3 layers" in cause.what
    floats = {f"{island['op']}": island["why"] for island in report.as_dict()["audit"]["islands"]}
    assert "layers in its bodies stay float with it: Conv_7" in floats["If"]


def test_an_element_type_is_kept() -> None:
    """Numbers of an integer output behind an operator that onnx does not know stay what they are."""
    g = Grower(13)
    t = g.op("Gelu", g.conv(g.input([1, 3, 8, 8]), 3, 4), domain=CONTRIB)
    g.output(g.op("ArgMax", g.conv(t, 4, 5), axis=1), None, TensorProto.INT64)
    report = quantized(as_case(g))
    proto = onnx.ModelProto.FromString(report.model_bytes or b"")
    assert proto.graph.output[0].type.tensor_type.elem_type == TensorProto.INT64


# -- kinds beside each other -------------------------------------------------------------------------------------------


def empty_layer(kind: str) -> Case:
    """A part of no channels beside one of 16, behind a layer or a BatchNormalization of its own."""
    g = Grower(7)
    x = g.input([1, 3, 16, 16])
    t = g.op("Relu", g.conv(x, 3, 16))
    if kind == "conv":
        none = g.op("Conv", t, g.const(np.zeros((0, 16, 1, 1), np.float32)))
    else:
        t, none = g.op("Split", t, g.ints(16, 0), outputs=2, axis=1)
        none = g.op("BatchNormalization", none, *(g.const(np.zeros(0, np.float32)) for _ in range(4)))
    t = g.op("Concat", t, none, axis=1)
    g.output(g.conv(t, 16, 4, 1), [1, 4, 16, 16])
    return as_case(g)


@pytest.mark.parametrize("kind", ["conv", "norm"])
@pytest.mark.parametrize("effort", ["balanced", "fast"])
def test_layers_without_weights_stay_as_they_are(kind: str, effort: str) -> None:
    case = empty_layer(kind)
    report = quantized(case, effort)
    assert sqnr_on_others(case, report) > 30
    assert qconv.inspect(case.proto.SerializeToString()) is not None


def test_a_sequence_of_unlike_tensors_beside_an_output_without_a_shape() -> None:
    g = Grower(8)
    t = g.conv(g.op("Relu", g.conv(g.input([1, 3, 16, 16]), 3, 8)), 8, 4)
    g.output(t, [])
    case = as_case(g)
    parts = helper.make_node("SplitToSequence", [t, "sizes"], ["parts"], axis=1)
    case.proto.graph.initializer.append(numpy_helper.from_array(np.int64([1, 3]), "sizes"))
    case.proto.graph.node.append(parts)
    case.proto.graph.output.append(helper.make_tensor_sequence_value_info("parts", TensorProto.FLOAT, None))
    output = onnx.ModelProto.FromString(quantized(case).model_bytes or b"").graph.output[0]
    assert [d.dim_value for d in output.type.tensor_type.shape.dim] == [1, 4, 16, 16]


def test_a_sequence_as_an_output_is_passed_over() -> None:
    g = Grower(8)
    x = g.input([1, 3, 16, 16])
    t = g.op("Relu", g.conv(x, 3, 8))
    g.output(g.conv(t, 8, 4), [1, 4, 16, 16])
    case = as_case(g)
    pair = helper.make_node("SequenceConstruct", [t, t], ["pair"])
    case.proto.graph.node.append(pair)
    case.proto.graph.output.append(helper.make_tensor_sequence_value_info("pair", TensorProto.FLOAT, None))
    report = quantized(case)
    found = qconv.compare(case.proto.SerializeToString(), report.model_bytes, case.others, threads=1)
    assert found.sqnr_db is not None
    assert found.sqnr_db > 25


def test_an_output_of_a_whole_batch_is_passed_over() -> None:
    """A network of two pictures with a result for each, and one for both."""
    g = Grower(9)
    x = g.input([2, 3, 16, 16])
    t = g.op("Relu", g.conv(x, 3, 8))
    g.output(g.op("Flatten", g.op("GlobalAveragePool", g.conv(t, 8, 5))), [2, 5])
    g.output(g.op("ReduceMean", t, axes=[0, 2, 3], keepdims=0), [8])
    case, heard = as_case(g), list[str]()
    report, float_file = quantized(case), case.proto.SerializeToString()
    found = qconv.evaluate(
        report.model_bytes, case.others, against=float_file, reporter=Reporter(heard.append), threads=1
    )
    compared, passed = found.outputs
    assert compared.scores
    assert not passed.scores
    assert any("for each picture" in text for text in heard)
