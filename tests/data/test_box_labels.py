"""One set of boxes written in three forms reads alike; what is wrong in a file is said once."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qconv.config.data_options import DataOptions
from qconv.data.box_labels import WrittenLabels, describe_boxes_outside, settle_classes
from qconv.data.coco_labels import read_coco_labels
from qconv.data.label_files import LabelledPictures, LabelRequest, ModelClasses
from qconv.data.voc_labels import read_voc_labels
from qconv.data.yolo_labels import read_yolo_labels
from qconv.errors import QconvError

NAMES = ("cat", "traffic light", "no")
SIZES = {"a.jpg": (200, 100), "b.jpg": (64, 64), "c.jpg": (10, 10)}
BOXES = {
    "a.jpg": [(1, (20.0, 10.0, 70.0, 60.0)), (0, (0.0, 0.0, 200.0, 100.0))],
    "b.jpg": [(2, (8.0, 16.0, 24.0, 64.0))],
}
"""By picture: class, and edges in pixels. Nothing is labelled in c.jpg."""


@pytest.fixture
def pictures(tmp_path: Path) -> LabelledPictures:
    root = tmp_path / "images"
    root.mkdir()
    for name in SIZES:
        (root / name).write_bytes(b"")
    return LabelledPictures.of([root / name for name in SIZES], DataOptions((str(root),)))


def sizes_of(pictures: LabelledPictures) -> dict[Path, tuple[int, int]]:
    return {path: SIZES[path.name] for path in pictures.paths}


def coco(folder: Path, **instead: Any) -> Path:
    """Ids of categories have gaps and stand in no order; a picture that is not there is labelled, too."""
    ids = (3, 90, 7)
    images = [{"id": 5, "file_name": "train/other.jpg"}]
    annotations: list[dict[str, Any]] = [{"id": 9, "image_id": 5, "category_id": 3, "bbox": [0, 0, 1, 1]}]
    for number, name in enumerate(BOXES, 40):
        images.append({"id": number, "file_name": f"val/{name}"})
        for index, (x, y, right, bottom) in BOXES[name]:
            box = {"bbox": [x, y, right - x, bottom - y], "iscrowd": int(index == 2)}
            annotations.append({"id": len(annotations), "image_id": number, "category_id": ids[index], **box})
    categories = [{"id": number, "name": name} for number, name in zip(ids, NAMES, strict=True)]
    path = folder / "labels.json"
    content = {"images": images, "annotations": annotations, "categories": categories, **instead}
    path.write_text(json.dumps(content))
    return path


def yolo(folder: Path) -> Path:
    """With a polygon, whose box is the one meant, and a class written as a float."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, boxes in BOXES.items():
        width, height = SIZES[name]
        lines = []
        for index, (x, y, right, bottom) in boxes:
            left, top, end, base = x / width, y / height, right / width, bottom / height
            box = f"{index}.0 {(left + end) / 2} {(top + base) / 2} {end - left} {base - top}"
            polygon = f"{index} {left} {base} {end} {(top + base) / 2} {(left + end) / 2} {top}"
            lines.append(polygon if index == 1 else box)
        (folder / name).with_suffix(".txt").write_text("\n".join(lines) + "\n\n")
    return folder


