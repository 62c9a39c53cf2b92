"""`qconv quantize --labels`: both models by labels of the pictures that results are checked on, gates, searches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from PIL import Image

from qconv.data.dataset import find_files
from qconv.errors import QconvError
from tests.metrics.test_labelled import by_pycocotools
from tests.support import labelled
from tests.support.cli import Qconv, assert_error, listing, picture

BOXED = ("--preprocess", "unit", "--resize", "letterbox", "--effort", "fast")
STRETCHED = ("--preprocess", "unit", "--resize", "exact", "--effort", "fast")

needs_library = pytest.mark.usefixtures("_library")


@pytest.fixture
def _library() -> None:
    pytest.importorskip("faster_coco_eval", reason="needs the extra: pip install 'qconv[detect]'")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return labelled.pictures(tmp_path / "imgs", 12)


@pytest.fixture
def detector(tmp_path: Path) -> Path:
    labelled.save(labelled.detector(), tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


@pytest.fixture
def segmenter(tmp_path: Path) -> Path:
    labelled.save(labelled.segmenter(), tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


@pytest.fixture
def coco(call: Qconv, tmp_path: Path, images: Path, detector: Path) -> Path:
    """Every third box of the float model's best, as `evaluate` saves them, for a label."""
    dummy = labelled.write_coco(labelled.some_boxes(images), tmp_path / "coco.json")
    truth = json.loads(dummy.read_text())
    words = (*BOXED[:4], "--labels", dummy, "--save-predictions", tmp_path / "boxes.json")
    assert call("evaluate", detector, "--images", images, *words, "--quiet").status == 0
    found = sorted(json.loads((tmp_path / "boxes.json").read_text()), key=lambda box: -box["score"])
    truth["annotations"] = [
        {"id": number, "area": box["bbox"][2] * box["bbox"][3], "iscrowd": 0, **box}
        for number, box in enumerate(found[:90:3], 1)
    ]
    dummy.write_text(json.dumps(truth))
    return dummy


def outputs(model: Path, images: Path) -> NDArray[np.float32]:
    """What ONNX Runtime gives for stretched pictures."""
    session = ort.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    found = []
    for path in sorted(images.rglob("*.png")):
        with Image.open(path) as shown:
            height, width = session.get_inputs()[0].shape[2:]
            small = shown.resize((width, height), Image.Resampling.BILINEAR)
        x = np.asarray(small, np.float32).transpose(2, 0, 1)[None] / np.float32(255)
        found.append(session.run(None, {session.get_inputs()[0].name: x})[0])
    return np.concatenate(found)


@needs_library
def test_boxes_by_labels(call: Qconv, tmp_path: Path, images: Path, detector: Path, coco: Path) -> None:
    """Both mAPs are pycocotools' on the boxes that `evaluate` saves of either file."""
    out = tmp_path / "q.onnx"
    words = ("quantize", detector, "--calib", images, *BOXED, "--weight-bits", "3", "--edge-bits", "3", "-o", out)
    found = call(*words, "--labels", coco, "--json").json["verify"]["labels"]
    assert found["source"] == f"{coco} (COCO JSON)"
    assert found["pictures"] == 12
    for model, got in ((detector, found["float"]), (out, found)):
        saved = tmp_path / "again.json"
        done = call("evaluate", model, "--images", images, *BOXED[:4], "--labels", coco, "--save-predictions", saved)
        assert done.status == 0
        np.testing.assert_allclose((got["map"], got["map50"]), by_pycocotools(coco, saved.read_bytes()), atol=1e-12)
    assert found["differences"]["map"] == found["map"] - found["float"]["map"] < 0
    low, high = found["intervals"]["map_difference"]
    assert low <= found["differences"]["map"] <= high
    text = call(*words, "--labels", coco).out.decode()
    assert f"mAP {100 * found['float']['map']:.2f} -> {100 * found['map']:.2f} by labels, finds " in text
    assert "with these for labels" not in text
    assert f"12 pictures with labels by {coco} (COCO JSON)" in text
    assert call(*words, "--labels", coco, "--batch", "5", "--json").json["verify"]["labels"]["map"] == found["map"]
    assert call(*words, "--json").json["verify"]["labels"] is None


