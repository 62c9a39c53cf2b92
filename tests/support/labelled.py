"""A small detector in YOLOX's form and a segmenter, both of chance weights, with pictures, and labels in every form."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
from PIL import Image

from qconv.ir.files import Source
from tests.support.models import network

SIDE, ROWS, CLASSES = 32, 21, 4
"""Of 32 pixels strides 8, 16 and 32 make 16 + 4 + 1 cells."""

NAMES = ("cat", "dog", "traffic light", "no")
CATEGORY_IDS = (3, 7, 20, 90)


def save(proto: onnx.ModelProto, path: Path) -> Source:
    path.write_bytes(proto.SerializeToString())
    return Source(str(path), path)


def detector(seed: int = 0) -> onnx.ModelProto:
    """What it finds depends on the picture: boxes of 8 to 87 pixels, scores of 0 to 1."""
    body = "f = Flatten(x)  g = MatMul(f, w)  h = Add(g, b)  s = Sigmoid(h)  y = Reshape(s, shape)"
    width = 5 + CLASSES
    rng = np.random.default_rng(seed)
    weights = rng.normal(0, 0.04, (3 * SIDE * SIDE, ROWS * width)).astype(np.float32)
    bias = np.tile(np.r_[np.zeros(4), 0, np.full(CLASSES, -1.0)], ROWS).astype(np.float32)
    shape = np.array([-1, ROWS, width])
    return network(body, ("N", 3, SIDE, SIDE), w=weights, b=bias, shape=shape)


def segmenter(seed: int = 0) -> onnx.ModelProto:
    rng = np.random.default_rng(seed)
    weights = {"w": rng.normal(0, 1, (CLASSES, 3, 1, 1)).astype(np.float32)}
    return network("y = Conv(x, w)", ("N", 3, SIDE, SIDE), **weights)


def pictures(folder: Path, count: int = 6) -> Path:
    """Noise of several sizes, wider and higher than they are."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(7)
    for index in range(count):
        size = (int(rng.integers(40, 90)), int(rng.integers(40, 90)), 3)
        Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)).save(folder / f"{index:03}.png")
    return folder


def size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as picture:
        return picture.size


Boxes = dict[str, list[tuple[int, tuple[float, float, float, float]]]]
"""Class and edges in pixels of the objects of each picture, by its stem."""


def some_boxes(folder: Path, seed: int = 3) -> Boxes:
    rng, found = np.random.default_rng(seed), Boxes()
    for path in sorted(folder.iterdir()):
        width, height = size_of(path)
        objects = []
        for _ in range(int(rng.integers(1, 5))):
            (x, right), (y, bottom) = (np.sort(rng.uniform(0, side, 2)).tolist() for side in (width, height))
            objects.append((int(rng.integers(0, CLASSES)), (x, y, right, bottom)))
        found[path.stem] = objects
    return found


def write_coco(boxes: Boxes, path: Path) -> Path:
    images, annotations = [], []
    for number, (stem, objects) in enumerate(boxes.items(), 50):
        images.append({"id": number, "file_name": f"{stem}.png"})
        for index, (x, y, right, bottom) in objects:
            box = {"bbox": [x, y, right - x, bottom - y], "area": (right - x) * (bottom - y), "iscrowd": 0}
            entry = {"id": len(annotations) + 1, "image_id": number, "category_id": CATEGORY_IDS[index]}
            annotations.append({**entry, **box})
    categories = [{"id": number, "name": name} for number, name in zip(CATEGORY_IDS, NAMES, strict=True)]
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path


def write_yolo(boxes: Boxes, folder: Path, images: Path) -> Path:
    folder.mkdir()
    for stem, objects in boxes.items():
        width, height = size_of(images / f"{stem}.png")
        lines = [
            f"{index} {(x + right) / 2 / width!r} {(y + bottom) / 2 / height!r} "
            f"{(right - x) / width!r} {(bottom - y) / height!r}\n"
            for index, (x, y, right, bottom) in objects
        ]
        (folder / f"{stem}.txt").write_text("".join(lines))
    return folder


def write_voc(boxes: Boxes, folder: Path) -> Path:
    folder.mkdir()
    for stem, objects in boxes.items():
        parts = "".join(
            f"<object><name>{NAMES[index]}</name><bndbox><xmin>{x + 1!r}</xmin><ymin>{y + 1!r}</ymin>"
            f"<xmax>{right!r}</xmax><ymax>{bottom!r}</ymax></bndbox></object>"
            for index, (x, y, right, bottom) in objects
        )
        (folder / f"{stem}.xml").write_text(f"<annotation>{parts}</annotation>")
    return folder
