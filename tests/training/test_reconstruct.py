"""Block reconstruction. Oracles: ONNX Runtime on the written files, cuts by hand, and QDrop's definition."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from PIL import Image

from qconv.config.data_options import DataOptions
from qconv.config.recipe import make_request
from qconv.reporter import Reporter
from tests.support.libraries import runner
from tests.support.models import ints, loaded, network

torch = pytest.importorskip("torch", reason="needs the extra: pip install 'qconv[torch]'")

from qconv.cli.main import cli
from qconv.config.data_options import Layout, PreprocessingOptions
from qconv.config.recipe import Recipe
from qconv.errors import Change, QconvError, Skipped
from qconv.ir.model import Model, ir
from qconv.pipeline import quantize
from qconv.results.quantize import Report
from qconv.training import reconstruct, trainable
from qconv.training.network import QuantDrop, TorchNetwork
from qconv.training.reconstruct import _find_cut_points, find_block_boundaries

torch.set_num_threads(1)  # tests run side by side
BODY = (
    "a = Conv<pads=[1,1,1,1]>(x, w)  b = Relu(a)  m = MaxPool<kernel_shape=[2,2], strides=[2,2]>(b)"
    "  c = Conv<pads=[1,1,1,1]>(m, v)  d = Relu(c)  e = Conv(d, u)  s = Add(e, m)  r = Relu(s)"
    "  p = GlobalAveragePool(r)  f = Flatten(p)  y = Gemm(f, g)"
)
RAW = PreprocessingOptions(preset="unit")
PICTURES = 48


@cache
def float_bytes() -> bytes:
    rng = np.random.default_rng(0)
    shapes = {"w": (8, 3, 3, 3), "v": (12, 8, 3, 3), "u": (8, 12, 1, 1), "g": (8, 5)}
    weights = {
        name: (1.4 * rng.normal(size=shape) / np.sqrt(np.prod(shape[1:] if name != "g" else shape[:1]))).astype(
            np.float32
        )
        for name, shape in shapes.items()
    }
    return bytes(network(BODY, ("N", 3, 12, 12), **weights).SerializeToString())


def pixels(number: int) -> np.ndarray:
    rng = np.random.default_rng(number)
    found = rng.integers(0, 256, (3, 3, 3)).repeat(4, axis=0).repeat(4, axis=1) + rng.normal(0, 12, (12, 12, 3))
    return np.clip(found, 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float model and pictures."""
    folder = tmp_path_factory.mktemp("reconstruct")
    (folder / "net.onnx").write_bytes(float_bytes())
    (folder / "pictures").mkdir()
    for number in range(PICTURES):
        Image.fromarray(pixels(number)).save(folder / "pictures" / f"{number:02}.png")
    return folder


def made(folder: Path, name: str, **more: Any) -> tuple[Report, Path]:
    options: dict[str, Any] = {
        "calib": (str(folder / "pictures"),), "weight_bits": 2, "activation_bits": 4, "preprocessing": RAW,
        "threads": 1, "rounding": "reconstruct",
    }  # fmt: skip
    out = folder / f"{name}.onnx"
    report, _ = quantize.quantize(str(folder / "net.onnx"), out, *make_request({**options, **more}))
    return report, out


def decibel(folder: Path, out: Path, nhwc_pixels: bool = False) -> float:
    """SQNR of the outputs on pictures that were not calibrated with, by ONNX Runtime."""
    raw = np.stack([pixels(number) for number in range(1000, 1128)])
    x = (raw.transpose(0, 3, 1, 2) / np.float32(255)).astype(np.float32)
    sessions = [ort.InferenceSession(str(p), providers=["CPUExecutionProvider"]) for p in (folder / "net.onnx", out)]
    wanted, said = (
        np.asarray(
            session.run(None, {"x": raw if session.get_inputs()[0].type == "tensor(uint8)" and nhwc_pixels else x})[0],
            np.float64,
        )
        for session in sessions
    )
    return float(10 * np.log10(((wanted - wanted.mean(0)) ** 2).sum() / ((wanted - said) ** 2).sum()))


