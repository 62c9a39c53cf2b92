"""Files with forms that are for speed alone, read beside their float model as if they had none."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from PIL import Image

from qconv.analysis import compare
from qconv.analysis.inspect_quantized import inspect_quantized
from qconv.cli.main import cli
from qconv.config.data_options import DataOptions, PreprocessingOptions
from qconv.config.recipe import Recipe
from qconv.ir.files import Source
from qconv.pipeline.quantize import quantize
from qconv.reporter import Reporter
from tests.support.models import network
from tests.support.quantized import pictures, quantized
from tests.support.runs import write_samples

BODY = """c = Conv<pads=[1,1,1,1], strides=[2,2]>(x, w, b) r = Relu(c) d = Conv(r, v) s = Relu(d)
          g = GlobalAveragePool(s) f = Flatten(g) y = Gemm(f, u)"""
WEIGHTS = {"w": (16, 3, 3, 3), "b": (16,), "v": (8, 16, 1, 1), "u": (8, 5)}
OPTIONS = {"preprocessing": PreprocessingOptions("imagenet")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("padded")
    for number in range(12):
        level = np.random.default_rng(number).integers(0, 256, (16, 16, 3)).astype(np.uint8)
        Image.fromarray(level).save(place / f"{number}.png")
    onnx.save(network(BODY, ("N", 3, 16, 16), **WEIGHTS), place / "net.onnx")
    data = DataOptions((str(place),), **OPTIONS)
    quantize(Source("net.onnx", place / "net.onnx"), place / "net.w8a8.onnx", Recipe(threads=1), data)
    return place


def test_the_file_is_padded(folder: Path) -> None:
    kinds = [node.op_type for node in onnx.load(folder / "net.w8a8.onnx").graph.node]
    assert kinds.count("Gather") == 1


def test_inspect_shows_the_shapes_of_the_float_model(folder: Path) -> None:
    first = inspect_quantized(Source("net.w8a8.onnx", folder / "net.w8a8.onnx")).layers[0]
    assert (first.shape, first.bits, first.scheme) == ((16, 3, 3, 3), 8, "symmetric")
    assert (first.input.type, first.runs) == ("uint8", "integer")


def test_compare_finds_every_tensor_and_weight(folder: Path) -> None:
    float_model, quantized = (Source(name, folder / name) for name in ("net.onnx", "net.w8a8.onnx"))
    data = DataOptions((str(folder),), **OPTIONS)
    found = compare.compare_on_images(float_model, quantized, data, Reporter()).compared
    assert found.unmatched == ()
    names = [row.name for row in found.layers]
    assert {"x", "c", "d", "y"} <= set(names)
    assert all(row.cosine > 0.99 for row in found.layers if row.cosine is not None)
    first = next(row for row in found.layers if row.name == "c")
    assert first.weights is not None
    assert first.weights.clipped == 0


FORMS = """c = Conv<pads=[1,1,1,1]>(x, w) o = Conv(x, v) d = Relu(o) s = Sub(c, d) e = Conv(s, u)
           r = Resize<mode="nearest">(e, , k) f = Conv(r, p) t = SpaceToDepth<blocksize=2>(f) h = Conv(t, q)
           g = GlobalAveragePool(h) y = Flatten(g)"""


def test_compare_finds_tensors_behind_operators_on_codes(tmp_path: Path) -> None:
    """Their layers are there, and what is read with the negated scale has the float model's sign."""
    shapes = {"w": (8, 3, 3, 3), "v": (8, 3, 1, 1), "u": (8, 8, 1, 1), "p": (8, 8, 1, 1), "q": (8, 32, 1, 1)}
    proto = network(FORMS, ("N", 3, 16, 16), k=np.float32([1, 1, 2, 2]), **shapes)
    result = quantized(proto, pictures((4, 3, 16, 16), low=-2.2, high=2.7))  # as a whole: no layer is faster in float
    onnx.save(proto, tmp_path / "net.onnx")
    onnx.save(result.proto, tmp_path / "net.w8a8.onnx")
    for number in range(12):
        level = np.random.default_rng(number).integers(0, 256, (16, 16, 3)).astype(np.uint8)
        Image.fromarray(level).save(tmp_path / f"{number}.png")
    data = DataOptions((str(tmp_path),), **OPTIONS)
    sources = [Source(name, tmp_path / name) for name in ("net.onnx", "net.w8a8.onnx")]
    kinds = [node.op_type for node in onnx.load(tmp_path / "net.w8a8.onnx").graph.node]
    assert {kind: kinds.count(kind) for kind in ("Sub", "SpaceToDepth", "Resize", "Slice")} == {
        "Sub": 0,
        "SpaceToDepth": 0,
        "Resize": 1,
        "Slice": 4,
    }
    found = compare.compare_on_images(*sources, data, Reporter()).compared
    assert found.unmatched == ()
    rows = {row.name: row for row in found.layers}
    assert {"x", "c", "o", "s", "e", "f", "h"} <= set(rows)
    assert all((rows[name].cosine or 0) > 0.999 for name in "xcosefh")
    assert all(rows[name].weights is not None for name in "coefh")
    layers = {layer.name: layer for layer in inspect_quantized(sources[1]).layers}
    assert all(layer.input.bits == 8 and layer.runs == "integer" for layer in layers.values())


NORMALIZED = """c = Conv<pads=[1,1,1,1]>(x, w, b) r = Relu(c) n = LRN<size=5, alpha=0.5>(r) d = Conv(n, v) s = Relu(d)
                m = LRN<size=3, alpha=0.5, beta=0.6>(s) g = GlobalAveragePool(m) f = Flatten(g) y = Gemm(f, u)"""


def test_compare_and_inspect_read_opened_normalizations_as_they_were(tmp_path: Path) -> None:
    proto = network(NORMALIZED, ("N", 3, 16, 16), **WEIGHTS)
    onnx.save(proto, tmp_path / "net.onnx")
    samples = tmp_path / "samples"
    samples.mkdir()
    calib = write_samples(samples, (1, 3, 16, 16), 12)
    path = tmp_path / "net.w8a8.onnx"
    command = ["quantize", str(tmp_path / "net.onnx"), "--calib", calib, "-o", str(path), "--json", "--threads", "1"]
    done = CliRunner().invoke(cli, command)
    assert done.exit_code == 0, done.output
    told = {island["node"]: island["why"] for island in json.loads(done.stdout)["audit"]["islands"]}
    assert told.keys() >= {"n", "n_square", "n_sum", "m", "m_power"}
    assert all("LRN" in why for node, why in told.items() if node.partition("_")[0] in ("m", "n"))
    kinds = [node.op_type for node in onnx.load(path).graph.node]
    assert (kinds.count("LRN"), kinds.count("Div")) == (0, 2)
    sources = [Source(name, tmp_path / name) for name in ("net.onnx", "net.w8a8.onnx")]
    found = compare.compare_on_images(*sources, DataOptions((calib,)), Reporter()).compared
    assert found.unmatched == ()
    rows = {row.name: row for row in found.layers}
    assert {"x", "c", "n", "d", "f", "y"} <= set(rows)
    assert all((rows[name].cosine or 0) > 0.99 for name in "xcndfy")
    assert [layer.name for layer in inspect_quantized(sources[1]).layers] == ["c", "d", "y"]