def voc(folder: Path) -> Path:
    """Pixels are counted from 1."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, boxes in BOXES.items():
        objects = "".join(
            f"<object><name>{NAMES[index]}</name><difficult>{int(index == 2)}</difficult><bndbox>"
            f"<xmin>{x + 1}</xmin><ymin>{y + 1}</ymin><xmax>{right}</xmax><ymax>{bottom}</ymax></bndbox>"
            "<part><name>head</name></part></object>"
            for index, (x, y, right, bottom) in boxes
        )
        (folder / name).with_suffix(".xml").write_text(f"<annotation><filename>wrong</filename>{objects}</annotation>")
    return folder


def check(written: WrittenLabels, tmp_path: Path, known: ModelClasses, labelled: set[str]) -> None:
    """Boxes and classes are those of BOXES."""
    found = settle_classes(written, LabelRequest(tmp_path), known, lambda text: pytest.fail(text)).pictures
    assert {path.name for path in found} == labelled
    for path, own in found.items():
        wanted = BOXES.get(path.name, [])
        np.testing.assert_allclose(own.boxes, np.array([box for _, box in wanted]).reshape(-1, 4), atol=1e-9)
        assert own.classes.tolist() == [index for index, _ in wanted]


def test_coco(tmp_path: Path, pictures: LabelledPictures) -> None:
    """The order of ids is 3, 7, 90: `no` before `traffic light`; the model names its classes as NAMES does."""
    written = read_coco_labels(coco(tmp_path), pictures)
    check(written, tmp_path, ModelClasses(dict(enumerate(NAMES)), 3), {"a.jpg", "b.jpg"})
    assert written.ids == (3, 7, 90)
    assert written.strangers == 1
    assert {path.name: number for path, number in written.picture_ids.items()} == {"a.jpg": 40, "b.jpg": 41}
    (crowd,) = (own.crowd for path, own in written.pictures.items() if path.name == "b.jpg")
    assert crowd == [True]
    settled = settle_classes(written, LabelRequest(tmp_path), ModelClasses({}, 3), lambda text: None)
    assert settled.category_ids == {0: 3, 1: 7, 2: 90}
    assert settled.pictures[pictures.paths[1]].ignored.tolist() == [True]


def test_yolo(tmp_path: Path, pictures: LabelledPictures) -> None:
    """A picture without a file shows nothing."""
    written = read_yolo_labels(yolo(tmp_path / "labels"), pictures, sizes_of(pictures))
    check(written, tmp_path, ModelClasses({}, 3), set(SIZES))


def test_voc(tmp_path: Path, pictures: LabelledPictures) -> None:
    written = read_voc_labels(voc(tmp_path / "xml"), pictures)
    check(written, tmp_path, ModelClasses(dict(enumerate(NAMES))), {"a.jpg", "b.jpg"})
    assert written.pictures[pictures.paths[1]].ignored == [True]


YAMLS = {
    "mapping": "names:\n  0: cat  # a pet\n  1: 'traffic light'\n  2: no\n",
    "list": 'nc: 3\nnames:\n- cat\n- "traffic light"\n- no\n',
    "inline list": "names: [cat, traffic light, 'no']  # three\n",
    "inline mapping": "names: {0: cat, 1: traffic light, 2: no}\n",
    "anchors": "all: &all [cat, traffic light, no]\nnames: *all\n",
}


@pytest.mark.parametrize("text", YAMLS.values(), ids=YAMLS)
@pytest.mark.parametrize("place", ["labels", "images", "images_labels"])
def test_data_yaml(tmp_path: Path, pictures: LabelledPictures, text: str, place: str) -> None:
    """Names in any spelling of YAML, `no` among them, and text files in any of the usual places."""
    pytest.importorskip("yaml", reason="needs the extra: pip install 'qconv[detect]'")
    yolo(tmp_path / place)
    (tmp_path / "data.yaml").write_text(f"path: .\nval: images\n{text}")
    written = read_yolo_labels(tmp_path / "data.yaml", pictures, sizes_of(pictures))
    assert written.names == dict(enumerate(NAMES))
    check(written, tmp_path, ModelClasses({}, 3), set(SIZES))


def test_data_yaml_of_a_pose_data_set(tmp_path: Path, pictures: LabelledPictures) -> None:
    """Keypoints behind a box are no polygon."""
    pytest.importorskip("yaml", reason="needs the extra: pip install 'qconv[detect]'")
    (tmp_path / "images" / "a.txt").write_text("0 0.5 0.5 0.2 0.4 " + "0.1 0.9 " * 4)
    (tmp_path / "data.yaml").write_text("names: [person]\nkpt_shape: [4, 2]\n")
    written = read_yolo_labels(tmp_path / "data.yaml", pictures, sizes_of(pictures))
    np.testing.assert_allclose(written.pictures[pictures.paths[0]].boxes, [(80, 30, 120, 70)])


@pytest.mark.parametrize(
    ("text", "fact"),
    [
        ("names: [a", "is no YAML"),
        ("nc: 3", "has no names of classes"),
        ("names: 7", "neither a list nor numbers with names"),
        ("names: {a: b}", "gives the class 'a' the name 'b'"),
    ],
)
def test_poor_yaml(tmp_path: Path, pictures: LabelledPictures, text: str, fact: str) -> None:
    pytest.importorskip("yaml", reason="needs the extra: pip install 'qconv[detect]'")
    yolo(tmp_path / "labels")
    (tmp_path / "data.yaml").write_text(text)
    with pytest.raises(QconvError, match=fact):
        read_yolo_labels(tmp_path / "data.yaml", pictures, sizes_of(pictures))


def test_data_yaml_without_files_or_without_yaml(
    tmp_path: Path, pictures: LabelledPictures, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data.yaml").write_text("names: [a]")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "yaml", None)
        with pytest.raises(QconvError, match="needs PyYAML, which is not installed") as caught:
            read_yolo_labels(tmp_path / "data.yaml", pictures, sizes_of(pictures))
    assert "qconv[detect]" in caught.value.hint
    pytest.importorskip("yaml", reason="needs the extra: pip install 'qconv[detect]'")
    with pytest.raises(QconvError, match=r"no picture has labels; .*a.jpg has none of .*labels/a.txt, .*images/a.txt"):
        read_yolo_labels(tmp_path / "data.yaml", pictures, sizes_of(pictures))


@pytest.mark.parametrize(
    ("line", "fact"),
    [
        ("0 0.5 0.5 0.2", "3 numbers behind the class are neither a box"),
        ("0 50 0.5 0.2 0.2", "50 is no share of the picture's side"),
        ("0 nan 0.5 0.2 0.2", "nan is no share"),
        ("cat 0.5 0.5 0.2 0.2", "are not all numbers"),
        ("0.5 0.5 0.5 0.2 0.2", "0.5 is no number of a class"),
        ("-1 0.5 0.5 0.2 0.2", "-1 is no number of a class"),
        ("0 0.5 0.5 -0.005 0.2", "negative side"),
    ],
)
def test_poor_lines_of_yolo(tmp_path: Path, pictures: LabelledPictures, line: str, fact: str) -> None:
    folder = yolo(tmp_path / "labels")
    (folder / "b.txt").write_text(f"0 0.5 0.5 0.1 0.1\n{line}\n")
    with pytest.raises(QconvError, match=f"b.txt, line 2: .*{fact}"):
        read_yolo_labels(folder, pictures, sizes_of(pictures))


@pytest.mark.parametrize(
    ("instead", "fact"),
    [
        (
            {"annotations": [{"id": 1, "image_id": 77, "category_id": 3, "bbox": [0, 0, 1, 1]}]},
            "no annotation is of a picture that is listed, but of pictures 77",
        ),
        (
            {"annotations": [{"id": 1, "image_id": 40, "category_id": 4, "bbox": [0, 0, 1, 1]}]},
            "no annotation is of a category that is listed, but of categories 4",
        ),
        (
            {"annotations": [{"id": 1, "category_id": 3}]},
            "annotation 1 has the image_id None, which is no whole",
        ),
        (
            {"annotations": [{"id": 1, "image_id": "40"}]},
            "annotation 1 has the image_id '40', which is no whole",
        ),
        ({"annotations": [{"id": 1, "image_id": 40}]}, "annotation 1 has the category_id None, which is no whole"),
        ({"annotations": [{"id": 1, "image_id": 40, "category_id": 3}]}, "annotation 1 has the bbox None"),
        (
            {"annotations": [{"id": 1, "image_id": 40, "category_id": 3, "bbox": [0, 0, -1, 1]}]},
            "annotation 1 has the bbox",
        ),
        (
            {"annotations": [{"id": 1, "image_id": 40, "category_id": 3, "bbox": [0, 0, 10**400, 1]}]},
            "annotation 1 has the bbox",
        ),
        ({"annotations": None}, "has no list of annotations"),
        ({"categories": [{"id": "x"}]}, "entry of categories has the id 'x'"),
    ],
)
def test_poor_json(tmp_path: Path, pictures: LabelledPictures, instead: dict[str, Any], fact: str) -> None:
    with pytest.raises(QconvError, match=fact):
        read_coco_labels(coco(tmp_path, **instead), pictures)


def test_files_of_another_kind(tmp_path: Path, pictures: LabelledPictures) -> None:
    path = tmp_path / "labels.json"
    for text, fact in (("{", "is no JSON"), ("[]", "has no list of images"), ("[" * 99999, "is no JSON")):
        path.write_text(text)
        with pytest.raises(QconvError, match=fact):
            read_coco_labels(path, pictures)
    folder = voc(tmp_path / "xml")
    for text, fact in (
        ("<annotation>", "is no XML"),
        ("<svg/>", "holds <svg>, where Pascal VOC has <annotation>"),
        (
            "<annotation><object><name>cat</name></object></annotation>",
            "object 1 has the name 'cat' and the box nothing",
        ),
    ):
        (folder / "b.xml").write_text(text)
        with pytest.raises(QconvError, match=fact):
            read_voc_labels(folder, pictures)


def test_two_pictures_of_one_name(tmp_path: Path) -> None:
    """A whole file name tells them apart, the last part of it does not."""
    paths = [tmp_path / "one" / "a.jpg", tmp_path / "two" / "a.jpg"]
    pictures = LabelledPictures.of(paths, DataOptions((str(tmp_path),)))
    own = {"categories": [{"id": 3, "name": "cat"}], "annotations": []}
    tmp_path.mkdir(exist_ok=True)
    written = read_coco_labels(coco(tmp_path, images=[{"id": 1, "file_name": "two/a.jpg"}], **own), pictures)
    assert [*written.pictures] == [paths[1]]
    with pytest.raises(QconvError, match=r"labels val/a.jpg, but .* are called so"):
        read_coco_labels(coco(tmp_path, images=[{"id": 1, "file_name": "val/a.jpg"}], **own), pictures)


@pytest.mark.parametrize(("side", "told"), [(64.5, False), (70.0, True)])
def test_boxes_outside(tmp_path: Path, pictures: LabelledPictures, side: float, told: bool) -> None:
    """Half a pixel is rounding; six are not."""
    own: dict[str, Callable[[], Any]] = {"bbox": [0, 0, side, 10]}  # type: ignore[dict-item]
    content = {
        "images": [{"id": 1, "file_name": "b.jpg"}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 3, **own}],
        "categories": [{"id": 3, "name": "cat"}],
    }
    text = describe_boxes_outside(read_coco_labels(coco(tmp_path, **content), pictures), sizes_of(pictures))
    assert ("1 of 1 box reach beyond" in text) is told
    assert ("b.jpg, which is 64x64" in text) is told
