"""The whole story on small models: what goes in, what comes out, and that each wish of the recipe reaches the file."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

import qconv
from qconv.config.choices import CALIBRATOR_NAMES, Scheme, WeightGranularity
from qconv.config.data_options import Color, DataOptions, Layout, PreprocessingOptions
from qconv.config.recipe import Recipe
from qconv.errors import QconvError
from qconv.ir.files import Source
from qconv.metrics import comparison
from qconv.pipeline import checks
from qconv.pipeline.quantize import quantize
from qconv.report.console import show_report
from qconv.reporter import Reporter
from qconv.results.quantize import OutputScore, Report
from qconv.runtime.session import Session
from tests.support.folded import write_folded_float
from tests.support.libraries import MOVES_CODES, ZERO_POINTS, needs, skip_without
from tests.support.models import ints, network
from tests.support.scores import scores

CIFAR = Path(__file__).parent / "models" / "cifar_mobilenet.onnx"
PHOTOS = Path(__file__).parent.parent / "calib_samples"
RAW = PreprocessingOptions(preset="raw")
# three layers: the first and the last are edges
BODY = (
    "c = Conv(x, w)  r = Relu(c)  d = Conv(r, v)  e = Relu(d)  p = GlobalAveragePool(e)  f = Flatten(p)  y = Gemm(f, g)"
)
WEIGHTS: dict[str, Any] = {"w": (8, 3, 3, 3), "v": (12, 8, 3, 3), "g": (12, 10)}


def deep(x: Sequence[int | str] = ("N", 3, 8, 8)) -> onnx.ModelProto:
    return network(BODY, x, **WEIGHTS)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> str:
    """12 pictures of random pixels."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(12):
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return str(folder)


def samples(folder: Path, arrays: Sequence[NDArray[Any]]) -> str:
    folder.mkdir(exist_ok=True)
    for number, array in enumerate(arrays):
        np.save(folder / f"{number}.npy", array)
    return str(folder)


def quantized(proto: onnx.ModelProto, recipe: Recipe, data: DataOptions) -> tuple[Report, onnx.ModelProto]:
    """Report and result, checked as a whole."""
    source = Source("the model", None, proto.SerializeToString())
    report, made = quantize(source, None, replace(recipe, threads=1), data)
    assert made is not None
    result = onnx.load_from_string(made)
    onnx.checker.check_model(result, full_check=True)
    return report, result


def feeds_of(proto: onnx.ModelProto, arrays: NDArray[Any]) -> dict[str, NDArray[Any]]:
    return {proto.graph.input[0].name: arrays}


def constants(proto: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    return {tensor.name: tensor for tensor in proto.graph.initializer}


def codes(proto: onnx.ModelProto, rank: int = 4) -> dict[tuple[int, ...], onnx.TensorProto]:
    """Quantized weights of `rank` by their shape."""
    kinds = {getattr(TensorProto, name) for name in ("INT4", "UINT4", "INT8", "UINT8", "INT16", "UINT16")}
    return {tuple(t.dims): t for t in proto.graph.initializer if len(t.dims) == rank and t.data_type in kinds}


def pixels(count: int, shape: tuple[int, ...], seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), np.uint8)


# -- the main job ------------------------------------------------------------------------------------------------------


def test_the_report_agrees_with_a_measurement_of_ones_own(tmp_path: Path) -> None:
    """SQNR and agreement by their definitions, from the two files, on the pictures that were used."""
    rng = np.random.default_rng(0)
    arrays = rng.standard_normal((10, 3, 32, 32)).astype(np.float32)
    recipe, data = Recipe(min_sqnr=1.0, threads=1), DataOptions((samples(tmp_path / "s", arrays),))
    out = tmp_path / "out.onnx"
    report, data = quantize(CIFAR, out, recipe, data)
    assert data is None
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.onnx", "s"]
    (want,) = Session(str(CIFAR), threads=1).run_all({"input": arrays})
    (got,) = Session(str(out), threads=1).run_all({"input": arrays})
    ref, noise = want.astype(np.float64), want.astype(np.float64) - got
    assert report.verify.images == 10
    assert report.verify.sqnr_db == pytest.approx(10 * math.log10((ref**2).sum() / (noise**2).sum()), abs=0.05)
    assert report.verify.agreement == pytest.approx((want.argmax(1) == got.argmax(1)).mean())
    assert report.quantized_bytes == out.stat().st_size
    assert report.float_bytes == CIFAR.stat().st_size
    assert report.ratio < 0.32
    assert report.held


