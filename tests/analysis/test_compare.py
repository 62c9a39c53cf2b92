"""Layer by layer: against outputs of ONNX Runtime, closed forms, and what the pair of files is known to hold."""

from __future__ import annotations

import csv
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnxruntime import GraphOptimizationLevel, InferenceSession, SessionOptions
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

from qconv.analysis import compare
from qconv.cli.main import cli
from qconv.config.data_options import DataOptions
from qconv.config.recipe import Recipe, make_request
from qconv.errors import QconvError
from qconv.ir import metadata
from qconv.ir.files import Source
from qconv.pipeline import quantize
from qconv.quantizer import QuantSpec
from qconv.reporter import Reporter
from qconv.results.comparison import Comparison
from qconv.runtime.session import Session
from tests.support.libraries import runner
from tests.support.models import network

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("QCONV_DATA", ROOT.parent / "shared" / "data"))
CIFAR = ROOT / "tests" / "models" / "cifar_mobilenet.onnx"
SIZES = np.float32(2.0) ** np.linspace(-4, 4, 8, dtype=np.float32)
COUNT = 24


def unequal() -> onnx.ModelProto:
    """Conv -> Relu -> Conv, whose channels are scaled apart and back."""
    rng = np.random.default_rng(0)
    return network(
        "c = Conv<pads=[1,1,1,1]>(x, w, b) r = Relu(c) k = Conv(r, u) g = GlobalAveragePool(k) y = Flatten(g)",
        x=("N", 3, 8, 8),
        w=rng.standard_normal((8, 3, 3, 3)).astype(np.float32) * SIZES.reshape(-1, 1, 1, 1),
        b=rng.standard_normal(8).astype(np.float32) * SIZES,
        u=rng.standard_normal((4, 8, 1, 1)).astype(np.float32) / SIZES.reshape(1, -1, 1, 1),
    )


def normalised() -> onnx.ModelProto:
    """Conv -> BatchNormalization -> Relu -> Conv."""
    rng = np.random.default_rng(1)
    constants = {name: rng.uniform(0.5, 1.5, 6).astype(np.float32) for name in ("s", "m", "v")}
    return network(
        "c = Conv<pads=[1,1,1,1]>(x, w) n = BatchNormalization(c, s, b, m, v) r = Relu(n) k = Conv(r, u)"
        " g = GlobalAveragePool(k) y = Flatten(g)",
        x=("N", 3, 8, 8),
        w=(6, 3, 3, 3),
        b=rng.normal(5, 1, 6).astype(np.float32),
        u=(4, 6, 1, 1),
        **constants,
    )


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    folder = tmp_path / "samples"
    folder.mkdir()
    rng = np.random.default_rng(5)
    for index in range(COUNT):
        np.save(folder / f"{index:02}.npy", rng.standard_normal((1, 3, 8, 8)).astype(np.float32))
    return folder


def inputs(samples: Path) -> list[NDArray[np.float32]]:
    return [np.load(path) for path in sorted(samples.glob("*.npy"))]


def saved(proto: onnx.ModelProto, samples: Path, name: str = "model.onnx") -> Path:
    path = samples.parent / name
    onnx.save(proto, path)
    return path


def quantized(model: Path, samples: Path, **options: Any) -> Path:
    out = model.with_suffix(".q.onnx")
    quantize.quantize(model, out, *make_request({"calib": (str(samples),)} | options))
    return out


def compared(float_model: Path, model: Path, pictures: Path, **options: Any) -> Comparison:
    sources = [Source(str(path), path) for path in (float_model, model)]
    return compare.compare_on_images(*sources, DataOptions((str(pictures),), **options), Reporter()).compared


def run(model: Path, x: NDArray[np.float32], *tensors: str) -> list[NDArray[Any]]:
    """Tensors of a model in ONNX Runtime, its optimizations off."""
    proto = onnx.load(model)
    known = {output.name for output in proto.graph.output}
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in tensors if name not in known)
    return Session(proto.SerializeToString(), optimize=False).run(list(tensors), {"x": x})


def decibel(reference: NDArray[Any], got: NDArray[Any]) -> float:
    return float(10 * np.log10(np.sum(reference**2) / np.sum((reference - got) ** 2)))


# -- what was scaled ---------------------------------------------------------------------------------------------------


