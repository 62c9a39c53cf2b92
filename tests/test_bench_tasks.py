"""The benchmark of detectors and segmenters: what it counts, and how it feeds and labels pictures.

Oracle: boxes worked by hand, and the forms of labels beside each other.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image

from qconv.data.label_files import LabelledPictures
from qconv.data.voc_labels import read_voc_labels
from tests.bench.cases import BY_NAME, Prep
from tests.bench.table import grid
from tests.bench.tasks import NETWORKS, count_found, found_cells, joined_rows, overlap, with_output, write_voc
from tests.support.models import ints, network


def box(left: float, score: float = 0.5, category: int = 1) -> dict[str, object]:
    """10 wide and high."""
    return {"bbox": [left, 0, 10, 10], "score": score, "category_id": category}


def test_overlap_by_hand() -> None:
    """5 of 10 columns are shared: 50 of 150 pixels."""
    assert overlap([0, 0, 10, 10], [5, 0, 10, 10]) == pytest.approx(50 / 150)
    assert overlap([0, 0, 10, 10], [20, 0, 10, 10]) == 0
    assert overlap([0, 0, 0, 0], [0, 0, 0, 0]) == 0


def test_each_box_finds_one() -> None:
    """An overlap of 8 columns is 80 of 120, of 6 is 60 of 140."""
    assert count_found([box(0), box(2)], [box(0)]) == 1
    assert count_found([box(0), box(2)], [box(2), box(0)]) == 2
    assert count_found([box(0)], [box(2)]) == 1
    assert count_found([box(0)], [box(4)]) == 0
    assert count_found([box(0)], [box(0, category=2)]) == 0


def test_boxes_are_found_in_their_own_picture() -> None:
    assert found_cells({1: [box(0)], 2: [box(0), box(50)]}, {1: [box(0)], 3: [box(0)], 2: [box(50)]}) == ["66.7", "3"]
    assert found_cells({}, {1: [box(0)]}) == ["-", "1"]


def test_pascal_voc_says_what_coco_said(tmp_path: Path) -> None:
    labels = {
        "images": [{"id": 7, "file_name": "a.jpg"}, {"id": 8, "file_name": "b.jpg"}],
        "categories": [{"id": 3, "name": "cat"}],
        "annotations": [
            {"image_id": 7, "category_id": 3, "bbox": [1.5, 2.25, 10.125, 20.5]},
            {"image_id": 7, "category_id": 3, "bbox": [0, 0, 5, 5], "iscrowd": 1},
        ],
    }
    paths = (tmp_path / "a.jpg", tmp_path / "b.jpg")
    said = read_voc_labels(write_voc(labels, tmp_path / "voc"), LabelledPictures(paths, (Path("a.jpg"), Path("b.jpg"))))
    first, second = (said.pictures[path] for path in paths)
    assert np.array(first.boxes) == pytest.approx(np.array([[1.5, 2.25, 11.625, 22.75], [0, 0, 5, 5]]))
    assert first.keys == ["cat", "cat"]
    assert list(first.ignored) == [False, True]
    assert not len(second.boxes)


@pytest.mark.parametrize(
    ("resize", "first"),
    [("top-left", 0), ("center", 2)],
)
def test_a_letterbox_is_grey_beside_the_picture(tmp_path: Path, resize: str, first: int) -> None:
    """16x8 in 8x8 is 8x4: rows 0 to 3, or 2 to 5; blue comes first where channels are turned."""
    Image.new("RGB", (16, 8), (10, 20, 30)).save(tmp_path / "a.png")
    fed = Prep((8, 8), resize=resize, bgr=True)(tmp_path / "a.png")
    expected = np.full((1, 3, 8, 8), 114.0)
    expected[:, :, first : first + 4] = np.array([30, 20, 10]).reshape(3, 1, 1)
    assert np.array_equal(fed, expected)


def test_a_row_may_say_something_in_place_of_numbers() -> None:
    lines = grid([["a", "b", "c"], ["1", "2", "3"], ["1", "no file: it is a very long story"]]).splitlines()
    assert lines[0] == "a  b  c"
    assert lines[-1] == "1  no file: it is a very long story"


def test_rows_are_compared_in_front_of_what_picks_some(tmp_path: Path) -> None:
    body = "b = Sigmoid(x)  j = Concat<axis=1>(x, b)  v, i = TopK(j, k)  y = Concat<axis=1>(v, v)"
    joined = network(body, (1, 2, 3), k=ints(1))
    path, copy = tmp_path / "a.onnx", tmp_path / "b.onnx"
    onnx.save(joined, path)
    name = joined_rows(path)
    assert name == "j"
    assert [output.name for output in onnx.load(with_output(path, name, copy)).graph.output] == ["y", "j"]


def test_every_network_has_a_case() -> None:
    assert set(NETWORKS) <= set(BY_NAME)
