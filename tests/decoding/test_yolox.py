from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from qconv.decoding import yolox
from qconv.decoding.boxes import cell_grid
from qconv.decoding.head import Head, NetworkFacts

DATA = Path(os.environ.get("QCONV_DATA") or Path(__file__).parents[3] / "shared" / "data")
MODEL = DATA / "models" / "yolox_nano.onnx"
SIDE = 416

needs_data = pytest.mark.skipif(not MODEL.exists(), reason="needs the models of $QCONV_DATA or ../shared/data")


def letterboxed() -> Iterator[np.ndarray]:
    """Pictures as the network was trained: BGR from 0 to 255, at the top left, 114 around."""
    from PIL import Image

    for path in sorted((DATA / "images" / "coco" / "val").glob("*.jpg")):
        picture = Image.open(path).convert("RGB")
        ratio = min(SIDE / picture.width, SIDE / picture.height)
        width, height = int(picture.width * ratio), int(picture.height * ratio)
        canvas = np.full((SIDE, SIDE, 3), 114, np.float32)
        resized = picture.resize((width, height), Image.Resampling.BILINEAR)
        canvas[:height, :width] = np.asarray(resized, np.float32)[..., ::-1]
        yield canvas.transpose(2, 0, 1)[None]


def decoded(raw: np.ndarray) -> np.ndarray:
    cells, steps = cell_grid((SIDE, SIDE), (8, 16, 32))
    centres, sizes = (raw[..., :2] + cells) * steps, np.exp(raw[..., 2:4]) * steps
    return np.concatenate([centres, sizes, raw[..., 4:]], axis=-1)


def head_of(array: np.ndarray) -> Head:
    head = yolox.match(NetworkFacts({"output": array}, (SIDE, SIDE)))
    assert head is not None
    return head


@needs_data
def test_the_real_network_finds_as_many_boxes_as_are_published() -> None:
    """The README of these data counts 299 boxes above 0.3 in the pictures of coco/val."""
    import onnxruntime

    session = onnxruntime.InferenceSession(MODEL)
    name, count = session.get_inputs()[0].name, 0
    for feed in letterboxed():
        (raw,) = session.run(None, {name: feed})
        (found,) = head_of(raw).read({"output": raw}, 0.3)
        count += len(found)
        (same,) = head_of(decoded(raw)).read({"output": decoded(raw)}, 0.3)
        assert np.abs(same.boxes - found.boxes).max(initial=0.0) < 0.01
    assert count == 299