@needs("onnxruntime", "1.22", MOVES_CODES)
def test_the_demo_runs_in_integers_and_agrees() -> None:
    """Every Conv, Add, pool and Gemm, 22 + 4 + 1 + 1, and what leads in and out, but for some that the table picks."""
    recipe, data = Recipe(threads=1), DataOptions((str(PHOTOS),), preprocessing=PreprocessingOptions(resize="exact"))
    report, data = quantize(CIFAR, None, recipe, data)
    assert data is not None
    assert report.audit.islands == ()
    assert report.audit.integer >= 25
    assert report.audit.integer + len(report.audit.placed) >= 28
    assert report.verify.sqnr_db is not None
    assert report.verify.sqnr_db > 20
    assert report.verify.agreement is not None
    assert report.verify.agreement >= 0.95
    before, after = onnx.load(CIFAR), onnx.load_from_string(data)
    assert after.graph.input == before.graph.input
    assert [(o.name, o.type) for o in after.graph.output] == [(o.name, o.type) for o in before.graph.output]
    for size in (1, 3):  # the batch stays open
        (result,) = Session(data, threads=1).run_all({"input": np.zeros((size, 3, 32, 32), np.float32)})
        assert result.shape == (size, 10)


def test_metadata_of_the_model_stays(pictures: str) -> None:
    proto = deep()
    helper.set_model_props(proto, {"labels": "cat,dog"})
    _, result = quantized(proto, Recipe(), DataOptions((pictures,)))
    carried = {entry.key: entry.value for entry in result.metadata_props}
    assert carried["labels"] == "cat,dog"
    assert {"qconv.version", "qconv.recipe", "qconv.preprocessing"} <= carried.keys()


def test_the_public_name_does_the_same(tmp_path: Path, pictures: str) -> None:
    (tmp_path / "m.onnx").write_bytes(deep().SerializeToString())
    recipe, data = Recipe(threads=1), DataOptions((pictures,))
    first = qconv.quantize(tmp_path / "m.onnx", None, recipe, data).model_bytes
    qconv.quantize(str(tmp_path / "m.onnx"), str(tmp_path / "out.onnx"), recipe, data)
    assert (tmp_path / "out.onnx").read_bytes() == first
    with pytest.raises(AttributeError, match="nonsense"):
        qconv.nonsense  # noqa: B018


def test_only_what_shapes_the_file_changes_it(pictures: str) -> None:
    proto = deep()
    recipe, data = Recipe(), DataOptions((pictures,))
    _, first = quantized(proto, recipe, data)
    for steering in ({"min_sqnr": -100.0}, {"min_agreement": 0.0}):
        assert quantized(proto, replace(recipe, **steering), data)[1] == first
    assert quantized(proto, recipe, replace(data, seed=1))[1] != first


def test_the_folded_model_computes_the_same(tmp_path: Path) -> None:
    write_folded_float(CIFAR, tmp_path / "folded.onnx")
    x = np.random.default_rng(0).standard_normal((2, 3, 32, 32)).astype(np.float32)
    (want,), (got,) = (
        Session(str(path), optimize=False, threads=1).run_all({"input": x})
        for path in (CIFAR, tmp_path / "folded.onnx")
    )
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    ops = [node.op_type for node in onnx.load(tmp_path / "folded.onnx").graph.node]
    assert "BatchNormalization" not in ops


# -- whoever listens ---------------------------------------------------------------------------------------------------


def test_a_listener_hears_progress_and_warnings(tmp_path: Path, pictures: str) -> None:
    heard: list[tuple[str, int, int]] = []
    said: list[str] = []
    for path in Path(pictures).iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "bad.png").write_bytes(b"")
    reporter = Reporter(said.append, lambda *args: heard.append(args))
    recipe, data = Recipe(min_sqnr=1.0, threads=1), DataOptions((str(tmp_path),), batch=5)
    report, _ = quantize(Source("m", None, deep().SerializeToString()), None, recipe, data, reporter)
    solves = ("ranges", "widths", "precision", "round")
    assert {total for stage, _, total in heard if stage not in solves} == {13}
    assert [done for stage, done, _ in heard if stage == "round"] == [0, 1, 2, 3]
    done = [(done, total) for stage, done, total in heard if stage == "ranges"]
    assert done == sorted(done)
    assert done[-1][0] == done[-1][1]
    assert [(stage, done) for stage, done, _ in heard if stage not in solves] == [
        (s, n)
        for s in ("load", "equalize", "calibrate", "read again", "float", "read again", "verify")
        for n in (5, 10, 12)
    ]
    assert said == report.warnings
    assert sum("bad.png" in text for text in said) == 1


