"""Detectors and segmenters in their own measure: qconv beside ONNX Runtime's quantizer, and every decoder.

python -m tests.bench.tasks [--only NAME] [--models FOLDER | --make PYTHON] [--json FILE]

The peer is quantize_static for Conv, Gemm and MatMul alone, as everyday exporters call it, on the same 96 pictures.
Files run in ONNX Runtime, one thread, on images/coco/val. Networks of Ultralytics have random weights: --models names a
folder with yolo11n.onnx and yolo26n.onnx by `tests.bench.ultralytics_models`, --make the Python of an environment in
which that makes them.

    mAP, mIoU       by the labels of the data; the difference to float has the paired bootstrap's interval
    found           share of float's boxes above 0.3 that the file shows above 0.3 too: of the class, IoU 0.5 or more
    boxes above     how many boxes the file shows above 0.3
    usual           the share found as `evaluate` tells it, from the score on that programs of the family show boxes
    best scores     correlation with float's over the pictures
    dB              of boxes and of scores, each by its own power, in front of the rows that TopK picks
    px              by how much a decoder's boxes differ from those of its family's own program
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from tests.bench import peer
from tests.bench.accuracy import Tally, session
from tests.bench.cases import BY_NAME, REPOSITORY, Case, default_data, linked, pictures, require_data
from tests.bench.table import grid
from tests.support.decoder_references import NAMES, DecoderReference, differences

CALIBRATION, TESTS = "images/coco/calib", "images/coco/val"
BOX_LABELS, MASK_LABELS = "images/coco/val_instances.json", "images/coco/val_masks_voc"
MOST_PICTURES = 96
WEIGHTED = ("Conv", "Gemm", "MatMul")
LEAST_SCORE = 0.3
FOUND_IOU = 0.5
MOST_LETTERS = 110
"""Of an error."""
PUBLISHED = {"map": 34.99, "miou": 46.58}
"""Of yolox_nano and deeplabv3 on these pictures, by pycocotools and numpy, as the README of the data tells."""

Row = list[str]
Boxes = dict[int, list[dict[str, Any]]]
"""What COCO's results hold, by picture."""


@dataclass(frozen=True)
class Place:
    """data: with models/ and images/. scratch: a folder of this run. models: networks of Ultralytics, if any."""

    data: Path
    scratch: Path
    models: Path | None

    def model(self, case: Case) -> Path | None:
        folder = self.models if case.name in MADE else self.data / "models"
        return None if folder is None else folder / case.model


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.tasks", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--data", type=Path, default=default_data(), help="folder with models/ and images/")
    parser.add_argument("--only", action="append", metavar="NAME", choices=(*NETWORKS, *TABLES), help="repeatable")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all rows")
    networks = parser.add_mutually_exclusive_group()
    networks.add_argument("--models", type=Path, metavar="FOLDER", help="with networks of Ultralytics")
    networks.add_argument("--make", metavar="PYTHON", help="which makes them")
    wanted = parser.parse_args()
    require_data(wanted.data)
    told: dict[str, list[Row]] = {}
    with tempfile.TemporaryDirectory(prefix="qconv-bench-") as scratch:
        models = wanted.models or (make_networks(wanted.make, Path(scratch), wanted.data) if wanted.make else None)
        place = Place(wanted.data, Path(scratch), models)
        for title, heading, rows in parts(wanted.only or [*NETWORKS, *TABLES], place):
            told[title] = [list(heading), *rows]
            print(f"{title}\n{grid(told[title])}\n", flush=True)
            if wanted.json:
                wanted.json.write_text(json.dumps(told, indent=1))


def parts(names: Sequence[str], place: Place) -> Any:
    """(title, heading, rows) of each table that has any of these names."""
    for title, (heading, rows_of, networks) in GROUPS.items():
        chosen = [name for name in networks if name in names]
        if chosen:
            yield title, heading, [row for name in chosen for row in network_rows(BY_NAME[name], place, rows_of)]
    for name, (title, heading, rows) in TABLES.items():
        if name in names:
            yield title, heading, rows(place)


