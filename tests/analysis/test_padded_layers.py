"""A file whose stem is padded with channels, read beside its float model as if it were not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image

from qconv.analysis import compare
from qconv.analysis.inspect_quantized import inspect_quantized
from qconv.config.data_options import DataOptions, PreprocessingOptions
from qconv.config.recipe import Recipe
from qconv.ir.files import Source
from qconv.pipeline.quantize import quantize
from qconv.reporter import Reporter
from tests.support.models import network

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
    assert kinds.count("Pad") == 1


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