def test_errors_before_any_work_leave_no_file(tmp_path: Path, pictures: str) -> None:
    out = tmp_path / "out.onnx"
    out.write_bytes(b"before")
    recipe, data = Recipe(opset=11), DataOptions((pictures,))
    with pytest.raises(QconvError, match="--opset 11 is below"):
        quantize(Source("m", None, deep().SerializeToString()), out, recipe, data)
    assert out.read_bytes() == b"before"
    assert len(list(tmp_path.iterdir())) == 1


# -- bits, schemes and granularity reach the file ----------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8, 16])
def test_weight_bits(pictures: str, bits: int) -> None:
    """Narrow range in the middle; at the edges as asked by default, at least 8 bits."""
    report, result = quantized(deep(), Recipe(weight_bits=bits), DataOptions((pictures,)))
    weights = codes(result)
    assert set(weights) == {(8, 3, 3, 3), (12, 8, 3, 3)}
    for shape, width in (((8, 3, 3, 3), max(bits, 8)), ((12, 8, 3, 3), bits)):
        values = numpy_helper.to_array(weights[shape]).astype(int)
        top = 2 ** (width - 1) - 1
        assert abs(values).max() <= top
        if width != 8:  # eight bits may give one up against saturation
            assert abs(values).max() == top
        assert weights[shape].data_type == (TensorProto.INT16 if width == 16 else TensorProto.INT8)
    rows = {row.bits for row in report.tensors if row.kind == "weight"}
    assert rows == {bits, max(bits, 8)}


@pytest.mark.parametrize("edge", [2, 4, 8, 16])
def test_edge_bits(pictures: str, edge: int) -> None:
    report, _ = quantized(deep(), Recipe(weight_bits=4, edge_bits=edge), DataOptions((pictures,)))
    weights = [row.bits for row in report.tensors if row.kind == "weight"]
    assert weights == [max(4, edge), 4, max(4, edge)]


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8, 16])
def test_activation_bits(pictures: str, bits: int) -> None:
    """The range of an inner tensor is cut into 2^b - 1 steps; the input is an edge."""
    recipe, data = Recipe(calibrator="minmax", equalize=False), DataOptions((pictures,))  # which depends on the bits
    report, result = quantized(deep(), replace(recipe, activation_bits=bits), data)
    inner = {row.name: row for row in report.tensors if row.kind == "activation"}
    assert inner["r"].bits == bits
    assert inner["x"].bits == max(bits, 8)
    wide = {r.name: r for r in quantized(deep(), recipe, data)[0].tensors}
    assert inner["r"].scale * (2**bits - 1) == pytest.approx(wide["r"].scale * 255, rel=0.01)
    kinds = {t.data_type for t in result.graph.initializer if t.data_type in (TensorProto.UINT8, TensorProto.UINT16)}
    assert (TensorProto.UINT16 in kinds) == (bits == 16)


def test_weights_only(pictures: str) -> None:
    report, result = quantized(deep(), Recipe(activation_bits=32), DataOptions((pictures,)))
    assert "QuantizeLinear" not in [node.op_type for node in result.graph.node]
    assert len(codes(result)) == 2
    assert all(row.bits is None or row.bits == 32 for row in report.tensors if row.kind == "activation")


@pytest.mark.parametrize("scheme", Scheme)
def test_weight_schemes(pictures: str, scheme: Scheme) -> None:
    """All weights positive: codes that must hold zero in the middle reach half as many values."""
    if scheme is Scheme.ASYMMETRIC:
        skip_without("onnxruntime", "1.28", ZERO_POINTS)
    v = np.abs(np.random.default_rng(0).standard_normal((12, 8, 3, 3))).astype(np.float32)
    proto = network(BODY, ("N", 3, 8, 8), **(WEIGHTS | {"v": v}))
    report, result = quantized(proto, Recipe(weight_scheme=scheme, weight_bits=6), DataOptions((pictures,)))
    (row,) = [row for row in report.tensors if row.kind == "weight" and row.bits == 6]
    assert row.symmetric is (scheme is Scheme.SYMMETRIC)
    values = numpy_helper.to_array(codes(result)[12, 8, 3, 3]).astype(int)
    spread = values.max() - np.min(row.zero_point)
    assert spread == (31 if scheme is Scheme.SYMMETRIC else 63)


