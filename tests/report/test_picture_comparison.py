"""Pictures side by side: which, in which order, and where each box and each colour lies, worked by hand."""

from __future__ import annotations

import colorsys
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image

from qconv.config.data_options import DataOptions, PreprocessingOptions
from qconv.data.model_with_data import open_models
from qconv.ir.files import Source
from qconv.report import html
from qconv.report.html import ComparedPicture, Page, PictureComparison
from qconv.report.picture_comparison import (
    MASK_OPACITY,
    MOST_SHOWN,
    PHOTO_SIDE,
    color_classes,
    compare_pictures,
    paint_classes,
)
from qconv.reporter import Reporter
from tests.report.test_html import Tree
from tests.support.browser import Browser
from tests.support.models import ints, network

HEIGHT, WIDTH = 32, 64

DECODER = """
def decode(outputs):
    "As many boxes as the left upper pixel says, ten pixels apart, each of a class of its own."
    count = int(outputs["y"].ravel()[0])
    return [[10 * i, 4, 10 * i + 8, 14, 0.9 - i / 100, i] for i in range(count)]
"""


def save(proto: onnx.ModelProto, path: Path) -> Source:
    path.write_bytes(proto.SerializeToString())
    return Source(path.name, path)


def detector(gain: float, shape: Sequence[int | str], names: str = "") -> onnx.ModelProto:
    body = "p = Slice(x, starts, ends, axes)  y = Mul(p, gain)"
    proto = network(body, shape, starts=ints(0, 0, 0), ends=ints(1, 1, 1), axes=ints(1, 2, 3), gain=np.float32(gain))
    if names:
        proto.metadata_props.add(key="names", value=names)
    return proto


def save_pictures(folder: Path, values: Sequence[int], size: tuple[int, int] = (WIDTH, HEIGHT)) -> Path:
    folder.mkdir()
    for index, value in enumerate(values):
        Image.new("RGB", size, (value, value, value)).save(folder / f"{index}.png")
    return folder


def shown(
    tmp_path: Path, own: onnx.ModelProto, other: onnx.ModelProto, **options: Any
) -> tuple[PictureComparison, ...]:
    """The float model `own` beside the file `other`, on what lies in `images`."""
    (tmp_path / "decoder.py").write_text(DECODER)
    given = {"preset": "raw", "resize": "exact", **options.pop("preprocessing", {})}
    decode = f"{tmp_path / 'decoder.py'}:decode" if options.pop("detect", True) else None
    data = DataOptions(
        (str(tmp_path / "images"),), preprocessing=PreprocessingOptions(**given), decode=decode, **options
    )
    file, source = save(other, tmp_path / "other.onnx"), save(own, tmp_path / "own.onnx")
    opened, against = open_models(file, source, data, 1, Reporter())
    assert against is not None
    return compare_pictures(against, opened)


NCHW, NHWC, GREY = ("N", 3, HEIGHT, WIDTH), ("N", HEIGHT, WIDTH, 3), ("N", 1, HEIGHT, WIDTH)


def boxes_of(picture: ComparedPicture) -> tuple[list[float], list[float], list[bool]]:
    """Left edges on both sides, and which are lost."""
    sides = picture.float_side.boxes, picture.file_side.boxes
    own, other = ([box.points[0][0] for box in boxes] for boxes in sides)
    return own, other, [box.lost for box in sides[0]]