def make_networks(python: str, scratch: Path, data: Path) -> Path:
    command = [python, "-m", "tests.bench.ultralytics_models", str(scratch / "made"), "--images"]
    subprocess.run([*command, str(data / CALIBRATION)], cwd=REPOSITORY, check=True, stdout=sys.stderr)
    return scratch / "made"


# -- networks ----------------------------------------------------------------------------------------------------------


def network_rows(case: Case, place: Place, rows_of: Callable[[Case, Path, Path, Place], Row]) -> list[Row]:
    """A row for the float model and each side; words in place of numbers where there is no file."""
    model = place.model(case)
    if model is None:
        return [[case.name, "-", "not measured: pass --models or --make"]]
    files, failures = quantized(case, model, place)
    rows = [[case.name, side, *rows_of(case, model, file, place)] for side, file in files.items()]
    return rows + [[case.name, side, why[:MOST_LETTERS]] for side, why in failures.items()]


def quantized(case: Case, model: Path, place: Place) -> tuple[dict[str, Path], dict[str, str]]:
    """The file of each side, and why one has none of the model as it is."""
    folder = place.scratch / case.name
    calibration = linked(pictures(place.data / CALIBRATION, MOST_PICTURES), folder / "calib")
    own, other = folder / "qconv.onnx", folder / "peer.onnx"
    qconv("quantize", model, "-o", own, "--calib", calibration, *case.options)
    files, failures = {"float": model, "qconv": own}, {}
    made = peer.convert(case, model, calibration, other, next(calibration.iterdir()), WEIGHTED)
    if made["error"]:
        failures["peer"] = made["error"]
    if made["input"]:
        files["peer" if made["input"] == "as is" else "peer, of the folded model"] = other
    return files, failures


def qconv(command: str, *options: object) -> Any:
    """What a command prints with --json."""
    words = [sys.executable, "-m", "qconv", command, *options, "--json", "--quiet", "--threads", "1"]
    done = subprocess.run([*map(str, words)], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 3):
        sys.exit(done.stderr)
    return json.loads(done.stdout)


def evaluated(case: Case, model: Path, file: Path, place: Place, *options: object) -> tuple[dict[str, Any], Boxes]:
    """What `evaluate` says of a file beside the float model, and the boxes that it finds."""
    found = place.scratch / case.name / "found.json"
    pair = (file, "--against", model, "--images", place.data / TESTS, *case.options)
    told = qconv("evaluate", *pair, *options, "--save-predictions", found)
    boxes: Boxes = defaultdict(list)
    for entry in json.loads(found.read_text()):
        if entry["score"] > LEAST_SCORE:
            boxes[entry["image_id"]].append(entry)
    return told, boxes


@functools.cache
def float_boxes(case: Case, model: Path, place: Place, *options: object) -> Boxes:
    """options: as for the other side, since labels say how results call classes."""
    return evaluated(case, model, model, place, *options)[1]


def detector_row(case: Case, model: Path, file: Path, place: Place) -> Row:
    labels = ("--labels", place.data / BOX_LABELS) if case.name == "yolox_nano" else ()
    told, boxes = evaluated(case, model, file, place, *labels)
    measured = [*(in_points(told, name) for name in ("map", "map50")), difference(told, "map")]
    return [*measured, *found_cells(float_boxes(case, model, place, *labels), boxes), shown_share(told)]


def segmenter_row(case: Case, model: Path, file: Path, place: Place) -> Row:
    pair = (file, "--against", model, "--images", place.data / TESTS, *case.options)
    told = qconv("evaluate", *pair, "--labels", place.data / MASK_LABELS)
    return [in_points(told, "miou"), in_points(told, "pixel_accuracy"), difference(told, "miou")]


def made_row(case: Case, model: Path, file: Path, place: Place) -> Row:
    told, boxes = evaluated(case, model, file, place)
    found = found_cells(float_boxes(case, model, place), boxes)
    return [*compare_rows(case, model, file, place), *found, shown_share(told)]


def in_points(told: dict[str, Any], name: str) -> str:
    return "-" if told.get(name) is None else f"{100 * told[name]:.2f}"


def difference(told: dict[str, Any], name: str) -> str:
    """The paired difference to float with its interval."""
    value = ((told["against"] or {}).get("differences") or {}).get(name)
    if value is None:
        return "-"
    low, high = told["intervals"][f"{name}_difference"]
    return f"{100 * value:+.2f} ({100 * low:+.2f} .. {100 * high:+.2f})"


