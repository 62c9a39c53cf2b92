"""Masks on the grid of a map: Pillow's nearest neighbour, marked pixels, and PNG files of every depth."""

from __future__ import annotations

import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from qconv.config.data_options import (
    Color,
    DataOptions,
    Layout,
    LetterboxAlign,
    Preprocessing,
    ResizeFilter,
)
from qconv.data.images import load_ids
from qconv.data.label_files import LabelledPictures, LabelRequest, ModelClasses
from qconv.data.mask_labels import NO_CLASS, MaskLabels, read_mask_labels, tell_of_unmapped
from qconv.errors import QconvError

PREP = Preprocessing(
    *("raw", "a test", Color.RGB, 1.0, (0.0,), (1.0,), Layout.NCHW, "exact", ResizeFilter.BILINEAR, (32, 32)),
    class_vector=False,
)


def masks(folder: Path, ids: NDArray[np.uint8], **how: object) -> MaskLabels:
    folder.mkdir(exist_ok=True)
    Image.fromarray(ids).save(folder / "a.png")
    return MaskLabels({Path("a.jpg"): folder / "a.png"}, how.pop("classes", None), **how)  # type: ignore[arg-type]


def png(path: Path, values: NDArray[np.uint8], depth: int, *, palette: bool) -> Path:
    """A PNG of few bits, written by hand: (H, W) values, a row a byte string with the high bits first."""
    height, width = values.shape
    bits = np.unpackbits(values[..., None], axis=2)[..., 8 - depth :].reshape(height, -1)
    rows = np.packbits(bits, axis=1)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, 3 if palette else 0, 0, 0, 0)
    colours = chunk(b"PLTE", bytes(range(3 * 2**depth))) if palette else b""
    content = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + colours + chunk(b"IDAT", content) + chunk(b"IEND", b"")
    )
    return path


@pytest.mark.parametrize("palette", [False, True])
@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_ids_are_the_numbers_that_are_stored(tmp_path: Path, depth: int, palette: bool) -> None:
    """Viewers stretch 15 of 4 bits to white; a mask means 15."""
    if depth == 8 and palette:
        Image.fromarray(np.uint8([[0, 7], [255, 3]])).convert("P").save(tmp_path / "a.png")
        assert load_ids(tmp_path / "a.png").tolist() == [[0, 7], [255, 3]]
        return
    values = (np.arange(12) % 2**depth).astype(np.uint8).reshape(3, 4)
    assert load_ids(png(tmp_path / "a.png", values, depth, palette=palette)).tolist() == values.tolist()


def test_ids_of_sixteen_bits_and_colours(tmp_path: Path) -> None:
    Image.fromarray(np.uint16([[0, 300]])).save(tmp_path / "a.png")
    assert load_ids(tmp_path / "a.png").tolist() == [[0, 300]]
    Image.new("RGB", (2, 2)).save(tmp_path / "b.png")
    with pytest.raises(QconvError, match=r"b.png holds colours \(RGB\), where a mask holds ids"):
        load_ids(tmp_path / "b.png")


@pytest.mark.parametrize("grid", [(32, 32), (8, 16), (66, 34)])
def test_stretched_as_pillow_does_by_nearest(tmp_path: Path, grid: tuple[int, int]) -> None:
    ids = np.random.default_rng(0).integers(0, 21, (50, 70), dtype=np.uint8)
    wanted = np.asarray(Image.fromarray(ids).resize(grid[::-1], Image.Resampling.NEAREST))
    np.testing.assert_array_equal(masks(tmp_path, ids).on_grid(Path("a.jpg"), (70, 50), PREP, grid), wanted)


def test_padding_does_not_count(tmp_path: Path) -> None:
    """32x16 in 32x32 lies between rows 8 and 24, or above row 16; on a grid of 8 rows between 2 and 6, or above 4."""
    ids = np.full((16, 32), 3, np.uint8)
    labels = masks(tmp_path, ids)
    for align, rows in ((LetterboxAlign.CENTER, (2, 6)), (LetterboxAlign.TOP_LEFT, (0, 4))):
        prep = replace(PREP, resize="letterbox", letterbox_align=align)
        got = labels.on_grid(Path("a.jpg"), (32, 16), prep, (8, 8))
        wanted = np.full((8, 8), NO_CLASS)
        wanted[rows[0] : rows[1]] = 3
        np.testing.assert_array_equal(got, wanted)


def test_what_is_cropped_is_not_seen(tmp_path: Path) -> None:
    """Of 96x32 the middle 32 columns are the input."""
    ids = np.repeat(np.uint8([[1] * 32 + [2] * 32 + [3] * 32]), 32, axis=0)
    got = masks(tmp_path, ids).on_grid(Path("a.jpg"), (96, 32), replace(PREP, resize=32), (32, 32))
    assert np.unique(got).tolist() == [2]


def test_ids_that_do_not_count_and_ids_that_are_mapped(tmp_path: Path) -> None:
    ids = np.uint8([[0, 7, 255, 9]])
    prep = replace(PREP, size=(1, 4))
    assert masks(tmp_path, ids).on_grid(Path("a.jpg"), (4, 1), prep, (1, 4)).tolist() == [[0, 7, NO_CLASS, 9]]
    mapped = masks(tmp_path, ids, numbers={7: 2, 0: NO_CLASS}, classes=3)
    assert mapped.on_grid(Path("a.jpg"), (4, 1), prep, (1, 4)).tolist() == [[NO_CLASS, 2, NO_CLASS, NO_CLASS]]
    told: list[str] = []
    tell_of_unmapped(mapped, told.append)
    assert told == ["ids of masks that --label-map does not have do not count: 9."]


def test_poor_masks(tmp_path: Path) -> None:
    ids = np.uint8([[0, 21]])
    with pytest.raises(QconvError, match="holds the id 21, but the model has 21 classes") as caught:
        masks(tmp_path, ids, classes=21).on_grid(Path("a.jpg"), (2, 1), PREP, (32, 32))
    assert "--label-map" in caught.value.hint
    with pytest.raises(QconvError, match=r"is 2x1 pixels, but a.jpg 1x2"):
        masks(tmp_path, ids).on_grid(Path("a.jpg"), (1, 2), PREP, (32, 32))


def test_options_of_masks(tmp_path: Path) -> None:
    pictures = LabelledPictures.of([tmp_path / "a.jpg"], DataOptions((str(tmp_path),)))
    folder, names, mapped = tmp_path / "masks", tmp_path / "names.txt", tmp_path / "map.toml"
    masks(folder, np.uint8([[0]]))
    names.write_text("sky\nroad\n")
    mapped.write_text('7 = "road"\n0 = "ignore"\n')
    model = ModelClasses({}, 2)
    assert read_mask_labels(LabelRequest(folder), pictures, model).numbers is None
    got = read_mask_labels(LabelRequest(folder, mapped, names), pictures, model)
    assert got.numbers == {7: 1, 0: NO_CLASS}
    assert got.files == {tmp_path / "a.jpg": folder / "a.png"}
    for request, fact in (
        (LabelRequest(folder, offset=1), "--label-offset is not used for masks"),
        (LabelRequest(folder, None, names), "--classes is not used for masks"),
    ):
        with pytest.raises(QconvError, match=fact):
            read_mask_labels(request, pictures, model)
    mapped.write_text("road = 1\n")
    with pytest.raises(QconvError, match="names road, but masks hold ids"):
        read_mask_labels(LabelRequest(folder, mapped), pictures, model)