def test_what_is_told_is_read_again() -> None:
    rng = np.random.default_rng(0)
    u, shift = metadata.round_log_scale(rng.normal(size=5)), rng.uniform(size=5).astype(np.float32)
    props: dict[str, str] = {}
    metadata.write_equalization(props, {}, {"a": shift})
    metadata.write_equalization(props, {"a": u, "b": u}, {})
    found = metadata.read_equalization(props)
    x = rng.normal(size=(2, 5, 3, 3)).astype(np.float32)
    wanted = (x - shift.reshape(1, -1, 1, 1)) / np.exp(u).reshape(1, -1, 1, 1)
    np.testing.assert_allclose(found.moved("a", x), wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.back("a", found.moved("a", x)), x, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.moved("b", x), x / np.exp(u).reshape(1, -1, 1, 1), rtol=1e-5, atol=1e-6)
    assert (found.moved("c", x) == x).all()


@pytest.mark.parametrize("text", ["", "no base64 !", "AAAA"])
def test_what_is_illegible_tells_nothing(text: str) -> None:
    assert not metadata.read_equalization({metadata.EQUALIZATION_KEY: text})


def test_scales_that_are_told_are_near_those_wanted_and_no_larger() -> None:
    u = np.linspace(-4, 4, 101)
    told = metadata.round_log_scale(u)
    assert np.abs(told - u).max() < np.log(2) / metadata.SCALE_STEPS
    assert (np.abs(told) <= np.abs(u) + 1e-12).all()


# -- errors of layers --------------------------------------------------------------------------------------------------


def test_scaled_channels_are_compared_as_the_float_model_has_them(samples: Path) -> None:
    model = saved(unequal(), samples)
    out = quantized(model, samples, equalize=True)
    assert metadata.read_equalization({p.key: p.value for p in onnx.load(out).metadata_props})
    found = compared(model, out, samples)
    assert all(row.sqnr_db is None or row.sqnr_db > 25 for row in found.layers)
    # without what the file tells, the tensors are not each other's
    proto = onnx.load(out)
    kept = [p for p in proto.metadata_props if p.key != metadata.EQUALIZATION_KEY]
    del proto.metadata_props[:]
    proto.metadata_props.extend(kept)
    untold = compared(model, saved(proto, samples, "untold.onnx"), samples)
    assert min(row.sqnr_db or 99.0 for row in untold.layers) < 15


def test_the_last_layer_receives_what_the_output_has(samples: Path) -> None:
    model = saved(unequal(), samples)
    out = quantized(model, samples, equalize=False)
    last = compared(model, out, samples).layers[-1]
    pairs = [(run(model, x, "y")[0], run(out, x, "y")[0]) for x in inputs(samples)]
    reference, got = (np.concatenate(arrays) for arrays in zip(*pairs, strict=True))
    assert last.sqnr_db == pytest.approx(decibel(reference, got), abs=0.01)
    cosine = float(np.sum(reference * got) / np.sqrt(np.sum(reference**2) * np.sum(got**2)))
    assert last.cosine == pytest.approx(cosine, abs=1e-5)


def test_the_input_adds_its_own_rounding(samples: Path) -> None:
    """All others are fed with floats: what the input adds is the closed form of its quantizer."""
    model = saved(unequal(), samples)
    out = quantized(model, samples, equalize=False)
    first = compared(model, out, samples).layers[0]
    assert first.input
    assert first.values is not None
    params = QuantSpec(8, signed=False, symmetric=False).from_range(first.values.low, first.values.high)
    x = np.concatenate(inputs(samples))
    assert first.added_sqnr_db == pytest.approx(decibel(x, params.fake_quantize(x)), abs=0.05)
    assert first.added_sqnr_db == first.sqnr_db


