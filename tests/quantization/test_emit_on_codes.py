"""Operators on codes: the numbers of the standard, in integer kernels. Oracle: ONNX Runtime without its optimizations
on the same file, and on the file of a target that has these operators in float between quantizers."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from qconv.auditing.fusion_rules import find_float_reason
from qconv.errors import Change
from qconv.ir.model import dims
from tests.support.models import Constant, ints, loaded, network
from tests.support.quantized import SAME, Quantized, quantized

DOUBLED = {"k": np.float32([1, 1, 2, 2])}
FAST = 'mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor"'


def between(body: str, channels: int = 8, side: int = 8, **constants: Constant) -> Quantized:
    """Conv -> the operator, from c to a -> Conv."""
    shapes = {"w": (8, 3, 3, 3), "t": (4, channels, 1, 1), **constants}
    proto = network(f"c = Conv<{SAME}>(x, w) {body} y = Conv(a, t)", x=("N", 3, side, side), **shapes)
    return quantized(proto, weight_bits=7, edge_bits=7).check()


def assert_exact(result: Quantized, **without: int) -> None:
    """Nothing runs in float, and the runtime does exactly what the file says."""
    assert result.audit.islands == ()
    assert all(np.array_equal(result.meant[name], result.got[name]) for name in result.meant)
    assert {op: result.wiring.count(op) for op in without} == without


def assert_as_in_float(result: Quantized) -> None:
    """The same numbers as with the operator in float between dequantizer and quantizer."""
    model = onnx.ModelProto.FromString(result.proto.SerializeToString())
    before = quantized(result.float, target="generic", weight_bits=7, edge_bits=7)
    assert before.wiring.count("SpaceToDepth", "Resize", "Sub") == 1
    assert np.array_equal(before.meant["y"], result.meant["y"]), model.graph.name


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_resize_doubles_codes_in_the_files_layout(factor: int) -> None:
    result = between('a = Resize<mode="nearest">(c, , k)', k=np.float32([1, 1, factor, factor]))
    doublings = factor.bit_length() - 1
    assert_exact(result, Resize=doublings, Reshape=2)
    assert_as_in_float(result)
    frames = {onnx.helper.get_node_attr_value(node, "nearest_mode") for node in result.wiring.all("Resize")}
    assert frames == {b"floor"}
    assert Change("codes", "a", "Resize computed on codes") in result.findings
    assert {(node.op, node.rule) for node in result.audit.on_codes} >= {("Resize", "on-codes")}


def test_resize_to_sizes_doubles_codes() -> None:
    shapes = {"w": (8, 3, 3, 3), "t": (4, 8, 1, 1), "k": ints(2, 8, 16, 16)}
    body = f"c = Conv<{SAME}>(x, w) a = Resize<{FAST}>(c, , , k) y = Conv(a, t)"
    result = quantized(network(body, x=(2, 3, 8, 8), **shapes), weight_bits=7, edge_bits=7).check()
    assert_exact(result, Reshape=2)
    assert_as_in_float(result)


@pytest.mark.parametrize(
    ("attributes", "scales"),
    [
        (FAST, [1, 1, 3, 3]),  # no fast kernel
        (FAST, [1, 1, 2, 4]),
        (FAST, [1, 1, 1.5, 1.5]),
        (FAST, [1, 2, 2, 2]),
        (FAST, [1, 1, 16, 16]),
        (FAST.replace("floor", "ceil"), [1, 1, 2, 2]),
        (FAST.replace("floor", "round_prefer_floor"), [1, 1, 2, 2]),
    ],
)
def test_other_resizes_stay_between_quantizers(attributes: str, scales: list[float]) -> None:
    channels = 8 * int(scales[1])
    result = between(f"a = Resize<{attributes}>(c, , k)", channels, k=np.float32(scales))
    assert result.wiring.count("Reshape") == 0
    assert_exact(result, Resize=1)


def test_space_to_depth_is_four_slices_of_codes() -> None:
    """Channel (2 y + x) C + c holds what channel c has at rows 2 i + y and columns 2 j + x."""
    body = f"c = Conv<{SAME}>(x, w) a = SpaceToDepth<blocksize=2>(c) y = Conv(a, t)"
    proto = network(body, x=("N", 3, 8, 8), outputs=("y", "a", "c"), w=(8, 3, 3, 3), t=(4, 32, 1, 1))
    result = quantized(proto, weight_bits=7, edge_bits=7).check()
    assert_exact(result, SpaceToDepth=0, Slice=4, Concat=1)
    before = result.meant["c"]
    parts = [before[:, :, y::2, x::2] for y in (0, 1) for x in (0, 1)]
    assert np.array_equal(result.meant["a"], np.concatenate(parts, axis=1))
    assert Change("codes", "a", "SpaceToDepth computed on codes") in result.findings


@pytest.mark.parametrize(
    ("body", "channels"),
    [
        ("a = SpaceToDepth<blocksize=4>(c)", 128),
        ("m = Transpose<perm=[0,1,3,2]>(c) a = SpaceToDepth<blocksize=2>(m)", 32),
        ("s = SpaceToDepth<blocksize=2>(c) a = Concat<axis=1>(s, s)", 64),
    ],
)
def test_space_to_depth_stays_float_where_slices_are_slow(body: str, channels: int) -> None:
    result = between(body, channels)
    assert result.wiring.count("SpaceToDepth") == 1
    assert "SpaceToDepth" in result.islands


def test_space_to_depth_of_an_input_stays_float() -> None:
    proto = network("a = SpaceToDepth<blocksize=2>(x) y = Conv(a, t)", x=(1, 3, 8, 8), t=(16, 12, 3, 3))
    assert quantized(proto).wiring.count("SpaceToDepth") == 1


BRANCHES = {"v": (8, 3, 1, 1)}


@pytest.mark.parametrize(
    "body",
    [
        "o = Conv(x, v) d = Relu(o) a = Sub(c, d)",
        "d = GlobalAveragePool(c) a = Sub(c, d)",  # which is broadcast
        "d = GlobalAveragePool(c) a = Sub(d, c)",
        "a = Sub(c, c)",
        "o = Conv(x, v) d = Relu(o) s = Sub(c, d) a = Relu(s)",
    ],
)
def test_sub_is_an_add_of_negated_codes(body: str) -> None:
    shapes = {"w": (8, 3, 3, 3), "t": (4, 8, 1, 1), "b": (4,), **(BRANCHES if "v)" in body else {})}
    proto = network(f"c = Conv<{SAME}>(x, w) {body} y = Conv(a, t, b)", x=("N", 3, 8, 8), **shapes)
    result = quantized(proto, weight_bits=7, edge_bits=7)
    assert_exact(result, Sub=0, Add=1)
    assert_as_in_float(result)
    assert result.runs.count("QLinearAdd") == 1
    assert {(node.op, node.rule) for node in result.audit.on_codes} == {("Add", "negated-scale")}


def test_who_else_reads_the_subtracted_codes_reads_them_as_they_are() -> None:
    body = f"c = Conv<{SAME}>(x, w) o = Conv(x, v) d = Relu(o) s = Sub(c, d) e = Add(s, d) y = Conv(e, t)"
    proto = network(body, x=("N", 3, 8, 8), w=(8, 3, 3, 3), v=(8, 3, 1, 1), t=(4, 8, 1, 1))
    assert_exact(quantized(proto, weight_bits=7, edge_bits=7).check(), Sub=0, Add=2)


@pytest.mark.parametrize("target", ["generic", "openvino"])
@pytest.mark.parametrize(
    ("body", "channels"),
    [
        ("o = Conv(x, v) d = Relu(o) a = Sub(c, d)", 8),
        ("a = SpaceToDepth<blocksize=2>(c)", 32),
        ('a = Resize<mode="nearest">(c, , k)', 8),
    ],
)
def test_other_runtimes_get_the_operators_themselves(target: str, body: str, channels: int) -> None:
    shapes = {"w": (8, 3, 3, 3), "t": (4, channels, 1, 1), "v": (8, 3, 1, 1), **DOUBLED}
    proto = network(f"c = Conv<{SAME}>(x, w) {body} y = Conv(a, t)", x=("N", 3, 8, 8), **shapes)
    result = quantized(proto, target=target)
    assert result.wiring.count("Sub", "SpaceToDepth", "Resize") == 1
    assert result.wiring.count("Slice", "Reshape", "Add") == 0
    signs = [np.sign(numbers).min() for name, numbers in result.wiring.constants.items() if "scale" in name]
    assert min(signs) > 0


def test_16_bits_are_left_to_float() -> None:
    proto = network(
        f"c = Conv<{SAME}>(x, w) o = Conv(x, v) d = Relu(o) a = Sub(c, d) y = Conv(a, t)",
        w=(8, 3, 3, 3),
        v=(8, 3, 1, 1),
        t=(4, 8, 1, 1),
    )
    result = quantized(proto, activation_bits=16).check()
    assert result.wiring.count("Sub") == 1


@pytest.mark.parametrize("op_type", ["Sub", "SpaceToDepth"])
def test_the_audit_of_others_files_says_what_could_be_done(op_type: str) -> None:
    body = {"Sub": "a = Sub(x, x)", "SpaceToDepth": "a = SpaceToDepth<blocksize=2>(x)"}[op_type]
    model = loaded(network(f"{body} y = Relu(a)", x=(1, 4, 8, 8)))
    reason = find_float_reason(next(node for node in model.nodes() if node.op_type == op_type))
    assert reason.rule == "no-kernel"
    assert "qconv quantize writes it so" in (reason.remedy or "")


def test_shapes_of_what_is_written_are_known() -> None:
    result = between("a = SpaceToDepth<blocksize=2>(c)", 32)
    found = {node.op_type: dims(node.outputs[0]) for node in result.model.nodes()}
    assert found["Slice"] == [None, 8, 4, 4]
    assert found["Concat"] == [None, 32, 4, 4]
