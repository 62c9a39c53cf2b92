"""Networks that take whole numbers, drawn at random: every type, layout and option, against the pixels as numpy has
them."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from qconv import Recipe
from qconv.config.data_options import DataOptions, Layout, PreprocessingOptions
from qconv.data.loader import DataLoader
from qconv.pipeline.quantize import quantize
from qconv.reporter import Reporter
from qconv.runtime.session import Session

DRAWS = int(os.environ.get("QCONV_DRAWS", "60"))
KINDS = ("uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64")
SIDE = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for index in range(8):
        Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)).save(place / f"{index}.png")
    return place


def network(kind: str, layout: Layout, channels: int, opset: int = 17) -> onnx.ModelProto:
    """Pixels are divided by 127.5, less 1, as pose networks do, then convolved."""
    rng = np.random.default_rng(1)
    constants = {
        "by": np.float32(127.5),
        "one": np.float32(1),
        "w": (rng.normal(size=(8, channels, 3, 3)) / 5).astype(np.float32),
        "v": (rng.normal(size=(8, 5)) / 3).astype(np.float32),
    }
    nhwc = layout is Layout.NHWC
    nodes = [
        helper.make_node("Cast", ["x"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Div", ["f", "by"], ["d"]),
        helper.make_node("Sub", ["d", "one"], ["s"]),
        helper.make_node(*(("Transpose", ["s"], ["t"]) if nhwc else ("Identity", ["s"], ["t"]))),
        helper.make_node("Conv", ["t", "w"], ["c"]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("GlobalAveragePool", ["r"], ["p"]),
        helper.make_node("Flatten", ["p"], ["q"]),
        helper.make_node("MatMul", ["q", "v"], ["y"]),
    ]
    if nhwc:
        nodes[3].attribute.append(helper.make_attribute("perm", [0, 3, 1, 2]))
    shape = [1, SIDE, SIDE, channels] if nhwc else [1, channels, SIDE, SIDE]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", helper.np_dtype_to_tensor_dtype(np.dtype(kind)), shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 5])],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


@pytest.mark.parametrize("seed", range(DRAWS))
def test_inputs_of_whole_numbers_get_pixels(seed: int, folder: Path) -> None:
    """What the options make of pixels is fed where it is whole and fits the type, else the pixels, with a warning."""
    rng = np.random.default_rng(seed)
    kind, layout, channels = str(rng.choice(KINDS)), list(Layout)[rng.integers(2)], int(rng.choice([1, 3]))
    presets = ["auto", "raw", "unit", "tf"] + (["imagenet", "caffe"] if channels == 3 else [])
    said = PreprocessingOptions(str(rng.choice(presets)), layout=layout)
    scale, mean = 1.0, 0.0
    if rng.integers(0, 2):
        scale, mean = float(rng.choice([1, 2, 0.5, 1000])), float(rng.choice([0, 128, 0.25]))
        said = PreprocessingOptions(said.preset, scale, (mean,), (1.0,), layout=layout)
    asked = scale, mean
    heard: list[str] = []
    session = Session(network(kind, layout, channels).SerializeToString(), threads=1)
    feed = DataLoader.of(session, DataOptions((str(folder),), preprocessing=said), Reporter(heard.append))
    bounds = np.iinfo(kind)
    ends = [-mean, 255 * scale - mean]
    numbers_said = said.scale is not None
    whole = scale == round(scale) and mean == round(mean) and bounds.min <= min(ends) and max(ends) <= bounds.max
    bgr = said.preset == "caffe" and numbers_said and whole
    if not (numbers_said and whole):
        scale, mean = 1.0, 0.0
    for path, feeds in zip(feed.listing.paths, feed.iter_batches(""), strict=True):
        picture = Image.open(path)
        pixels = np.atleast_3d(np.asarray(picture.convert("L") if channels == 1 else picture)).astype(np.int64)
        if bgr:
            pixels = pixels[:, :, ::-1]
        expected = (pixels * scale - mean)[None]
        expected = expected if layout is Layout.NHWC else expected.transpose(0, 3, 1, 2)
        assert feeds["x"].dtype == kind
        np.testing.assert_array_equal(feeds["x"], expected)
    vain = said.preset not in ("auto", "raw") or asked != (1.0, 0.0)
    assert bool(heard) == (vain and (scale, mean) == (1.0, 0.0)), heard


@pytest.mark.parametrize("preset", ["auto", "unit"])
def test_a_network_of_whole_pixels_is_quantized(folder: Path, preset: str) -> None:
    """The input keeps its type, and the result is near, with and without embedded preprocessing."""
    for layout in (None, Layout.NCHW):
        data = DataOptions((str(folder),), preprocessing=PreprocessingOptions(preset))
        heard: list[str] = []
        source = folder.parent / "net.onnx"
        source.write_bytes(network("int32", Layout.NHWC, 3).SerializeToString())
        recipe = Recipe(threads=1, embed_preprocessing=layout)
        report, result = quantize(source, None, recipe, data, Reporter(heard.append))
        assert result is not None
        (value,) = onnx.load_from_string(result).graph.input
        kinds = (TensorProto.INT32, TensorProto.UINT8)
        assert value.type.tensor_type.elem_type == kinds[layout is not None]
        assert report.verify.sqnr_db is not None
        assert report.verify.sqnr_db > 30
        assert report.preprocessing is not None
        assert report.preprocessing["preset"] == "raw"
        assert any("is not used" in text for text in heard) == (preset == "unit")


def test_pixels_are_handed_out_whatever_was_kept_before(folder: Path) -> None:
    """A pass before, which found out shapes, has kept what the float network takes."""
    session = Session(network("int32", Layout.NCHW, 3).SerializeToString(), threads=1)
    feed = DataLoader.of(session, DataOptions((str(folder),)), Reporter())
    assert {batch["x"].dtype.name for batch in feed.iter_cached("")} == {"int32"}
    feed.take_pixels(Layout.NHWC)
    assert {batch["x"].dtype.name for batch in feed.iter_cached("")} == {"uint8"}
    assert next(iter(feed.over(feed.listing.paths).iter_batches("")))["x"].shape[-1] == 3