@pytest.mark.parametrize("scheme", Scheme)
def test_activation_schemes(pictures: str, scheme: Scheme) -> None:
    """Symmetric: zero point 0 where nothing is negative, else the middle code."""
    report, _ = quantized(deep(), Recipe(activation_scheme=scheme), DataOptions((pictures,)))
    rows = {row.name: row for row in report.tensors if row.kind == "activation"}
    assert rows["r"].zero_point == 0
    if scheme is Scheme.SYMMETRIC:
        assert rows["x"].zero_point == 128
        assert rows["x"].symmetric
    else:
        assert rows["x"].zero_point != 128
        assert not rows["x"].symmetric


@pytest.mark.parametrize("granularity", WeightGranularity)
def test_weight_granularity(pictures: str, granularity: WeightGranularity) -> None:
    """How many scales the middle layer of 12 x 8 x 3 x 3 has; blocks of 4 of its 8 input channels."""
    recipe, data = Recipe(weight_granularity=granularity, block_size=4), DataOptions((pictures,))
    report, _ = quantized(deep(), recipe, data)
    row = [row for row in report.tensors if row.kind == "weight"][1]
    assert (row.granularity or "").startswith(granularity)
    scales = {WeightGranularity.PER_TENSOR: 1, WeightGranularity.PER_CHANNEL: 12, WeightGranularity.PER_BLOCK: 24}
    assert np.size(row.scale) == scales[granularity]
    assert report.verify.sqnr_db is not None
    assert report.verify.sqnr_db > 20


@pytest.mark.parametrize(
    ("change", "kept"),
    [
        ({"keep_float": ("d",)}, ["d"]),
        ({"keep_float_op": ("Conv",)}, ["c", "d"]),
        ({"keep_float_op": ("Gemm",)}, ["y"]),
    ],
)
def test_kept_layers_are_reported_with_the_wish_as_the_reason(
    pictures: str, change: dict[str, Any], kept: list[str]
) -> None:
    report, result = quantized(deep(), Recipe(**change), DataOptions((pictures,)))
    wished = [island for island in report.audit.islands if "--keep-float" in island.why]
    assert len(wished) == len(kept)
    layers = [row for row in report.tensors if row.kind == "weight" and row.bits is not None]
    assert len(layers) == 3 - len(kept)
    assert len(codes(result)) == sum(layer not in kept for layer in ("c", "d"))


# -- inputs and outputs of all kinds -----------------------------------------------------------------------------------


def test_channels_last(tmp_path: Path) -> None:
    """Pictures come as (N, H, W, C); the file's own Transpose turns them."""
    proto = network("t = Transpose<perm=[0, 3, 1, 2]>(x)  c = Conv(t, w)  y = Relu(c)", ("N", 8, 8, 3), w=(4, 3, 3, 3))
    Image.fromarray(pixels(1, (8, 8, 3))[0]).save(tmp_path / "0.png")
    report, result = quantized(proto, Recipe(), DataOptions((str(tmp_path),), preprocessing=RAW))
    assert report.preprocessing is not None
    assert report.preprocessing["layout"] == Layout.NHWC
    x = pixels(1, (8, 8, 3)).astype(np.float32)
    (want,), (got,) = (Session(p.SerializeToString(), threads=1).run_all({"x": x}) for p in (proto, result))
    assert np.abs(got - want).max() <= (want.max() - want.min()) * 0.02


def test_bytes_as_input(tmp_path: Path) -> None:
    """A network that takes uint8 pixels is fed with them as they are and keeps its type."""
    proto = network("h = Cast<to=1>(x)  s = Mul(h, k)  c = Conv(s, w)  y = Relu(c)", w=(4, 3, 3, 3), k=1 / 255)
    proto.graph.input[0].type.tensor_type.elem_type = TensorProto.UINT8
    for number, picture in enumerate(pixels(4, (6, 6, 3))):
        Image.fromarray(picture).save(tmp_path / f"{number}.png")
    report, result = quantized(proto, Recipe(), DataOptions((str(tmp_path),)))
    assert report.preprocessing is not None
    assert report.preprocessing["preset"] == "raw"
    assert result.graph.input[0].type.tensor_type.elem_type == TensorProto.UINT8
    x = pixels(2, (3, 6, 6))
    (want,), (got,) = (Session(p.SerializeToString(), threads=1).run_all({"x": x}) for p in (proto, result))
    assert np.abs(got - want).max() <= (want.max() - want.min()) * 0.05


