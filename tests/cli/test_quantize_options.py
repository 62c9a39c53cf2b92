"""The options of `qconv quantize`: which are refused, and that the others reach the pictures and the file."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from PIL import Image

from tests.support.cli import CIFAR, PHOTOS, QUICK, Qconv, assert_error, listing, write_with_open_size
from tests.support.libraries import MOVES_CODES, needs


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("--colour rgb", "No such option"),
        ("--weight-bits 9", "2 to 8"),
        ("--weight-bits eight", "not a valid integer"),
        ("--activation-bits 9", "2 to 8"),
        ("--edge-bits 1", "2 to 8"),
        ("--edge-bits 32", "2 to 8"),
        ("--pack", "7 or fewer"),
        ("--min-agreement 1.01", "0 to 1"),
        ("--min-sqnr nan", "dB"),
        ("--samples 0", "samples"),
        ("--batch 0", "batch"),
        ("--threads 0", "threads"),
        ("--seed -1", "seed"),
        ("--size 0x8", "224x224"),
        ("--size 8x8x3", "224x224"),
        ("--resize wide", "letterbox"),
        ("--mean 1/0", "mean"),
        ("--mean nan", "mean"),
        ("--scale 1,2", "one number"),
        ("--scale 0", "scale"),
        ("--weight-scheme none", "symmetric"),
        ("--embed-preprocessing hwc", "nhwc"),
        ("--calibrator magic", "calibrator"),
        ("--target gpu", "target"),
        ("more.onnx", "more.onnx"),
    ],
)
def test_usage_errors_have_status_2(call: Qconv, tiny: Path, calib: Path, options: str, says: str) -> None:
    done = call("quantize", tiny, "--calib", calib, *options.split())
    assert listing(tiny.parent) == ["model.onnx"]
    assert done.out == b""
    assert "Error" in done.err
    assert says in done.err
    assert done.status == 2


def test_calibration_is_not_optional(call: Qconv, tiny: Path) -> None:
    done = call("quantize", tiny)
    assert done.status == 2
    assert "--calib" in done.err


def test_ways_to_name_pictures(call: Qconv, tiny: Path, calib: Path, tmp_path: Path) -> None:
    """A folder, the same as a list, its halves one after the other, one picture, a pattern."""
    halves = tmp_path / "a", tmp_path / "b"
    for number, path in enumerate(sorted(calib.iterdir())):
        (folder := halves[number // 10]).mkdir(exist_ok=True)
        shutil.copy(path, folder)
    (text := tmp_path / "list.txt").write_text("".join(f"{path}\n" for path in sorted(calib.iterdir())))
    results = {
        args: call("quantize", tiny, *args.split(), "-o", "-").out
        for args in (f"--calib {calib}", f"--calib {text}", f"--calib {halves[0]} --calib {halves[1]}")
    }
    assert len(set(results.values())) == 1

    def images(*args: object) -> int:
        args = ("quantize", tiny, *args, "--min-sqnr", "-100", "--json", "-o", tiny.with_name("o"))
        return int(call(*args).json["verify"]["images"])

    assert images("--calib", calib / "00.png") == 1
    assert images("--calib", calib, "--glob", "0*.png") == 10
    assert images("--calib", calib, "--samples", "7") == 7
    assert images("--calib", calib, "--samples", "7", "--batch", "3") == 7


def initializers(path: Path) -> dict[str, onnx.TensorProto]:
    return {tensor.name: tensor for tensor in onnx.load(path).graph.initializer}


def test_keep_float_keeps_a_layer(call: Qconv, tiny: Path, calib: Path) -> None:
    done = call("quantize", tiny, "--calib", calib, "--keep-float", "[xyz]", "--json")
    weights = [row["name"] for row in done.json["tensors"] if row["kind"] == "weight" and row["bits"] == 8]
    assert len(weights) == 1
    (island,) = [row for row in done.json["audit"]["islands"] if row["op"] in ("Gemm", "MatMul")]
    assert "--keep-float" in island["why"]
    kept = [t for t in initializers(tiny.with_name("model.w8a8.onnx")).values() if t.data_type == TensorProto.FLOAT]
    assert sorted([4, 10]) in [sorted(t.dims) for t in kept]
    all_kept = call("quantize", tiny, "--calib", calib, "--keep-float", "*")
    assert_error(all_kept, "nothing to quantize(?s:.*)--keep-float")


def test_a_pattern_that_keeps_nothing_is_told(call: Qconv, tiny: Path, calib: Path) -> None:
    """A misspelt --keep-float must not pass in silence."""
    done = call("quantize", tiny, "--calib", calib, "--keep-float", "clasifier*")
    assert "clasifier" in done.err


def test_open_sizes_need_a_size(call: Qconv, tiny: Path, calib: Path) -> None:
    write_with_open_size(tiny)
    done = call("quantize", tiny, "--calib", calib, "--size", "6x10", "--json")
    assert done.status == 0
    assert done.json["preprocessing"]["size"] == [6, 10]
    assert_error(call("quantize", CIFAR, "--calib", calib, "--size", "33x32", "-o", tiny.with_name("o")), "33x32")


def test_preprocessing_options_reach_the_pictures(call: Qconv, tiny: Path, tmp_path: Path) -> None:
    """One picture of one colour: the scale of the input follows from (pixel * scale - mean) / std by hand."""
    (tmp_path / "one").mkdir()
    Image.new("RGB", (8, 8), (255, 51, 0)).save(tmp_path / "one" / "0.png")
    for options, low, high in (
        ("--preprocess raw", 0, 255),
        ("--preprocess unit", 0, 1),
        ("--preprocess tf", -1, 1),
        ("--preprocess caffe", -103.939, 255 - 123.68),
        ("--preprocess raw --color bgr --mean 255,0,0", -255, 255),
        ("--preprocess raw --scale 1/51 --std 5", 0, 1),
    ):
        done = call("quantize", tiny, "--calib", tmp_path / "one", *options.split(), "--json")
        (row,) = [row for row in done.json["tensors"] if row["name"] == "x"]
        assert row["scale"] == pytest.approx((high - low) / 255, rel=1e-4), options
        assert row["zero_point"] == round(-low / row["scale"])


@needs("onnxruntime", "1.22", MOVES_CODES)
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_a_file_that_takes_pixels(call: Qconv, tmp_path: Path, layout: str) -> None:
    """The summary says so; the file gives the same bytes again, and the classes that the float model gives."""
    options = ("--calib", PHOTOS, *QUICK, "--preprocess", "imagenet", "--embed-preprocessing", layout)
    outs = [tmp_path / name for name in ("a.onnx", "b.onnx")]
    text = call("quantize", CIFAR, *options, "-o", outs[0]).out.decode()
    found = call("quantize", CIFAR, *options, "-o", outs[1], "--json").json
    assert outs[0].read_bytes() == outs[1].read_bytes()
    assert f"pictures      RGB pixels as they are, uint8 {layout.upper()} 32x32, stretched; inside the file: " in text
    assert found["recipe"]["embed_preprocessing"] == found["preprocessing"]["layout"] == layout
    assert found["preprocessing"]["embedded"]["mean"] == [0.485, 0.456, 0.406]
    assert found["audit"]["islands"] == []
    assert found["verify"]["agreement"] > 0.8
    assert_error(call("quantize", outs[0], *options, "-o", tmp_path / "c.onnx"), "already quantized")


def test_samples_have_no_preprocessing_to_embed(call: Qconv, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    np.save(tmp_path / "s" / "0.npy", np.zeros((3, 8, 8), np.float32))
    done = call("quantize", tiny, "--calib", tmp_path / "s", "--embed-preprocessing", "nchw")
    assert_error(done, "preprocessed already(.|\n)*leave --embed-preprocessing out")
    assert listing(tiny.parent) == [tiny.name]


@pytest.mark.parametrize(
    ("text", "scale"),
    [("1/255", 1 / 255), ("1/127.5", 1 / 127.5), ("0.5", 0.5), (" 2 / 4 ", 0.5), ("-1/255", -1 / 255)],
)
def test_numbers_may_be_fractions(call: Qconv, tiny: Path, calib: Path, text: str, scale: float) -> None:
    done = call("quantize", tiny, "--calib", calib, "--json", "--preprocess", "raw", "--scale", text)
    assert done.json["preprocessing"]["scale"] == scale


@pytest.mark.parametrize("text", ["1/0", "a", "1/2/3", "", "1,2"])
def test_what_is_no_number_is_a_usage_error(call: Qconv, tiny: Path, calib: Path, text: str) -> None:
    done = call("quantize", tiny, "--calib", calib, "--scale", text)
    assert done.status == 2
    assert "--scale" in done.err


@pytest.mark.parametrize(
    ("command", "options", "why"),
    [
        ("quantize", ("--sweep", "recipes.toml"), "a sweep scores recipes on them"),
        ("quantize", ("--samples", "4"), "--samples with --calib none is not possible"),
        ("study-samples", (), "how many of them it takes"),
        ("diagnose", (), "a diagnosis scores on some of them"),
    ],
)
def test_what_needs_pictures(call: Qconv, tiny: Path, command: str, options: tuple[str, ...], why: str) -> None:
    done = call(command, tiny, "--calib", "none", *options)
    assert done.status == 2
    assert why in " ".join(done.err.split())
    assert listing(tiny.parent) == ["model.onnx"]


def test_targets_and_their_refusals(call: Qconv, tiny: Path, calib: Path) -> None:
    options = ("--calib", calib, "--preprocess", "unit")
    done = call("quantize", tiny, *options, "--target", "tensorrt")
    assert done.status == 0
    assert "as tensorrt decides" in done.out.decode()
    assert "speed here" not in done.out.decode()
    refused = call("quantize", tiny, *options, "--target", "tensorrt", "--activation-scheme", "asymmetric")
    assert refused.status == 2
    assert "zero point 0" in refused.err


def test_saturation_is_a_choice_of_three(call: Qconv, tiny: Path, calib: Path) -> None:
    options = ("--calib", calib, "--preprocess", "unit", "--json", "-o", tiny.parent / "o.onnx")
    kept = [
        call("quantize", tiny, *options, *more).json["recipe"]["saturation_safe"]
        for more in ((), ("--saturation-safe",), ("--no-saturation-safe",))
    ]
    assert kept == [None, True, False]


@pytest.mark.parametrize(
    "options",
    [
        ("--saturation-safe", "--activation-bits", "32"),
        ("--no-saturation-safe", "--weight-bits", "16"),
        ("--no-saturation-safe", "--target", "tensorrt"),
        ("--block-size", "16"),
        ("--activation-scheme", "symmetric", "--activation-bits", "32"),
    ],
)
def test_options_that_would_do_nothing_are_refused(
    call: Qconv, tiny: Path, calib: Path, options: tuple[str, ...]
) -> None:
    done = call("quantize", tiny, "--calib", calib, "--preprocess", "unit", *options)
    assert done.status == 2
    assert options[0] in done.err
    assert listing(tiny.parent) == ["model.onnx"]
