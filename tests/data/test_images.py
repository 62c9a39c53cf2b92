"""Pictures to batches. Oracles: values worked by hand, NumPy formulas, torchvision's documented algorithm on Pillow."""

from __future__ import annotations

import io
import itertools
import os
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
import zlib
from collections.abc import Callable, Generator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from qconv import storage
from qconv.config.choices import PICTURE_SUFFIXES
from qconv.config.data_options import (
    PRESETS,
    RESIZE_MODES,
    Color,
    Layout,
    Preprocessing,
    PreprocessingOptions,
    ResizeFilter,
)
from qconv.data.batches import PixelCache, iter_batches
from qconv.data.dataset import Listing, find_files
from qconv.data.fitting import choose_scaled_size
from qconv.data.images import UnreadableImage, load_pixels
from qconv.data.preprocessing import InputSpec, normalize_pixels, resolve_preprocessing
from qconv.errors import QconvError
from qconv.reporter import Reporter
from qconv.storage import prefetch
from tests.support.libraries import skip_without

FLOAT = np.dtype(np.float32)
BYTE = np.dtype(np.uint8)
RAW = Preprocessing(
    preset="raw",
    source="a test",
    color=Color.RGB,
    scale=1.0,
    mean=(0.0,),
    std=(1.0,),
    layout=Layout.NHWC,
    resize="auto",
    filter=ResizeFilter.BILINEAR,
    size=(2, 3),
    class_vector=False,
)
# 2 rows of 3 pixels, all values apart
PIXELS = np.arange(0, 18 * 14, 14, dtype=np.uint8).reshape(2, 3, 3)


def load_image(path: Path, prep: Preprocessing) -> np.ndarray:
    """A picture as the network takes it."""
    return normalize_pixels(load_pixels(path, prep), prep)


def spec(*shape: int | None, dtype: np.dtype[Any] = FLOAT, name: str = "x") -> InputSpec:
    return InputSpec(name, dtype, shape)


def noise(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def save(picture: Image.Image, path: Path, **how: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, **how)
    return path


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def folder_of(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return folder


def found(*sources: Path, pattern: str | None = None, samples: int = 1000, seed: int = 0) -> Listing:
    return find_files([str(s) for s in sources], pattern=pattern, samples=samples, seed=seed)


def listing(*paths: Path) -> Listing:
    return Listing(paths, len(paths), 0)


def run(
    paths: Listing, *inputs: InputSpec, prep: Preprocessing | None = RAW, batch: int = 2, workers: int = 2
) -> tuple[list[dict[str, np.ndarray]], list[str]]:
    warnings: list[str] = []
    given = iter_batches(paths, inputs, prep, batch=batch, workers=workers, reporter=Reporter(warnings.append))
    return list(given), warnings


# ---- find


def test_find_reads_folders_recursively_and_counts_what_it_ignores(tmp_path):
    folder = folder_of(tmp_path / "c", "a.jpg", "deep/er/b.PNG", "deep/s.npy", "deep/t.npz", "notes.txt", "README")
    folder_of(folder, ".hidden.jpg", ".git/c.jpg")
    listed = found(folder)
    assert {p.relative_to(folder).as_posix() for p in listed.paths} == {
        "a.jpg",
        "deep/er/b.PNG",
        "deep/s.npy",
        "deep/t.npz",
    }
    assert (listed.found, listed.ignored) == (4, 2)


@pytest.mark.parametrize("suffix", sorted(PICTURE_SUFFIXES))
def test_find_takes_every_picture_suffix_in_any_case(tmp_path, suffix):
    folder = folder_of(tmp_path / "c", f"a{suffix}", f"B{suffix.upper()}")
    assert found(folder).found == 2


def test_find_draws_the_same_files_for_any_order_of_creation(tmp_path, monkeypatch):
    names = [f"{i // 10}/{i:03}.jpg" for i in range(40)]
    one, other = folder_of(tmp_path / "one", *names), folder_of(tmp_path / "other", *reversed(names))
    drawn = [p.relative_to(one) for p in found(one, samples=10).paths]
    assert drawn == [p.relative_to(other) for p in found(other, samples=10).paths]

    walk = os.walk

    def backwards(top, **how):
        for here, folders, files in walk(top, **how):
            folders.reverse()
            yield here, folders, files[::-1]

    monkeypatch.setattr(os, "walk", backwards)
    assert drawn == [p.relative_to(one) for p in found(one, samples=10).paths]


def test_find_shuffles_the_sorted_files_with_the_seed_and_keeps_the_first(tmp_path):
    names = [f"{i:02}.jpg" for i in range(20)]
    folder = folder_of(tmp_path / "c", *names)
    order = np.random.default_rng(7).permutation(20)
    assert [p.name for p in found(folder, samples=5, seed=7).paths] == [names[i] for i in order[:5]]
    assert found(folder, samples=5, seed=7).found == 20
    assert found(folder, samples=5, seed=8).paths != found(folder, samples=5, seed=7).paths
    assert sorted(p.name for p in found(folder).paths) == names


def test_find_sorts_by_source_before_name(tmp_path):
    b, a = folder_of(tmp_path / "b", "z.jpg"), folder_of(tmp_path / "a", "a.jpg")
    order = np.random.default_rng(0).permutation(2)
    assert [p.name for p in found(b, a).paths] == [("z.jpg", "a.jpg")[i] for i in order]


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("*.jpg", {"a.jpg", "cats/b.jpg"}),
        ("cats/*", {"cats/b.jpg", "cats/c.png"}),
        ("?.png", {"cats/c.png"}),
        ("*", {"a.jpg", "cats/b.jpg", "cats/c.png"}),
    ],
)
def test_find_globs_names_and_relative_paths(tmp_path, pattern, names):
    folder = folder_of(tmp_path / "c", "a.jpg", "cats/b.jpg", "cats/c.png", "cats/d.txt")
    listed = found(folder, pattern=pattern)
    assert {p.relative_to(folder).as_posix() for p in listed.paths} == names
    assert (listed.found, listed.ignored) == (len(names), 1)


def test_find_reads_a_text_file_relative_to_its_own_folder(tmp_path, monkeypatch):
    folder_of(tmp_path / "lists", "a.jpg", "sub/b c.png", "notes.md")
    elsewhere = folder_of(tmp_path / "elsewhere", "d.jpg")
    text = tmp_path / "lists" / "all.txt"
    lines = ["\ufeff# a comment", "", "a.jpg", "  sub/b c.png \r", "notes.md", str(elsewhere / "d.jpg")]
    text.write_text("\n".join(lines), encoding="utf-8")
    monkeypatch.chdir(elsewhere)
    listed = found(text)
    assert {p.name for p in listed.paths} == {"a.jpg", "b c.png", "d.jpg"}
    assert all(p.is_file() for p in listed.paths)
    assert (listed.found, listed.ignored) == (3, 1)


