"""Codes stored at their bits: the runtime finds the ones that a file without packing has."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from qconv.analysis.inspect_quantized import inspect_quantized
from qconv.config.recipe import Recipe
from qconv.errors import QconvError
from qconv.ir.files import Source
from qconv.ir.load import load_unchanged
from qconv.ir.model import Model
from qconv.ir.packed_codes import pack_codes, packing_opset, packing_runtime, unpack_codes
from qconv.ir.requirements import check_needs, needed_opset, needed_runtime
from qconv.runtime.session import Session
from tests.support.libraries import skip_without
from tests.support.models import loaded, network
from tests.support.quantized import Quantized, pictures, quantized

RUNTIMES = [(13, (1, 19)), (13, (1, 30)), (17, (1, 19)), (17, (1, 22)), (21, (1, 19)), (21, (1, 23)), (25, (1, 30))]
"""Opsets, and the oldest runtimes that files in them are to run in: every form."""

WIDE = network(
    "c = Conv<pads=[3,3,4,4]>(x, w, b) r = Relu(c) d = Conv<pads=[3,3,4,4], group=64>(r, v, a) y = Conv(d, u)",
    x=("n", 3, 12, 12), w=(64, 3, 8, 8), b=(64,), v=(64, 1, 8, 8), a=(64,), u=(96, 64, 1, 1),
)  # fmt: skip
INT2 = 26  # of TensorProto, which older versions of onnx do not know
SIZES = {"c": 64 * 3 * 64, "d": 64 * 64, "y": 96 * 64}


def wide(**options: object) -> Quantized:
    return quantized(WIDE, pictures((2, 3, 12, 12)), edge_bits=2, **options)


def graph_of(codes: NDArray[np.int8], opset: int, *, at_load: bool, axis: int = 0) -> onnx.ModelProto:
    """A Conv whose weights are these codes, between activations in codes, or in float."""
    scales = np.linspace(0.5, 1.5, codes.shape[axis], dtype=np.float32)
    made = "z = Cast<to=1>(q) v = Mul(z, s)" if at_load else "v = DequantizeLinear<axis=0>(q, s, zeros)"
    constants = {"q": codes, "s": scales.reshape(-1, 1, 1, 1) if at_load else scales}
    if not at_load:
        constants["zeros"] = np.zeros(codes.shape[0], np.int8)
    proto = network(f"{made} y = Conv(x, v)", x=(1, codes.shape[1], 8, 8), opset=opset, **constants)
    proto.ir_version = {25: 12}.get(opset, 10)
    return proto


def unpacking_alone(packed: onnx.ModelProto) -> onnx.ModelProto:
    """What the runtime computes at load of it: the codes q."""
    probe = onnx.ModelProto.FromString(packed.SerializeToString())
    steps = [
        node for node in probe.graph.node if node.op_type in ("Cast", "BitShift", "Mod", "Reshape", "Slice", "Add")
    ]
    del probe.graph.node[:], probe.graph.input[:], probe.graph.output[:]
    probe.graph.node.extend(node for node in steps if node.output[0] != "z")
    probe.graph.output.append(onnx.helper.make_tensor_value_info("q", onnx.TensorProto.INT8, None))
    return probe


def reopened(proto: onnx.ModelProto) -> Model:
    copy = onnx.ModelProto.FromString(proto.SerializeToString())
    return load_unchanged(copy, Source("the test's model", None, b""))


def random_codes(bits: int, *, moved: bool, shape: tuple[int, ...] = (90, 6, 5, 5)) -> NDArray[np.int8]:
    """Codes that take all their bits. moved: each channel lies somewhere else, as far as 8 bits go."""
    rng = np.random.default_rng(bits)
    codes = rng.integers(0, 1 << bits, shape)
    codes.reshape(len(codes), -1)[:, :2] = 0, (1 << bits) - 1
    if moved:
        least = np.linspace(-128, 128 - (1 << bits), len(codes)).astype(int)
        return (codes + least.reshape(-1, *[1] * (len(shape) - 1))).astype(np.int8)
    return (codes - (1 << (bits - 1))).astype(np.int8)


@pytest.mark.parametrize("at_load", [False, True])
@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize(("opset", "runtime"), RUNTIMES)
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7])
def test_codes_of_all_bits_come_back(
    bits: int, opset: int, runtime: tuple[int, int], moved: bool, at_load: bool
) -> None:
    """What the operators give by ONNX Runtime, by onnx's own evaluator and by qconv's reader is what was packed."""
    if opset == 25:
        skip_without("onnx", "1.20", "older ones do not know int2")
    codes = random_codes(bits, moved=moved)
    model = reopened(graph_of(codes, opset, at_load=at_load))
    plain = model.proto()
    assert pack_codes(model, runtime) == {"q": bits}
    packed = model.proto()
    skip_without("onnxruntime", packing_runtime(model) or "1.19", "this form of packed codes does")
    onnx.checker.check_model(packed)
    stored = {t.name: t for t in packed.graph.initializer}
    assert "q" not in stored
    whole = packing_opset(bits, runtime)
    kinds = {t.data_type for t in stored.values()}
    assert (kinds & {onnx.TensorProto.INT4, INT2} != set()) is (0 < whole <= opset)
    probe = unpacking_alone(packed)
    np.testing.assert_array_equal(Session(probe.SerializeToString(), optimize=False, threads=1).run_all({})[0], codes)
    if opset < 25:  # int2 is beyond the evaluator
        np.testing.assert_array_equal(ReferenceEvaluator(probe).run(None, {})[0], codes)
    x = np.ones((1, 6, 8, 8), np.float32)
    results = [Session(p.SerializeToString(), threads=1).run(["y"], {"x": x})[0] for p in (plain, packed)]
    np.testing.assert_array_equal(*results)
    (found,) = unpack_codes(model).codes.items()
    assert found[1].bits == bits
    assert found[1].codes == -(-codes.size * bits // 8)
    assert found[1].added == (len(codes) if moved else 0 if bits in (2, 4) and 0 < whole <= opset else 1)
    back = {t.name: onnx.numpy_helper.to_array(t) for t in model.proto().graph.initializer}
    assert back.keys() == {t.name for t in plain.graph.initializer}
    np.testing.assert_array_equal(back["q"], codes)


@pytest.mark.parametrize("runtime", [(1, 19), (1, 22)])
@pytest.mark.parametrize("bits", [2, 3, 5, 6, 7])
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_counts_that_fill_no_byte_are_cut(count: int, bits: int, runtime: tuple[int, int]) -> None:
    codes = random_codes(bits, moved=False, shape=(count, 3, 63, 133))
    codes[0, 0, 0, 0] = 0
    model = reopened(graph_of(codes, 17, at_load=False))
    assert pack_codes(model, runtime) == {"q": bits}
    assert "Slice" in {node.op_type for node in model.nodes()} or codes.size % 8 == 0
    assert [packed.bits for packed in unpack_codes(model).codes.values()] == [bits]
    back = {t.name: onnx.numpy_helper.to_array(t) for t in model.proto().graph.initializer}
    np.testing.assert_array_equal(back["q"], codes)


def test_codes_of_8_bits_and_small_layers_stay() -> None:
    for codes in (random_codes(8, moved=False), random_codes(4, moved=False, shape=(8, 2, 3, 3))):
        model = reopened(graph_of(codes, 21, at_load=False))
        before = model.proto().SerializeToString()
        assert pack_codes(model, (1, 30)) == {}
        assert model.proto().SerializeToString() == before


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_openvino_gets_the_form_that_it_reads_right(bits: int) -> None:
    """OpenVINO 2026.4 loads no int2, and makes other numbers of bytes in the weights of a Gemm."""
    packed, plain = (wide(weight_bits=bits, pack=pack, target="openvino", opset=21) for pack in (True, False))
    kinds = {t.data_type for t in packed.proto.graph.initializer}
    assert onnx.TensorProto.INT4 in kinds
    assert INT2 not in kinds
    assert {"BitShift", "Add"}.isdisjoint(node.op_type for node in packed.proto.graph.node)
    for name, result in plain.got.items():
        np.testing.assert_array_equal(packed.got[name], result)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"target": "tensorrt"}, "leave --pack out"),
        ({"target": "openvino", "needs": "1.22"}, "needs 1.23 or newer"),
        ({"target": "openvino", "opset": 20}, "opset 21"),
        ({"target": "openvino", "weight_bits": 5}, "--weight-bits 4 or fewer"),
    ],
)
def test_forms_that_a_target_does_not_take_are_refused_before_the_work(options: dict[str, object], told: str) -> None:
    with pytest.raises(QconvError, match="is not possible") as caught:
        Recipe(**{"weight_bits": 4, "pack": True, **options})  # type: ignore[arg-type]
    assert told in caught.value.hint


def test_one_tensor_of_two_layers_is_packed_once() -> None:
    codes = random_codes(4, moved=True, shape=(6, 6, 9, 9))
    body = "v = DequantizeLinear<axis=0>(q, s, z) c = Conv<pads=[4,4,4,4]>(x, v) y = Conv<pads=[4,4,4,4]>(c, v)"
    proto = network(body, x=(1, 6, 9, 9), opset=21, q=codes, s=np.ones(6, np.float32), z=np.zeros(6, np.int8))
    model = reopened(proto)
    assert pack_codes(model, (1, 30)) == {"q": 4}
    assert Counter(node.op_type for node in model.nodes())["Cast"] == 1


@pytest.mark.parametrize("needs", ["1.19", "1.22.0", "1.23", None])
@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_packed_layers_run_in_integers_and_bit_for_bit(bits: int, needs: str | None) -> None:
    packed, plain = wide(weight_bits=bits, pack=True, needs=needs), wide(weight_bits=bits)
    assert packed.runs == plain.runs
    assert packed.runs.count("QLinearConv") == 3
    for name, result in plain.got.items():
        np.testing.assert_array_equal(packed.got[name], result)
    assert packed.proto.ByteSize() < plain.proto.ByteSize()


@pytest.mark.parametrize(
    ("granularity", "block"), [("per-tensor", 32), ("per-channel", 32), ("per-block", 32), ("per-block", 27)]
)
@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_weights_alone_are_computed_at_load(bits: int, granularity: str, block: int) -> None:
    """Nothing is left of the codes in the network that runs, and the numbers are those of the codes.

    Blocks of 27 leave a short one in each row.
    """
    options = {"weight_bits": bits, "activation_bits": 32, "weight_granularity": granularity, "block_size": block}
    packed, plain = wide(**options, pack=True), wide(**options)
    assert set(packed.runs) == set(plain.runs) <= {"Conv", "FusedConv", "ReorderInput", "ReorderOutput"}
    for name, result in plain.got.items():
        np.testing.assert_array_equal(packed.got[name], result)
        np.testing.assert_allclose(result, plain.meant[name], rtol=1e-4, atol=1e-5 * np.abs(result).max())


@pytest.mark.parametrize("target", ["ort-cpu", "generic"])
@pytest.mark.parametrize(("granularity", "block"), [("per-channel", 32), ("per-block", 32), ("per-block", 20)])
def test_products_of_weights_alone_round_nothing_but_the_weights(granularity: str, block: int, target: str) -> None:
    """ONNX Runtime would make MatMulNBits of them, which it does where it is allowed to."""
    proto = network("h = MatMul(x, w) r = Relu(h) y = Gemm(r, v)", x=(4, 64), w=(64, 96), v=(96, 32))
    samples = pictures((4, 64))
    options = {"activation_bits": 32, "weight_granularity": granularity, "block_size": block, "target": target}
    exact = quantized(proto, samples, **options)
    assert "MatMulNBits" not in exact.runs
    np.testing.assert_allclose(exact.got["y"], exact.meant["y"], rtol=1e-4, atol=1e-5 * np.abs(exact.got["y"]).max())
    allowed = quantized(proto, samples, **options, allow_matmul_nbits=True)
    assert "DequantizeLinear" in {node.op_type for node in allowed.proto.graph.node}


def test_scales_of_biases_are_not_stored_twice() -> None:
    """Nor their zeros: both are computed of those that weights and inputs have."""
    packed, plain = wide(weight_bits=4, pack=True), wide(weight_bits=4)
    biases = [node.input[2] for node in plain.wiring.all("Conv") if len(node.input) > 2]
    assert len(biases) == 3
    for proto, computed in ((plain.proto, False), (packed.proto, True)):
        stored = {t.name for t in proto.graph.initializer}
        for node in proto.graph.node:
            if node.op_type == "DequantizeLinear" and node.output[0] in biases:
                assert [name not in stored for name in node.input[1:]] == [computed, computed]


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_a_bias_may_have_the_very_scale_of_its_weights(scale: float) -> None:
    """Pixels from 0 to 255 have scale 1: the product is the scale of the weights, and stored once."""
    skip_without("onnxruntime", "1.22", "this form of packed codes does")
    codes = random_codes(4, moved=False, shape=(90, 6, 5, 5))
    scales = np.linspace(0.5, 1.5, 90, dtype=np.float32)
    own = "s" if scale == 1 else "t"
    proto = network(
        "p = QuantizeLinear(x, one, zero) u = DequantizeLinear(p, one, zero) v = DequantizeLinear<axis=0>(q, s, zeros)"
        f" c = DequantizeLinear<axis=0>(b, {own}, wide) y = Conv(u, v, c)",
        x=(1, 6, 8, 8), one=np.array(scale, np.float32), zero=np.array(0, np.uint8), q=codes, s=scales,
        zeros=np.zeros(90, np.int8), b=np.arange(90, dtype=np.int32), wide=np.zeros(90, np.int32),
        **({} if scale == 1 else {"t": scales * np.float32(scale)}),
    )  # fmt: skip
    model = reopened(proto)
    assert pack_codes(model, (1, 23)) == {"q": 4}
    packed = model.proto()
    onnx.checker.check_model(packed)
    assert "s" in {t.name for t in packed.graph.initializer}
    assert ("Mul" in {node.op_type for node in packed.graph.node}) is (scale != 1)
    x = np.random.default_rng(0).integers(0, 255, (1, 6, 8, 8)).astype(np.float32)
    results = [Session(p.SerializeToString(), threads=1).run(["y"], {"x": x})[0] for p in (proto, packed)]
    np.testing.assert_array_equal(*results)


def test_the_file_is_hardly_more_than_its_codes_scales_and_biases() -> None:
    body = "c = Conv(x, w, b) r = Relu(c) y = Conv(r, v, a)"
    proto = network(body, x=(1, 64, 6, 6), w=(160, 64, 3, 3), b=(160,), v=(96, 160, 3, 3), a=(96,))
    for bits, effort in ((4, "balanced"), (2, "best"), (3, "best")):
        found = quantized(proto, pictures((1, 64, 6, 6)), weight_bits=bits, edge_bits=2, pack=True, effort=effort)
        weights, channels = 160 * 64 * 9 + 96 * 160 * 9, 160 + 96
        least = weights * bits / 8 + channels * (4 + 1 + 4)
        assert found.proto.ByteSize() <= 1.06 * least + 100 * len(found.proto.graph.node)


@pytest.mark.parametrize(
    ("options", "own", "opset", "runtime"),
    [
        ({"weight_bits": 4}, 17, 21, "1.23"),
        ({"weight_bits": 2}, 17, 25, "1.24"),
        ({"weight_bits": 3}, 17, 17, "1.22"),
        ({"weight_bits": 3}, 13, 13, "1.19"),
        ({"weight_bits": 4, "needs": "1.22"}, 17, 17, "1.22"),
        ({"weight_bits": 4, "needs": "1.19"}, 17, 17, "1.19"),
        ({"weight_bits": 2, "needs": "1.23"}, 17, 17, "1.22"),
        ({"weight_bits": 4, "opset": 18}, 17, 18, "1.22"),
        ({"weight_bits": 2, "opset": 21}, 17, 21, "1.22"),
    ],
)
def test_the_form_is_chosen_by_what_the_file_may_need(
    options: dict[str, object], own: int, opset: int, runtime: str
) -> None:
    if opset == 25:
        skip_without("onnx", "1.20", "older ones do not know int2")
    recipe = Recipe(pack=True, edge_bits=2, **options)  # type: ignore[arg-type]
    assert needed_opset(recipe, own) == opset
    model = reopened(graph_of(random_codes(recipe.weight_bits, moved=True), opset, at_load=False))
    assert packing_runtime(model) is None
    pack_codes(model, recipe.oldest_runtime)
    assert packing_runtime(model) == runtime
    assert needed_runtime(model, recipe) == f"onnxruntime >= {max(runtime, {25: '1.24'}.get(opset, '1.19'))}"


@pytest.mark.parametrize(("largest", "opset"), [(None, 21), (100_000, 21), (213, 17), (0, 17)])
def test_no_opset_is_raised_for_codes_that_are_too_few(largest: int | None, opset: int) -> None:
    assert needed_opset(Recipe(pack=True, weight_bits=4), 17, largest) == opset


@pytest.mark.parametrize(
    ("options", "opset", "needed"),
    [({}, 22, "1.22"), ({"weight_scheme": "asymmetric"}, 17, "1.28"), ({"pack": True, "weight_bits": 4}, 17, None)],
)
def test_a_result_that_would_need_more_is_refused_before_the_work(
    options: dict[str, object], opset: int, needed: str | None
) -> None:
    model = loaded(network("y = Relu(x)", opset=opset))
    check_needs(model, Recipe(**options))  # type: ignore[arg-type]
    recipe = Recipe(needs="1.20", **options)  # type: ignore[arg-type]
    if needed is None:
        check_needs(model, recipe)
        return
    with pytest.raises(QconvError, match=f"--needs 1.20: the result would need ONNX Runtime {needed}"):
        check_needs(model, recipe)


@pytest.mark.parametrize("wrong", ["1", "new", "1.18", "0.9", "1.23.x", "", "\uff11.\uff12\uff13"])
def test_odd_versions_are_refused(wrong: str) -> None:
    with pytest.raises(QconvError, match="--needs"):
        Recipe(needs=wrong)


@pytest.mark.parametrize("needs", ["1.19", None])
def test_inspect_reads_every_form(tmp_path: Path, needs: str | None) -> None:
    place = tmp_path / "packed.onnx"
    for bits in (2, 3, 4):
        found = wide(weight_bits=bits, pack=True, needs=needs)
        place.write_bytes(found.proto.SerializeToString())
        rows = inspect_quantized(Source(str(place), place)).layers
        assert [row.runs for row in rows] == ["integer"] * 3
        assert {row.bits for row in rows} == {bits}
        assert {row.type for row in rows} == {f"int{bits}"}
        assert {row.name: row.codes_bytes for row in rows} == {name: size * bits // 8 for name, size in SIZES.items()}
        assert sum(row.bytes for row in rows) < found.proto.ByteSize()