def shown_share(told: dict[str, Any]) -> str:
    """What qconv itself says of boxes, from the score on that the family shows them."""
    return in_points(told["against"], "boxes")


def found_cells(reference: Boxes, boxes: Boxes) -> Row:
    """The share of boxes that are found, and how many boxes there are."""
    whole, shown = (sum(map(len, side.values())) for side in (reference, boxes))
    found = sum(count_found(own, boxes.get(picture, [])) for picture, own in reference.items())
    return [f"{100 * found / whole:.1f}" if whole else "-", str(shown)]


def count_found(reference: Sequence[dict[str, Any]], boxes: Sequence[dict[str, Any]]) -> int:
    """Boxes of one picture that another model finds, each by a box of its own, the highest scores first."""
    left, found = list(boxes), 0
    for own in sorted(reference, key=lambda box: -box["score"]):
        near = [box for box in left if box["category_id"] == own["category_id"]]
        best = max(near, key=lambda box: overlap(own["bbox"], box["bbox"]), default=None)
        if best is not None and overlap(own["bbox"], best["bbox"]) >= FOUND_IOU:
            left.remove(best)
            found += 1
    return found


def overlap(one: Sequence[float], other: Sequence[float]) -> float:
    """IoU of two boxes by left, top, width and height."""
    width, height = (
        max(0.0, min(one[a] + one[a + 2], other[a] + other[a + 2]) - max(one[a], other[a])) for a in (0, 1)
    )
    both = width * height
    return both / (one[2] * one[3] + other[2] * other[3] - both) if both else 0.0


def compare_rows(case: Case, model: Path, file: Path, place: Place) -> Row:
    """Correlation of best scores, dB of boxes and dB of scores."""
    correlation, *sides = compare_parts(case, model, file, place)
    return [f"{correlation:.4f}", *("equal" if side.sqnr_db is None else f"{side.sqnr_db:.1f}" for side in sides)]


def compare_parts(case: Case, model: Path, file: Path, place: Place) -> tuple[float, Tally, Tally]:
    """Correlation of best scores, boxes and scores, by the tensor that joins both, (1, 4 + C, N)."""
    name = joined_rows(model)
    copies = [with_output(path, name, place.scratch / f"{index}.onnx") for index, path in enumerate((model, file))]
    ours, theirs = (session(copy) for copy in copies)
    boxes, scores, best = Tally(), Tally(), []
    for path in pictures(place.data / TESTS, 1000):
        feeds = {ours.get_inputs()[0].name: case.prep(path)}
        (ref,), (got,) = ours.run([name], feeds), theirs.run([name], feeds)
        boxes.add(ref[:, :4], got[:, :4])
        scores.add(ref[:, 4:], got[:, 4:])
        best.append((ref[:, 4:].max(), got[:, 4:].max()))
    return float(np.corrcoef(np.array(best).T)[0, 1]), boxes, scores


def joined_rows(path: Path) -> str:
    """The tensor of boxes and scores of all cells: what the last Concat gives, in front of the first TopK if any."""
    nodes = list(onnx.load(path).graph.node)
    end = next((index for index, node in enumerate(nodes) if node.op_type == "TopK"), len(nodes))
    name: str = [node for node in nodes[:end] if node.op_type == "Concat"][-1].output[0]
    return name


def with_output(path: Path, name: str, copy: Path) -> Path:
    """A copy that also gives this tensor."""
    proto = onnx.load(path)
    if name not in [output.name for output in proto.graph.output]:
        proto.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    onnx.save(proto, copy)
    return copy


# -- decoders and labels -----------------------------------------------------------------------------------------------


def decoder_rows(place: Place) -> list[Row]:
    """A row a reference."""
    rows = []
    for name in NAMES:
        reference = DecoderReference.load(name)
        boxes = sum(len(found["scores"]) for found in reference.published)
        try:
            apart = differences(reference)
            pixels = max(value for kind, value in apart.items() if kind not in ("scores", "masks"))
            cells = [
                f"{pixels:.5f}",
                f"{apart['scores']:.1e}",
                f"{100 * apart['masks']:.2f} %" if "masks" in apart else "-",
            ]
        except AssertionError as error:
            cells = [f"differs: {error}", "", ""]
        rows.append([reference.family, name, str(boxes), *cells, reference.program])
    return sorted(rows)