def test_grey_networks(pictures: str) -> None:
    """Colour pictures become grey."""
    proto = network("c = Conv(x, w)  y = Relu(c)", ("N", 1, 8, 8), w=(4, 1, 3, 3))
    report, _ = quantized(proto, Recipe(), DataOptions((pictures,), preprocessing=PreprocessingOptions(preset="unit")))
    assert report.preprocessing is not None
    assert (report.preprocessing["preset"], report.preprocessing["color"]) == ("unit", Color.GREY)
    (row,) = [row for row in report.tensors if row.name == "x"]
    assert 0.8 < row.scale * 255 <= 1
    assert row.zero_point == 0


@pytest.mark.parametrize(("count", "seen"), [(4, 4), (6, 4), (8, 8), (3, 3)])
def test_a_fixed_batch(tmp_path: Path, count: int, seen: int) -> None:
    """Four at a time: what is left over is not used, and fewer than four are repeated but not counted twice."""
    proto = deep((4, 3, 8, 8))
    arrays = pixels(count, (3, 8, 8)).astype(np.float32)
    recipe, data = Recipe(min_sqnr=1.0), DataOptions((samples(tmp_path / "s", arrays),), batch=3)
    report, result = quantized(proto, recipe, data)
    assert result.graph.input == proto.graph.input
    assert report.held
    assert report.verify.images == seen


def test_several_outputs(pictures: str) -> None:
    """Each has its score; gates take the lowest. One is not quantized at all."""
    body = "c = Conv(x, w)  a = Relu(c)  d = Conv(a, v)  p = GlobalAveragePool(d)  b = Flatten(p)  s = Shape(x)"
    proto = network(body, ("N", 3, 8, 8), outputs=("a", "b", "s"), **WEIGHTS)
    report, result = quantized(proto, Recipe(), DataOptions((pictures,)))
    assert [o.name for o in result.graph.output] == ["a", "b", "s"]
    scores = {o.name: o for o in report.verify.outputs}
    assert list(scores) == ["a", "b", "s"]
    assert scores["s"].sqnr_db is None
    assert report.verify.sqnr_db == min(scores["a"].sqnr_db or 0, scores["b"].sqnr_db or 0)
    assert scores["b"].agreement is not None


def test_several_inputs_as_npz(tmp_path: Path) -> None:
    proto = network("c = Conv(x, w)  d = Conv(z, w)  y = Add(c, d)", (1, 3, 6, 6), w=(4, 3, 3, 3))
    proto.graph.input.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, [1, 3, 6, 6]))
    rng = np.random.default_rng(0)
    for number in range(4):
        np.savez(tmp_path / f"{number}.npz", x=rng.random((3, 6, 6), np.float32), z=rng.random((3, 6, 6), np.float32))
    report, result = quantized(proto, Recipe(), DataOptions((str(tmp_path),)))
    assert report.preprocessing is None
    assert [i.name for i in result.graph.input] == ["x", "z"]
    assert "qconv.preprocessing" not in {entry.key for entry in result.metadata_props}
    assert report.as_dict()["preprocessing"] is None


def test_inputs_that_are_no_pictures(tmp_path: Path) -> None:
    """A plain vector, by .npy."""
    proto = network("h = Gemm(x, a)  r = Relu(h)  y = Gemm(r, b)", ("N", 16), a=(16, 8), b=(8, 4))
    arrays = np.random.default_rng(0).standard_normal((20, 16)).astype(np.float32)
    report, _ = quantized(proto, Recipe(), DataOptions((samples(tmp_path / "s", arrays),)))
    assert report.verify.images == 20
    assert report.verify.sqnr_db is not None
    assert report.verify.sqnr_db > 25


def test_outputs_whose_shape_depends_on_the_data(pictures: str) -> None:
    """Detection ends in NonMaxSuppression or NonZero: the quantized model may find one more or one less."""
    proto = network("c = Conv(x, w)  r = Relu(c)  y = NonZero(r)", ("N", 3, 8, 8), w=(4, 3, 3, 3))
    report, _ = quantized(proto, Recipe(weight_bits=4, edge_bits=4), DataOptions((pictures,)))
    (score,) = report.verify.outputs
    assert score.agreement is None