@needs_library
def test_a_gate_on_map_is_by_labels(call: Qconv, tmp_path: Path, images: Path, detector: Path, coco: Path) -> None:
    words = ("quantize", detector, "--calib", images, *BOXED, "-o", tmp_path / "q.onnx", "--min-map", "0.9", "--json")
    beside = call(*words).json["gates"][0]
    assert beside["held"] is True
    done = call(*words, "--labels", coco)
    (gate,) = done.json["gates"]
    assert done.status == 3
    told = done.json["verify"]["labels"]
    named = {"name": "min-map", "want": 0.9, "got": told["map"], "held": False}
    assert gate == {**named, "float": told["float"]["map"], "float_held": False}
    assert 0.05 < gate["got"] < 0.9 < beside["got"]
    assert (beside["float"], beside["float_held"]) == (None, None)
    floats = f"the float model itself has {gate['float']:.4g} on these pictures"
    excuse = f"{floats}, so that no quantized file can be expected to reach it"
    assert f"got {gate['got']:.4g}; {excuse}" in done.err
    assert excuse in " ".join(call(*words[:-1], "--labels", coco).out.decode().split())


@needs_library
@pytest.mark.parametrize("drop", ["0.02", "0.2"])
def test_a_search_by_labels(call: Qconv, tmp_path: Path, images: Path, detector: Path, coco: Path, drop: str) -> None:
    """The smallest file that was tried and keeps the drop is taken."""
    words = ("--candidate-bits", "2,3,4,5,8", "--edge-bits", "2", "--labels", coco, "-o", tmp_path / "q.onnx")
    mixed = call("quantize", detector, "--calib", images, *BOXED, *words, "--max-drop", f"map:{drop}", "--json").json
    points, before = mixed["mixed"]["points"], mixed["mixed"]["float_labels"]["map"]
    tried = [point for point in points if point["verified"]]
    within = [point for point in tried if before - point["map"] <= float(drop) + 1e-9]
    assert (len(within) < len(tried)) == (drop == "0.02")
    assert min(within, key=lambda point: point["size"])["chosen"]
    assert mixed["verify"]["labels"]["float"]["map"] == before


def test_masks_by_labels(call: Qconv, tmp_path: Path, images: Path, segmenter: Path) -> None:
    """mIoU by numpy of masks that are the float model's maps, of which every second row says class 0."""
    masks, out = tmp_path / "masks", tmp_path / "q.onnx"
    masks.mkdir()
    truth = outputs(segmenter, images).argmax(axis=1)
    truth[:, ::2] = 0
    for path, mask in zip(sorted(images.iterdir()), truth, strict=True):
        with Image.open(path) as shown:
            size = shown.size
        Image.fromarray(mask.astype(np.uint8)).resize(size, Image.Resampling.NEAREST).save(masks / path.name)
    words = ("quantize", segmenter, "--calib", images, *STRETCHED, "--weight-bits", "2", "--edge-bits", "2", "-o", out)
    done = call(*words, "--labels", masks, "--min-miou", "0.99", "--json")
    found = done.json["verify"]["labels"]
    for model, got in ((segmenter, found["float"]), (out, found)):
        said = outputs(model, images).argmax(axis=1)
        shares = [((said == c) & (truth == c)).sum() / ((said == c) | (truth == c)).sum() for c in np.unique(truth)]
        assert got["miou"] == pytest.approx(np.mean(shares), abs=1e-12)
        assert got["pixel_accuracy"] == pytest.approx((said == truth).mean(), abs=1e-12)
    assert done.status == 3
    assert done.json["gates"][0]["got"] == found["miou"] != found["float"]["miou"]
    text = call(*words, "--labels", masks).out.decode()
    assert f"mIoU {100 * found['float']['miou']:.2f} -> {100 * found['miou']:.2f} by labels" in text


def test_class_folders(call: Qconv, tiny: Path, twenty: Path) -> None:
    """top-1 by hand, in the order of a list of classes."""
    names, out = tiny.parent / "names.txt", tiny.parent / "q.onnx"
    order = [f"class{(number * 3) % 10}" for number in range(10)]
    names.write_text("\n".join(order))
    words = ("quantize", tiny, "--calib", twenty, *STRETCHED, "--weight-bits", "2", "--edge-bits", "2", "-o", out)
    found = call(*words, "--classes", names, "--json").json["verify"]["labels"]
    truth = np.array([order.index(path.parent.name) for path in sorted(twenty.rglob("*.png"))])
    for model, got in ((tiny, found["float"]), (out, found)):
        assert got["top1"] == (outputs(model, twenty).argmax(axis=1) == truth).mean()
    assert found["source"] == str(names)
    assert call(*words, "--json").json["verify"]["labels"] is None