def test_a_layer_that_is_exact_adds_nothing_but_hands_on(samples: Path) -> None:
    """A hand-made file: one tensor is rounded coarsely, all else is float. Only its row adds an error."""
    model = saved(unequal(), samples)
    proto = onnx.load(model)
    proto.graph.initializer.extend(
        [onnx.numpy_helper.from_array(np.float32(2.0), "scale"), onnx.numpy_helper.from_array(np.uint8(0), "zero")]
    )
    place = next(i for i, node in enumerate(proto.graph.node) if node.op_type == "Relu")
    reader = next(node for node in proto.graph.node if "r" in node.input)
    reader.input[0] = "r_dq"
    for offset, (kind, source, result) in enumerate(
        (("QuantizeLinear", "r", "r_q"), ("DequantizeLinear", "r_q", "r_dq")), 1
    ):
        node = onnx.helper.make_node(kind, [source, "scale", "zero"], [result], name=result)
        proto.graph.node.insert(place + offset, node)
    out = saved(proto, samples, "coarse.onnx")
    found = compared(model, out, samples)
    rows = {row.tensor: row for row in found.layers}
    r = np.concatenate([run(model, x, "r")[0] for x in inputs(samples)])
    rounded = np.clip(np.rint(r / 2), 0, 255) * 2
    assert rows["r"].added_sqnr_db == pytest.approx(decibel(r, rounded), abs=0.01)
    assert rows["r"].output_share == pytest.approx(1.0)
    assert {row.added_sqnr_db for tensor, row in rows.items() if tensor != "r"} == {None}
    # alone as together: what is predicted is what is measured
    assert found.predicted_db == pytest.approx(found.sqnr_db, abs=1.0)
    values = rows["r"].values
    assert values is not None
    codes = np.clip(np.rint(r / 2), 0, 255)
    assert values.range_use == np.unique(codes).size / 256
    assert values.clipped == pytest.approx(np.mean(r > 511), abs=1e-12)


def test_what_lies_beyond_the_range_is_counted(samples: Path) -> None:
    model = saved(unequal(), samples)
    out = quantized(model, samples, equalize=False, calibrator="percentile", percentile=90.0, effort="fast")
    row = compared(model, out, samples).layers[0]
    assert row.values is not None
    x, half = np.concatenate(inputs(samples)), (row.values.high - row.values.low) / 255 / 2
    beyond = np.mean((x < row.values.low - half) | (x > row.values.high + half))
    assert row.values.clipped == pytest.approx(float(beyond), abs=1e-6)
    assert beyond > 0.05
    assert sum(row.values.bars.counts) > 0


@pytest.mark.parametrize("bits", [8, 4])
def test_weights_are_told_in_their_codes(samples: Path, bits: int) -> None:
    model = saved(unequal(), samples)
    out = quantized(
        model, samples, equalize=False, weight_bits=bits, edge_bits=bits, effort="fast", saturation_safe=False
    )
    row = next(row for row in compared(model, out, samples).layers if row.weights is not None)
    assert row.weights is not None
    assert row.weights.bits == bits
    assert (row.weights.low, row.weights.high) == (1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1)
    assert row.weights.clipped == 0
    assert sum(row.weights.bars.counts) == 8 * 3 * 3 * 3


def test_a_folded_layer_is_compared_with_what_the_normalization_gives(samples: Path) -> None:
    model = saved(normalised(), samples)
    for row in compared(model, quantized(model, samples), samples).layers:
        assert row.sqnr_db is None or row.sqnr_db > 25


def test_a_file_by_another_tool_is_matched_through_its_folding(samples: Path) -> None:
    """ONNX Runtime's own optimizer folds, and renames what it folds into."""
    model = saved(normalised(), samples)
    folded = samples.parent / "folded.onnx"

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.rest = iter(inputs(samples))

        def get_next(self) -> Any:
            x = next(self.rest, None)
            return None if x is None else {"x": x}

    options = SessionOptions()
    options.graph_optimization_level = GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(folded)
    InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    assert "BatchNormalization" not in {node.op_type for node in onnx.load(folded).graph.node}
    out = samples.parent / "other.onnx"
    quantize_static(str(folded), str(out), Reader(), quant_format=QuantFormat.QDQ, per_channel=True)
    found = compared(model, out, samples)
    (row,) = [row for row in found.layers if row.op == "Conv" and row.tensor != "k"]
    assert row.tensor in ("n", "r")
    assert (row.sqnr_db or 99.0) > 25


@pytest.fixture(scope="module")
def cifar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository's own network, every weight to its nearest code."""
    out = tmp_path_factory.mktemp("cifar") / "out.onnx"
    quantize.quantize(CIFAR, out, Recipe(effort="fast"), DataOptions((str(ROOT / "calib_samples"),), samples=32))
    return out