def of(report: Report, kind: type) -> list[Any]:
    return [found for found in report.findings if isinstance(found, kind) and found.step == reconstruct.STEP]


# -- what it brings ----------------------------------------------------------------------------------------------------


def test_it_is_nearer_than_second_order_rounding(place: Path) -> None:
    _, plain = made(place, "second", rounding="second-order")
    report, rebuilt = made(place, "rebuilt")
    assert of(report, Change)
    assert decibel(place, rebuilt) > decibel(place, plain) + 0.2
    assert [n.op_type for n in onnx.load(rebuilt).graph.node] == [n.op_type for n in onnx.load(plain).graph.node]


def test_every_block_is_told_of_and_none_gets_worse(place: Path) -> None:
    report, _ = made(place, "told", effort="fast")
    told = [*of(report, Change), *of(report, Skipped)]
    assert 2 <= len(told) <= 4
    for change in of(report, Change):
        before, after = (float(word) for word in change.what.split() if word[0].isdigit())
        assert after < before


def test_what_brings_nothing_changes_nothing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconstruct, "LEARNING_RATES", dict.fromkeys(reconstruct.LEARNING_RATES, 0.0))
    report, same = made(place, "same", effort="fast")
    assert of(report, Skipped)
    assert not of(report, Change)
    _, plain = made(place, "plain", rounding="second-order", effort="fast")
    assert decibel(place, same) == pytest.approx(decibel(place, plain), abs=1e-3)