@pytest.mark.parametrize(("own", "other"), [(NCHW, NCHW), (NHWC, NHWC), (GREY, GREY), (NCHW, NHWC)])
@pytest.mark.parametrize("batch", [1, 2])
def test_boxes_by_hand(tmp_path: Path, own: Sequence[int | str], other: Sequence[int | str], batch: int) -> None:
    """Of 2, 6, 0 and 4 boxes the file, at half the gain, finds 1, 3, 0 and 2; where there is none, nothing is shown."""
    save_pictures(tmp_path / "images", (2, 6, 0, 4))
    (found,) = shown(tmp_path, detector(1, own), detector(0.5, other), batch=batch)
    assert found.key == "boxes"
    assert [picture.name for picture in found.pictures] == ["1.png", "3.png", "0.png"]
    assert [picture.caption for picture in found.pictures] == [
        "3 of 6 boxes found", "2 of 4 boxes found", "1 of 2 boxes found",
    ]  # fmt: skip
    second = found.pictures[1]
    assert boxes_of(second) == ([0, 10, 20, 30], [0, 10], [False, False, True, True])
    assert second.float_side.boxes[1].points == ((10, 4), (18, 4), (18, 14), (10, 14))
    assert [box.label for box in second.file_side.boxes] == ["class 0 0.90", "class 1 0.89"]
    assert (second.size, second.shown) == ((WIDTH, HEIGHT), (0, 0, WIDTH, HEIGHT))
    with Image.open(io.BytesIO(second.photo)) as photo:
        assert photo.size == (WIDTH, HEIGHT)
        assert np.abs(np.asarray(photo.convert("L"), int) - 4).max() <= 2


def test_boxes_of_the_file_alone_are_told(tmp_path: Path) -> None:
    save_pictures(tmp_path / "images", (1,))
    (found,) = shown(tmp_path, detector(1, NCHW, "{0: 'cat', 1: '<b>'}"), detector(3, NCHW))
    assert found.pictures[0].caption == "1 of 1 box found, 2 in the file alone"
    assert [box.label for box in found.pictures[0].file_side.boxes] == ["cat 0.90", "<b> 0.89", "class 2 0.88"]


@pytest.mark.parametrize(("align", "left"), [("center", 16), ("top-left", 0)])
def test_the_border_of_a_letterbox_is_not_shown(tmp_path: Path, align: str, left: int) -> None:
    """A picture of 64 x 64 becomes 32 x 32 of an input of 32 x 64; what is fed, and boxes, stay where they are."""
    save_pictures(tmp_path / "images", (3,), (64, 64))
    prep = {"resize": "letterbox", "letterbox_align": align, "letterbox_fill": 5}
    (found,) = shown(tmp_path, detector(1, NCHW), detector(0, NCHW), preprocessing=prep)
    (picture,) = found.pictures
    assert (picture.size, picture.shown) == ((WIDTH, HEIGHT), (left, 0, 32, 32))
    count = 3 if left == 0 else 5  # of the left upper pixel of the input
    assert boxes_of(picture) == ([10 * i for i in range(count)], [], [True] * count)


@pytest.mark.parametrize("count", [3, 11])
def test_few_pictures_are_shown_the_worst_first(tmp_path: Path, count: int) -> None:
    """A last batch of 3 is filled up to 4 with a picture that is there already, and is not shown twice."""
    save_pictures(tmp_path / "images", range(1, count + 1))
    fixed = (4, 3, HEIGHT, WIDTH)
    (found,) = shown(tmp_path, detector(1, fixed), detector(0, fixed))
    expected = list(range(count, 0, -1))[:MOST_SHOWN]
    assert [len(p.float_side.boxes) for p in found.pictures] == expected
    assert [p.name for p in found.pictures] == [f"{boxes - 1}.png" for boxes in expected]


def test_what_cannot_be_read_is_left_out(tmp_path: Path) -> None:
    save_pictures(tmp_path / "images", range(1, 13))
    (tmp_path / "images" / "10.png").write_bytes(b"no picture")
    (found,) = shown(tmp_path, detector(1, NCHW), detector(0, NCHW))
    assert [picture.name for picture in found.pictures] == [f"{i}.png" for i in (11, 9, 8, 7, 6, 5, 4, 3)]


