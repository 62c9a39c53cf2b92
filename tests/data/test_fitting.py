"""Where a picture lies in the input. Oracles: published letterboxes written down as formulas, and marked pixels."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from qconv.calibration.statistics_file import preprocessing_from_dict, preprocessing_to_dict
from qconv.config.data_options import (
    Color,
    DataOptions,
    Layout,
    LetterboxAlign,
    Preprocessing,
    PreprocessingOptions,
    ResizeFilter,
    merge_options,
    require_letterbox,
)
from qconv.config.recipe import Recipe
from qconv.config.serialization import command_line_options
from qconv.data.fitting import choose_scaled_size, find_corner, place_picture
from qconv.data.images import UnreadableImage, find_placement, load_pixels, read_size
from qconv.data.preprocessing import InputSpec, resolve_preprocessing
from qconv.errors import QconvError
from qconv.ir import metadata

PREP = Preprocessing(
    *("raw", "a test", Color.RGB, 1.0, (0.0,), (1.0,), Layout.NHWC, "letterbox", ResizeFilter.BILINEAR, (416, 416)),
    class_vector=False,
)
TOP_LEFT = replace(PREP, letterbox_align=LetterboxAlign.TOP_LEFT)
sides = st.integers(1, 3000)


@given(sides, sides, st.integers(1, 700), st.integers(1, 700))
def test_centred_as_ultralytics(width: int, height: int, to_width: int, to_height: int) -> None:
    """`LetterBox` of ultralytics 8.x: r = min(...); new = max(round(side r), 1); left = round(padding / 2 - 0.1)."""
    prep = replace(PREP, size=(to_height, to_width))
    r = min(to_height / height, to_width / width)
    new = max(round(width * r), 1), max(round(height * r), 1)
    assert choose_scaled_size((width, height), prep) == new
    left, top = round((to_width - new[0]) / 2 - 0.1), round((to_height - new[1]) / 2 - 0.1)
    assert find_corner(new, prep) == (-left, -top)


@given(sides, sides)
def test_top_left_as_yolox(width: int, height: int) -> None:
    """`preproc` of YOLOX 0.3: r = min(416 / height, 416 / width), the sides int(side r), at (0, 0)."""
    r = min(416 / height, 416 / width)
    scaled = choose_scaled_size((width, height), TOP_LEFT)
    assert scaled == (max(1, int(width * r)), max(1, int(height * r)))
    assert find_corner(scaled, TOP_LEFT) == (0, 0)


def test_the_two_differ() -> None:
    """427 by 0.65 is 277.55: 278 rows from row 69 on, or 277 from row 0 on."""
    size = (640, 427)
    assert (choose_scaled_size(size, PREP), find_corner((416, 278), PREP)) == ((416, 278), (0, -69))
    assert choose_scaled_size(size, TOP_LEFT) == (416, 277)


@pytest.mark.parametrize(
    "prep",
    [
        replace(PREP, size=(60, 90)),
        replace(TOP_LEFT, size=(60, 90)),
        replace(PREP, size=(90, 60), resize="exact"),
        replace(PREP, size=(40, 60), resize=80),
        replace(PREP, size=(70, 56), resize="auto", class_vector=True),
    ],
    ids=["center", "top-left", "exact", "80", "auto"],
)
def test_a_mark_is_found_again(tmp_path: Path, prep: Preprocessing) -> None:
    """The centre of a white square in the input, moved back, is where it was drawn, to half a pixel of the input."""
    pixels = np.zeros((200, 300, 3), np.uint8)
    pixels[90:110, 120:160] = 255  # its centre is (140, 100)
    path = tmp_path / "a.png"
    Image.fromarray(pixels).save(path)
    seen = load_pixels(path, replace(prep, letterbox_fill=0))[:, :, 0].astype(float)
    columns, rows = (np.average(np.arange(seen.shape[axis]) + 0.5, weights=seen.sum(1 - axis)) for axis in (1, 0))
    placed = find_placement(path, prep)
    assert placed.size == (300, 200)
    assert columns * placed.scale[0] + placed.offset[0] == pytest.approx(140, abs=placed.scale[0] / 2)
    assert rows * placed.scale[1] + placed.offset[1] == pytest.approx(100, abs=placed.scale[1] / 2)


def test_a_placement_by_hand() -> None:
    """300x200 into 60x60 is 60x40 from row 10 on: 5 pixels to one, row 10 is row 0."""
    placed = place_picture((300, 200), replace(PREP, size=(60, 60)))
    assert (placed.scale, placed.offset) == ((5.0, 5.0), (0.0, -50.0))


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_sizes_are_of_upright_pictures(tmp_path: Path, kind: str, orientation: int) -> None:
    """EXIF: values from 5 on lie on their side. The pixels that are loaded have the same size."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{kind}"
    Image.new("RGB", (20, 10)).save(path, format=kind, exif=exif)
    wanted = (10, 20) if orientation >= 5 else (20, 10)
    assert read_size(path) == wanted
    assert load_pixels(path, replace(PREP, size=wanted[::-1], resize="exact")).shape[:2] == wanted[::-1]