def test_outputs_that_are_texts(pictures: str) -> None:
    proto = network(
        "c = Conv(x, w)  f = Flatten(c)  l = ArgMax<axis=1, keepdims=0>(f)", ("N", 3, 8, 8), ("c",), **WEIGHTS
    )
    names = helper.make_node(
        "LabelEncoder", ["l"], ["s"], "names", domain="ai.onnx.ml", keys_int64s=[0, 1], values_strings=["cat", "dog"]
    )
    proto.graph.node.append(names)
    proto.graph.output.append(helper.make_tensor_value_info("s", TensorProto.STRING, ["N"]))
    proto.opset_import.append(helper.make_opsetid("ai.onnx.ml", 2))
    report, _ = quantized(proto, Recipe(), DataOptions((pictures,)))
    assert report.verify.outputs[0].name == "c"
    assert report.verify.sqnr_db is not None


def test_outputs_that_are_sequences(pictures: str) -> None:
    proto = network("c = Conv(x, w)  s = SequenceConstruct(c, c)", ("N", 3, 8, 8), ("c",), **WEIGHTS)
    proto.graph.output.append(helper.make_tensor_sequence_value_info("s", TensorProto.FLOAT, None))
    report, _ = quantized(proto, Recipe(), DataOptions((pictures,)))
    assert report.verify.sqnr_db is not None


def test_outputs_that_pass_the_input_through(pictures: str) -> None:
    proto = network("c = Conv(x, w)  y = Relu(c)  z = Identity(x)", ("N", 3, 8, 8), ("y", "z"), w=(4, 3, 3, 3))
    report, result = quantized(proto, Recipe(), DataOptions((pictures,)))
    assert [o.name for o in result.graph.output] == ["y", "z"]
    assert report.verify.outputs[1].sqnr_db is None  # what nobody asked to be rounded is equal


def test_a_constant_picture_is_no_reason_to_divide_by_zero(tmp_path: Path) -> None:
    """All activations are zero: no range, no scale."""
    proto = network("c = Conv(x, w)  r = Relu(c)  y = Conv(r, v)", ("N", 3, 8, 8), w=(8, 3, 3, 3), v=(4, 8, 3, 3))
    report, result = quantized(
        proto, Recipe(), DataOptions((samples(tmp_path / "s", np.zeros((3, 3, 8, 8), np.float32)),))
    )
    assert report.verify.sqnr_db is None
    assert all(np.all(np.asarray(row.scale) > 0) for row in report.tensors if row.scale is not None)
    (got,) = Session(result.SerializeToString(), threads=1).run_all({"x": np.ones((1, 3, 8, 8), np.float32)})
    assert np.isfinite(got).all()


def scaled_between(factor: float, offset: float = 0.0) -> onnx.ModelProto:
    """Between two layers the activation is multiplied and moved, by numbers that come in as tensors of their own."""
    body = "c = Conv(x, w)  m = Mul(c, f)  a = Add(m, o)  r = Relu(a)  y = Conv(r, v)"
    numbers = {"f": np.float32([factor]), "o": np.float32([offset])}
    return network(body, ("N", 3, 8, 8), w=(8, 3, 3, 3), v=(4, 8, 3, 3), **numbers)


@pytest.mark.parametrize("calibrator", CALIBRATOR_NAMES)
@pytest.mark.parametrize(
    ("factor", "offset", "word"),
    [
        (0.0, 0.0, "tensor 'r' (and 1 more) is zero everywhere"),
        (0.0, 3.0, "tensor 'r' is one and the same number"),
        (1e-42, 0.0, "tensor 'r' (and 1 more) holds numbers too small for float32"),
        (1e-42, 1e-41, "tensor 'r' (and 1 more) holds numbers too small for float32"),
    ],
)
def test_odd_activations_find_a_range(calibrator: str, factor: float, offset: float, word: str, pictures: str) -> None:
    """All zero, constant, and so small that float32 runs out: told, and nothing is divided by what is not there."""
    recipe, data = Recipe(calibrator=calibrator), DataOptions((pictures,), preprocessing=RAW)
    report, result = quantized(scaled_between(factor, offset), recipe, data)
    assert any(text.startswith(word) for text in report.warnings)
    scales = [np.asarray(row.scale) for row in report.tensors if row.kind == "activation"]
    assert all((scale >= np.finfo(np.float32).tiny).all() and np.isfinite(scale).all() for scale in scales)
    x = np.random.default_rng(0).integers(0, 256, (1, 3, 8, 8)).astype(np.float32)
    (expected,) = Session(scaled_between(factor, offset).SerializeToString(), threads=1).run_all({"x": x})
    (got,) = Session(result.SerializeToString(), threads=1).run_all({"x": x})
    np.testing.assert_allclose(got, expected, atol=0.02 * np.abs(expected).max() + np.finfo(np.float32).tiny)