def label_rows(place: Place) -> list[Row]:
    """The float models by labels of each form."""
    images = place.data / "images/coco"
    voc = write_voc(json.loads((place.data / BOX_LABELS).read_text()), place.scratch / "voc")
    forms: list[tuple[str, str, str, object]] = [
        ("COCO JSON", "yolox_nano", "map", images / "val_instances.json"),
        ("YOLO data.yaml", "yolox_nano", "map", images / "val_data.yaml"),
        ("YOLO txt", "yolox_nano", "map", images / "val_labels"),
        ("Pascal VOC, of COCO JSON", "yolox_nano", "map", voc),
        ("masks", "deeplabv3", "miou", images / "val_masks_voc"),
    ]
    rows = []
    for form, name, measure, labels in forms:
        case = BY_NAME[name]
        options = ("--images", place.data / TESTS, *case.options, "--labels", labels, *classes_of(form, place))
        told = qconv("evaluate", place.data / "models" / case.model, *options)
        rows.append([form, name, measure, in_points(told, measure), f"{PUBLISHED[measure]:.2f}"])
    return rows


def classes_of(form: str, place: Place) -> tuple[object, ...]:
    """Names alone tell classes of Pascal VOC: those of COCO, in the order of their ids."""
    if not form.startswith("Pascal VOC"):
        return ()
    path = place.scratch / "classes.txt"
    categories = json.loads((place.data / BOX_LABELS).read_text())["categories"]
    path.write_text("".join(f"{entry['name']}\n" for entry in sorted(categories, key=lambda entry: int(entry["id"]))))
    return ("--classes", path)


def write_voc(labels: dict[str, Any], folder: Path) -> Path:
    """The same boxes as Pascal VOC has them: a file a picture, pixels counted from 1, crowds difficult."""
    folder.mkdir(exist_ok=True)
    names = {entry["id"]: entry["name"] for entry in labels["categories"]}
    objects: dict[int, list[str]] = defaultdict(list)
    for entry in labels["annotations"]:
        x, y, width, height = entry["bbox"]
        edges = dict(zip(("xmin", "ymin", "xmax", "ymax"), (x + 1, y + 1, x + width, y + height), strict=True))
        box = "".join(f"<{edge}>{value!r}</{edge}>" for edge, value in edges.items())
        told = f"<name>{names[entry['category_id']]}</name><difficult>{entry.get('iscrowd', 0)}</difficult>"
        objects[entry["image_id"]].append(f"<object>{told}<bndbox>{box}</bndbox></object>")
    for image in labels["images"]:
        path = folder / Path(image["file_name"]).with_suffix(".xml").name
        path.write_text(f"<annotation>{''.join(objects[image['id']])}</annotation>")
    return folder


FOUND = ("found %", "boxes above", "usual %")
MADE = ("yolo11n", "yolo26n")
GROUPS: dict[str, tuple[Row, Callable[[Case, Path, Path, Place], Row], tuple[str, ...]]] = {
    "Detectors": (
        ["network", "file", "mAP", "mAP50", "mAP to float (95 %)", *FOUND],
        detector_row,
        ("yolox_nano", "ultraface", "fastestdet"),
    ),
    "Segmenters": (
        ["network", "file", "mIoU", "pixel accuracy", "mIoU to float (95 %)"],
        segmenter_row,
        ("deeplabv3",),
    ),
    "Networks of Ultralytics with random weights": (
        ["network", "file", "best scores", "boxes dB", "scores dB", *FOUND],
        made_row,
        MADE,
    ),
}
NETWORKS = tuple(name for _, _, names in GROUPS.values() for name in names)
TABLES: dict[str, tuple[str, Row, Callable[[Place], list[Row]]]] = {
    "decoders": (
        "Decoders beside their families' own programs",
        ["family", "reference", "boxes", "px", "score", "masks", "program"],
        decoder_rows,
    ),
    "labels": ("Labels of each form, float models", ["form", "network", "measure", "here", "published"], label_rows),
}


if __name__ == "__main__":
    main()