def test_a_size_needs_the_header_alone(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.effect_noise((300, 200), 50).save(buffer, "JPEG")
    path = tmp_path / "a.jpg"
    path.write_bytes(buffer.getvalue()[:1000])
    assert read_size(path) == (300, 200)
    path.write_bytes(b"no picture")
    with pytest.raises(UnreadableImage, match="not an image"):
        read_size(path)


def test_the_fill_is_what_is_asked_for(tmp_path: Path) -> None:
    """4x2 white in 4x4 to the top left: two rows of padding below."""
    path = tmp_path / "a.png"
    Image.new("RGB", (4, 2), "white").save(path)
    got = load_pixels(path, replace(TOP_LEFT, size=(4, 4), letterbox_fill=7))
    assert got[:, 0, 0].tolist() == [255, 255, 7, 7]


def test_letterbox_options_without_a_letterbox() -> None:
    """What is not letterboxed by the user's own word is refused at once, else when it is known what a file says."""
    for said in ({"letterbox_align": "top-left"}, {"letterbox_fill": 0}):
        with pytest.raises(QconvError, match="with --resize exact is not possible") as caught:
            PreprocessingOptions(resize="exact", **said)  # type: ignore[arg-type]
        assert caught.value.hint == "pass --resize letterbox with it."
        options = PreprocessingOptions(**said)  # type: ignore[arg-type]
        require_letterbox(options, "letterbox", "as a file says")
        with pytest.raises(QconvError, match="resized by --resize 256, as a file says") as caught:
            require_letterbox(options, 256, "as a file says")
        assert caught.value.hint == "pass --resize letterbox with it, or leave it out."
    with pytest.raises(QconvError, match="--letterbox-fill 256"):
        PreprocessingOptions(resize="letterbox", letterbox_fill=256)


def test_options_win_over_what_a_file_carries() -> None:
    """Another way of resizing leaves nothing of the letterbox; the fill stays beside another align."""
    told = PreprocessingOptions("raw", resize="letterbox", letterbox_align=LetterboxAlign.TOP_LEFT, letterbox_fill=0)
    assert merge_options(PreprocessingOptions(resize="exact"), told) == PreprocessingOptions("raw", resize="exact")
    said = PreprocessingOptions(resize="letterbox", letterbox_align=LetterboxAlign.CENTER)
    assert merge_options(said, told) == replace(told, letterbox_align=LetterboxAlign.CENTER)
    assert merge_options(PreprocessingOptions(), told) == told
    fill = PreprocessingOptions(letterbox_fill=7)
    assert merge_options(fill, told) == replace(told, letterbox_fill=7)
    exact = PreprocessingOptions("raw", resize="exact")
    assert merge_options(fill, exact) == exact


def test_files_carry_it() -> None:
    """Metadata of models, statistics and recipes give back what they were given; old ones say the default."""
    known = replace(TOP_LEFT, letterbox_fill=7)
    carried = {metadata.PREPROCESSING_KEY: json.dumps(known.as_dict())}
    assert metadata.read_preprocessing(carried) == known.as_options
    old = {name: value for name, value in PREP.as_dict().items() if not name.startswith("letterbox")}
    assert preprocessing_from_dict(old) == replace(PREP, source="as the statistics were made")
    words = preprocessing_to_dict(known)
    assert words is not None
    assert preprocessing_from_dict(words) == replace(known, source="as the statistics were made")
    recipe, data = Recipe(), DataOptions(("imgs",), preprocessing=known.as_options)
    options = command_line_options(recipe.as_dict(data))
    assert options[-4:] == ["--letterbox-align", "top-left", "--letterbox-fill", "7"]


def test_words_and_defaults() -> None:
    spec = InputSpec("x", np.dtype(np.float32), (1, 3, 64, 64))

    def words(**said: object) -> str:
        options = PreprocessingOptions("raw", **said)  # type: ignore[arg-type]
        return resolve_preprocessing(options, spec, class_vector=False).in_words()

    assert ", letterboxed; " in words(resize="letterbox")
    assert ", letterboxed to the top left, filled with 0; " in words(
        resize="letterbox", letterbox_align="top-left", letterbox_fill=0
    )
    kept = resolve_preprocessing(PreprocessingOptions("raw", resize="letterbox"), spec, class_vector=False).as_dict()
    assert (kept["letterbox_align"], kept["letterbox_fill"]) == ("center", 114)
    assert "letterbox_fill" not in resolve_preprocessing(PreprocessingOptions(), spec, class_vector=False).as_dict()
