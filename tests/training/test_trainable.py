"""What of a quantized file can be learned. Oracles: ONNX Runtime before and after, and files worked out by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from PIL import Image

from tests.support.libraries import ZERO_POINTS, needs, skip_without
from tests.support.models import network

pytest.importorskip("torch", reason="needs the extra: pip install 'qconv[torch]'")

from qconv.config.data_options import PreprocessingOptions
from qconv.config.recipe import make_request
from qconv.config.serialization import recipe_from_dict
from qconv.errors import QconvError
from qconv.ir import load
from qconv.ir.files import Source, read_proto
from qconv.ir.metadata import read_recipe
from qconv.ir.model import Model
from qconv.ir.stored_weights import constant_numbers
from qconv.pipeline.quantize import quantize
from qconv.training.trainable import LearnableSites, find_sites

BODY = (
    "a = Conv(x, w)  b = Clip(a, low, high)  c = Conv(b, v)  d = Clip(c, low, high)"
    "  m = MaxPool<kernel_shape=[2,2], strides=[2,2]>(d)  e = Conv(m, u)  p = GlobalAveragePool(e)  y = Flatten(p)"
)
WEIGHTS = {"w": (6, 3, 1, 1), "v": (6, 6, 1, 1), "u": (5, 6, 1, 1)}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    proto = network(BODY, ("N", 3, 8, 8), low=np.float32(0), high=np.float32(6), **WEIGHTS)
    (tmp_path / "net.onnx").write_bytes(proto.SerializeToString())
    (tmp_path / "pictures").mkdir()
    for number in range(6):
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{number}.png")
    return tmp_path


def sites(place: Path, **more: object) -> tuple[Model, LearnableSites]:
    fast = {"effort": "fast", "calibrator": "minmax", **more}
    feed = {"calib": (str(place / "pictures"),), "preprocessing": PreprocessingOptions(preset="raw"), "threads": 1}
    quantize(str(place / "net.onnx"), place / "q.onnx", *make_request({**feed, **fast}))
    source = Source(str(place / "q.onnx"), place / "q.onnx")
    model = load.load_unchanged(read_proto(source), source)
    return model, find_sites(model, recipe_from_dict(read_recipe(model.inner.metadata_props)))


def run(data: bytes, x: np.ndarray) -> np.ndarray:
    session = ort.InferenceSession(data, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0])


def test_scales_that_are_equal_by_chance_are_parted(place: Path) -> None:
    """Both Clips reach 0 to 6, so that the file stores one scale; they learn apart. MaxPool ties its two sides."""
    model, found = sites(place)
    stored = [float(constant_numbers(site.scale)) for site in found.activations]  # type: ignore[arg-type]
    assert len({site.scale for site in found.activations}) == len(found.activations)
    assert stored.count(np.float32(6 / 255)) == 2
    tied = next(site for site in found.activations if any("m" in (n.name or "").split("_") for n in site.nodes))
    assert {n.op_type for n in tied.nodes} == {"QuantizeLinear", "DequantizeLinear"}
    readers = [node for value in model.graph.initializers.values() for node in model.readers(value)]
    assert readers  # every node still reads what it did
    for site in found.activations:
        assert set(model.readers(site.scale)) == set(site.nodes)


def test_parting_changes_no_output(place: Path) -> None:
    model, _ = sites(place)
    x = np.random.default_rng(1).uniform(0, 255, (3, 3, 8, 8)).astype(np.float32)
    before = run((place / "q.onnx").read_bytes(), x)
    np.testing.assert_array_equal(run(model.proto().SerializeToString(), x), before)


@pytest.mark.parametrize(
    ("more", "low", "high"),
    [
        ({"weight_bits": 4}, -7, 7),
        ({"weight_bits": 3, "weight_scheme": "asymmetric", "target": "generic"}, -4, 3),
        ({}, -127, 127),
    ],
    ids=["symmetric", "asymmetric", "eight bits"],
)
def test_codes_end_with_their_bits(place: Path, more: dict[str, object], low: int, high: int) -> None:
    if more.get("weight_scheme") == "asymmetric":
        skip_without("onnxruntime", "1.28", ZERO_POINTS)
    _, found = sites(place, **more)
    (middle,) = (site for site in found.weights if (site.codes.name or "").startswith("v"))
    assert (int(middle.low.min()), int(middle.high.max())) == (low, high)
    codes = constant_numbers(middle.codes)
    assert codes is not None
    assert (codes >= middle.low).all()
    assert (codes <= middle.high).all()


@needs("onnxruntime", "1.28", ZERO_POINTS)
def test_windows_of_moved_zeros_have_all_their_codes(place: Path) -> None:
    """Asymmetric weights of 2 bits, with zero at code 0: four codes each, zero and all that there are among them."""
    _, found = sites(place, weight_bits=2, weight_scheme="asymmetric")
    (middle,) = (site for site in found.weights if (site.codes.name or "").startswith("v"))
    codes = constant_numbers(middle.codes)
    assert codes is not None
    np.testing.assert_array_equal(middle.high - middle.low, 3)
    assert (middle.low <= np.minimum(codes, 0)).all()
    assert (middle.high >= np.maximum(codes, 0)).all()


def test_a_file_without_stored_codes_is_refused(place: Path) -> None:
    source = Source(str(place / "net.onnx"), place / "net.onnx")
    with pytest.raises(QconvError, match="no layer with stored codes"):
        find_sites(load.load_unchanged(read_proto(source), source), None)
