"""What `inspect` tells of float and quantized models: planted troubles, files made by hand and by ONNX Runtime."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from qconv.analysis.inspect_float import FloatModel, inspect_float
from qconv.analysis.inspect_quantized import QuantizedModel, inspect_quantized, is_quantized_file
from qconv.cli.command import format_csv
from qconv.cli.quantize import quantize as quantize_command
from qconv.cli.recipe_options import collect_fields, make_request_of_fields
from qconv.config.choices import Drop, LayerBits
from qconv.config.data_options import DataOptions, PreprocessingOptions
from qconv.config.recipe import Recipe, make_request
from qconv.config.serialization import command_line_options, format_number, recipe_from_dict
from qconv.errors import QconvError
from qconv.ir.files import Source, is_quantized, read_proto
from qconv.pipeline.quantize import quantize
from qconv.report.text_inspect import _shorten_name, format_float_model, format_quantized_model
from tests.support.models import network, statistics

ROOT = Path(__file__).resolve().parents[2]
OWN = ROOT / "tests/models/cifar_mobilenet.onnx"
DATA = Path(os.environ.get("QCONV_DATA", ROOT.parent / "shared" / "data"))
SHARED = sorted((DATA / "models").glob("*.onnx"))
RNG = np.random.default_rng(7)


def source_of(proto: onnx.ModelProto) -> Source:
    return Source("the test's model", None, proto.SerializeToString())


def seen(proto: onnx.ModelProto, target: str = "ort-cpu") -> FloatModel:
    return inspect_float(source_of(proto), target)


def kinds(found: FloatModel) -> list[str]:
    return [trouble.kind for trouble in found.troubles]


def signs(*shape: int) -> NDArray[np.float32]:
    """Weights of size 1 and either sign: no range, no row and no channel differs from another."""
    return RNG.choice([-1.0, 1.0], shape).astype(np.float32)


def cli(*words: object, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "qconv", *map(str, words)]
    return subprocess.run(command, input=stdin, capture_output=True, env=environment, check=False)


# -- float: what is in it ----------------------------------------------------------------------------------------------

NET = "c = Conv(x, w, b)  r = Relu(c)  p = GlobalAveragePool(r)  f = Flatten(p)  y = Gemm(f, g)"


def net(**instead: Any) -> onnx.ModelProto:
    parts = {"w": signs(8, 3, 3, 3), "b": np.zeros(8, np.float32), "g": signs(8, 5)}
    return network(NET, ("N", 3, 6, 6), **{**parts, **instead})


def test_parameters_operators_and_ends() -> None:
    """8 x 3 x 3 x 3 weights and 8 biases, 8 x 5 weights: counted by hand."""
    proto = net()
    found = seen(proto)
    assert found.parameters == 216 + 8 + 40
    assert found.stored == 4 * found.parameters
    assert found.operators == {"Conv": 1, "Flatten": 1, "Gemm": 1, "GlobalAveragePool": 1, "Relu": 1}
    assert [(row.name, row.op, row.shape, row.parameters) for row in found.layers] == [
        ("c", "Conv", (8, 3, 3, 3), 224),
        ("y", "Gemm", (8, 5), 40),
    ]
    assert [row.share for row in found.layers] == [224 / 264, 40 / 264]
    assert found.inputs[0].as_dict() == {"name": "x", "type": "float", "shape": [None, 3, 6, 6]}
    assert found.bytes == proto.ByteSize()
    assert found.opset == 17


def test_the_plan_is_that_of_a_default_run(tmp_path: Path) -> None:
    """The report of a real run has the same bits, granularity, and layers in float."""
    found = inspect_float(Source(str(OWN), OWN), "ort-cpu")
    report, _ = quantize(OWN, None, Recipe(), DataOptions((str(ROOT / "calib_samples"),), samples=2))
    rows = {row.why.removeprefix("weights of "): row for row in report.tensors if row.kind == "weight"}
    assert {row.name: (row.bits, row.granularity) for row in found.layers} == {
        name: (row.bits, row.granularity) for name, row in rows.items()
    }
    placed = {island.node for island in report.audit.placed}
    assert {row.name for row in found.layers if row.runs == "float"} == placed
    assert found.norms == sum(node.op_type == "BatchNormalization" for node in onnx.load(OWN).graph.node)
    assert found.folded == found.norms


def test_a_batch_norm_that_does_not_fold() -> None:
    """Its layer has another reader, and what reads it is no layer."""
    body = "c = Conv(x, w)  n = BatchNormalization(c, gamma, beta, mean, var)  s = Sigmoid(n)  y = Add(s, c)"
    found = seen(network(body, w=(4, 3, 3, 3), **statistics(4)))
    assert (found.norms, found.folded, found.converted) == (1, 0, 1)
    assert [row.shape for row in found.layers] == [(4, 3, 3, 3), (4, 1, 1, 1)]
    assert "0 of 1 fold into the layers beside them, 1 become depthwise layers" in format_float_model(
        found, verbose=False
    )


def test_an_open_size_is_said() -> None:
    """Costs depend on it, so that nothing can be left in float for their sake."""
    open_, fixed = (network("y = Conv(x, w)", (1, 3, *size), w=signs(4, 3, 3, 3)) for size in (("h", "w"), (9, 9)))
    assert "Its input size is open" in format_float_model(seen(open_), verbose=False)
    assert "Its input size is open" not in format_float_model(seen(fixed), verbose=False)


def test_long_names_keep_their_end() -> None:
    assert _shorten_name("conv1", 5) == "conv1"
    assert _shorten_name("/features/features.8/conv/conv.0/Conv", 28) == "...features.8/conv.0/Conv"
    assert _shorten_name("a" * 30 + "b", 10) == "...aaaaaab"


def test_reasons_for_float() -> None:
    found = seen(network("c = Conv(x, w)  e = Exp(c)  y = Conv(e, v)", w=signs(8, 3, 1, 1), v=signs(8, 8, 1, 1)))
    left = {(group.op, group.why): group.nodes for group in found.left}
    assert left["Exp", "Exp has no integer kernel"] == ("e",)


def test_targets_differ() -> None:
    body = "c = Conv(x, w)  y = ConvTranspose(c, v)"
    proto = network(body, w=signs(8, 3, 1, 1), v=signs(8, 4, 1, 1))
    assert [row.granularity for row in seen(proto, "tensorrt").layers] == ["per-channel", "per-tensor"]
    assert seen(proto).layers[1].why == "ONNX Runtime's CPU provider has no integer ConvTranspose"


def test_without_layers() -> None:
    found = seen(network("y = Relu(x)"))
    assert found.layers == ()
    assert found.as_dict()["layers"] == []
    assert format_csv(found.rows) == "\n"
    assert "nothing to quantize" in format_float_model(found, verbose=True)


def test_weights_as_constant_nodes() -> None:
    proto = net()
    for tensor in proto.graph.initializer:
        proto.graph.node.insert(0, helper.make_node("Constant", [], [tensor.name], value=tensor))
    del proto.graph.initializer[:]
    found = seen(proto)
    assert (found.parameters, found.stored) == (264, 4 * 264)
    assert [row.parameters for row in found.layers] == [224, 40]
    assert "Constant" not in found.operators


def test_nodes_without_names_are_called_by_their_output() -> None:
    proto = net()
    for node in proto.graph.node:
        node.name = ""
    assert [row.name for row in seen(proto).layers] == ["c", "y"]


def test_external_data(tmp_path: Path) -> None:
    path = tmp_path / "big.onnx"
    onnx.save(net(), path, save_as_external_data=True, location="big.data", size_threshold=0)
    found = inspect_float(Source(str(path), path), "ort-cpu")
    assert found.parameters == 264
    assert found.bytes == path.stat().st_size + (tmp_path / "big.data").stat().st_size


def test_custom_operators_end_in_one_error() -> None:
    proto = net()
    proto.graph.node[1].domain = "odd.vendor"
    proto.opset_import.append(helper.make_opsetid("odd.vendor", 1))
    with pytest.raises(QconvError, match=r"does not know: Relu of odd\.vendor") as caught:
        seen(proto)
    assert caught.value.hint


# -- float: what the weights foretell ----------------------------------------------------------------------------------


def test_nothing_is_foretold_of_weights_alike() -> None:
    assert kinds(seen(net())) == []


@pytest.mark.parametrize(("factor", "told"), [(1 / 63, False), (1 / 65, True)])
def test_channel_imbalance(factor: float, told: bool) -> None:
    """All weights are 1, of channel 5 `factor`: the ratio is its inverse."""
    weight = signs(8, 3, 3, 3)
    weight[5] *= np.float32(factor)
    found = seen(net(w=weight))
    assert found.layers[0].ranges.output_ratio == pytest.approx(1 / factor, rel=1e-6)
    assert (kinds(found) == ["channel-imbalance"]) == told
    if told:
        (trouble,) = found.troubles
        assert (trouble.where, trouble.channels, trouble.count) == ("c", (5,), 1)
        assert trouble.value == pytest.approx(65, rel=1e-6)
        assert "each channel" in trouble.handled


def test_channel_imbalance_of_one_scale_is_not_handled() -> None:
    """TensorRT takes one scale for a ConvTranspose."""
    weight = signs(8, 4, 2, 2)
    weight[:, 3] /= 100
    proto = network("c = Conv(x, w)  y = ConvTranspose(c, v)", w=signs(8, 3, 1, 1), v=weight)
    (trouble,) = seen(proto, "tensorrt").troubles
    assert (trouble.kind, trouble.where, trouble.handled) == ("channel-imbalance", "y", "")
    assert trouble.value == pytest.approx(100, rel=1e-6)


def test_input_imbalance() -> None:
    weight = signs(4, 8, 1, 1)
    weight[:, 2] /= 1000
    proto = network(
        "c = Conv(x, w)  r = Clip(c, lo, hi)  y = Conv(r, v)", w=signs(8, 3, 1, 1), v=weight, lo=0.0, hi=6.0
    )
    found = seen(proto)
    (trouble,) = found.troubles
    assert (trouble.kind, trouble.where, trouble.channels) == ("input-imbalance", "y", (2,))
    assert trouble.value == pytest.approx(1000, rel=1e-6)
    assert "at 6" in trouble.what
    assert "equalization" in trouble.handled
    assert found.relu6 == 1


def test_input_channels_that_bring_nothing_do_not_count() -> None:
    """BatchNormalization says that channel 2 is zero on average, and never above: whoever reads it loses nothing."""
    weight = signs(4, 8, 1, 1)
    weight[:, 2] /= 1000
    ones = np.ones(8, np.float32)
    beta = np.where(np.arange(8) == 2, np.float32(-1), np.float32(1))
    gamma = np.where(np.arange(8) == 2, np.float32(1e-3), np.float32(1))
    body = "c = Conv(x, w)  n = BatchNormalization(c, gamma, beta, mean, var)  r = Relu(n)  y = Conv(r, v)"
    parts = statistics(8, gamma=gamma, beta=beta, mean=0 * ones, var=ones)
    found = seen(network(body, w=signs(8, 3, 1, 1), v=weight, **parts))
    assert "input-imbalance" not in kinds(found)
    assert found.layers[1].ranges.input_ratio == 1.0


@pytest.mark.parametrize(("large", "told"), [(11.0, False), (13.0, True)])
def test_outlier(large: float, told: bool) -> None:
    """Others are 1 in size: the ratio is the weight itself, and 8 bits keep 20 log10(sqrt(12) 127 / ratio) dB."""
    weight = signs(8, 8, 3, 3)
    weight[3, 2, 1, 1] = -large
    found = seen(network("c = Relu(x)  y = Conv(c, w)", (1, 8, 6, 6), w=weight))
    assert found.layers[0].ranges.outlier == pytest.approx(large, rel=1e-6)
    assert ("outlier" in kinds(found)) == told
    if told:
        (trouble,) = (trouble for trouble in found.troubles if trouble.kind == "outlier")
        assert trouble.channels == (3,)
        assert f"{20 * math.log10(12**0.5 * 127 / large):.0f} dB" in trouble.what


def test_few_weights_have_no_outlier() -> None:
    weight = signs(8, 31, 1, 1)
    weight[0, 0] = 50
    assert seen(network("y = Conv(x, w)", (1, 31, 4, 4), w=weight)).layers[0].ranges.outlier is None


def normalised(beta: NDArray, gamma: NDArray, behind: str = "y = Relu(n)") -> onnx.ModelProto:
    ones = np.ones(4, np.float32)
    parts = statistics(4, beta=beta, gamma=gamma, mean=0 * ones, var=ones)
    body = f"c = Conv(x, w)  n = BatchNormalization(c, gamma, beta, mean, var)  {behind}"
    return network(body, w=signs(4, 3, 3, 3), lo=0.0, hi=6.0, **parts)


def test_high_bias_by_batch_normalization() -> None:
    """Channel 1: 20 +- 3 of a range of 0 .. 23, so that c / R = 17 / 23."""
    found = seen(normalised(np.float32([0, 20, 0, 0]), np.float32([1, 1, 1, 1])))
    (trouble,) = found.troubles
    assert (trouble.kind, trouble.where, trouble.channels) == ("high-bias", "c", (1,))
    assert trouble.value == pytest.approx(17 / 23, rel=1e-4)
    assert "BatchNormalization" in trouble.what


def test_a_negative_bias_in_front_of_a_relu_takes_no_codes() -> None:
    assert kinds(seen(normalised(np.float32([0, -20, 0, 0]), np.float32([1, 1, 1, 1])))) == []
    found = seen(normalised(np.float32([0, -20, 0, 0]), np.float32([1, 1, 1, 1]), "y = Sigmoid(n)"))
    assert kinds(found) == ["high-bias"]
    assert found.troubles[0].value == pytest.approx(17 / 26, rel=1e-4)  # of -23 .. 3


def test_high_bias_without_batch_normalization() -> None:
    """s = 6 sqrt(27), and b = 1000: c = 1000 - 3 s, R = 1000 + 3 s; what lies below zero falls to the Relu."""
    reach = 18 * math.sqrt(27)
    bias = np.float32([0, 1000, 0, 0, 0, 0, 0, 0])
    found = seen(net(b=bias))
    (trouble,) = found.troubles
    assert trouble.kind == "high-bias"
    assert trouble.value == pytest.approx((1000 - reach) / (1000 + reach), rel=1e-6)


def test_high_bias_behind_bounded_inputs() -> None:
    """Behind ReLU6 8 weights of 1 make at most 48: with a bias of 100 values lie in 100 .. 148."""
    weight = np.ones((4, 8, 1, 1), np.float32)
    body = "c = Conv(x, w)  r = Clip(c, lo, hi)  d = Conv(r, v, b)  y = Relu(d)"
    bias = np.float32([100, 0, 0, 0])
    found = seen(network(body, w=signs(8, 3, 1, 1), v=weight, b=bias, lo=0.0, hi=6.0))
    (trouble,) = found.troubles
    assert (trouble.kind, trouble.where) == ("high-bias", "d")
    assert trouble.value == pytest.approx(100 / 148, rel=1e-6)
    assert "whatever it reads" in trouble.what


def test_dead_channels() -> None:
    """Two of zeros; one has a bias above zero and is constant, the other is never active."""
    weight, bias = signs(8, 3, 3, 3), np.zeros(8, np.float32)
    weight[[1, 6]] = 0
    bias[6] = 1
    (trouble,) = seen(net(w=weight, b=bias)).troubles
    assert (trouble.kind, trouble.channels, trouble.count, trouble.value) == ("dead-channels", (1, 6), 2, 0.25)
    assert "1 never active" in trouble.what


def test_all_weights_zero() -> None:
    found = seen(net(w=np.zeros((8, 3, 3, 3), np.float32)))
    assert [(trouble.kind, trouble.value) for trouble in found.troubles] == [("dead-channels", 1.0)]
    json.dumps(found.as_dict(), allow_nan=False)


def test_weights_that_are_not_finite() -> None:
    weight = signs(8, 3, 3, 3)
    weight[0, 0, 0, 0] = np.nan
    found = seen(net(w=weight))
    assert kinds(found) == ["not-finite"]
    json.dumps(found.as_dict(), allow_nan=False)
    assert "NaN" in format_float_model(found, verbose=True)


def test_depthwise_layers_have_no_input_ratio() -> None:
    weight = signs(8, 1, 3, 3) * np.float32([[[[10.0**-k]]] for k in range(8)]).reshape(8, 1, 1, 1)
    found = seen(network("y = Conv<group=8>(x, w)", (1, 8, 6, 6), w=weight))
    assert found.layers[0].ranges.input_ratio is None
    assert "channel-imbalance" in kinds(found)


@pytest.mark.skipif(not SHARED, reason="needs the models of $QCONV_DATA or ../shared/data")
@pytest.mark.parametrize("path", SHARED, ids=lambda path: path.stem)
def test_real_models(path: Path) -> None:
    """All are described, in 80 columns; nothing that is not handled is told of more than every other layer."""
    source = Source(str(path), path)
    if path.stem.startswith("superres"):
        with pytest.raises(QconvError, match="does not know"):
            inspect_float(source, "ort-cpu")
        return
    found = inspect_float(source, "ort-cpu")
    json.dumps(found.as_dict(), allow_nan=False)
    # a network can be as dead as it likes; nearly every layer of LPRNet has input channels of about 1e-4
    true = {"dead-channels"} | ({"input-imbalance"} if path.stem == "lprnet" else set())
    for kind in set(kinds(found)) - true:
        assert kinds(found).count(kind) <= 0.55 * len(found.layers), kind
    lines = format_float_model(found, verbose=False).splitlines()
    assert all(len(line) <= 80 for line in lines if str(path) not in line)


# -- quantized: by hand ------------------------------------------------------------------------------------------------


def init(**tensors: NDArray) -> list[TensorProto]:
    return [numpy_helper.from_array(np.asarray(numbers), name) for name, numbers in tensors.items()]


def by_hand(nodes: list[onnx.NodeProto], tensors: list[TensorProto], x: list[int], opset: int = 21) -> QuantizedModel:
    ends = [helper.make_tensor_value_info("x", TensorProto.FLOAT, x)], [onnx.ValueInfoProto(name="y")]
    graph = helper.make_graph(nodes, "g", *ends, tensors)
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    proto = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    assert is_quantized_file(proto)
    return inspect_quantized(source_of(proto))


def qdq(weight: NDArray, scale: NDArray, zero: NDArray, **attributes: int) -> QuantizedModel:
    f = np.float32
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "s", "z"], ["xd"]),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wd"], **attributes),
        helper.make_node("DequantizeLinear", ["b", "bs", "bz"], ["bd"]),
        helper.make_node("Conv", ["xd", "wd", "bd"], ["y"], name="conv"),
    ]
    biases = {"b": np.zeros(len(weight), np.int32), "bs": f(0.1), "bz": np.int32(0)}
    tensors = init(s=f(0.1), z=np.uint8(3), w=weight, ws=scale, wz=zero, **biases)
    return by_hand(nodes, tensors, [1, weight.shape[1], 6, 6])


def test_a_layer_between_quantizers() -> None:
    """Bytes by hand: 4 x 2 x 3 x 3 codes, four scales of 4 bytes and zeros of 1, biases of 4 with a scale."""
    found = qdq(np.zeros((4, 2, 3, 3), np.int8), np.ones(4, np.float32), np.zeros(4, np.int8), axis=0)
    (row,) = found.layers
    assert (row.name, row.type, row.bits, row.scheme, row.granularity) == (
        "conv",
        "int8",
        8,
        "symmetric",
        "per-channel",
    )
    assert (row.codes_bytes, row.scales_bytes, row.bias_bytes, row.bias) == (72, 20, 24, "int32")
    assert (str(row.input), row.input.scheme, str(row.output)) == ("uint8", "asymmetric", "float32")
    assert row.runs == "integer"
    assert found.other_constants == 5  # the input's scale and zero point
    assert sum(layer.bytes for layer in found.layers) + found.other_constants + found.structure == found.bytes
    assert (found.format, found.recipe, found.options) == ("Q/DQ", {}, ())


@pytest.mark.parametrize(
    ("kind", "zero", "scheme"),
    [
        (np.uint8, 128, "symmetric"),
        (np.uint8, 100, "asymmetric"),
        (np.int8, 0, "symmetric"),
        (np.int8, 1, "asymmetric"),
    ],
)
def test_schemes_by_zero_points(kind: Any, zero: int, scheme: str) -> None:
    (row,) = qdq(np.zeros((4, 2, 3, 3), kind), np.float32(1), kind(zero)).layers
    assert (row.granularity, row.scheme, row.type) == ("per-tensor", scheme, np.dtype(kind).name)


def test_blocks_and_packed_codes() -> None:
    """MatMul of 64 x 6 int4 codes, blocks of 32 rows: 192 bytes of codes, 12 scales."""
    packed = helper.make_tensor("w", TensorProto.INT4, [64, 6], np.zeros(192, np.uint8).tobytes(), raw=True)
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "ws"], ["wd"], axis=0, block_size=32),
        helper.make_node("MatMul", ["x", "wd"], ["y"]),
    ]
    (row,) = by_hand(nodes, [packed, *init(ws=np.ones((2, 6), np.float32))], [5, 64]).layers
    assert (row.name, row.type, row.bits, row.granularity, row.block_size) == ("y", "int4", 4, "per-block", 32)
    assert (row.codes_bytes, row.scales_bytes, row.bias, row.runs) == (192, 48, None, "float")


def test_weights_that_the_file_holds_as_numbers() -> None:
    """Constant -> QuantizeLinear -> DequantizeLinear, as quantize_static leaves weights in Constant nodes."""
    weight = numpy_helper.from_array(np.ones((4, 2, 3, 3), np.float32))
    nodes = [
        helper.make_node("Constant", [], ["w"], value=weight),
        helper.make_node("QuantizeLinear", ["w", "ws", "wz"], ["wq"]),
        helper.make_node("DequantizeLinear", ["wq", "ws", "wz"], ["wd"]),
        helper.make_node("Conv", ["x", "wd"], ["y"]),
    ]
    (row,) = by_hand(nodes, init(ws=np.float32(1), wz=np.int8(0)), [1, 2, 6, 6]).layers
    assert (row.type, row.bits, row.codes_bytes, str(row.input)) == ("int8", 8, 4 * 72, "float32")


def test_a_clip_on_codes_tells_bits() -> None:
    f = np.float32
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("Clip", ["q", "lo", "hi"], ["k"]),
        helper.make_node("DequantizeLinear", ["k", "s", "z"], ["d"]),
        helper.make_node("Conv", ["d", "w"], ["y"]),
    ]
    tensors = init(s=f(1), z=np.uint8(0), lo=np.uint8(0), hi=np.uint8(15), w=np.ones((4, 2, 1, 1), np.float32))
    (row,) = by_hand(nodes, tensors, [1, 2, 6, 6]).layers
    assert (str(row.input), row.input.bits) == ("uint8 (4)", 4)
    tensors[3] = numpy_helper.from_array(np.uint8(14), "hi")  # a Relu's or a Clip's own bound
    assert by_hand(nodes, tensors, [1, 2, 6, 6]).layers[0].input.bits == 8


def test_two_layers_share_weights_and_count_them_once() -> None:
    f = np.float32
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "ws"], ["wd"]),
        helper.make_node("Conv", ["x", "wd"], ["a"], name="one"),
        helper.make_node("Conv", ["a", "wd"], ["y"], name="two"),
    ]
    found = by_hand(nodes, init(w=np.zeros((2, 2, 1, 1), np.int8), ws=f(1)), [1, 2, 6, 6])
    assert [row.bytes for row in found.layers] == [8, 0]
    assert found.other_constants == 0


def test_four_bits_of_onnxruntimes_own_operator() -> None:
    """MatMulNBits: 6 columns of two blocks of 32 rows, two codes a byte."""
    codes, scales = np.zeros((6, 2, 16), np.uint8), np.ones(12, np.float32)
    shape = {"K": 64, "N": 6, "bits": 4, "block_size": 32}
    node = helper.make_node("MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft", **shape)
    found = by_hand([node], init(w=codes, s=scales), [5, 64])
    (row,) = found.layers
    assert (row.shape, row.bits, row.granularity, row.block_size, row.runs) == ((64, 6), 4, "per-block", 32, "float")
    assert (row.codes_bytes, row.scales_bytes, found.format) == (192, 48, "weights only")


def test_metadata_of_a_stranger() -> None:
    """Neither lets the numbers that JSON lacks through, nor fails on what no recipe is."""
    weight = init(w=np.zeros((4, 2, 1, 1), np.int8), ws=np.float32(1))
    nodes = [helper.make_node("DequantizeLinear", ["w", "ws"], ["d"]), helper.make_node("Conv", ["x", "d"], ["y"])]
    ends = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 2, 4, 4])], [onnx.ValueInfoProto(name="y")]
    proto = helper.make_model(helper.make_graph(nodes, "g", *ends, weight))
    odd = '{"samples": NaN, "layer_bits": 5, "effort": ["x"], "preprocessing": {"scale": Infinity}}'
    for key in ("qconv.recipe", "qconv.preprocessing"):
        proto.metadata_props.append(onnx.StringStringEntryProto(key=key, value=odd))
    found = inspect_quantized(source_of(proto))
    json.dumps(found.as_dict(), allow_nan=False)
    assert "1 x Conv: 8 bits" in format_quantized_model(found, verbose=True)


# -- quantized: by tools -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small network and ONNX Runtime's files of it."""
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_dynamic,
        quantize_static,
    )

    class Pictures(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter([{"x": RNG.standard_normal((1, 3, 6, 6)).astype(np.float32)}])

        def get_next(self) -> Any:
            return next(self.left, None)

    place = tmp_path_factory.mktemp("inspect")
    model = place / "model.onnx"
    onnx.save(network(NET, (1, 3, 6, 6), w=(8, 3, 3, 3), b=(8,), g=(8, 5)), model)
    for name, how in {"qdq": QuantFormat.QDQ, "qop": QuantFormat.QOperator}.items():
        out = str(place / f"{name}.onnx")
        kind = QuantType.QUInt8 if name == "qop" else QuantType.QInt8
        options = {"quant_format": how, "per_channel": True, "weight_type": QuantType.QInt8, "activation_type": kind}
        quantize_static(str(model), out, Pictures(), **options)
    quantize_dynamic(str(model), str(place / "dynamic.onnx"), weight_type=QuantType.QUInt8)
    return place


@pytest.mark.parametrize(
    ("name", "format_", "ops", "type_", "granularity", "reads"),
    [
        ("qdq", "Q/DQ", ["Conv", "Gemm"], "int8", "per-channel", "int8"),
        ("qop", "QOperator", ["QLinearConv", "QGemm"], "int8", "per-channel", "uint8"),
        ("dynamic", "dynamic", ["ConvInteger", "MatMulInteger"], "uint8", "per-tensor", "uint8"),
    ],
)
def test_files_by_onnxruntime(
    folder: Path, name: str, format_: str, ops: list[str], type_: str, granularity: str, reads: str
) -> None:
    path = folder / f"{name}.onnx"
    found = inspect_quantized(Source(str(path), path))
    assert found.format == format_
    assert [row.op for row in found.layers] == ops
    assert {row.type for row in found.layers} == {type_}
    assert {row.granularity for row in found.layers} == {granularity}
    assert {(row.input.type, row.input.bits) for row in found.layers} == {(reads, 8)}
    assert [row.codes_bytes for row in found.layers] == [216, 40]
    assert {row.runs for row in found.layers} == {"integer"}
    assert found.producer.startswith("onnx.quantize")
    assert sum(row.bytes for row in found.layers) + found.other_constants + found.structure == path.stat().st_size
    stored = sum(numpy_helper.to_array(tensor).nbytes for tensor in onnx.load(path).graph.initializer)
    assert sum(row.bytes for row in found.layers) + found.other_constants == stored
    assert found.recipe == {}
    json.dumps(found.as_dict(), allow_nan=False)
    assert "int8" in format_quantized_model(found, verbose=False)


def made(recipe: Recipe, data: DataOptions, proto: onnx.ModelProto | None = None) -> QuantizedModel:
    source = Source(str(OWN), OWN) if proto is None else source_of(proto)
    _, file = quantize(source, None, recipe, data)
    return inspect_quantized(Source("made", None, file))


CALIB = (str(ROOT / "calib_samples"),)


def test_a_file_by_qconv() -> None:
    found = made(Recipe(effort="fast", weight_bits=4, keep_float_op=("Gemm",)), DataOptions(CALIB, samples=2))
    report, _ = quantize(
        OWN, None, Recipe(effort="fast", weight_bits=4, keep_float_op=("Gemm",)), DataOptions(CALIB, samples=2)
    )
    rows = {row.why.removeprefix("weights of "): row for row in report.tensors if row.kind == "weight"}
    assert {row.name: row.bits for row in found.layers if row.scheme} == {name: row.bits for name, row in rows.items()}
    assert {row.granularity for row in found.layers if row.scheme} == {row.granularity for row in rows.values()}
    assert [row.op for row in found.layers if row.scheme is None] == ["Gemm"]
    assert 4 in {row.bits for row in found.layers}
    assert found.options == ("--samples", "2", "--weight-bits", "4", "--effort", "fast", "--keep-float-op", "Gemm")
    assert found.preprocessing is not None
    text = format_quantized_model(found, verbose=False)
    assert "--weight-bits 4" in text
    assert "4 bits in int8" in text


def test_layers_in_float_whose_weights_are_codes() -> None:
    """Weights alone, of 8 bits: Cast and Mul, with a Sub where zero is not 0."""
    for scheme in ("symmetric", "asymmetric"):
        recipe, data = Recipe(effort="fast", activation_bits=32, weight_scheme=scheme), DataOptions(CALIB, samples=1)  # type: ignore[arg-type]
        found = made(recipe, data)
        assert {(row.type, row.bits, row.scheme, row.granularity) for row in found.layers} == {
            ("int8", 8, scheme, "per-channel")
        }
        assert {(row.runs, str(row.input)) for row in found.layers} == {("float", "float32")}
        assert found.format == "weights only"


def test_bits_of_activations_and_blocks_by_qconv() -> None:
    few = made(Recipe(effort="fast", weight_bits=3, activation_bits=5, edge_bits=2), DataOptions(CALIB, samples=1))
    assert {row.bits for row in few.layers} == {3}
    assert {row.input.bits for row in few.layers if row.input.type == "uint8"} == {5}
    blocks = made(Recipe(effort="fast", weight_granularity="per-block", block_size=8), DataOptions(CALIB, samples=1))  # type: ignore[arg-type]
    assert {row.block_size for row in blocks.layers} <= {1, 3, 8}
    assert {row.granularity for row in blocks.layers} == {"per-block"}


def test_zeros_of_few_bits_that_moved() -> None:
    """With effort best weights of 4 bits are asymmetric, and their zeros are stored as code 0."""
    found = made(Recipe(effort="best", weight_bits=4, equalize=False, tune_ranges=False), DataOptions(CALIB, samples=2))
    assert {row.scheme for row in found.layers if row.bits == 4} == {"asymmetric"}


# -- a recipe as options -----------------------------------------------------------------------------------------------

RECIPES: dict[str, dict[str, Any]] = {
    "default": {},
    "bits": {"weight_bits": 4, "activation_bits": 16, "edge_bits": 4},
    "fast": {"effort": "fast"},
    "fast, equalized": {"effort": "fast", "equalize": True, "rounding": "second-order"},
    "best": {"effort": "best", "weight_bits": 4, "weight_scheme": "symmetric"},
    "not equalized": {"equalize": False, "tune_ranges": False},
    "kept": {"keep_float": ("a*", "-b [c]"), "keep_float_op": ("Gemm",)},
    "percentile": {"calibrator": "percentile", "percentile": 99.5},
    "percentile as it is": {"calibrator": "percentile"},
    "packed": {"weight_bits": 3, "activation_bits": 32, "pack": True},
    "blocks": {"weight_granularity": "per-block", "block_size": 16, "opset": 21},
    "blocks as they are": {"weight_granularity": "per-block"},
    "per tensor": {"weight_granularity": "per-tensor", "weight_calibrator": "mse", "bias_correction": "none"},
    "tensorrt": {"target": "tensorrt"},
    "safe": {"saturation_safe": True, "tune_latency": True},
    "unsafe": {"saturation_safe": False, "embed_preprocessing": "nhwc"},
    "drop": {"max_drop": Drop("agreement", 0.1 + 0.2), "candidate_bits": (4, 8, 32)},
    "drop as it is": {"max_drop": Drop("sqnr", 25.0)},
    "size": {"target_size": 0.16},
    "allocation": {"weight_bits": 4, "activation_bits": 4, "bit_allocation": "both", "calibrator": "aciq"},
    "pictures": {"samples": 7, "seed": 3, "glob": "*.jpg"},
    "preset": {"preprocessing": PreprocessingOptions("caffe", resize=256, size=(224, 192))},
    "numbers": {
        "preprocessing": PreprocessingOptions(
            scale=1 / 255, mean=(-0.1, 0.456, 1e-9), std=(0.229,), color="bgr", layout="nhwc", filter="bicubic"
        )
    },
}


@pytest.mark.parametrize("fields", RECIPES.values(), ids=list(RECIPES))
def test_options_are_read_back_into_the_recipe(fields: dict[str, Any]) -> None:
    request = make_request({"calib": ("imgs",), **fields})
    options = command_line_options(json.loads(json.dumps(request[0].as_dict(request[1]))))
    context = quantize_command.make_context("quantize", ["model.onnx", "--calib", "imgs", *options])
    with context:
        assert make_request_of_fields(collect_fields(context.params)) == request


def test_nothing_is_said_of_defaults() -> None:
    assert command_line_options(Recipe().as_dict(DataOptions())) == []
    assert command_line_options(Recipe(effort="fast").as_dict(DataOptions())) == ["--effort", "fast"]
    assert command_line_options(Recipe(block_size=7).as_dict(DataOptions())) == []  # without effect


def test_layer_bits_have_a_file_of_their_own() -> None:
    recipe, data = Recipe(layer_bits=(("a*", LayerBits(4)),)), DataOptions()
    assert command_line_options(recipe.as_dict(data)) == []
    found = recipe_from_dict(json.loads(json.dumps(recipe.as_dict(data))))
    assert found is not None
    assert found.as_dict(data) == recipe.as_dict(data)


@pytest.mark.parametrize(
    "odd",
    [{"weight_bits": 99}, {"samples": {}}, {"preprocessing": 3}, {"layer_bits": [1]}, {"max_drop": "x"}, {"new": 1}],
)
def test_recipes_of_other_versions(odd: dict[str, Any]) -> None:
    assert "fast" in command_line_options({"effort": "fast", **odd})


def test_numbers_in_words() -> None:
    assert [format_number(v) for v in (1 / 255, 1 / 127.5, 0.485, 1.0, -0.1)] == [
        "1/255",
        "1/127.5",
        "0.485",
        "1",
        "-0.1",
    ]
    assert float(format_number(0.1 + 0.2)) == 0.1 + 0.2


# -- the command -------------------------------------------------------------------------------------------------------


def test_json_and_csv(folder: Path, tmp_path: Path) -> None:
    for name, kind in (("model", "float"), ("qop", "quantized")):
        table = tmp_path / f"{name}.csv"
        done = cli("inspect", folder / f"{name}.onnx", "--json", "--csv", table)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert (found["schema"], found["kind"]) == (1, kind)
        rows = list(csv.DictReader(io.StringIO(table.read_text("utf-8"))))
        assert [row["name"] for row in rows] == [layer["name"] for layer in found["layers"]]
        assert list(rows[0]) == list(found["layers"][0])
        assert rows[0]["shape"] == "8x3x3x3"


def test_standard_input_and_output(folder: Path) -> None:
    data = (folder / "qdq.onnx").read_bytes()
    done = cli("inspect", "-", "--csv", "-", stdin=data)
    assert done.returncode == 0, done.stderr
    assert [row["op"] for row in csv.DictReader(io.StringIO(done.stdout.decode()))] == ["Conv", "Gemm"]
    done = cli("inspect", "-", stdin=data)
    assert b"the model on standard input: Q/DQ" in done.stdout
    assert cli("inspect", "-", "-q", stdin=data).stdout == b""


@pytest.mark.parametrize(
    ("words", "status", "told"),
    [
        (["no.onnx"], 1, b"does not exist"),
        (["cut.onnx"], 1, b"damaged"),
        (["", "--json"], 2, b"needs a name"),
        (["model.onnx", "--csv", ""], 2, b"needs a name"),
        (["model.onnx", "--json", "--csv", "-"], 2, b"both go to standard output"),
        (["model.onnx", "--csv", "model.onnx"], 1, b"is read"),
        (["model.onnx", "--csv", "no/such/place.csv"], 1, b"Error"),
        (["model.onnx", "--target", "abacus"], 2, b"--target"),
    ],
)
def test_errors(folder: Path, words: list[str], status: int, told: bytes) -> None:
    (folder / "cut.onnx").write_bytes((folder / "model.onnx").read_bytes()[:-300])
    paths = [str(folder / word) if word.endswith((".onnx", ".csv")) else word for word in words]
    done = cli("inspect", *paths)
    assert (done.returncode, done.stdout) == (status, b"")
    assert told in done.stderr
    assert b"Traceback" not in done.stderr
    assert not is_quantized(read_proto(Source("model", folder / "model.onnx")))


def test_lines_fit(folder: Path) -> None:
    found = inspect_float(Source("own", OWN), "ort-cpu")
    for verbose in (False, True):
        text = format_float_model(found, verbose=verbose)
        assert text.isascii()
        assert verbose or max(map(len, text.splitlines())) <= 80
    text = format_quantized_model(made(Recipe(effort="fast"), DataOptions(CALIB, samples=1)), verbose=False)
    assert max(map(len, text.splitlines())) <= 80
