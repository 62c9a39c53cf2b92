"""Boxes as files: worked by hand, and as COCO's own program reads them."""

from __future__ import annotations

import json
from pathlib import Path

from qconv.data.box_labels import BoxLabelSet
from qconv.decoding.boxes import Detections
from qconv.metrics.detection_table import DetectionTable

FOUND = {
    Path("imgs/b.jpg"): Detections.of([[1, 2, 4, 8]], [0.5], [1]),
    Path("imgs/000012.jpg"): Detections.of([[0, 0, 1.5, 1], [3, 3, 5, 5]], [0.25, 0.75], [0, 1]),
}


def test_csv() -> None:
    """Pictures by their names, boxes by falling score; a class without a name has none."""
    assert DetectionTable(dict(FOUND), {1: "cat, tame"}).as_csv().decode().splitlines() == [
        "path,x1,y1,x2,y2,score,class,name",
        'imgs/000012.jpg,3.00,3.00,5.00,5.00,0.75,1,"cat, tame"',
        "imgs/000012.jpg,0.00,0.00,1.50,1.00,0.25,0,",
        'imgs/b.jpg,1.00,2.00,4.00,8.00,0.5,1,"cat, tame"',
    ]


def test_json_by_the_ids_of_labels() -> None:
    labels = BoxLabelSet({}, {0: 7, 1: 90}, {Path("imgs/b.jpg"): 3})
    assert json.loads(DetectionTable(dict(FOUND), {}, labels).as_json()) == [
        {"image_id": 12, "category_id": 90, "score": 0.75, "bbox": [3, 3, 2, 2]},
        {"image_id": 12, "category_id": 7, "score": 0.25, "bbox": [0, 0, 1.5, 1]},
        {"image_id": 3, "category_id": 90, "score": 0.5, "bbox": [1, 2, 3, 6]},
    ]


def test_json_without_labels() -> None:
    found = json.loads(DetectionTable(dict(FOUND)).as_json())
    assert [(entry["image_id"], entry["category_id"]) for entry in found] == [(12, 1), (12, 0), ("b", 1)]