def test_find_takes_a_single_picture(tmp_path):
    folder = folder_of(tmp_path, "one.jpg")
    assert found(folder / "one.jpg").paths == (folder / "one.jpg",)


def test_find_survives_a_link_that_goes_round(tmp_path):
    folder = folder_of(tmp_path / "c", "deep/a.jpg")
    (folder / "deep" / "again").symlink_to(folder, target_is_directory=True)
    outside = folder_of(tmp_path / "outside", "b.jpg")
    (folder / "linked").symlink_to(outside, target_is_directory=True)
    assert {p.name for p in found(folder).paths} == {"a.jpg", "b.jpg"}
    assert found(folder).found == 2


def _missing(at: Path) -> Path:
    return at / "nowhere"


def _empty(at: Path) -> Path:
    return folder_of(at / "empty")


def _only_text(at: Path) -> Path:
    return folder_of(at / "texts", *(f"{i}.txt" for i in range(5)))


def _one_text(at: Path) -> Path:
    return folder_of(at / "texts", "only.txt")


def _binary(at: Path) -> Path:
    (at / "model.onnx").write_bytes(b"\x08\xff\xfe\x00")
    return at / "model.onnx"


def _bad_line(at: Path) -> Path:
    folder_of(at, "a.jpg")
    (at / "list.txt").write_text("a.jpg\n\ngone.jpg\n")
    return at / "list.txt"


def _folder_line(at: Path) -> Path:
    folder_of(at / "cats")
    (at / "list.txt").write_text("cats\n")
    return at / "list.txt"


def _no_lines(at: Path) -> Path:
    (at / "list.txt").write_text("# nothing yet\n")
    return at / "list.txt"


@pytest.mark.parametrize(
    ("build", "fact"),
    [
        (_missing, "nowhere does not exist."),
        (_empty, "empty is an empty folder."),
        (_only_text, "texts holds 5 files but none is a picture."),
        (_one_text, "texts holds 1 file but none is a picture."),
        (_binary, "model.onnx is neither a folder, nor a picture, nor a text file of paths."),
        (_bad_line, "list.txt: gone.jpg does not exist."),
        (_folder_line, "list.txt: cats is a folder."),
        (_no_lines, "no file was found in"),
    ],
)
def test_find_says_what_is_wrong_with_a_source(tmp_path, build, fact):
    source = build(tmp_path)
    with pytest.raises(QconvError) as caught:
        found(source)
    assert fact in caught.value.message
    assert caught.value.hint


def test_find_names_the_line_of_a_missing_path(tmp_path):
    with pytest.raises(QconvError, match=r"^line 3 of .*list\.txt"):
        found(_bad_line(tmp_path))


def test_find_says_when_the_glob_leaves_nothing(tmp_path):
    folder = folder_of(tmp_path / "c", "a.jpg", "b.jpg")
    with pytest.raises(QconvError, match=r"none of the 2 pictures in .* matches --glob '\*\.png'"):
        found(folder, pattern="*.png")


def test_find_names_all_sources_that_hold_nothing(tmp_path):
    with pytest.raises(QconvError, match=r"a and .*b hold 3 files but none"):
        found(folder_of(tmp_path / "a", "1.txt"), folder_of(tmp_path / "b", "1.txt", "2.txt"))
    with pytest.raises(QconvError, match="no pictures were given"):
        find_files([], pattern=None, samples=1, seed=0)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the superuser may read everything")
def test_find_does_not_pass_over_a_locked_folder(tmp_path):
    locked = folder_of(tmp_path / "c" / "locked", "a.jpg")
    locked.chmod(0)
    try:
        with pytest.raises(QconvError, match="locked cannot be read"):
            found(tmp_path / "c")
    finally:
        locked.chmod(0o700)


# ---- resolve