@pytest.mark.parametrize("calibrator", CALIBRATOR_NAMES)
@pytest.mark.parametrize("factor", [1e38, -1e38])
def test_an_activation_that_overflows_is_told_by_name(calibrator: str, factor: float, pictures: str) -> None:
    recipe, data = Recipe(calibrator=calibrator), DataOptions((pictures,), preprocessing=RAW)
    with pytest.raises(QconvError, match=r"Tensor '.*' holds NaN or infinite values on these pictures") as caught:
        quantized(scaled_between(factor), recipe, data)
    assert "preprocessing" in caught.value.hint


def test_reshapes_to_a_fixed_batch_are_fine(pictures: str) -> None:
    """Exporters write the batch of 1 into a Reshape; such a model takes no other batch."""
    proto = network(
        "c = Conv(x, w)  f = Reshape(c, s)  y = Gemm(f, g)", ("N", 3, 8, 8), w=(4, 3, 3, 3), s=ints(1, 144), g=(144, 10)
    )
    report, _ = quantized(proto, Recipe(), DataOptions((pictures,)))
    assert report.verify.images == 12
    with pytest.raises(QconvError, match="cannot be run") as caught:
        quantized(proto, Recipe(), DataOptions((pictures,), batch=4))
    assert "--batch" in caught.value.hint


def test_preprocessing_of_samples_is_told_to_be_in_vain(tmp_path: Path) -> None:
    folder = samples(tmp_path / "s", np.random.default_rng(0).normal(size=(4, 3, 8, 8)).astype(np.float32))
    report, _ = quantized(deep(), Recipe(), DataOptions((folder,), preprocessing=PreprocessingOptions(preset="tf")))
    assert any("preprocessing options are not used" in text for text in report.warnings)


@pytest.mark.parametrize(
    ("span", "told"),
    [
        ((1.4, 1.6), "1.40 to 1.60 times as long as the float one"),
        ((0.9, 3.0), ""),
        ((0.6, 0.8), ""),
        ((1.0, 1.02), ""),
        (None, ""),
    ],
)
def test_a_result_that_is_slower_than_float_is_told(
    pictures: str, monkeypatch: pytest.MonkeyPatch, span: tuple[float, float] | None, told: str
) -> None:
    """Times are the machine's; what is said of them is not. On a busy one they spread, and tell nothing."""
    real = comparison.verify
    middle = None if span is None else sum(span) / 2
    timed = {"slowdown": middle, "slowdown_range": span}
    monkeypatch.setattr(checks, "verify", lambda *args: replace(real(*args), **timed))
    report, _ = quantized(deep(), Recipe(), DataOptions((pictures,)))
    said = [text for text in report.warnings if "as long as the float one" in text]
    assert len(said) == bool(told)
    assert all(told in text for text in said)
    stream = io.StringIO()
    show_report(report, stream, verbose=False)
    line = "" if span is None else f"speed here    {1 / span[1]:.2f} to {1 / span[0]:.2f} times the float model's"
    assert line in stream.getvalue()
    assert ("speed here" in stream.getvalue()) == bool(line)


@pytest.mark.parametrize(
    ("sqnr", "agreement", "told"),
    [(2.0, 0.9, "little is left of the float model: agreement 90.0%, SQNR 2.0 dB;")]
    + [(2.0, None, "little is left of the float model: SQNR 2.0 dB;")]
    + [(None, 0.4, "little is left of the float model: agreement 40.0%;")]
    + [(9.9, 0.8, "the result is far from the float model: agreement 80.0%, SQNR 9.9 dB;")]
    + [(6.0, None, "the result is far from the float model: SQNR 6.0 dB;")]
    + [(20.0, 0.8, ""), (20.0, 0.9, ""), (10.0, None, ""), (None, None, "")],
)
def test_a_result_of_which_little_is_left_is_told(
    pictures: str, monkeypatch: pytest.MonkeyPatch, sqnr: float | None, agreement: float | None, told: str
) -> None:
    real = comparison.verify
    found = (OutputScore("y", scores(sqnr, agreement)),)
    monkeypatch.setattr(checks, "verify", lambda *args: replace(real(*args), outputs=found))
    report, _ = quantized(deep(), Recipe(effort="fast"), DataOptions((pictures,)))
    warned = [text for text in report.warnings if "of the float model:" in text or "from the float model:" in text]
    assert len(warned) == bool(told)
    assert all(told in text and "`qconv diagnose`" in text for text in warned)


