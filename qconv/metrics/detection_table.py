"""Writes the boxes that a detector finds in pictures: as CSV, and as results for COCO's programs in JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qconv.data.box_labels import BoxLabelSet
from qconv.decoding.boxes import Detections

COLUMNS = ("path", "x1", "y1", "x2", "y2", "score", "class", "name")


@dataclass(frozen=True, slots=True)
class DetectionTable:
    """What a detector finds.

    Attributes:
        found: By picture, in its pixels, or in those of the network's input where no picture was read.
        names: Of classes, as far as they are known.
        labels: Those of the same pictures, which know what COCO calls pictures and classes; None without any.
    """

    found: dict[Path, Detections] = field(default_factory=dict)
    names: Mapping[int, str] = field(default_factory=dict)
    labels: BoxLabelSet | None = None

    def add(self, path: Path, found: Detections) -> None:
        """Take in a picture."""
        self.found[path] = found

    def as_csv(self) -> bytes:
        """A line a box: path, edges, score, class and its name; pictures by their paths, boxes by falling score."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(COLUMNS)
        for path in sorted(self.found, key=Path.as_posix):
            own = self.found[path]
            for box, score, number in zip(own.boxes.tolist(), own.scores.tolist(), own.classes.tolist(), strict=True):
                edges = (f"{edge:.2f}" for edge in box)
                writer.writerow([path.as_posix(), *edges, f"{score:.6g}", number, self.names.get(number, "")])
        return text.getvalue().encode("utf-8", "surrogateescape")

    def as_json(self) -> bytes:
        """The list that COCO's programs take as results.

        Pictures and classes are called as COCO labels call them, if there are such; else a picture is called by its
        name without suffix, as a number where it is one, and a class by its number.
        """
        pictures = {} if self.labels is None else self.labels.picture_ids
        classes = {} if self.labels is None else self.labels.category_ids
        found: list[dict[str, Any]] = []
        for path in sorted(self.found, key=Path.as_posix):
            own, name = self.found[path], pictures.get(path, int(path.stem) if path.stem.isdecimal() else path.stem)
            for box, score, number in zip(own.boxes.tolist(), own.scores.tolist(), own.classes.tolist(), strict=True):
                left, top, right, bottom = box
                entry = {"image_id": name, "category_id": classes.get(number, number), "score": score}
                found.append({**entry, "bbox": [left, top, right - left, bottom - top]})
        return json.dumps(found).encode()
