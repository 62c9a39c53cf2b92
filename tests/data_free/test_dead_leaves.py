"""Made-up pictures: like photographs in what can be measured, and enough to tell how a network was fed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from PIL import Image

from qconv.config.data_options import Color, Layout, PreprocessingOptions
from qconv.data.autodetect import DetectedPreprocessing, detect_without_images
from qconv.data_free.dead_leaves import (
    IMAGE_COUNT,
    PIXEL_MEAN,
    GeneratedImageLoader,
    draw_dead_leaves,
    network_input_distribution,
    pixel_distribution,
)
from qconv.errors import QconvError
from qconv.runtime.session import Session
from tests.support.models import loaded, network, statistics

SIDE = 32
PHOTOS = Path(__file__).parents[2] / "calib_samples"
BODY = "c = Conv(x, w)  b = BatchNormalization(c, gamma, beta, mean, var)  r = Relu(b)  y = Conv(r, v)"


def many(count: int = 200, channels: int = 3) -> NDArray[np.float64]:
    rng = np.random.default_rng(1)
    return np.stack([draw_dead_leaves(rng, (SIDE, SIDE), channels) for _ in range(count)]).astype(np.float64)


def test_colours_are_those_that_are_told_of() -> None:
    """Cutting off at black and white takes some of the deviation."""
    found, told = many(), pixel_distribution(3)
    assert told.std is not None
    np.testing.assert_allclose(found.mean(axis=(0, 1, 2)), PIXEL_MEAN, atol=8)
    np.testing.assert_allclose(found.std(axis=(0, 1, 2)), told.std, rtol=0.15)
    together = np.corrcoef(found.reshape(-1, 3).T)
    assert together.min() > 0.6
    assert together[0, 2] < min(together[0, 1], together[1, 2])  # red and blue have the least in common


def test_power_falls_with_the_square_of_the_frequency() -> None:
    power = (np.abs(np.fft.fft2(many(channels=1)[..., 0])) ** 2).mean(axis=0)
    low, high = np.arange(1, 4), np.arange(6, 13)
    slope = np.log(power[high, 0].mean() / power[low, 0].mean()) / np.log(high.mean() / low.mean())
    assert -2.8 < slope < -1.4


def test_pictures_are_the_same_in_every_run() -> None:
    one, other = (list(made(trained("imagenet")).iter_batches("verify")) for _ in range(2))
    assert sum(len(feeds["x"]) for feeds in one) == IMAGE_COUNT
    for mine, yours in zip(one, other, strict=True):
        np.testing.assert_array_equal(mine["x"], yours["x"])


def test_a_batch_of_the_network_s_own_is_whole() -> None:
    session = Session(network("y = Conv(x, w)", (5, 1, 8, 8), w=(2, 1, 3, 3)).SerializeToString())
    batches = list(GeneratedImageLoader.like(session, PreprocessingOptions()).iter_batches("verify"))
    assert {feeds["x"].shape for feeds in batches} == {(5, 1, 8, 8)}
    assert len(batches) == -(-IMAGE_COUNT // 5)


@pytest.mark.parametrize("color", list(Color))
def test_ends_are_black_and_white(color: Color) -> None:
    """(0 * scale - mean) / std and (255 * scale - mean) / std, in the order of the network."""
    channels = 1 if color is Color.GREY else 3
    session = Session(network("y = Conv(x, w)", (1, channels, 8, 8), w=(2, channels, 3, 3)).SerializeToString())
    options = PreprocessingOptions("unit", mean=(0.1, 0.2, 0.3)[:channels], std=(0.5,), color=color)
    feed = GeneratedImageLoader.like(session, options)
    assert feed.preprocessing is not None
    found = network_input_distribution(feed.preprocessing)
    np.testing.assert_allclose(found.ends[0], (0 - np.array([0.1, 0.2, 0.3])[:channels]) / 0.5)
    np.testing.assert_allclose(found.ends[1], (1 - np.array([0.1, 0.2, 0.3])[:channels]) / 0.5)
    if color is Color.BGR:
        other = network_input_distribution(replace(feed.preprocessing, color=Color.RGB, mean=(0.3, 0.2, 0.1)))
        np.testing.assert_allclose(found.mean, other.mean[::-1])


def trained(preset: str) -> bytes:
    """A network whose BatchNormalization has stored what real photographs show that are fed like that."""
    with_colours = [Image.open(path).convert("RGB").resize((SIDE, SIDE)) for path in sorted(PHOTOS.glob("*.jpg"))]
    seen = np.stack([np.asarray(photo, np.float64) for photo in with_colours])
    options = PreprocessingOptions(preset)
    session = Session(network("y = Conv(x, w)", (1, 3, SIDE, SIDE), w=(2, 3, 3, 3)).SerializeToString())
    prep = GeneratedImageLoader.like(session, options).preprocessing
    assert prep is not None
    assert prep.layout is Layout.NCHW
    ordered = seen[..., ::-1] if prep.color is Color.BGR else seen
    fed = ((ordered * prep.scale - np.array(prep.mean)) / np.array(prep.std)).transpose(0, 3, 1, 2)
    w = np.random.default_rng(1).normal(size=(8, 3, 3, 3)).astype(np.float32)
    windows = np.lib.stride_tricks.sliding_window_view(fed, (3, 3), axis=(2, 3))
    made_of = np.einsum("nchwij,kcij->nkhw", windows, w.astype(np.float64))
    stored = statistics(8, mean=made_of.mean((0, 2, 3)), var=made_of.var((0, 2, 3)))
    return network(BODY, x=("N", 3, SIDE, SIDE), w=w, v=(4, 8, 3, 3), **stored).SerializeToString()


def made(data: bytes, **options: str) -> GeneratedImageLoader:
    return GeneratedImageLoader.like(Session(data), PreprocessingOptions(**options))  # type: ignore[arg-type]


def detected(data: bytes, **options: str) -> DetectedPreprocessing:
    session, said = Session(data), PreprocessingOptions(**options)  # type: ignore[arg-type]
    return detect_without_images(loaded(onnx.ModelProto.FromString(data)), session, made(data, **options), said)


@pytest.mark.parametrize("preset", ["imagenet", "raw", "unit", "tf"])
def test_how_a_network_was_fed_shows_without_a_picture(preset: str) -> None:
    found = detected(trained(preset))
    assert found.preprocessing is not None
    assert found.preprocessing.preset == preset
    assert found.evident


def test_what_the_user_says_is_taken() -> None:
    found = detected(trained("imagenet"), preset="tf")
    assert found.preprocessing is not None
    assert found.preprocessing.preset == "tf"


def test_where_nothing_tells_the_user_must() -> None:
    plain = network("y = Conv(x, w)", (1, 3, SIDE, SIDE), w=(2, 3, 3, 3)).SerializeToString()
    with pytest.raises(QconvError, match="not known without pictures: no BatchNorm in it tells") as error:
        detected(plain)
    assert "--preprocess" in error.value.hint


@pytest.mark.parametrize("shape", [(1, 12, 8, 8), (1, 40)])
def test_what_is_no_picture_cannot_be_made_up(shape: tuple[int, ...]) -> None:
    body = "y = Relu(x)"
    session = Session(network(body, shape).SerializeToString())
    with pytest.raises(QconvError, match=r"has 12 channels|is no picture's") as error:
        GeneratedImageLoader.like(session, PreprocessingOptions())
    assert ".npy" in error.value.hint
