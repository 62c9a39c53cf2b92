"""Colours of every network and option, drawn at random, and files that know the size which they leave open."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qconv.config.data_options import DataOptions, Layout, PreprocessingOptions
from qconv.data.autodetect import detect_preprocessing
from qconv.data.loader import DataLoader
from qconv.errors import QconvError
from qconv.reporter import Reporter
from qconv.runtime.session import Session
from tests.support.cli import Qconv, assert_error, net
from tests.support.models import loaded, network

DRAWS = int(os.environ.get("QCONV_DRAWS", "60"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for index in range(6):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(folder / f"{index}.png")
    return folder


@pytest.mark.parametrize("seed", range(DRAWS))
def test_every_colour_is_fed_or_refused_in_a_sentence(seed: int, pictures: Path) -> None:
    """A network of one channel gets grey, one of three what is said, and an open one three unless grey is said."""
    rng = np.random.default_rng(seed)
    channels = [1, 3, "C"][rng.integers(3)]
    nhwc = bool(rng.integers(0, 2)) and channels != "C"
    color = [None, "rgb", "bgr", "grey"][rng.integers(4)]
    preset = str(rng.choice(["auto", "unit", "tf", "imagenet", "raw"]))
    mean = (0.25,) if rng.integers(0, 2) else None
    said = PreprocessingOptions(preset, color=color, mean=mean, std=None if mean is None else (0.5,))
    shape = ("N", 8, 8, channels) if nhwc else ("N", channels, 8, 8)
    count = 1 if channels == 1 or (channels == "C" and color == "grey") else 3
    turn = "t = Transpose<perm=[0,3,1,2]>(x)" if nhwc else "t = Identity(x)"
    proto = network(f"{turn} c = Conv(t, w) p = GlobalAveragePool(c) y = Flatten(p)", shape, w=(4, count, 3, 3))
    session = Session(proto.SerializeToString(), threads=1)
    data = DataOptions((str(pictures),), preprocessing=said)
    contradicts = channels != "C" and color is not None and (color == "grey") != (channels == 1)
    too_many = count == 1 and preset == "imagenet" and mean is None
    if contradicts or too_many:
        with pytest.raises(QconvError):
            DataLoader.of(session, data, Reporter())
        return
    feed = DataLoader.of(session, data, Reporter())
    found = detect_preprocessing(loaded(proto), session, feed, said, threads=1).preprocessing
    assert found is not None
    assert found.channels == count
    assert found.layout == (Layout.NHWC if nhwc else Layout.NCHW)
    assert found.color == (color or ("grey" if count == 1 else found.color))
    feed.preprocessing = found
    for feeds in feed.iter_batches(""):
        assert feeds["x"].shape == ((1, 8, 8, count) if nhwc else (1, count, 8, 8))


def test_raw_that_agrees_with_the_graph_is_not_spoken_against(pictures: Path) -> None:
    """Its means of channels rise as those of BGR do, which is another matter than its range."""
    means = np.float32([103.9, 116.8, 123.7]).reshape(1, 3, 1, 1)
    proto = network("s = Sub(x, m) c = Conv(s, w) y = Relu(c)", ("N", 3, 8, 8), m=means, w=(4, 3, 3, 3))
    session = Session(proto.SerializeToString(), threads=1)
    for color, doubt in ((None, "--color bgr"), ("bgr", "")):
        said = PreprocessingOptions("raw", color=color)
        feed = DataLoader.of(session, DataOptions((str(pictures),), preprocessing=said), Reporter())
        found = detect_preprocessing(loaded(proto), session, feed, said, threads=1)
        assert "--preprocess raw" not in found.doubt
        assert doubt in found.doubt
        assert bool(found.doubt) == bool(doubt)


def test_a_file_knows_the_size_that_it_leaves_open(call: Qconv, tmp_path: Path, pictures: Path) -> None:
    source, out = tmp_path / "open.onnx", tmp_path / "q.onnx"
    source.write_bytes(net(x=("N", 3, "H", "W")).SerializeToString())
    assert call("quantize", source, "--calib", pictures, "--size", "12x16", "-o", out).status == 0
    assert call("audit", out).status == 0
    found = call("benchmark", source, out, "--rounds", "1", "--json").json
    assert [row["inputs"]["x"] for row in found["models"]] == [[1, 3, 12, 16]] * 2
    assert_error(call("audit", source), "open shape")