def test_outputs_without_a_number_are_an_error(pictures: str) -> None:
    """Weights alone: no calibration meets what they make."""
    proto = network("c = Conv(x, w, b)  y = Relu(c)", ("N", 3, 8, 8), w=(4, 3, 3, 3), b=np.full(4, np.nan, np.float32))
    with pytest.raises(QconvError, match="Output y of the float model holds NaN"):
        quantized(proto, Recipe(activation_bits=32, effort="fast", bias_correction="none"), DataOptions((pictures,)))


@pytest.mark.parametrize("option", ["save_stats", "save_layer_bits"])
def test_what_is_read_is_not_written_over(option: str, tmp_path: Path, pictures: str) -> None:
    listed = tmp_path / "list.txt"
    listed.write_text("\n".join(map(str, sorted(Path(pictures).iterdir()))) + "\n")
    before = listed.read_bytes()
    model = tmp_path / "m.onnx"
    model.write_bytes(deep().SerializeToString())
    more = {"target_size": 0.3} if option == "save_layer_bits" else {}
    recipe, data = Recipe(effort="fast", **{option: str(listed)}, **more), DataOptions((str(listed),))
    with pytest.raises(QconvError, match="is read, and would be written over"):
        quantize(model, tmp_path / "out.onnx", recipe, data)
    with pytest.raises(QconvError, match="is read, and would be written over"):
        quantize(model, listed, Recipe(effort="fast"), DataOptions((str(listed),)))
    assert listed.read_bytes() == before


def test_two_outputs_have_two_names(tmp_path: Path, pictures: str) -> None:
    model, both = tmp_path / "m.onnx", str(tmp_path / "both")
    model.write_bytes(deep().SerializeToString())
    recipe, data = (
        Recipe(effort="fast", target_size=0.3, save_layer_bits=both, save_stats=both),
        DataOptions((pictures,)),
    )
    with pytest.raises(QconvError, match="both --save-stats and --save-layer-bits"):
        quantize(model, tmp_path / "out.onnx", recipe, data)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.onnx"]


def test_means_are_kept_where_weights_alone_are_rounded(pictures: str) -> None:
    """Nearest codes of 3 bits: outputs move on average, and hardly any more with the bias that calibration tells."""
    arrays = np.concatenate([np.asarray(Image.open(path), np.float32)[None] for path in Path(pictures).iterdir()])
    fed = np.ascontiguousarray(arrays.transpose(0, 3, 1, 2)) / 255
    (ref,) = Session(deep().SerializeToString()).run_all({"x": fed})
    options: dict[str, Any] = {"weight_bits": 3, "edge_bits": 3, "activation_bits": 32, "effort": "fast"}
    moved = {}
    for correction in ("none", "measured"):
        recipe, data = (
            Recipe(bias_correction=correction, **options),
            DataOptions((pictures,), preprocessing=PreprocessingOptions(preset="unit")),
        )
        (got,) = Session(quantized(deep(), recipe, data)[1].SerializeToString()).run_all({"x": fed})
        moved[correction] = float(np.abs((got - ref).mean(axis=0)).mean())
    assert moved["measured"] < 0.5 * moved["none"]


def test_wishes_that_change_nothing_are_told(pictures: str) -> None:
    """A Relu between codes only cuts: it runs on them."""
    report, _ = quantized(deep(), Recipe(keep_float_op=("Relu",)), DataOptions((pictures,)))
    assert "r" not in {island.node for island in report.audit.islands}
    assert any("changes nothing for r:" in text for text in report.warnings)


def test_wishes_that_come_true_are_not_warned_of(pictures: str) -> None:
    """Nor is the Relu that went into the kept layer."""
    report, _ = quantized(deep(), Recipe(keep_float=("d",)), DataOptions((pictures,)))
    assert not any("changes nothing" in text for text in report.warnings)
