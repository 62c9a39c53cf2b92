"""Packed files read by the commands, beside the same file without packing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image

from qconv.analysis import compare
from qconv.analysis.inspect_quantized import inspect_quantized
from qconv.auditing.audit import audit_file, detect_format
from qconv.config.data_options import DataOptions, PreprocessingOptions
from qconv.config.recipe import Recipe
from qconv.errors import QconvError
from qconv.ir.files import Source, read_proto, refuse_quantized
from qconv.pipeline.quantize import quantize
from qconv.reporter import Reporter
from tests.support.libraries import skip_without
from tests.support.models import network

BODY = """c = Conv<pads=[1,1,1,1], strides=[2,2]>(x, w, b) r = Relu(c) d = Conv<pads=[1,1,1,1]>(r, v) s = Relu(d)
          g = GlobalAveragePool(s) f = Flatten(g) y = Gemm(f, u)"""
SHAPES = {"w": (48, 3, 3, 3), "b": (48,), "v": (48, 48, 3, 3), "u": (48, 80)}
CODES = {"c": 48 * 3 * 9, "d": 48 * 48 * 9, "y": 48 * 80}
OPTIONS = {"preprocessing": PreprocessingOptions("imagenet")}
FORMS = {"int4": ("4", None), "bytes": ("3", None), "bytes by int32": ("4", "1.19")}


@pytest.fixture(scope="module", params=FORMS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    bits, needs = FORMS[request.param]
    return packed_beside_plain(
        tmp_path_factory.mktemp("packed"), needs, weight_bits=int(bits), edge_bits=int(bits), float_budget=0.0
    )


def packed_beside_plain(place: Path, needs: str | None, **options: Any) -> Path:
    """A folder with pictures, a network, and what becomes of it with these options, packed and not."""
    if needs is None:
        skip_without("onnxruntime", "1.23", "this form of packed codes does")
    for number in range(12):
        level = np.random.default_rng(number).integers(0, 256, (48, 48, 3)).astype(np.uint8)
        Image.fromarray(level).save(place / f"{number}.png")
    onnx.save(network(BODY, ("N", 3, 48, 48), **SHAPES), place / "net.onnx")
    data = DataOptions((str(place),), **OPTIONS)
    for name, pack in (("plain", False), ("packed", True)):
        source = Source("net.onnx", place / "net.onnx")
        quantize(source, place / f"{name}.onnx", Recipe(pack=pack, threads=1, needs=needs, **options), data)
    return place


def source(folder: Path, name: str) -> Source:
    return Source(name, folder / f"{name}.onnx")


def test_inspect_tells_of_codes_as_they_are_stored(folder: Path) -> None:
    """A stem that is padded on codes among them: its shape is the float model's, its bytes are the file's."""
    plain, packed = (inspect_quantized(source(folder, name)) for name in ("plain", "packed"))
    assert packed.bytes < plain.bytes
    for one, other in zip(plain.layers, packed.layers, strict=True):
        assert (one.name, one.shape, one.bits, one.scheme) == (other.name, other.shape, other.bits, other.scheme)
        assert (one.input, one.output, one.runs) == (other.input, other.output, other.runs)
        assert other.type == f"int{other.bits}"
        share = other.bits / 8 * (4 / 3 if other.name == "c" else 1)
        assert other.codes_bytes == pytest.approx(CODES[other.name] * share, abs=2)
    assert sum(layer.bytes for layer in packed.layers) + packed.other_constants < packed.bytes


def test_compare_finds_every_tensor_and_weight(folder: Path) -> None:
    data = DataOptions((str(folder),), **OPTIONS)
    rows = []
    for name in ("plain", "packed"):
        found = compare.compare_on_images(source(folder, "net"), source(folder, name), data, Reporter()).compared
        assert found.unmatched == ()
        rows.append([(row.name, row.cosine, row.weights) for row in found.layers])
    assert rows[0] == rows[1]
    assert {name for name, _, weights in rows[1] if weights is not None} == {"c", "d", "y"}


def test_audit_sees_the_same_network(folder: Path) -> None:
    plain, packed = (
        audit_file(source(folder, name), threads=1, batch=None, size=None).audit for name in ("plain", "packed")
    )
    assert (plain.integer, plain.float) == (packed.integer, packed.float)
    assert [(row.node, row.rule) for row in plain.on_codes] == [(row.node, row.rule) for row in packed.on_codes]
    assert {row.rule for row in packed.on_codes} == {"padded-channels"}
    assert plain.saturating == packed.saturating


@pytest.mark.parametrize(
    ("bits", "needs", "granularity"),
    [
        (4, None, "per-channel"),
        (4, None, "per-block"),
        (4, "1.19", "per-channel"),
        (3, None, "per-channel"),
        (2, None, "per-channel"),
    ],
)
def test_weights_alone_are_known_as_codes_in_every_form(
    tmp_path: Path, bits: int, needs: str | None, granularity: str
) -> None:
    """As the file without packing: told of, compared, and not quantized once more."""
    options = {"weight_bits": bits, "edge_bits": bits, "activation_bits": 32, "weight_granularity": granularity}
    packed_beside_plain(tmp_path, needs, **options)
    plain, packed = (source(tmp_path, name) for name in ("plain", "packed"))
    for one in (plain, packed):
        assert detect_format(read_proto(one))[0] == "weights only"
        assert {row.bits for row in inspect_quantized(one).layers} == {bits}
        with pytest.raises(QconvError, match="already quantized"):
            refuse_quantized(read_proto(one), one.name)
    data = DataOptions((str(tmp_path),), **OPTIONS)
    found = compare.compare_on_images(source(tmp_path, "net"), packed, data, Reporter()).compared
    assert {row.name for row in found.layers if row.weights is not None} == {"c", "d", "y"}