PUBLISHED = {  # the table in the documentation
    "imagenet": (Color.RGB, 1 / 255, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "tf": (Color.RGB, 1 / 127.5, (1.0,), (1.0,)),
    "caffe": (Color.BGR, 1.0, (103.939, 116.779, 123.68), (1.0,)),
    "unit": (Color.RGB, 1 / 255, (0.0,), (1.0,)),
    "raw": (Color.RGB, 1.0, (0.0,), (1.0,)),
}


@pytest.mark.parametrize("name", PRESETS)
def test_resolve_takes_a_preset_as_published(name):
    prep = resolve_preprocessing(PreprocessingOptions(preset=name), spec(None, 3, 224, 224), class_vector=True)
    assert (prep.color, prep.scale, prep.mean, prep.std) == PUBLISHED[name]
    assert (prep.preset, prep.source, prep.class_vector) == (name, f"--preprocess {name}", True)


@pytest.mark.parametrize(
    ("shape", "layout", "size"),
    [
        ((1, 3, 20, 30), Layout.NCHW, (20, 30)),
        ((None, 1, 20, 30), Layout.NCHW, (20, 30)),
        ((None, 20, 30, 3), Layout.NHWC, (20, 30)),
        ((None, 20, 30, 1), Layout.NHWC, (20, 30)),
        ((None, 20, 30, None), Layout.NHWC, (20, 30)),
        ((None, None, 20, 30), Layout.NCHW, (20, 30)),
        ((None, 3, 20, 3), Layout.NCHW, (20, 3)),
    ],
)
def test_resolve_deduces_the_layout(shape, layout, size):
    prep = resolve_preprocessing(PreprocessingOptions(), spec(*shape), class_vector=False)
    assert (prep.layout, prep.size) == (layout, size)


@pytest.mark.parametrize(
    ("shape", "dtype", "preset", "color", "source"),
    [
        ((1, 3, 8, 8), FLOAT, "imagenet", Color.RGB, "the default for 3 channels; name another with --preprocess"),
        ((1, 1, 8, 8), FLOAT, "unit", Color.GREY, "the default for 1 channel; name another with --preprocess"),
        ((1, 3, 8, 8), BYTE, "raw", Color.RGB, "the default for uint8 inputs; name another with --preprocess"),
        ((1, 8, 8, 1), BYTE, "raw", Color.GREY, "the default for uint8 inputs; name another with --preprocess"),
    ],
)
def test_resolve_has_a_default_for_every_kind_of_input(shape, dtype, preset, color, source):
    prep = resolve_preprocessing(PreprocessingOptions(), spec(*shape, dtype=dtype), class_vector=False)
    assert (prep.preset, prep.color, prep.source) == (preset, color, source)


def test_resolve_lets_single_options_replace_the_presets():
    options = PreprocessingOptions(
        preset="caffe", scale=0.5, mean=(1.0, 2.0, 3.0), std=(4.0,), color=Color.RGB, layout=Layout.NHWC, size=(8, 9)
    )
    prep = resolve_preprocessing(options, spec(None, None, None, 3), class_vector=False)
    assert (prep.scale, prep.mean, prep.std, prep.color) == (0.5, (1.0, 2.0, 3.0), (4.0,), Color.RGB)
    assert (prep.layout, prep.size) == (Layout.NHWC, (8, 9))
    changed = "--scale and --mean and --std and --color and --layout and --size"
    assert prep.source == f"--preprocess caffe, with {changed}"


def test_what_is_said_of_a_letterbox_is_named():
    options = PreprocessingOptions("unit", resize="letterbox", letterbox_align="top-left", letterbox_fill=0)
    prep = resolve_preprocessing(options, spec(1, 3, 8, 8), class_vector=False)
    assert prep.source == "--preprocess unit, with --resize and --letterbox-align and --letterbox-fill"
    assert "letterboxed to the top left, filled with 0" in prep.in_words()


def test_resolve_moves_a_presets_numbers_with_their_colours():
    """0.485 is the mean of red, wherever red stands."""
    prep = resolve_preprocessing(
        PreprocessingOptions(preset="imagenet", color=Color.BGR), spec(1, 3, 8, 8), class_vector=False
    )
    assert (prep.mean, prep.std) == ((0.406, 0.456, 0.485), (0.225, 0.224, 0.229))


def test_resolve_lets_colour_decide_open_channels():
    options = PreprocessingOptions(color=Color.GREY, size=(8, 8))
    assert resolve_preprocessing(options, spec(None, None, None, None), class_vector=False).channels == 1
    assert (
        resolve_preprocessing(replace(options, color=None), spec(None, None, None, None), class_vector=False).channels
        == 3
    )


def test_resolve_takes_a_preset_for_three_channels_on_grey_with_own_numbers():
    options = PreprocessingOptions(preset="imagenet", mean=(0.5,), std=(0.25,))
    prep = resolve_preprocessing(options, spec(1, 1, 8, 8), class_vector=False)
    assert (prep.mean, prep.std, prep.color) == ((0.5,), (0.25,), Color.GREY)


O = PreprocessingOptions  # noqa: E741


@pytest.mark.parametrize(
    ("options", "given", "fact", "fix"),
    [
        (O(), spec(1, 10), "input 'x' has shape 1x10", ".npz"),
        (O(), spec(1, 3, 8, 8, dtype=np.dtype(np.bool_)), "takes bool", ".npz"),
        (O(), spec(1, 4, 8, 8), "has 4 channels", ".npy"),
        (O(layout=Layout.NHWC), spec(1, 3, 8, 9), "has 9 channels", "--layout"),
        (O(), spec(1, 3, None, None), "no fixed height and width", "--size 224x224"),
        (O(), spec(1, 3, 8, None), "no fixed height and width", "--size"),
        (O(size=(9, 8)), spec(1, 3, 8, None), "--size 9x8 contradicts input 'x', which is fixed at 8x?", "--size"),
        (O(color=Color.GREY), spec(1, 3, 8, 8), "--color grey contradicts input 'x', which has 3 channels", "--color"),
        (O(color=Color.BGR), spec(1, 1, 8, 8), "--color bgr contradicts input 'x', which has 1 channel.", "--color"),
        (O(mean=(1.0, 2.0)), spec(1, 3, 8, 8), "--mean has 2 values but", "one value, or 3"),
        (O(std=(1.0, 2.0, 3.0)), spec(1, 1, 8, 8), "--std has 3 values but", "one value"),
        (O(preset="imagenet"), spec(1, 1, 8, 8), "the preset has 3 values for --mean but", "--preprocess unit"),
    ],
)
def test_resolve_refuses_what_does_not_go_together(options, given, fact, fix):
    with pytest.raises(QconvError) as caught:
        resolve_preprocessing(options, given, class_vector=False)
    assert fact in caught.value.message
    assert fix in caught.value.hint


# ---- one picture: normalisation, colour, layout


@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize("name", PRESETS)
def test_a_picture_is_normalised_by_the_formula(tmp_path, name, layout):
    color, scale, mean, std = PUBLISHED[name]
    path = save(Image.fromarray(PIXELS), tmp_path / "a.png")
    prep = replace(RAW, color=color, scale=scale, mean=mean, std=std, layout=layout)
    pixels = PIXELS[..., ::-1] if color is Color.BGR else PIXELS
    wanted = (pixels.astype(np.float32) * np.float32(scale) - np.float32(mean)) / np.float32(std)
    got = load_image(path, prep)
    assert got.dtype == np.float32
    assert got.flags.c_contiguous
    np.testing.assert_array_equal(got, wanted if layout is Layout.NHWC else wanted.transpose(2, 0, 1))


def test_imagenet_by_hand(tmp_path):
    """White is (1 - 0.485) / 0.229 = 2.2489 in red, (1 - 0.406) / 0.225 = 2.64 in blue."""
    path = save(Image.new("RGB", (3, 2), "white"), tmp_path / "a.png")
    prep = resolve_preprocessing(PreprocessingOptions(), spec(1, 3, 2, 3), class_vector=True)
    got = load_image(path, prep)
    assert got.shape == (3, 2, 3)
    np.testing.assert_allclose(got[[0, 2], 0, 0], [2.248908, 2.64], rtol=1e-6)


@pytest.mark.parametrize("layout", Layout)
def test_a_grey_input_has_one_channel_of_luma(tmp_path, layout):
    """ITU-R 601: 0.299 * 100 + 0.587 * 150 + 0.114 * 200 = 140.75, which Pillow rounds to 141."""
    path = save(Image.new("RGB", (3, 2), (100, 150, 200)), tmp_path / "a.png")
    got = load_image(path, replace(RAW, color=Color.GREY, layout=layout))
    assert got.shape == ((1, 2, 3) if layout is Layout.NCHW else (2, 3, 1))
    assert (got == 141).all()


# ---- one picture: file kinds. Each builder saves a 3x2 picture whose upper left pixel is the RGB beside it.


def _palette(**transparency: Any) -> Image.Image:
    picture = Image.new("P", (3, 2), 1)
    picture.putpalette([0, 0, 0, 10, 200, 30])
    picture.info.update(transparency)
    return picture


def _wide(dtype: type, value: float) -> Image.Image:
    return Image.fromarray(np.full((2, 3), value, dtype))


def _pages(first: str, *others: str) -> tuple[Image.Image, dict[str, Any]]:
    one, *rest = (Image.new("RGB", (3, 2), color) for color in (first, *others))
    return one, {"save_all": True, "append_images": rest}


KINDS: dict[str, tuple[str, Callable[[], Any], tuple[int, int, int], int]] = {
    "grey": ("png", lambda: Image.new("L", (3, 2), 77), (77, 77, 77), 0),
    "grey and alpha": ("png", lambda: Image.new("LA", (3, 2), (77, 0)), (77, 77, 77), 0),
    "one bit": ("png", lambda: Image.new("1", (3, 2), 1), (255, 255, 255), 0),
    "palette": ("png", _palette, (10, 200, 30), 0),
    "palette and a clear entry": ("png", lambda: _palette(transparency=1), (10, 200, 30), 0),
    "palette and alphas": ("png", lambda: _palette(transparency=b"\xff\x40"), (10, 200, 30), 0),
    "alpha": ("png", lambda: Image.new("RGBA", (3, 2), (10, 200, 30, 0)), (10, 200, 30), 0),
    "colour key": ("png", lambda: (Image.new("RGB", (3, 2), (1, 2, 3)), {"transparency": (1, 2, 3)}), (1, 2, 3), 0),
    # 65535 is white: 0x1234 = 4660, 4660 / 257 = 18.13
    "16-bit grey PNG": ("png", lambda: _wide(np.uint16, 0x1234), (18, 18, 18), 0),
    "16-bit white": ("png", lambda: _wide(np.uint16, 65535), (255, 255, 255), 0),
    "16-bit grey TIFF": ("tif", lambda: _wide(np.uint16, 257 * 200), (200, 200, 200), 0),
    "32-bit grey TIFF": ("tiff", lambda: _wide(np.int32, 257 * 200), (200, 200, 200), 0),
    "float TIFF": ("tiff", lambda: _wide(np.float32, 0.4), (102, 102, 102), 0),
    "BMP": ("bmp", lambda: Image.new("RGB", (3, 2), (10, 200, 30)), (10, 200, 30), 0),
    "JPEG": ("jpg", lambda: (Image.new("RGB", (3, 2), (10, 200, 30)), {"quality": 100}), (10, 200, 30), 2),
    "grey JPEG": ("jpeg", lambda: Image.new("L", (3, 2), 77), (77, 77, 77), 1),
    # (255 - 255) * (255 - k) / 255 in red, (255 - 55) * 1 in green, for k = 0
    "CMYK JPEG": ("jpg", lambda: (Image.new("CMYK", (3, 2), (255, 55, 0, 0)), {"quality": 100}), (0, 200, 255), 2),
    "WebP": ("webp", lambda: (Image.new("RGB", (3, 2), (10, 200, 30)), {"lossless": True}), (10, 200, 30), 0),
    "animated WebP": ("webp", lambda: _pages("red", "lime"), (255, 0, 0), 3),
    "animated GIF": ("gif", lambda: _pages("red", "lime", "blue"), (255, 0, 0), 0),
    "TIFF of pages": ("tif", lambda: _pages("red", "lime"), (255, 0, 0), 0),
    "CMYK TIFF": ("tif", lambda: Image.new("CMYK", (3, 2), (0, 0, 0, 255)), (0, 0, 0), 0),
    "YCbCr TIFF": ("tif", lambda: Image.new("RGB", (3, 2), (90, 90, 90)).convert("YCbCr"), (90, 90, 90), 1),
    "a PNG called JPEG": ("jpg", lambda: (Image.new("RGB", (3, 2), (1, 2, 3)), {"format": "PNG"}), (1, 2, 3), 0),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_becomes_rgb(tmp_path, kind):
    if kind == "YCbCr TIFF":
        skip_without("pillow", "13.0", "older ones cannot read such files, even their own")
    suffix, build, rgb, tolerance = KINDS[kind]
    built = build()
    picture, how = built if isinstance(built, tuple) else (built, {})
    path = save(picture, tmp_path / f"a.{suffix}", **how)
    got = load_image(path, RAW)
    assert got.shape == (2, 3, 3)
    np.testing.assert_allclose(got[0, 0], rgb, atol=tolerance)


def test_alpha_is_dropped_for_grey_inputs_too(tmp_path):
    path = save(Image.new("RGBA", (3, 2), (80, 80, 80, 0)), tmp_path / "a.png")
    assert (load_image(path, replace(RAW, color=Color.GREY)) == 80).all()


def test_big_endian_16_bit_grey(tmp_path):
    """A TIFF by hand: 3x2 pixels of 0x8000 = 32768, and 32768 / 257 = 127.5019, so 128."""
    entries = [
        (256, 3, 3),
        (257, 3, 2),
        (258, 3, 16),
        (259, 3, 1),
        (262, 3, 1),
        (273, 4, 122),
        (277, 3, 1),
        (278, 3, 2),
    ]
    entries.append((279, 4, 12))
    body = b"".join(
        struct.pack(">HHI", tag, kind, 1) + (struct.pack(">HH", value, 0) if kind == 3 else struct.pack(">I", value))
        for tag, kind, value in entries
    )
    head = b"MM\x00\x2a" + struct.pack(">I", 8) + struct.pack(">H", len(entries)) + body + struct.pack(">I", 0)
    assert len(head) == 122
    path = tmp_path / "a.tif"
    path.write_bytes(head + b"\x80\x00" * 6)
    assert (load_image(path, RAW) == 128).all()


ORIENTED: dict[int, Callable[[np.ndarray], np.ndarray]] = {  # EXIF 2.3: which way the stored rows must be turned
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
    8: np.rot90,
}


@pytest.mark.parametrize("orientation", ORIENTED)
def test_exif_orientation_is_applied(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(Image.fromarray(PIXELS), tmp_path / "a.png", exif=exif)
    wanted = ORIENTED[orientation](PIXELS)
    np.testing.assert_array_equal(load_image(path, replace(RAW, size=wanted.shape[:2])), wanted)


def test_a_rotated_jpeg_is_turned_upright(tmp_path):
    """Orientation 6: what is stored on the left is shown on top."""
    stored = np.zeros((16, 32), np.uint8)
    stored[:, :16] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    path = save(Image.fromarray(stored), tmp_path / "a.jpg", exif=exif)
    got = load_image(path, replace(RAW, size=(32, 16)))
    assert got[:12].min() > 240
    assert got[20:].max() < 15


# ---- one picture: size


def resized(picture: Image.Image, size: tuple[int, int], box: tuple[int, int, int, int] | None = None) -> np.ndarray:
    return np.asarray(picture.resize(size, Image.Resampling.BILINEAR).crop(box or (0, 0, *size)))


@pytest.mark.parametrize("resize", ["auto", "exact", "letterbox"])
@pytest.mark.parametrize("class_vector", [True, False])
def test_a_picture_of_the_inputs_size_is_left_alone(tmp_path, resize, class_vector):
    path = save(Image.fromarray(PIXELS), tmp_path / "a.png")
    got = load_image(path, replace(RAW, resize=resize, class_vector=class_vector))
    np.testing.assert_array_equal(got, PIXELS)


@pytest.mark.parametrize(
    ("width", "height", "size", "scaled", "corner"),
    [
        # torchvision's Resize(256), CenterCrop(224): int(256 * 640 / 480) = 341, round(58.5) = 58, (256 - 224) / 2 = 16
        (640, 480, (224, 224), (341, 256), (58, 16)),
        (480, 640, (224, 224), (256, 341), (16, 58)),
        # int(256 * 333 / 250) = 340
        (333, 250, (224, 224), (340, 256), (58, 16)),
        # int(256 * 431 / 300) = int(367.8), and round(71.5) = 72
        (300, 431, (224, 224), (256, 367), (16, 72)),
        (100, 100, (224, 224), (256, 256), (16, 16)),
        # only the shorter side is 224: still resized
        (300, 224, (224, 224), (342, 256), (59, 16)),
        # both sides must reach 64 x 128 (56 / 0.875, 112 / 0.875): the width binds for a square, the height for a strip
        (100, 100, (56, 112), (128, 128), (8, 36)),
        (300, 100, (56, 112), (192, 64), (40, 4)),
    ],
)
def test_auto_for_classifiers_crops_as_torchvision(tmp_path, width, height, size, scaled, corner):
    picture = noise(height, width)
    path = save(picture, tmp_path / "a.png", compress_level=1)
    left, top = corner
    wanted = resized(picture, scaled, (left, top, left + size[1], top + size[0]))
    np.testing.assert_array_equal(load_image(path, replace(RAW, size=size, class_vector=True)), wanted)


@pytest.mark.parametrize(("resize", "class_vector"), [("auto", False), ("exact", False), ("exact", True)])
def test_stretching(tmp_path, resize, class_vector):
    picture = noise(20, 30)
    path = save(picture, tmp_path / "a.png")
    prep = replace(RAW, size=(16, 12), resize=resize, class_vector=class_vector)
    np.testing.assert_array_equal(load_image(path, prep), resized(picture, (12, 16)))


@pytest.mark.parametrize("class_vector", [True, False])
def test_shorter_side_in_pixels(tmp_path, class_vector):
    """30x20 with the shorter side 16 is 24x16; the crop of 12x10 starts at (6, 3)."""
    picture = noise(20, 30)
    path = save(picture, tmp_path / "a.png")
    prep = replace(RAW, size=(10, 12), resize=16, class_vector=class_vector)
    np.testing.assert_array_equal(load_image(path, prep), resized(picture, (24, 16), (6, 3, 18, 13)))


def test_a_crop_larger_than_the_resized_picture_is_refused(tmp_path):
    path = save(noise(20, 30), tmp_path / "a.png")
    with pytest.raises(QconvError, match=r"24x16 after --resize 16, less than the input's 20x20") as caught:
        load_image(path, replace(RAW, size=(20, 20), resize=16))
    assert "--resize 20" in caught.value.hint
    assert not isinstance(caught.value, UnreadableImage)


@pytest.mark.parametrize("color", [Color.RGB, Color.GREY])
def test_letterbox_by_hand(tmp_path, color):
    """4x2 white in 4x5: rows of padding (5 - 2) // 2 = 1 above and 2 below, grey 114."""
    path = save(Image.new("RGB", (4, 2), "white"), tmp_path / "a.png")
    got = load_image(path, replace(RAW, size=(5, 4), resize="letterbox", color=color))
    assert got[:, 0, 0].tolist() == [114, 255, 255, 114, 114]
    assert (got == got[:, :1, :1]).all()


def test_letterbox_scales_both_ways(tmp_path):
    picture = noise(20, 30)
    path = save(picture, tmp_path / "a.png")
    for width in (12, 60):  # 30x20 -> 12x8 or 60x40, between equal borders
        height = width * 2 // 3
        got = load_image(path, replace(RAW, size=(width, width), resize="letterbox"))
        top = (width - height) // 2
        np.testing.assert_array_equal(got[top : top + height], resized(picture, (width, height)))
        assert (got[:top] == 114).all()


def test_bicubic(tmp_path):
    picture = noise(20, 30)
    path = save(picture, tmp_path / "a.png")
    wanted = np.asarray(picture.resize((12, 16), Image.Resampling.BICUBIC))
    got = load_image(path, replace(RAW, size=(16, 12), filter=ResizeFilter.BICUBIC))
    np.testing.assert_array_equal(got, wanted)
    assert not np.array_equal(got, resized(picture, (12, 16)))


sides = st.integers(1, 40)


@settings(max_examples=40, deadline=None)
@given(sides, sides, sides, sides, st.sampled_from(["auto", "exact", "letterbox", 40]), st.booleans())
def test_the_result_has_the_inputs_size_and_no_new_values(width, height, to_width, to_height, resize, class_vector):
    """Bilinear weights are positive and sum to 1: a flat picture stays flat, apart from padding."""
    prep = replace(RAW, size=(to_height, to_width), resize=resize, class_vector=class_vector)
    with tempfile.TemporaryDirectory() as folder:
        path = save(Image.new("RGB", (width, height), (9, 9, 9)), Path(folder) / "a.bmp")
        got = load_image(path, prep)
    assert got.shape == (to_height, to_width, 3)
    assert set(np.unique(got)) <= ({9, 114} if resize == "letterbox" else {9})


# ---- one picture: what cannot be decoded


def _truncated(path: Path) -> None:
    save(noise(64, 64), path, format="JPEG")
    path.write_bytes(path.read_bytes()[:-500])


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "text": (lambda p: p.write_text("hello"), "not an image"),
    "empty": (lambda p: p.write_bytes(b""), "not an image"),
    "truncated": (_truncated, "truncated"),
    "missing": (lambda p: None, "no such file"),
    "PostScript": (lambda p: p.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), "not an image"),
    "bomb": (lambda p: p.write_bytes(png_header(60000, 60000)), "bomb"),
    "dark 32-bit": (lambda p: save(_wide(np.int32, -1), p, format="TIFF"), "values from -1 to -1"),
    "bright 32-bit": (lambda p: save(_wide(np.int32, 70000), p, format="TIFF"), "where white is 65535"),
    "bright float": (lambda p: save(_wide(np.float32, 200), p, format="TIFF"), "where white is 1"),
    "NaN": (lambda p: save(_wide(np.float32, np.nan), p, format="TIFF"), "nan"),
    "no pixels": (lambda p: p.write_bytes(png_header(4, 4)), ""),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_an_undecodable_picture_is_told_with_its_reason(tmp_path, kind):
    build, reason = BROKEN[kind]
    path = tmp_path / "cats.jpg"
    build(path)
    with pytest.raises(UnreadableImage) as caught:
        load_image(path, RAW)
    assert caught.value.message.startswith(f"{path} cannot be decoded (")
    assert reason in caught.value.reason
    assert caught.value.path == path


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_what_pillow_only_warns_about_is_refused(tmp_path):
    """144 million pixels lie between Pillow's limit, where it warns, and twice that, where it raises."""
    path = tmp_path / "a.png"
    path.write_bytes(png_header(12000, 12000))
    with pytest.raises(UnreadableImage, match="12000x12000 pixels, refused as a possible decompression bomb"):
        load_image(path, RAW)


def test_a_thin_picture_does_not_grow_without_bounds(tmp_path):
    """1x60000 with the shorter side 256 would be 256x15360000: 3.9 thousand million pixels."""
    path = save(Image.new("L", (1, 60000)), tmp_path / "a.png")
    with pytest.raises(UnreadableImage, match="1x60000 pixels are too thin to be resized: 256x15360000"):
        load_image(path, replace(RAW, size=(224, 224), class_vector=True))
    assert load_image(path, replace(RAW, resize="exact")).shape == (2, 3, 3)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_named_pipe_does_not_block(tmp_path):
    for name, read in (
        ("a.jpg", lambda p: load_image(p, RAW)),
        ("a.npy", lambda p: run(listing(p), spec(None, 3), prep=None)),
    ):
        os.mkfifo(tmp_path / name)
        with pytest.raises(QconvError, match="no such file"):
            read(tmp_path / name)


# ---- batches of pictures


def flat(folder: Path, count: int) -> list[Path]:
    """Pictures of 3x2 pixels that all have the picture's number as value."""
    return [save(Image.new("L", (3, 2), i), folder / f"{i:03}.png") for i in range(count)]


@pytest.mark.parametrize("batch", [1, 2, 3, 7, 10])
@pytest.mark.parametrize("workers", [1, 4])
def test_batches_keep_the_order_and_the_remainder(tmp_path, batch, workers):
    got, warnings = run(listing(*flat(tmp_path, 7)), spec(None, 2, 3, 3), batch=batch, workers=workers)
    assert [len(b["x"]) for b in got] == [batch] * (7 // batch) + [7 % batch] * (7 % batch > 0)
    together = np.concatenate([b["x"] for b in got])
    assert together.shape == (7, 2, 3, 3)
    assert together[:, 0, 0, 0].tolist() == list(range(7))
    assert warnings == []


@pytest.mark.parametrize("layout", Layout)
def test_batches_have_the_layout_of_the_input(tmp_path, layout):
    shape = (2, 3, 2, 3) if layout is Layout.NCHW else (2, 2, 3, 3)
    got, _ = run(listing(*flat(tmp_path, 2)), spec(None, *shape[1:]), prep=replace(RAW, layout=layout))
    assert got[0]["x"].shape == shape
    assert got[0]["x"].flags.c_contiguous


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_batches_have_the_type_of_the_input(tmp_path, dtype):
    path = save(Image.fromarray(PIXELS), tmp_path / "a.png")
    prep = replace(RAW, scale=1 / 255)
    got, _ = run(listing(path), spec(None, 2, 3, 3, dtype=np.dtype(dtype)), prep=prep)
    assert got[0]["x"].dtype == dtype
    np.testing.assert_array_equal(got[0]["x"][0], (PIXELS * np.float32(1 / 255)).astype(dtype))


def test_bytes_are_rounded_to_even_and_clipped(tmp_path):
    """Pixels 1, 3, 5, 200 times 0.5, and times 2: 0.5 -> 0, 1.5 -> 2, 2.5 -> 2, and 400 -> 255."""
    path = save(Image.fromarray(np.uint8([[1, 3, 5, 200]])), tmp_path / "a.png")
    x = spec(None, 1, 1, 4, dtype=BYTE)
    prep = replace(RAW, size=(1, 4), color=Color.GREY, layout=Layout.NCHW)
    half, _ = run(listing(path), x, prep=replace(prep, scale=0.5))
    double, _ = run(listing(path), x, prep=replace(prep, scale=2.0, mean=(4.0,)))
    assert half[0]["x"].dtype == np.uint8
    assert half[0]["x"].ravel().tolist() == [0, 2, 2, 100]
    assert double[0]["x"].ravel().tolist() == [0, 2, 6, 255]


def test_a_corrupt_picture_among_good_ones_is_skipped_with_a_warning(tmp_path):
    """1 of 10 is a tenth, which is allowed."""
    paths = flat(tmp_path, 10)
    paths[3].write_text("hello")
    done: list[int] = []
    warnings: list[str] = []
    given = iter_batches(
        listing(*paths),
        [spec(None, 2, 3, 3)],
        RAW,
        batch=4,
        workers=2,
        reporter=Reporter(warnings.append),
        progress=done.append,
    )
    got = np.concatenate([b["x"] for b in given])
    assert got[:, 0, 0, 0].tolist() == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    assert warnings == [f"skipped {paths[3]}: cannot be decoded (not an image)"]
    assert done == list(range(1, 11))


@pytest.mark.parametrize(
    ("total", "bad", "fact"),
    [
        (5, [4], "1 of 5 pictures cannot be decoded, which"),
        (5, [1], "1 of 5 pictures cannot be decoded among the first 2, which"),
        (20, [0, 5, 9], "3 of 20 pictures cannot be decoded among the first 10, which"),
        (1, [0], "1 of 1 picture cannot be decoded, which"),
        (4, [0, 1, 2, 3], "1 of 4 pictures cannot be decoded among the first 1, which"),
    ],
)
def test_more_than_a_tenth_corrupt_is_an_error(tmp_path, total, bad, fact):
    paths = flat(tmp_path, total)
    for i in bad:
        paths[i].write_text("hello")
    with pytest.raises(QconvError) as caught:
        run(listing(*paths), spec(None, 2, 3, 3))
    assert fact in caught.value.message
    assert f"the first is {paths[bad[0]]} (not an image)." in caught.value.message
    assert "--glob" in caught.value.hint


def test_pictures_need_one_input_and_a_preprocessing(tmp_path):
    paths = listing(*flat(tmp_path, 1))
    with pytest.raises(QconvError, match="network has 2 inputs") as caught:
        run(paths, spec(None, 2, 3, 3, name="a"), spec(None, 2, name="b"))
    assert "np.savez('0.npz', **{'a': ..., 'b': ...})" in caught.value.hint
    with pytest.raises(QconvError, match="the network takes none"):
        run(paths, spec(None, 2, 3, 3), prep=None)


def test_a_crop_that_does_not_fit_is_not_skipped(tmp_path):
    with pytest.raises(QconvError, match="after --resize 2"):
        run(listing(*flat(tmp_path, 30)), spec(None, 3, 3, 3), prep=replace(RAW, size=(3, 3), resize=2))


# ---- reading ahead


def images_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("qconv-images")]


def test_nothing_is_read_before_the_first_batch_is_asked_for(tmp_path):
    given = iter_batches(
        listing(tmp_path / "gone.png"), [spec(None, 2, 3, 3)], RAW, batch=1, workers=1, reporter=Reporter(print)
    )
    given.close()
    assert images_threads() == []


def test_a_cache_decodes_each_picture_once_and_gives_back_its_very_bytes(tmp_path, monkeypatch):
    """In memory up to its bound, and from files beyond it; other sizes are other pictures."""
    paths = []
    for index in range(6):
        pixels = np.random.default_rng(index).integers(0, 256, (9, 11, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
        paths.append(tmp_path / f"{index}.png")
    decoded: list[Path] = []

    def count(path: Path, prep: Preprocessing) -> np.ndarray:
        decoded.append(path)
        return load_pixels(path, prep)

    monkeypatch.setattr("qconv.data.batches.load_pixels", count)
    imagenet = replace(RAW, size=(4, 5), mean=(1.0,), std=(2.0,))
    for prep in (replace(RAW, size=(4, 5)), imagenet):  # as pixels, and normalized: the same pixels
        plain = list(
            iter_batches(listing(*paths), [spec(None, 4, 5, 3)], prep, batch=2, workers=2, reporter=Reporter())
        )
        assert len(plain) == 3
    decoded.clear()
    cache = PixelCache(limit=4 * 5 * 3 * 2)  # two pictures
    for prep in (replace(RAW, size=(4, 5)), imagenet, imagenet):
        kept = iter_batches(
            listing(*paths), [spec(None, 4, 5, 3)], prep, batch=2, workers=2, reporter=Reporter(), cache=cache
        )
        for got, wanted in zip(kept, plain if prep is imagenet else [None] * 3, strict=True):
            if wanted is not None:
                np.testing.assert_array_equal(got["x"], wanted["x"])
    assert sorted(decoded) == paths
    assert cache.load(paths[0], replace(RAW, size=(3, 3))).shape == (3, 3, 3)
    assert len(decoded) == 7


def test_reading_ahead_is_bounded_and_goes_on_while_the_caller_works(tmp_path, monkeypatch):
    started: list[Path] = []

    def count(path: Path, prep: Preprocessing) -> np.ndarray:
        started.append(path)
        return np.zeros((2, 3, 3), np.float32)

    monkeypatch.setattr("qconv.data.batches.load_pixels", count)
    paths = [Path(f"{i}.png") for i in range(100)]
    workers, batch = 2, 3
    given = iter_batches(
        listing(*paths), [spec(None, 2, 3, 3)], RAW, batch=batch, workers=workers, reporter=Reporter(print)
    )
    most = 2 * workers + batch
    for taken in range(batch, 30, batch):
        next(given)
        deadline = time.monotonic() + 2
        while len(started) < taken + most - 1 and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.005)  # time to overshoot
        assert taken + most - 1 <= len(started) <= taken + most
    given.close()
    assert images_threads() == []


def test_closing_early_drops_what_was_only_waiting(tmp_path, monkeypatch):
    """100 wait after the first batch, 2 s of work; a busy machine may start a few more until they are dropped."""
    started: list[Path] = []

    def slow(path: Path, prep: Preprocessing) -> np.ndarray:
        started.append(path)
        time.sleep(0.02 if len(started) > 100 else 0)
        return np.zeros((2, 3, 3), np.float32)

    monkeypatch.setattr("qconv.data.batches.load_pixels", slow)
    paths = [Path(f"{i}.png") for i in range(1000)]
    given = iter_batches(listing(*paths), [spec(None, 2, 3, 3)], RAW, batch=100, workers=1, reporter=Reporter(print))
    next(given)
    before = len(started)
    given.close()
    assert len(started) <= before + 20
    assert images_threads() == []


def test_an_error_stops_the_threads(tmp_path):
    paths = flat(tmp_path, 8)
    paths[0].write_text("hello")
    with pytest.raises(QconvError):
        run(listing(*paths), spec(None, 2, 3, 3))
    assert images_threads() == []


# ---- ready-made samples


@pytest.mark.parametrize("dtype", ["float32", "float64", ">f4", "float16"])
@pytest.mark.parametrize("lead", [(), (1,)])
def test_npy_samples_with_and_without_the_batch_axis(tmp_path, lead, dtype):
    values = np.arange(24).reshape(2, 3, 4).astype(dtype)
    for i in range(3):
        np.save(tmp_path / f"{i}.npy", (values + i).reshape(*lead, 2, 3, 4))
    paths = listing(*(tmp_path / f"{i}.npy" for i in range(3)))
    got, _ = run(paths, spec(None, 2, 3, 4), prep=None)
    assert [b["x"].shape for b in got] == [(2, 2, 3, 4), (1, 2, 3, 4)]
    assert got[0]["x"].dtype == np.float32
    np.testing.assert_array_equal(got[0]["x"][1], values + 1)


def test_npz_samples_by_input_name(tmp_path):
    for i in range(3):
        np.savez(tmp_path / f"{i}.npz", a=np.full((1, 4), i, np.float32), b=np.int32(i))
    inputs = [spec(None, 4, name="a"), spec(None, name="b", dtype=np.dtype(np.int64))]
    got, _ = run(listing(*sorted(tmp_path.iterdir())), *inputs, prep=None)
    assert [(b["a"].shape, b["b"].shape) for b in got] == [((2, 4), (2,)), ((1, 4), (1,))]
    assert got[0]["b"].dtype == np.int64
    assert got[0]["b"].tolist() == [0, 1]
    assert got[1]["a"].tolist() == [[2, 2, 2, 2]]


def test_pictures_and_samples_may_be_mixed(tmp_path):
    flat(tmp_path, 1)
    np.save(tmp_path / "001.npy", np.ones((2, 3, 3), np.float32))
    got, _ = run(listing(*sorted(tmp_path.iterdir())), spec(None, 2, 3, 3))
    assert got[0]["x"][:, 0, 0, 0].tolist() == [0, 1]


@pytest.mark.parametrize(
    ("array", "given", "fact"),
    [
        (np.zeros((4, 3), np.float32), spec(None, 3, 4), "has shape 4x3 for input 'x', which takes ?x3x4"),
        (np.zeros((2, 3, 4), np.float32), spec(None, 3, 4), "has shape 2x3x4 for"),
        (np.zeros((1, 1, 3, 4), np.float32), spec(None, 3, 4), "has shape 1x1x3x4"),
        (np.zeros((), np.float32), spec(), "has shape scalar for input 'x', which takes a number"),
        (np.zeros((3, 4), np.uint8), spec(None, 3, 4), "holds uint8 for input 'x', which takes float32"),
        (np.zeros((3, 4), np.int64), spec(None, 3, 4, dtype=np.dtype(np.int32)), "holds int64"),
        (np.zeros((3, 4), np.float32), spec(None, 3, 4, dtype=BYTE), "holds float32"),
        (np.full((3, 4), np.nan, np.float32), spec(None, 3, 4), "holds NaN or infinity"),
        (np.full((3, 4), 1e5, np.float32), spec(None, 3, 4, dtype=np.dtype(np.float16)), "holds NaN or infinity"),
    ],
)
def test_a_sample_that_does_not_fit_is_an_error_at_once(tmp_path, array, given, fact):
    for i in range(30):
        np.save(tmp_path / f"{i:02}.npy", array if i == 5 else np.zeros(given.shape[1:], given.dtype))
    with pytest.raises(QconvError) as caught:
        run(listing(*sorted(tmp_path.iterdir())), given, prep=None)
    assert fact in caught.value.message
    assert caught.value.hint
    assert not isinstance(caught.value, UnreadableImage)


def lying_header(*, zipped):
    """An array of a terabyte by its header, and sixteen bytes of it."""
    content = io.BytesIO()
    np.lib.format.write_array_header_1_0(content, {"descr": "<f4", "fortran_order": False, "shape": (1 << 38,)})
    content.write(bytes(16))
    if not zipped:
        return content.getvalue()
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("x.npy", content.getvalue())
    return archive.getvalue()


@pytest.mark.parametrize("zipped", [False, True])
def test_a_sample_whose_header_lies_takes_no_memory(tmp_path, zipped):
    path = tmp_path / ("s.npz" if zipped else "s.npy")
    path.write_bytes(lying_header(zipped=zipped))
    with pytest.raises(QconvError, match=r"cannot be decoded.*which are not there"):
        run(listing(path), spec(None, 4), prep=None)


def test_a_sample_is_not_unpacked_without_bound(tmp_path, monkeypatch):
    monkeypatch.setattr("qconv.data.samples.MOST_SAMPLE_BYTES", 1 << 19)
    np.savez_compressed(tmp_path / "s.npz", x=np.zeros(1 << 18, np.float32))
    assert (tmp_path / "s.npz").stat().st_size < 1 << 12
    with pytest.raises(QconvError, match=r"unpacks to 1\.05 MB, more than the 524\.3 kB"):
        run(listing(tmp_path / "s.npz"), spec(None, 4), prep=None)


def test_want_of_memory_is_not_a_broken_sample(tmp_path, monkeypatch):
    def full(*args):
        raise MemoryError

    np.savez(tmp_path / "s.npz", x=np.zeros(4, np.float32))
    monkeypatch.setattr(storage, "read_member", full)
    with pytest.raises(QconvError, match="more memory than there is") as caught:
        run(listing(tmp_path / "s.npz"), spec(None, 4), prep=None)
    assert not isinstance(caught.value, UnreadableImage)


@pytest.mark.parametrize(
    ("arrays", "fact"),
    [({"a": 1}, "lacks b."), ({"a": 1, "b": 1, "c": 1}, "holds unknown c."), ({"d": 1}, "lacks a, b.")],
)
def test_npz_names_must_be_the_inputs(tmp_path, arrays, fact):
    np.savez(tmp_path / "s.npz", **{name: np.zeros(4, np.float32) for name in arrays})
    with pytest.raises(QconvError) as caught:
        run(listing(tmp_path / "s.npz"), spec(None, 4, name="a"), spec(None, 4, name="b"), prep=None)
    assert fact in caught.value.message
    assert "inputs: a, b" in caught.value.hint


def test_npy_cannot_feed_two_inputs(tmp_path):
    np.save(tmp_path / "s.npy", np.zeros(4, np.float32))
    with pytest.raises(QconvError, match="holds one array but the network has 2 inputs") as caught:
        run(listing(tmp_path / "s.npy"), spec(None, 4, name="a"), spec(None, 4, name="b"), prep=None)
    assert "np.savez" in caught.value.hint


def test_samples_of_several_shapes_do_not_share_a_batch(tmp_path):
    for i in (3, 4):
        np.save(tmp_path / f"{i}.npy", np.zeros((2, i), np.float32))
    paths = listing(*sorted(tmp_path.iterdir()))
    with pytest.raises(QconvError, match="differ in shape: 2x3 and 2x4"):
        run(paths, spec(None, 2, None), prep=None)
    got, _ = run(paths, spec(None, 2, None), prep=None, batch=1)
    assert [b["x"].shape for b in got] == [(1, 2, 3), (1, 2, 4)]


def _pickled(path: Path) -> None:
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)


@pytest.mark.parametrize("suffix", ["npy", "npz"])
@pytest.mark.parametrize(
    "build",
    [
        _pickled,
        lambda p: p.write_bytes(b"hello"),
        lambda p: p.write_bytes(b""),
        lambda p: p.write_bytes(b"PK\x03\x04 no archive"),
        lambda p: p.write_bytes(b"\x93NUMPY\x01\x00 short"),
    ],
    ids=["pickle", "text", "empty", "zip", "npy"],
)
def test_a_broken_sample_is_skipped_and_never_unpickled(tmp_path, build, suffix):
    for i in range(10):
        np.save(tmp_path / f"{i}.npy", np.full(4, i, np.float32))
    broken = tmp_path / f"9b.{suffix}"
    made = tmp_path / "made.npy"
    build(made)
    made.rename(broken)
    got, warnings = run(listing(*sorted(tmp_path.iterdir())), spec(None, 4), prep=None, batch=10)
    assert got[0]["x"][:, 0].tolist() == list(range(10))
    assert [w.split(": cannot")[0] for w in warnings] == [f"skipped {broken}"]


# ---- the door


def test_pillow_is_not_imported_until_it_is_needed():
    code = "import sys, qconv.data.images; sys.exit('PIL' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=Path(__file__).parents[2]).returncode == 0


@pytest.mark.parametrize("resize", RESIZE_MODES)
def test_every_way_to_resize_is_known_to_both_sides(resize):
    """What may be asked for, and what is done."""
    assert choose_scaled_size((30, 20), replace(RAW, resize=resize)) in [(3, 2)]


def test_a_forgotten_generator_may_be_closed_by_one_of_its_own_threads() -> None:
    """The garbage collector runs in whatever thread is at work, and no thread can wait for itself."""
    own: list[Generator[Future[None], None, None]] = []

    def close_it(item: int) -> None:
        while not own:
            time.sleep(0.001)
        if item == 0:
            own[0].close()

    own_futures = prefetch(close_it, itertools.count(), workers=1, depth=2)
    first = next(own_futures)
    own.append(own_futures)
    assert first.result(timeout=10) is None