def test_the_same_bytes_every_time_and_others_by_the_seed(place: Path) -> None:
    once, again, other = (
        made(place, name, effort="fast", seed=seed)[1].read_bytes() for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert once == again
    assert once != other


@pytest.mark.parametrize(
    "options",
    [
        {"weight_bits": 3, "activation_bits": 8},
        {"weight_bits": 4, "activation_bits": 32, "pack": True},
        {"weight_bits": 4, "weight_granularity": "per-block", "block_size": 16, "activation_bits": 32},
        {"weight_bits": 8, "activation_bits": 3, "weight_granularity": "per-tensor"},
        {"weight_scheme": "asymmetric", "activation_scheme": "symmetric", "weight_bits": 3},
        {"target_size": 0.5, "weight_bits": 8, "activation_bits": 8},
    ],
    ids=str,
)
def test_schemes(place: Path, options: dict[str, Any]) -> None:
    report, out = made(place, "scheme", effort="fast", **options)
    assert of(report, Change) or of(report, Skipped)
    _, plain = made(place, "scheme_plain", effort="fast", **{**options, "rounding": "second-order"})
    assert decibel(place, out) > decibel(place, plain) - 0.5


def test_pixels_go_in(place: Path) -> None:
    report, out = made(place, "pixels", embed_preprocessing=Layout.NHWC, effort="fast")
    assert of(report, Change)
    assert decibel(place, out, nhwc_pixels=True) > 5


def test_the_command(place: Path, tmp_path: Path) -> None:
    words = ["quantize", place / "net.onnx", "--calib", place / "pictures", "--preprocess", "unit", "--weight-bits", 2]
    words += ["--rounding", "reconstruct", "--effort", "fast", "-o", tmp_path / "out.onnx", "--json"]
    done = runner().invoke(cli, [str(word) for word in words], standalone_mode=False)
    assert done.exception is None
    assert "reconstruct" in json.loads(done.stdout)["time"]
    recipe = {entry.key: entry.value for entry in onnx.load(tmp_path / "out.onnx").metadata_props}
    assert "reconstruct" in " ".join(recipe.values())


HEAD = (
    "a = Conv<pads=[1,1,1,1], strides=[2,2]>(x, w)  b = Relu(a)  c = Conv<pads=[1,1,1,1]>(b, v)  d = Relu(c)"
    "  p = GlobalAveragePool(d)  "
)


@pytest.mark.parametrize(
    ("batch", "rest", "outputs"),
    [
        (1, "y = Reshape(p, one)", ("y",)),
        (2, "y = Reshape(p, two)", ("y",)),
        (1, "f = Flatten(p) y = Reshape(f, detector)", ("y",)),
        ("N", "f = Flatten(p) y = Gemm(f, g) i = Cast<to=6>(y)", ("y", "i")),
        ("N", "f = Flatten(p) y = Gemm(f, g) i = Shape(x) k = Identity(priors)", ("y", "i", "k")),
        ("N", "f = Flatten(p) y = Gemm(f, g) i = ReduceMean<keepdims=0>(y)", ("y", "i")),
        ("N", "t = Transpose<perm=[0,2,3,1]>(d) r = Reshape(t, rows) y = MatMul(r, g)", ("y",)),
        ("N", "f = Flatten(p) k = Mul(f, nothing) y = Gemm(k, g)", ("y",)),
    ],
)
def test_odd_outputs_and_batches(tmp_path: Path, batch: int | str, rest: str, outputs: tuple[str, ...]) -> None:
    constants = {
        "one": ints(1, 8), "two": ints(2, 8), "detector": ints(1, -1, 2), "rows": ints(-1, 8), "nothing": 0.0,
        "priors": (1, 20, 4), "w": (8, 3, 3, 3), "v": (8, 8, 3, 3), "g": (8, 5),
    }  # fmt: skip
    words = set(re.findall(r"\w+", HEAD + rest))
    used = {name: constant for name, constant in constants.items() if name in words}
    proto = network(HEAD + rest, (batch, 3, 12, 12), outputs=outputs, **used)  # type: ignore[arg-type]
    (tmp_path / "net.onnx").write_bytes(proto.SerializeToString())
    (tmp_path / "pictures").mkdir()
    for number in range(6):
        Image.fromarray(pixels(number)).save(tmp_path / "pictures" / f"{number}.png")
    report, _ = made(tmp_path, "odd", effort="fast", weight_bits=3)
    assert of(report, Change) or of(report, Skipped)


def test_one_picture_is_too_few(place: Path, tmp_path: Path) -> None:
    with pytest.raises(QconvError, match="some are kept apart to judge by"):
        made(place, "one", effort="fast", samples=1)
    assert not (place / "one.onnx").exists()


def test_operators_that_cannot_be_run_are_told_of_before_the_work(place: Path, tmp_path: Path) -> None:
    body = "a = Conv(x, w) b = Relu(a) y = Mish(b)"
    proto = network(body, ("N", 3, 12, 12), opset=18, w=(8, 3, 3, 3))
    (tmp_path / "net.onnx").write_bytes(proto.SerializeToString())
    recipe, data = Recipe(rounding="reconstruct", threads=1), DataOptions((str(place / "pictures"),), preprocessing=RAW)
    heard: list[str] = []
    reporter = Reporter(on_progress=lambda stage, done, total: heard.append(stage))
    with pytest.raises(QconvError, match="cannot run 1 operator of this model in PyTorch: Mish"):
        quantize.quantize(str(tmp_path / "net.onnx"), tmp_path / "out.onnx", recipe, data, reporter)
    assert "round" not in heard


def test_scales_are_those_that_the_report_tells(place: Path) -> None:
    report, out = made(place, "rows", effort="fast")
    stored = [onnx.numpy_helper.to_array(t) for t in onnx.load(out).graph.initializer]
    scales = {float(array) for array in stored if array.dtype == np.float32 and array.size == 1}
    told = {np.float32(row.scale).item() for row in report.tensors if row.kind == "activation"}
    assert told <= scales


def test_a_block_whose_pairs_of_products_do_not_fit_stays(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainable.LearnedParameters, "fit_pairs", lambda learned: _widen(learned))
    report, _ = made(place, "pairs", effort="fast", weight_bits=8, activation_bits=8)
    assert {skipped.why for skipped in of(report, Skipped)} == {
        "pairs of 8-bit products would be beyond 16 bits after it"
    }
    monkeypatch.undo()
    _, plain = made(place, "pairs_plain", rounding="second-order", effort="fast", weight_bits=8, activation_bits=8)
    assert decibel(place, place / "pairs.onnx") == pytest.approx(decibel(place, plain), abs=1e-3)


def _widen(learned: Any) -> None:
    with torch.no_grad():
        for tensor in learned.kinds["weight_scales"].values():
            tensor += 0.1


# -- where it cuts -----------------------------------------------------------------------------------------------------


def quantized(folder: Path, name: str = "cut", **more: Any) -> Model:
    _, out = made(folder, name, rounding="second-order", effort="fast", weight_bits=8, activation_bits=8, **more)
    return Model(ir.from_proto(onnx.load(out)))


def test_a_residual_block_is_one_block(place: Path) -> None:
    found = find_block_boundaries(
        quantized(place), loaded(onnx.ModelProto.FromString(float_bytes())), dict.fromkeys("abmcdesrpfy", 1)
    )
    assert found[0].names == ("x",)
    assert found[-1].names == ("y",)
    # behind the first layer, behind the block, and what goes into the last layer; never inside the block
    inside = {"c", "d", "e"}
    assert len(found) >= 4
    assert not inside & {name for end in found for options in end.candidates for name in options}
    assert any("r" in options for end in found for options in end.candidates)


def test_cuts_are_all_that_goes_on(place: Path) -> None:
    """Given a cut alone, the network comes to the same outputs."""
    model = quantized(place)
    net = TorchNetwork(model)
    x = torch.rand(2, 3, 12, 12)
    wanted = net.run({"x": x})["y"]
    names = [codes.name or "" for codes in _find_cut_points(model)]
    assert len(names) >= 3
    for name in names:
        assert torch.equal(net.run({name: net.run({"x": x}, [name])[name]})["y"], wanted)


def test_wide_middles_stay_inside(tmp_path: Path) -> None:
    body = (
        "a = Conv(x, w) b = Relu(a) c = Conv(b, v) d = Relu(c) e = Conv<group=32, pads=[1,1,1,1]>(d, k) f = Relu(e)"
        " h = Conv(f, u) p = GlobalAveragePool(h) q = Flatten(p) y = Gemm(q, g)"
    )
    weights = {"w": (4, 3, 1, 1), "v": (32, 4, 1, 1), "k": (32, 1, 3, 3), "u": (4, 32, 1, 1), "g": (4, 5)}
    proto = network(body, ("N", 3, 12, 12), **weights)
    (tmp_path / "net.onnx").write_bytes(proto.SerializeToString())
    (tmp_path / "pictures").mkdir()
    for number in range(8):
        Image.fromarray(pixels(number)).save(tmp_path / "pictures" / f"{number}.png")
    sizes = {**dict.fromkeys("abhpqy", 4), **dict.fromkeys("cdef", 32)}
    found = find_block_boundaries(quantized(tmp_path, target="generic"), loaded(proto), sizes)
    reached = {name for end in found for options in end.candidates for name in options}
    assert {"b", "h"} <= reached
    assert not {"d", "f"} & reached


# -- dropped roundings -------------------------------------------------------------------------------------------------


def test_a_share_is_not_rounded_but_stays_in_range(place: Path) -> None:
    model = quantized(place, "drop")
    net = TorchNetwork(model)
    x = torch.rand(8, 3, 12, 12)
    names = [node.outputs[0].name or "" for node in model.nodes() if node.op_type == "DequantizeLinear"]
    behind = net.run({"x": x}, names)
    name = next(n for n in names if behind[n].ndim == 4 and behind[n].shape[0] == 8 and behind[n].min() == 0)
    plain = behind[name]
    generator = torch.Generator().manual_seed(0)
    none = net.run({"x": x}, [name], QuantDrop(0.0, generator))[name]
    assert torch.equal(none, plain)
    whole = net.run({"x": x}, [name], QuantDrop(1.0, generator))[name]
    step = float(plain[plain > 0].min())
    assert float(whole.min()) >= 0  # the Relu that the quantizer has absorbed
    assert 0 < float((whole - plain).abs().max()) < 2 * step
    half = net.run({"x": x}, [name], QuantDrop(0.5, generator))[name]
    assert not torch.equal(half, plain)