@needs_library
def test_what_does_not_fit_is_said_before_the_work(
    call: Qconv, tmp_path: Path, images: Path, segmenter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    coco = labelled.write_coco(labelled.some_boxes(images), tmp_path / "coco.json")
    words = ("quantize", segmenter, "--calib", images, *STRETCHED)
    before = listing(tmp_path)

    def never(*args: Any) -> None:
        raise AssertionError

    monkeypatch.setattr("qconv.pipeline.quantize._QuantizationRun.calibrate", never)
    assert_error(call(*words, "--labels", coco), "holds boxes as labels, but no output is read as detections")
    assert_error(call(*words, "--labels", tmp_path / "no.json"), "no.json does not exist")
    assert_error(call(*words, "--labels", coco, "--max-drop", "top1:0.1"), "top1 needs pictures in class folders")
    names = tmp_path.parent / f"{tmp_path.name}.txt"
    names.write_text("a\nb\n")
    assert_error(call(*words, "--classes", names), "No output of the model is one score a class")
    (tmp_path / "masks").mkdir()
    assert_error(call(*words, "--labels", tmp_path / "masks"), "holds no labels of these pictures")
    (tmp_path / "masks").rmdir()
    assert listing(tmp_path) == before + ["coco.json"] if "coco.json" not in before else before

    def missing() -> None:
        raise QconvError("mAP needs faster-coco-eval, which is not installed.", "install the extra.")

    monkeypatch.setattr("qconv.metrics.labelled.require_detect_extra", missing)
    assert_error(call(*words, "--labels", coco), "mAP needs faster-coco-eval")


def test_pictures_that_are_checked_need_labels(call: Qconv, tmp_path: Path, segmenter: Path) -> None:
    """Of 40 pictures 8 are held back, and the one that has a mask is none of these."""
    images, masks = labelled.pictures(tmp_path / "many", 40), tmp_path / "masks"
    masks.mkdir()
    words = ("quantize", segmenter, "--calib", images, *STRETCHED, "-o", tmp_path / "q.onnx", "--labels", masks)
    done = []
    for path in sorted(images.iterdir()):
        with Image.open(path) as shown:
            Image.new("L", shown.size).save(masks / path.name)
        done.append(call(*words, "--json"))
        (masks / path.name).unlink()
    assert sum(found.status == 0 for found in done) == 8
    assert {found.json["verify"]["labels"]["pictures"] for found in done if not found.status} == {1}
    told = next(found.err for found in done if found.status)
    assert "none of the 8 pictures that results are checked on has labels" in told
    assert "`qconv evaluate --images DIR" in " ".join(told.split())
    assert "Traceback" not in told


@needs_library
@pytest.mark.parametrize("form", ["file", "folder"])
def test_labels_of_other_pictures_are_told_where_to_go(
    call: Qconv, tmp_path: Path, images: Path, detector: Path, form: str
) -> None:
    """`diagnose` and `evaluate` take pictures to measure on, `quantize` has none but those of the calibration."""
    boxes = {f"other{stem}": found for stem, found in labelled.some_boxes(images).items()}
    labels = labelled.write_coco(boxes, tmp_path / "other.json")
    if form == "folder":
        labels = labelled.write_voc(boxes, tmp_path / "other")
    sweep, out = tmp_path / "sweep.toml", ("-o", tmp_path / "q.onnx")
    sweep.write_text("[a]\n")
    calib = ("--calib", images, *BOXED)
    for words, way in (
        (("quantize", detector, *calib, *out), "qconv evaluate --images"),
        (("quantize", detector, *calib, "--sweep", sweep), "qconv evaluate --images"),
        (("diagnose", detector, *calib), "with --images"),
        (("diagnose", detector, *calib, "--images", images), "with --images"),
        (("evaluate", detector, "--images", images, *BOXED[:4]), "with --images"),
    ):
        done = call(*words, "--labels", labels)
        assert_error(done, "labels of none of the pictures" if form == "file" else "no labels of these pictures")
        assert way in " ".join(done.err.split())


def test_usage(call: Qconv, tiny: Path, calib: Path) -> None:
    assert call("quantize", tiny, "--calib", calib, "--label-map", "map.toml").status == 2
    assert call("quantize", tiny, "--calib", calib, "--labels", "").status == 2
    assert call("quantize", tiny, "--calib", "none", "--labels", "x").status == 2
    assert call("study-samples", tiny, "--calib", calib, "--labels", "x").status == 2


def test_recipes_keep_labels(call: Qconv, tmp_path: Path, tiny: Path, twenty: Path) -> None:
    """A gate that is measured by labels would mean something else without them."""
    names, recipe = twenty / "classes.txt", tmp_path / "r.toml"
    names.write_text("".join(f"class{number}\n" for number in range(10)))
    words = ("quantize", tiny, "-o", tmp_path / "q.onnx", "--json")
    first = call(*words, "--calib", twenty, *STRETCHED, "--classes", names, "--save-recipe", recipe).json["verify"]
    assert f'classes = "{names}"' in recipe.read_text()
    assert call(*words, "--recipe", recipe).json["verify"]["labels"]["top1"] == first["labels"]["top1"]
    sweep = tmp_path / "sweep.toml"
    sweep.write_text(f'[a]\nclasses = "{names}"\n')
    assert_error(call(*words[:2], "--calib", twenty, "--sweep", sweep), "which cannot differ")


def test_noise_has_no_labels(call: Qconv, tmp_path: Path, tiny: Path) -> None:
    folder = tmp_path / "loose"
    for number in range(4):
        picture(folder / f"{number}.png", number)
    names = tmp_path / "names.txt"
    names.write_text("a\nb\n")
    done = call("quantize", tiny, "--calib", folder, *STRETCHED, "--classes", names)
    assert_error(done, "lie in no class folders")


@needs_library
def test_a_diagnosis_by_labels(call: Qconv, images: Path, detector: Path, coco: Path) -> None:
    """Trials have the labels' mAP, which they are ranked by.

    The command that is recommended has no labels: those of --images need not be of pictures that `quantize` reads.
    """
    words = (*BOXED, "--weight-bits", "2", "--edge-bits", "2", "--labels", coco)
    found = call("diagnose", detector, "--calib", images, *words, "--images", images, "--json").json
    assert found["ranked_by"] == "map"
    assert found["ladder"][0]["map"] == found["ladder"][0]["labels"]["map"]
    measured = [row["labels"] for row in found["ladder"] if row["failed"] is None]
    assert len({own["float"]["map"] for own in measured}) == 1
    assert len(measured) > 1
    assert "--labels" not in found["recommended"]
    own = call("diagnose", detector, "--calib", images, *words, "--json").json
    assert f"--labels {coco}" in own["recommended"]
    text = call("diagnose", detector, "--calib", images, *words, "--images", images).out.decode()
    assert "ranked by mAP by labels, of which the float model has" in " ".join(text.split())
    assert text.split("recipe\n")[0].splitlines()[-2].split()[0] == "mAP"
    assert f"has {100 * measured[0]['float']['map']:.2f}%" in " ".join(text.split())
    table = [line for line in text[: text.index("options:")].splitlines() if "/" not in line]  # but for long paths
    assert max(map(len, table)) <= 80, max(table, key=len)
    plain = call("diagnose", detector, "--calib", images, *words[:-2], "--images", images, "--json").json
    assert plain["ranked_by"] == "boxes"
    assert plain["ladder"][0]["labels"] is None
    assert plain["ladder"][0]["part_sqnr_db"] == found["ladder"][0]["part_sqnr_db"]


@needs_library
def test_a_sweep_by_labels(call: Qconv, tmp_path: Path, images: Path, detector: Path, coco: Path) -> None:
    """mAP of each recipe is pycocotools' on the pictures that are held back, which `evaluate` saves the boxes of."""
    sweep = tmp_path / "sweep.toml"
    sweep.write_text("[a]\nweight-bits = 8\n[b]\nweight-bits = 2\nedge-bits = 2\n")
    words = ("--sweep", sweep, "-o", tmp_path, "--labels", coco)
    found = call("quantize", detector, "--calib", images, *BOXED, *words, "--json").json
    assert (found["ranked_by"], found["pictures"]) == ("map", 2)
    paths = find_files((str(images),), pattern=None, samples=None, seed=0).paths[-2:]
    held, saved, truth = tmp_path / "held.txt", tmp_path / "boxes.json", json.loads(coco.read_text())
    held.write_text("".join(f"{path}\n" for path in paths))
    kept = {image["id"] for image in truth["images"] if image["file_name"] in {path.name for path in paths}}
    truth["images"] = [image for image in truth["images"] if image["id"] in kept]
    truth["annotations"] = [box for box in truth["annotations"] if box["image_id"] in kept]
    coco.write_text(json.dumps(truth))
    for row in found["recipes"]:
        words = ("--images", held, *BOXED[:4], "--labels", coco, "--save-predictions", saved, "--quiet")
        assert call("evaluate", row["output"], *words).status == 0
        assert row["map"] == pytest.approx(by_pycocotools(coco, saved.read_bytes())[0], abs=1e-12)
        assert row["labels"]["pictures"] == 2


def test_classes_in_a_diagnosis(call: Qconv, tiny: Path, twenty: Path) -> None:
    names = tiny.parent / "names.txt"
    names.write_text("".join(f"class{number}\n" for number in range(10)))
    words = ("--calib", twenty, "--images", twenty, *STRETCHED, "--classes", names)
    found = call("diagnose", tiny, *words, "--json").json
    truth = np.array([int(path.parent.name[5:]) for path in sorted(twenty.rglob("*.png"))])
    before = found["ladder"][0]["labels"]["float"]["top1"]
    assert before == (outputs(tiny, twenty).argmax(axis=1) == truth).mean()
    assert found["ranked_by"] == "top1"


@needs_library
def test_labels_that_do_not_fit_a_diagnosis(call: Qconv, tmp_path: Path, images: Path, segmenter: Path) -> None:
    coco = labelled.write_coco(labelled.some_boxes(images), tmp_path / "coco.json")
    words = ("diagnose", segmenter, "--calib", images, *STRETCHED)
    assert_error(call(*words, "--labels", coco), "holds boxes as labels")
    assert_error(call(*words, "--labels", tmp_path / "no.json"), "no.json does not exist")


@needs_library
@pytest.mark.parametrize("command", ["evaluate", "quantize"])
def test_labels_in_which_no_box_counts_are_an_error(
    call: Qconv, tmp_path: Path, images: Path, detector: Path, coco: Path, command: str
) -> None:
    """None at all, and crowds alone, of which no average precision can be taken."""
    truth, out = json.loads(coco.read_text()), tmp_path / "q.onnx"
    place = ("--images", images, *BOXED[:4]) if command == "evaluate" else ("--calib", images, *BOXED, "-o", out)
    for boxes in ([], [{**truth["annotations"][0], "iscrowd": 1}]):
        (tmp_path / "none.json").write_text(json.dumps({**truth, "annotations": boxes}))
        done = call(command, detector, *place, "--labels", tmp_path / "none.json")
        assert_error(done, "holds no box that counts in these pictures")
    assert not out.exists()


def test_masks_of_which_no_place_counts_are_an_error(
    call: Qconv, tmp_path: Path, images: Path, segmenter: Path
) -> None:
    masks = tmp_path / "masks"
    masks.mkdir()
    for path in images.rglob("*.png"):
        with Image.open(path) as shown:
            Image.new("L", shown.size, 255).save(masks / path.name)
    done = call("evaluate", segmenter, "--images", images, *STRETCHED[:4], "--labels", masks)
    assert_error(done, "holds no mask with a place that counts")


def test_compare_tells_the_boxes_that_are_found(call: Qconv, tmp_path: Path, images: Path, detector: Path) -> None:
    out = tmp_path / "q.onnx"
    assert call("quantize", detector, "--calib", images, *BOXED, "-o", out).status == 0
    words = ("compare", detector, out, "--images", images, *BOXED[:4])
    told = next(o for o in call(*words, "--json").json["outputs"] if o.get("boxes") is not None)
    text = " ".join(call(*words).out.decode().split())
    assert told["boxes_count"] >= 1
    assert f"finds {100 * told['boxes']:.1f}% of the float model's {told['boxes_count']} boxes" in text
