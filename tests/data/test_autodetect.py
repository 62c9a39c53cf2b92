"""Preprocessing, found out. Oracle: networks built here, whose statistics numpy took of pictures fed in a known way."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from PIL import Image

from qconv.config.data_options import PRESETS, Color, DataOptions, Layout, PreprocessingOptions
from qconv.config.recipe import Recipe
from qconv.data.autodetect import CERTAIN_MARGIN, DetectedPreprocessing, detect_preprocessing
from qconv.data.evidence import find_fact, find_references
from qconv.data.hypotheses import COLOR_FAMILIES, GREY_FAMILIES
from qconv.data.loader import DataLoader
from qconv.ir.files import Source
from qconv.pipeline.quantize import quantize
from qconv.reporter import Reporter
from qconv.runtime.session import Session
from tests.support.models import loaded, network, statistics

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("QCONV_DATA") or ROOT.parent / "shared" / "data")
SIDE = 16
BODY = "c = Conv(x, w)  b = BatchNormalization(c, gamma, beta, mean, var)  r = Relu(b)  y = Conv(r, v)"
FLOAT = np.dtype(np.float32)


def colourful(count: int = 24, channels: int = 3) -> NDArray[np.uint8]:
    """Warm pictures (n, H, W, C) of smooth shapes and noise: red is bright, blue is dark."""
    rng = np.random.default_rng(7)
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE
    waves = [np.sin(6 * (a * x + b * y) + c) for a, b, c in rng.normal(size=(count, 3))]
    shared = np.array(waves)[..., None] * 45 + rng.normal(0, 12, (count, SIDE, SIDE, channels))
    tint = np.array([165.0, 120.0, 70.0])[:channels] + rng.normal(0, 25, (count, 1, 1, channels))
    return np.clip(shared + tint, 0, 255).astype(np.uint8)


def folder_of(pictures: NDArray[np.uint8], folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    for index, pixels in enumerate(pictures):
        Image.fromarray(pixels.squeeze()).save(folder / f"{index:03}.png")
    return folder


@pytest.fixture(scope="module")
def calib(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of(colourful(), tmp_path_factory.mktemp("pictures"))


def fed(pictures: NDArray[np.uint8], scale: float, mean: Any, std: Any, color: str) -> NDArray[np.float64]:
    """(n, C, H, W) by the formula of `qconv manual preprocessing`."""
    ordered = pictures[..., ::-1] if color == "bgr" else pictures
    return ((ordered * scale - np.array(mean)) / np.array(std)).transpose(0, 3, 1, 2)


def convolved(x: NDArray[np.float64], w: NDArray[np.float32]) -> NDArray[np.float64]:
    """Convolution without padding, (n, K, H', W')."""
    windows = np.lib.stride_tricks.sliding_window_view(x, w.shape[2:], axis=(2, 3))
    return np.einsum("nchwij,kcij->nkhw", windows, w.astype(np.float64))


def trained(x: NDArray[np.float64], **instead: Any) -> onnx.ModelProto:
    """A network whose BatchNorm has stored what its input is for `x`, (n, C, H, W)."""
    channels = x.shape[1]
    w = np.random.default_rng(1).normal(size=(8, channels, 3, 3)).astype(np.float32)
    seen = convolved(x, w)
    stored = statistics(8, mean=seen.mean((0, 2, 3)), var=seen.var((0, 2, 3)))
    return network(BODY, x=("N", channels, SIDE, SIDE), w=w, v=(4, 8, 3, 3), **{**stored, **instead})


def trained_with(name: str, color: str | None = None, pictures: NDArray[np.uint8] | None = None) -> onnx.ModelProto:
    preset = PRESETS[name]
    wanted = color or preset.color
    mean, std = (values[::-1] if wanted != preset.color else values for values in (preset.mean, preset.std))
    return trained(fed(colourful() if pictures is None else pictures, preset.scale, mean, std, wanted))


def found(proto: onnx.ModelProto, folder: Path, samples: int = 128, **options: Any) -> DetectedPreprocessing:
    data = proto.SerializeToString()
    session = Session(data, threads=1)
    said = PreprocessingOptions(**options)
    pictures = DataOptions((str(folder),), samples=samples, preprocessing=said)
    feed = DataLoader.of(session, pictures, Reporter(print))
    return detect_preprocessing(loaded(proto), session, feed, said, threads=1)


# ---- statistics


@pytest.mark.parametrize("color", ["rgb", "bgr"])
@pytest.mark.parametrize("name", PRESETS)
def test_each_preset_in_each_colour_order_is_found(calib: Path, name: str, color: str) -> None:
    got = found(trained_with(name, color), calib)
    assert got.preprocessing is not None
    assert (got.preprocessing.preset, got.preprocessing.color) == (name, color)
    assert got.runner_up
    assert got.margin is not None
    assert got.margin >= (CERTAIN_MARGIN if color == PRESETS[name].color else 0.9)
    assert (got.doubt == "") == (got.margin >= CERTAIN_MARGIN)


@pytest.mark.parametrize("family", [f for f in COLOR_FAMILIES if f.name not in PRESETS], ids=lambda f: f.name)
def test_families_that_are_no_preset_are_found(calib: Path, family: Any) -> None:
    preset = PRESETS[family.options.preset]
    mean, std = family.options.mean or preset.mean, family.options.std or preset.std
    got = found(trained(fed(colourful(), preset.scale, mean, std, "rgb")), calib)
    assert got.preprocessing is not None
    assert (got.preprocessing.preset, got.preprocessing.mean) == (family.options.preset, mean)
    assert got.preprocessing.std == std


def test_mean_127_and_std_128_is_as_good_as_tf(calib: Path) -> None:
    got = found(trained(fed(colourful(), 1.0, (127,), (128,), "rgb")), calib)
    assert got.preprocessing is not None
    assert got.preprocessing.preset == "tf"
    assert got.doubt == ""


@pytest.mark.parametrize("name", ["unit", "tf", "raw"])
def test_grey(tmp_path: Path, name: str) -> None:
    pictures = colourful(channels=1)
    got = found(trained_with(name, "rgb", pictures), folder_of(pictures, tmp_path / "grey"))
    assert got.preprocessing is not None
    assert (got.preprocessing.preset, got.preprocessing.color) == (name, Color.GREY)
    assert got.doubt == ""


def test_mnist_numbers_on_grey(tmp_path: Path) -> None:
    pictures = colourful(channels=1)
    got = found(trained(fed(pictures, 1 / 255, 0.1307, 0.3081, "rgb")), folder_of(pictures, tmp_path / "grey"))
    assert got.preprocessing is not None
    assert (got.preprocessing.mean, got.preprocessing.std) == ((0.1307,), (0.3081,))


UNHEARD_OF = {
    "far too wide": (1 / 8, 2.0, 1.0),
    "between tf and imagenet": (1 / 255, 0.45, 0.36),
    "shifted": (1 / 255, -2.0, 1.0),
    "inverted": (-1 / 255, -1.0, 1.0),
}


@pytest.mark.parametrize(("scale", "mean", "std"), UNHEARD_OF.values(), ids=UNHEARD_OF)
def test_what_fits_nothing_is_told(calib: Path, scale: float, mean: float, std: float) -> None:
    got = found(trained(fed(colourful(), scale, (mean,), (std,), "rgb")), calib)
    assert got.margin is not None
    assert got.margin < CERTAIN_MARGIN
    assert "--preprocess" in got.doubt


def test_statistics_of_noise_fit_nothing(calib: Path) -> None:
    rng = np.random.default_rng(3)
    drawn = {"mean": rng.normal(0, 50, 8).astype(np.float32), "var": rng.uniform(1e-3, 1e3, 8).astype(np.float32)}
    got = found(trained(fed(colourful(), 1.0, 0, 1, "rgb"), **drawn), calib)
    assert "no known preprocessing fits well" in got.doubt
    assert got.runner_up == "something else"


def test_grey_pictures_do_not_tell_the_colour_order(tmp_path: Path) -> None:
    pictures = np.repeat(colourful(channels=1), 3, axis=3)
    got = found(trained_with("unit", "rgb", pictures), folder_of(pictures, tmp_path / "grey"))
    assert got.preprocessing is not None
    assert (got.preprocessing.preset, got.preprocessing.color) == ("unit", Color.RGB)
    assert "--color rgb or --color bgr settles it" in got.doubt


def test_dead_channels_do_not_matter(calib: Path) -> None:
    """A weight of zero: mean and variance are zero in training, and something tiny now."""
    proto = trained_with("unit")
    arrays = {t.name: onnx.numpy_helper.to_array(t).copy() for t in proto.graph.initializer}
    for name in ("w", "mean", "var"):
        arrays[name][:4] = 1e-12
    for tensor in proto.graph.initializer:
        tensor.CopyFrom(onnx.numpy_helper.from_array(arrays[tensor.name], tensor.name))
    got = found(proto, calib)
    assert got.preprocessing is not None
    assert got.preprocessing.preset == "unit"
    assert got.doubt == ""


def test_the_order_of_files_and_the_seed_do_not_matter(calib: Path, tmp_path: Path) -> None:
    paths = sorted(calib.iterdir())
    texts = []
    for name, order in (("a.txt", paths), ("b.txt", paths[::-1])):
        (tmp_path / name).write_text("\n".join(map(str, order)))
        texts.append(tmp_path / name)
    proto = trained_with("tf")
    got = [found(proto, text) for text in texts]
    assert got[0] == got[1] == found(proto, calib)


def test_a_batch_of_its_own_changes_nothing(calib: Path) -> None:
    free = trained_with("unit")
    fixed = onnx.ModelProto.FromString(free.SerializeToString())
    for value in (*fixed.graph.input, *fixed.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 5
    one, five = found(free, calib), found(fixed, calib)
    assert one.margin == pytest.approx(five.margin, abs=1e-4)
    assert (one.preprocessing, one.runner_up) == (five.preprocessing, five.runner_up)


# ---- confidence


def test_the_output_tells_the_order_where_statistics_cannot(tmp_path: Path) -> None:
    """Two classes, red and blue: the scores are high where a picture's red is in the first channel.

    The statistics are of both orders alike, as the weights of the first layer are grey.
    """
    pictures = colourful(48)
    rng = np.random.default_rng(0)
    grey = np.repeat(rng.normal(size=(4, 1, 1, 1)), 3, axis=1).astype(np.float32)
    seen = convolved(fed(pictures, 1 / 255, (0,), (1,), "rgb"), grey)
    stored = statistics(4, mean=seen.mean((0, 2, 3)), var=seen.var((0, 2, 3)))
    body = (
        "c = Conv(x, w)  b = BatchNormalization(c, gamma, beta, mean, var)  d = Conv(x, v)"
        "  k = Concat <axis = 1> (b, d)  p = GlobalAveragePool(k)  f = Flatten(p)  y = Gemm(f, u)"
    )
    v = np.array([1, 0, -1], np.float32).reshape(1, 3, 1, 1)
    for sign, color in ((1, "rgb"), (-1, "bgr")):
        u = np.zeros((5, 3), np.float32)
        u[4] = (20 * sign, -10 * sign, -10 * sign)
        proto = network(body, x=("N", 3, SIDE, SIDE), w=grey, v=v, u=u, **stored)
        got = found(proto, folder_of(pictures, tmp_path / "pictures"))
        assert got.preprocessing is not None
        assert (got.preprocessing.preset, got.preprocessing.color) == ("unit", color)
        assert got.doubt == ""


# ---- nothing stored


def test_without_statistics_it_is_a_guess(calib: Path) -> None:
    got = found(network("c = Conv(x, w)  y = Relu(c)", x=("N", 3, SIDE, SIDE), w=(8, 3, 3, 3)), calib)
    assert got.margin is not None
    assert got.margin < CERTAIN_MARGIN
    assert "is not certain" in got.doubt
    assert got.preprocessing is not None
    assert got.preprocessing.source == "guessed by the size of its first layers' outputs"


def test_without_any_evidence_the_default_stays(calib: Path) -> None:
    got = found(network("f = Flatten(x)  y = Gemm(f, w)", x=("N", 3, SIDE, SIDE), w=(3 * SIDE * SIDE, 2)), calib)
    assert got.preprocessing is not None
    assert got.preprocessing.preset == "imagenet"
    assert got.doubt


def test_statistics_that_were_never_measured_are_no_evidence() -> None:
    x = fed(colourful(), 1.0, 0, 1, "rgb")
    untrained = trained(x, mean=np.zeros(8, np.float32), var=np.ones(8, np.float32))
    assert [reference.stored for reference in find_references(loaded(untrained))] == [False, False]
    assert [reference.stored for reference in find_references(loaded(trained(x)))] == [True]


def test_statistics_far_from_the_pixels_are_no_evidence() -> None:
    x = fed(colourful(), 1.0, 0, 1, "rgb")
    deep = trained(x)
    chain = [onnx.helper.make_node("Conv", [f"r{i}" if i else "x", "same"], [f"r{i + 1}"]) for i in range(12)]
    nodes = [*chain, *deep.graph.node]
    nodes[12].input[0] = "r12"
    del deep.graph.node[:]
    deep.graph.node.extend(nodes)
    same = np.eye(3, dtype=np.float32).reshape(3, 3, 1, 1)
    deep.graph.initializer.append(onnx.numpy_helper.from_array(same, "same"))
    assert not any(reference.stored for reference in find_references(loaded(deep)))


# ---- facts


def per_channel(*numbers: float) -> NDArray[np.float32]:
    return np.array(numbers, np.float32).reshape(1, -1, 1, 1)


IMAGENET_PIXELS = (123.675, 116.28, 103.53)
INSIDE: dict[str, tuple[str, dict[str, Any], str, Color | None]] = {
    "by 255": ("n = Div(x, a)", {"a": 255.0}, "raw", None),
    "times 1/255": ("n = Mul(x, a)", {"a": 1 / 255}, "raw", None),
    "to -1..1": ("m = Mul(x, a)  n = Sub(m, b)", {"a": 1 / 127.5, "b": 1.0}, "raw", None),
    "mean and std of pixels": (
        "m = Sub(x, a)  n = Div(m, b)",
        {"a": per_channel(*IMAGENET_PIXELS), "b": per_channel(58.4, 57.1, 57.4)},
        "raw",
        Color.RGB,
    ),
    "caffe": ("n = Sub(x, a)", {"a": per_channel(103.939, 116.779, 123.68)}, "raw", Color.BGR),
    "mean and std of shares": (
        "m = Sub(x, a)  n = Div(m, b)",
        {"a": per_channel(0.485, 0.456, 0.406), "b": per_channel(0.229, 0.224, 0.225)},
        "unit",
        Color.RGB,
    ),
    "from 0..1 to pixels": ("n = Mul(a, x)", {"a": 255.0}, "unit", None),
    "added": ("m = Mul(x, b)  n = Add(m, a)", {"a": per_channel(-2.1, -2.0, -1.8), "b": 4.4}, "unit", Color.RGB),
    "a BatchNorm": (
        "n = BatchNormalization(x, gamma, beta, mean, var)",
        statistics(3, mean=np.array(IMAGENET_PIXELS), var=np.full(3, 3300.0)),
        "raw",
        Color.RGB,
    ),
}


@pytest.mark.parametrize(("body", "constants", "preset", "color"), INSIDE.values(), ids=INSIDE)
def test_a_normalisation_inside_is_a_fact(body: str, constants: Any, preset: str, color: Color | None) -> None:
    proto = network(f"{body}  y = Conv(n, w)", x=("N", 3, SIDE, SIDE), w=(8, 3, 3, 3), **constants)
    fact = find_fact(loaded(proto), FLOAT, Layout.NCHW)
    assert fact is not None
    assert (fact.options.preset, fact.options.color) == (preset, color)
    assert fact.why == "the graph normalises its input itself"


def test_a_normalisation_before_a_transpose_is_a_fact(calib: Path) -> None:
    means = np.array(IMAGENET_PIXELS, np.float32)
    body = "m = Sub(x, a)  n = Div(m, b)  t = Transpose <perm = [0, 3, 1, 2]> (n)  y = Conv(t, w)"
    proto = network(body, x=("N", SIDE, SIDE, 3), w=(8, 3, 3, 3), a=means, b=58.0)
    got = found(proto, calib)
    assert got.preprocessing is not None
    assert (got.preprocessing.preset, got.preprocessing.color) == ("raw", Color.RGB)
    assert (got.margin, got.runner_up, got.doubt) == (1.0, None, "")


NO_FACT = {
    "nothing": ("n = Identity(x)", {}),
    "twice": ("n = Mul(x, a)", {"a": 2.0}),
    "from -1..1": ("m = Mul(x, a)  n = Add(m, b)", {"a": 127.5, "b": 24.0}),
    "by itself": ("n = Mul(x, x)", {}),
    "reversed": ("n = Sub(a, x)", {"a": 255.0}),
    "zero": ("n = Mul(x, a)", {"a": 0.0}),
    "a map": ("n = Sub(x, a)", {"a": (1, 3, SIDE, SIDE)}),
}


@pytest.mark.parametrize(("body", "constants"), NO_FACT.values(), ids=NO_FACT)
def test_other_nodes_are_no_fact(body: str, constants: Any) -> None:
    proto = network(f"{body}  y = Conv(n, w)", x=("N", 3, SIDE, SIDE), w=(8, 3, 3, 3), **constants)
    assert find_fact(loaded(proto), FLOAT, Layout.NCHW) is None


METADATA: dict[str, tuple[dict[str, str], PreprocessingOptions]] = {
    "Windows ML": (
        {"Image.NominalPixelRange": "Normalized_1_1", "Image.BitmapPixelFormat": "Bgr8"},
        PreprocessingOptions("tf", color=Color.BGR),
    ),
    "Windows ML, no order": ({"Image.NominalPixelRange": "NominalRange_0_255"}, PreprocessingOptions("raw")),
    "YOLO": (
        {"author": "Ultralytics", "stride": "32", "task": "detect", "names": "{}"},
        PreprocessingOptions("unit", color=Color.RGB, resize="letterbox"),
    ),
    "YOLO that classifies": (
        {"author": "Ultralytics", "stride": "1", "task": "classify", "names": "{}"},
        PreprocessingOptions("unit", color=Color.RGB),
    ),
}


@pytest.mark.parametrize(("carried", "options"), METADATA.values(), ids=METADATA)
def test_metadata_is_a_fact(calib: Path, carried: dict[str, str], options: PreprocessingOptions) -> None:
    proto = trained_with("caffe")
    onnx.helper.set_model_props(proto, carried)
    fact = find_fact(loaded(proto), FLOAT, Layout.NCHW)
    assert fact is not None
    assert fact.options == options
    got = found(proto, calib)
    assert got.preprocessing is not None
    assert (got.preprocessing.preset, got.preprocessing.resize) == (options.preset, options.resize)


def test_what_qconv_wrote_is_read_again(calib: Path) -> None:
    proto = trained_with("caffe")
    said = found(proto, calib, preset="tf", scale=0.5, color=Color.BGR, resize="exact").preprocessing
    assert said is not None
    onnx.helper.set_model_props(proto, {"qconv.preprocessing": json.dumps(said.as_dict())})
    got = found(proto, calib)
    assert got.preprocessing is not None
    assert replace(got.preprocessing, source="") == replace(said, source="")
    assert (got.margin, got.doubt) == (1.0, "")


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"preset": "imagenet"}', '{"preset": 1, "scale": "x"}'])
def test_damaged_metadata_is_no_fact(text: str) -> None:
    proto = trained_with("caffe")
    onnx.helper.set_model_props(proto, {"qconv.preprocessing": text})
    assert find_fact(loaded(proto), FLOAT, Layout.NCHW) is None


def bytes_in(name: str) -> onnx.ModelProto:
    body = f"n = Cast <to = 1> (x)  {BODY.replace('Conv(x', 'Conv(n')}"
    proto = network(body, x=("N", 3, SIDE, SIDE), w=(8, 3, 3, 3), v=(4, 8, 3, 3), **statistics(8))
    known = {t.name: t for t in trained_with(name).graph.initializer}
    for tensor in proto.graph.initializer:
        tensor.CopyFrom(known[tensor.name])
    proto.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.UINT8
    return proto


def test_bytes_are_raw_and_their_order_is_found(calib: Path) -> None:
    got = found(bytes_in("raw"), calib)
    assert got.preprocessing is not None
    assert (got.preprocessing.preset, got.preprocessing.color) == ("raw", Color.RGB)
    assert got.preprocessing.source == "the input takes bytes"
    assert got.doubt == ""


# ---- what the user says


@pytest.mark.parametrize(
    "told", [{"preset": "raw"}, {"preset": "imagenet"}, {"preset": "tf", "color": Color.BGR}], ids=str
)
def test_the_user_wins_and_hears_of_clear_evidence(calib: Path, told: dict[str, Any]) -> None:
    got = found(trained_with("unit"), calib, **told)
    assert got.preprocessing is not None
    assert got.preprocessing.preset == told["preset"]
    assert (got.margin, got.runner_up) == (None, None)
    assert "speak for --preprocess unit and against the options given" in got.doubt


@pytest.mark.parametrize(
    ("trained_as", "told"),
    [
        ("unit", {"preset": "unit"}),
        ("unit", {"preset": "raw", "scale": 1 / 255}),
        ("tf", {"preset": "raw", "mean": (127.0,), "std": (128.0,)}),
        ("imagenet", {"preset": "imagenet", "mean": (0.48, 0.46, 0.41)}),
    ],
    ids=str,
)
def test_the_user_who_is_right_hears_nothing(calib: Path, trained_as: str, told: dict[str, Any]) -> None:
    assert found(trained_with(trained_as), calib, **told).doubt == ""


def test_weak_evidence_is_not_told_to_who_has_decided(calib: Path) -> None:
    proto = network("c = Conv(x, w)  y = Relu(c)", x=("N", 3, SIDE, SIDE), w=(8, 3, 3, 3))
    for name in PRESETS:
        assert found(proto, calib, preset=name).doubt == ""


def test_bytes_are_pixels_whatever_is_said(calib: Path) -> None:
    for preset in ("imagenet", "raw"):
        got = found(bytes_in("raw"), calib, preset=preset)
        assert got.preprocessing is not None
        assert got.preprocessing.preset == "raw"
        assert got.doubt == ""


def test_one_option_limits_the_rest(calib: Path) -> None:
    got = found(trained_with("tf", "bgr"), calib, color=Color.BGR)
    assert got.preprocessing is not None
    assert (got.preprocessing.preset, got.preprocessing.color) == ("tf", Color.BGR)
    got = found(trained(fed(colourful(), 1.0, (127,), (128,), "rgb")), calib, mean=(127.0,), std=(128.0,))
    assert got.preprocessing is not None
    assert (got.preprocessing.scale, got.preprocessing.mean, got.doubt) == (1.0, (127.0,), "")


def test_one_option_against_the_evidence_is_told(calib: Path) -> None:
    got = found(trained_with("tf"), calib, color=Color.BGR)
    assert got.preprocessing is not None
    assert got.preprocessing.color is Color.BGR
    assert "speak for --preprocess tf and against" in got.doubt


def test_options_of_shape_are_kept(calib: Path) -> None:
    got = found(trained_with("unit"), calib, resize="letterbox", filter="bicubic")
    assert got.preprocessing is not None
    assert (got.preprocessing.preset, got.preprocessing.resize, got.preprocessing.filter) == (
        "unit",
        "letterbox",
        "bicubic",
    )


@pytest.mark.parametrize("family", [*COLOR_FAMILIES, *GREY_FAMILIES], ids=lambda f: f.settled_by)
def test_the_options_named_are_those_that_settle_it(family: Any) -> None:
    """What the doubt advises is what the command line takes."""
    from click.testing import CliRunner

    from qconv.cli.main import cli

    done = CliRunner().invoke(cli, ["quantize", "no.onnx", "--calib", "no", *family.settled_by.split()])
    assert done.exit_code == 1, done.output  # not 2, which is for usage


# ---- the whole run


def test_the_report_tells_choice_runner_up_and_margin(calib: Path) -> None:
    heard: list[str] = []
    source = Source("m", None, trained_with("tf").SerializeToString())
    report, _ = quantize(source, None, Recipe(threads=1), DataOptions((str(calib),)), Reporter(heard.append))
    told = report.as_dict()
    assert (told["preprocessing"]["preset"], told["recipe"]["preprocessing"]["preset"]) == ("tf", "auto")
    assert told["preprocessing"]["margin"] >= CERTAIN_MARGIN
    assert told["preprocessing"]["runner_up"] in report.preprocessing_words
    assert "margin 1.00" in report.preprocessing_words
    assert told["time"]["detect"] > 0
    assert not [text for text in heard if "settles" in text]


def test_doubt_is_a_warning(calib: Path) -> None:
    heard: list[str] = []
    proto = network("c = Conv(x, w)  y = Relu(c)", x=("N", 3, SIDE, SIDE), w=(8, 3, 3, 3))
    recipe, data = Recipe(threads=1), DataOptions((str(calib),))
    report, _ = quantize(Source("m", None, proto.SerializeToString()), None, recipe, data, Reporter(heard.append))
    assert [text for text in report.warnings if "settles it" in text] == [
        text for text in heard if "settles it" in text
    ]
    assert len([text for text in heard if "settles it" in text]) == 1


def test_samples_need_no_detection(tmp_path: Path) -> None:
    for index in range(3):
        np.save(tmp_path / f"{index}.npy", np.full((3, SIDE, SIDE), index, np.float32))
    assert found(trained_with("tf"), tmp_path) == DetectedPreprocessing(None)


def test_a_broken_picture_is_left_to_the_run(calib: Path, tmp_path: Path) -> None:
    folder = folder_of(colourful(), tmp_path / "some")
    (folder / "000.png").write_bytes(b"hello")
    got = found(trained_with("unit"), folder)
    assert got.preprocessing is not None
    assert got.preprocessing.preset == "unit"


# ---- real networks

KNOWN = {
    "resnet20_cifar10": ("cifar10", "imagenet", {}),
    "kerascnn_cifar10": ("cifar10", "raw", {}),
    "mobilenetv2_imagenet": ("imagenet", "imagenet", {}),
    "efficientnet_lite0_imagenet": ("imagenet", "tf", {}),
    "efficientnet_b0_binary": ("imagenet", "imagenet", {}),
    "rapidocr_cls_v2": ("imagenet", "tf", {"size": (48, 192)}),
}


@pytest.mark.skipif(not DATA.is_dir(), reason="needs the models of $QCONV_DATA or ../shared/data")
@pytest.mark.parametrize("pictures", ["own", "other", "few"])
@pytest.mark.parametrize("name", KNOWN)
def test_real_networks_are_right_or_uncertain(name: str, pictures: str) -> None:
    folder, preset, options = KNOWN[name]
    calib = ROOT / "calib_samples" if pictures == "other" else DATA / "images" / folder / "calib"
    proto = onnx.load(DATA / "models" / f"{name}.onnx")
    got = found(proto, calib, samples=6 if pictures == "few" else 128, **options)
    assert got.preprocessing is not None
    right = (got.preprocessing.preset, got.preprocessing.color) == (preset, Color.RGB)
    assert right or got.doubt
    if pictures == "own":
        assert right