def test_errors_of_layers_are_shares_and_add_up_to_that_of_the_output(cifar: Path) -> None:
    found = compared(CIFAR, cifar, ROOT / "calib_samples", samples=32)
    shares = [row.output_share or 0.0 for row in found.worst_first]
    assert sum(shares) == pytest.approx(1.0)
    assert shares == sorted(shares, reverse=True)
    assert found.predicted_db == pytest.approx(found.sqnr_db, abs=3.0)


def test_errors_of_layers_add_up_on_resnet20(tmp_path: Path) -> None:
    model, calib, test = (
        DATA / part for part in ("models/resnet20_cifar10.onnx", "images/cifar10/calib", "images/cifar10/test")
    )
    if not model.is_file():
        pytest.skip(f"no {model.name}: set QCONV_DATA to the folder that has models/")
    out = tmp_path / "out.onnx"
    quantize.quantize(model, out, Recipe(), DataOptions((str(calib),)))
    found = compared(model, out, test, samples=64)
    assert found.predicted_db == pytest.approx(found.sqnr_db, abs=3.0)
    assert not found.unmatched


def test_what_is_no_number_is_still_told(samples: Path) -> None:
    """A scale of infinity makes NaN of a tensor: nothing is left of it, and JSON has no such numbers."""
    model = saved(unequal(), samples)
    out = quantized(model, samples, equalize=False, effort="fast")
    proto = onnx.load(out)
    dequantizer = next(n for n in proto.graph.node if n.op_type == "DequantizeLinear" and n.output[0] == "r_dq")
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.float32(np.inf), "broken"))
    dequantizer.input[1] = "broken"
    found = compared(model, saved(proto, samples, "broken.onnx"), samples)
    assert min(row.sqnr_db or 99.0 for row in found.layers) < -1000
    json.dumps(found.as_dict(), allow_nan=False)


# -- what cannot be compared -------------------------------------------------------------------------------------------


def test_a_float_model_is_no_quantized_one(samples: Path) -> None:
    model = saved(unequal(), samples)
    with pytest.raises(QconvError, match="not quantized"):
        compared(model, model, samples)


def test_a_quantized_model_is_no_float_one(samples: Path) -> None:
    out = quantized(saved(unequal(), samples), samples)
    with pytest.raises(QconvError, match="given as the float model, is quantized"):
        compared(out, out, samples)


def test_another_network_is_refused(samples: Path) -> None:
    model, other = saved(unequal(), samples), saved(network("y = Relu(x)", ("N", 3, 8, 8)), samples, "other.onnx")
    out = quantized(model, samples)
    with pytest.raises(QconvError, match="No layer of"):
        compared(other, out, samples)


# -- the command -------------------------------------------------------------------------------------------------------


def command(*words: object) -> Any:
    return runner().invoke(cli, [str(word) for word in words], standalone_mode=False)


def test_the_command_prints_in_80_columns(cifar: Path) -> None:
    done = command("compare", CIFAR, cifar, "--images", ROOT / "calib_samples", "--samples", 4)
    assert done.exception is None
    assert max(len(line) for line in done.stdout.splitlines() if "/" not in line) <= 80
    assert "part of" in done.stdout


def test_the_command_prints_json_and_writes_a_table(cifar: Path, tmp_path: Path) -> None:
    table = tmp_path / "layers.csv"
    words = ("compare", CIFAR, cifar, "--images", ROOT / "calib_samples", "--samples", 4, "--json", "--csv", table)
    found = json.loads(command(*words).stdout)
    rows = list(csv.DictReader(io.StringIO(table.read_text())))
    assert [row["name"] for row in rows] == [layer["name"] for layer in found["layers"]]
    assert {"name", "op", "sqnr_db", "added_sqnr_db", "cosine", "range_use", "clipped"} <= set(found["layers"][0])
    assert float(rows[0]["output_share"]) == found["layers"][0]["output_share"]


@pytest.mark.parametrize("words", [("--csv", "-", "--json"), ("--csv", "")])
def test_what_cannot_be_put_out_is_refused_before_the_work(words: tuple[str, ...], cifar: Path) -> None:
    done = command("compare", CIFAR, cifar, "--images", ROOT / "calib_samples", *words)
    assert type(done.exception).__name__ == "UsageError"


def test_a_model_is_not_written_over(cifar: Path) -> None:
    before = cifar.read_bytes()
    done = command("compare", CIFAR, cifar, "--images", ROOT / "calib_samples", "--csv", cifar)
    assert isinstance(done.exception, QconvError)
    assert cifar.read_bytes() == before