def test_nothing_is_shown_of_samples_nor_of_other_networks(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    np.save(tmp_path / "images" / "0.npy", np.full((3, HEIGHT, WIDTH), 3, np.float32))
    assert shown(tmp_path, detector(1, NCHW), detector(0, NCHW)) == ()
    (tmp_path / "images" / "0.npy").unlink()
    Image.new("RGB", (WIDTH, HEIGHT), (3, 3, 3)).save(tmp_path / "images" / "0.png")
    scores = [network("f = Flatten(x)  y = MatMul(f, w)", NCHW, w=(3 * HEIGHT * WIDTH, 5)) for _ in range(2)]
    assert shown(tmp_path, *scores, detect=False) == ()


# -- masks -------------------------------------------------------------------------------------------------------------


def segmenter(least: float) -> onnx.ModelProto:
    """Class 1 where red is higher than `least`, else class 0."""
    weights = np.zeros((2, 3, 1, 1), np.float32)
    weights[1, 0] = 1
    return network("y = Conv(x, w, b)", NCHW, w=weights, b=np.float32([least, 0]))


def save_bands(path: Path) -> None:
    """250 on 16 of 64 columns, 150 on 16 more, 0 on the others."""
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    pixels[:, :16], pixels[:, 16:32] = 250, 150
    Image.fromarray(pixels).save(path)


def test_masks_by_hand(tmp_path: Path) -> None:
    """Float says class 1 of both bands, the file of the first alone."""
    save_pictures(tmp_path / "images", (0,))
    save_bands(tmp_path / "images" / "1.png")
    (found,) = shown(tmp_path, segmenter(100), segmenter(200), detect=False)
    assert (found.key, found.legend) == ("masks", (("rgb(0,255,74)", "class 1"),))
    assert [(p.name, p.caption) for p in found.pictures] == [
        ("1.png", "75.0% of pixels agree"),
        ("0.png", "100.0% of pixels agree"),
    ]
    for side, edge in ((found.pictures[0].float_side, 32), (found.pictures[0].file_side, 16)):
        with Image.open(io.BytesIO(side.overlay)) as overlay:
            drawn = np.asarray(overlay)
        assert drawn.shape == (HEIGHT, WIDTH, 4)
        assert (drawn[:, :edge] == (0, 255, 74, MASK_OPACITY)).all()
        assert not drawn[:, edge:, 3].any()


def test_colours_are_hues_a_golden_angle_apart() -> None:
    for number in range(30):
        expected = [255 * part for part in colorsys.hls_to_rgb(number * 137.508 / 360 % 1, 0.5, 1)]
        assert color_classes(np.array(number)).tolist() == pytest.approx(expected, abs=0.51)


def test_large_maps_are_drawn_small() -> None:
    """A map of 1000 x 500 becomes one of every fourth place: 250 x 125."""
    painted = paint_classes(np.ones((500, 1000), np.int64))
    assert painted.shape == (125, 250, 4)
    assert max(painted.shape) <= PHOTO_SIDE


# -- on the page -------------------------------------------------------------------------------------------------------


def test_the_page_draws_each_box_once_and_fetches_nothing(tmp_path: Path) -> None:
    """Of 4 boxes of the float model 2 are lost, and a class may be called anything."""
    save_pictures(tmp_path / "images", (4,))
    hostile = '{0: "</svg><script>alert(1)</script>"}'
    parts = shown(tmp_path, detector(1, NCHW, hostile), detector(0.5, NCHW))
    tree = Tree(html.render_page(Page("m.onnx", "", (), "Fine.", "1", shown=parts)).decode())
    groups = [attrs["class"] for tag, attrs in tree.tags if tag == "g"]
    assert sorted(map(str, groups)) == ["box-file"] * 2 + ["box-float"] * 2 + ["box-float lost"] * 2
    corners = [attrs["points"] for tag, attrs in tree.tags if tag == "polygon"]
    assert corners.count("10.0,4.0 18.0,4.0 18.0,14.0 10.0,14.0") == 2
    assert corners.count("30.0,4.0 38.0,4.0 38.0,14.0 30.0,14.0") == 1
    assert [attrs["viewbox"] for tag, attrs in tree.tags if tag == "svg"] == ["0.0 0.0 64.0 32.0"] * 2
    sources = [attrs["href"] or "" for tag, attrs in tree.tags if tag == "image"]
    assert [source.partition(",")[0] for source in sources] == ["data:image/jpeg;base64"] * 2
    assert [tag for tag, _ in tree.tags].count("script") == 2
    assert "class 3 0.87, lost in the file" in tree.visible


# -- in a real browser -------------------------------------------------------------------------------------------------


def open_page(window: Browser, folder: Path, parts: tuple[PictureComparison, ...], width: int) -> None:
    page = folder / "page.html"
    page.write_bytes(html.render_page(Page("m.onnx", "", (), "Fine.", "1", shown=parts)))
    window.open(page, width)


def edges_of(window: Browser, selector: str) -> list[list[float]]:
    """Left, top, width and height of elements, in pixels of the page."""
    nodes = f"[...document.querySelectorAll({selector!r})]"
    corners = "r => [r.x + scrollX, r.y + scrollY, r.width, r.height]"
    found = window.run(f"return {nodes}.map(e => e.getBoundingClientRect()).map({corners})")
    assert isinstance(found, list)
    return found


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("resize", ["exact", "letterbox"])
def test_a_browser_draws_boxes_where_they_are(chromium: Browser, tmp_path: Path, width: int, resize: str) -> None:
    """Box i is 8 pixels wide and 10 high, at (10 i, 4); of a letterbox the middle 32 of 64 columns are shown."""
    save_pictures(tmp_path / "images", (5,), (WIDTH, HEIGHT) if resize == "exact" else (64, 64))
    prep = {"resize": resize, "letterbox_fill": 5} if resize == "letterbox" else {}
    open_page(chromium, tmp_path, shown(tmp_path, detector(1, NCHW), detector(0.5, NCHW), preprocessing=prep), width)
    left, across = (0, 64) if resize == "exact" else (16, 32)
    sides = edges_of(chromium, ".side svg")
    assert len(sides) == 2
    assert sides[0][0] + sides[0][2] <= sides[1][0]
    assert sides[1][0] + sides[1][2] <= width
    for side, key, count in zip(sides, ("float", "file"), (5, 2), strict=True):
        scale = side[2] / across
        assert side[3] == pytest.approx(HEIGHT * scale, abs=1)
        boxes = sorted(edges_of(chromium, f".side g.box-{key} polygon"))
        assert len(boxes) == count
        for index, box in enumerate(boxes):
            expected = [side[0] + (10 * index - left) * scale, side[1] + 4 * scale, 8 * scale, 10 * scale]
            assert box == pytest.approx(expected, abs=1)
    dashes = "return [...document.querySelectorAll('.side polygon')].map(e => getComputedStyle(e).strokeDasharray)"
    assert [dash == "none" for dash in chromium.run(dashes)].count(False) == 3
    assert chromium.complaints() == []


def test_a_browser_lays_masks_over_the_picture(chromium: Browser, tmp_path: Path) -> None:
    """Of every colour that is seen 105 parts of 255 are the picture's, and 150 the mask's where there is one."""
    (tmp_path / "images").mkdir()
    save_bands(tmp_path / "images" / "0.png")
    open_page(chromium, tmp_path, shown(tmp_path, segmenter(100), segmenter(200), detect=False), 1280)
    with Image.open(io.BytesIO(chromium.shot())) as page:
        seen = np.asarray(page.convert("RGB"), int)
    color = np.array([0, 255, 74])
    sides = edges_of(chromium, ".side svg")
    for (left, top, across, down), masked in zip(sides, ((8, 24), (8,)), strict=True):
        for column, grey in ((8, 250), (24, 150), (48, 0)):
            expected = (105 * grey + 150 * color) / 255 if column in masked else np.full(3, grey)
            x, y = left + across * column / WIDTH, top + down / 2
            assert np.abs(seen[round(y), round(x)] - expected).max() <= 4, (column, masked)
    assert chromium.complaints() == []
