"""Labels read in every form measure alike, and as pycocotools does with the boxes that were saved."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from PIL import Image

from qconv.analysis.evaluate import evaluate
from qconv.analysis.evaluation import Evaluation, EvaluationOptions
from qconv.config.data_options import DataOptions, PreprocessingOptions
from qconv.data.label_files import ModelClasses
from qconv.decoding.head import NetworkFacts
from qconv.decoding.suppressed import match as match_suppressed
from qconv.errors import QconvError
from qconv.ir.files import Source
from qconv.metrics.labelled import find_model_classes, tell_of_misfit
from qconv.metrics.network_outputs import NetworkOutputs
from qconv.report.text import format_evaluation
from qconv.reporter import Reporter
from qconv.results.scores import MAP, MAP50, MIOU, TOP1, Metric, Score, value_of
from qconv.runtime.outputs import ModelOutput
from tests.support import labelled

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
LETTERBOX = PreprocessingOptions("unit", resize="letterbox")

needs_library = pytest.mark.usefixtures("_library")


@pytest.fixture
def _library() -> None:
    pytest.importorskip("faster_coco_eval", reason="needs the extra: pip install 'qconv[detect]'")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return labelled.pictures(tmp_path / "imgs")


def measured(
    source: Source, images: Path, labels: Path | None, *, warnings: list[str] | None = None, **more: Any
) -> Evaluation:
    prep = more.pop("preprocessing", LETTERBOX)
    data = DataOptions((str(images),), samples=more.pop("samples", None), preprocessing=prep)
    reporter = Reporter((warnings if warnings is not None else []).append)
    return evaluate(source, EvaluationOptions(data, labels=labels, threads=1, **more), reporter)


def by_pycocotools(truth: Path, results: bytes, pictures: Collection[int] | None = None) -> tuple[float, float]:
    """mAP and mAP50. pictures: those that count; None for all."""
    pytest.importorskip("pycocotools", reason="needs pycocotools, of the extra qconv[test]")
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        expected = COCO(str(truth))
        found = [entry for entry in json.loads(results) if pictures is None or entry["image_id"] in pictures]
        judge = COCOeval(expected, expected.loadRes(found), "bbox")
        judge.params.imgIds = sorted(pictures or expected.getImgIds())
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return float(judge.stats[0]), float(judge.stats[1])


MISFIT = "they, the order of their classes or the preprocessing may not be the model's."
"""How a warning ends: these networks have random weights."""


@pytest.mark.parametrize(
    ("scores", "words"),
    [
        ([(MAP, 0.019)], [f"the float model has mAP 1.9% by boxes.json: {MISFIT}"]),
        ([(MIOU, 0.0)], [f"the float model has mIoU 0.0% by boxes.json: {MISFIT}"]),
        ([(MAP, 0.02), (MAP50, 0.0)], []),
        ([(MAP, None)], []),
        ([(TOP1, 0.0)], []),
        ([], []),
    ],
)
def test_labels_that_do_not_suit_the_float_model(scores: list[tuple[Metric, float | None]], words: list[str]) -> None:
    warnings: list[str] = []
    tell_of_misfit([Score(*pair) for pair in scores], "boxes.json", warnings.append)
    assert warnings == words


@needs_library
def test_every_form_measures_alike_and_as_pycocotools(tmp_path: Path, images: Path) -> None:
    source = labelled.save(labelled.detector(), tmp_path / "m.onnx")
    boxes = labelled.some_boxes(images)
    coco = labelled.write_coco(boxes, tmp_path / "coco.json")
    found = measured(source, images, coco, table=".json")
    values = value_of(found.labelled, MAP), value_of(found.labelled, MAP50)
    assert found.predictions is not None
    wanted = by_pycocotools(coco, found.predictions.as_table(".json"))
    np.testing.assert_allclose(values, wanted, rtol=0, atol=1e-15)
    assert 0 < wanted[0] < wanted[1]
    yolo = labelled.write_yolo(boxes, tmp_path / "yolo", images)
    names = tmp_path / "names.txt"
    names.write_text("\n".join(labelled.NAMES))
    voc = labelled.write_voc(boxes, tmp_path / "voc")
    for labels, more in ((yolo, {}), (voc, {"classes": names})):
        other = measured(source, images, labels, **more)
        got = value_of(other.labelled, MAP), value_of(other.labelled, MAP50)
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-12)


@needs_library
def test_parts_of_a_set_measure_as_pycocotools(tmp_path: Path, images: Path) -> None:
    """A picture is left out of the list, another one of the folder, and a category of theirs: all keep their boxes."""
    source = labelled.save(labelled.detector(), tmp_path / "m.onnx")
    coco = labelled.write_coco(labelled.some_boxes(images), tmp_path / "coco.json")
    whole = [score.value for score in measured(source, images, coco).labelled]
    content = json.loads(coco.read_text())
    (left,) = (entry for entry in content["images"] if entry["file_name"] == "004.png")
    content["images"].remove(left)
    content["categories"] = content["categories"][1:]
    coco.write_text(json.dumps(content))
    missed = [entry for entry in content["annotations"] if entry["image_id"] == left["id"]]
    odd = [x for x in content["annotations"] if x not in missed and x["category_id"] == labelled.CATEGORY_IDS[0]]
    assert missed
    assert odd
    names = tmp_path / "names.txt"
    names.write_text("\n".join(labelled.NAMES))
    (images / "002.png").unlink()
    there = {entry["id"] for entry in content["images"] if entry["file_name"] != "002.png"}
    warnings: list[str] = []
    found = measured(source, images, coco, table=".json", warnings=warnings, classes=names)
    assert found.predictions is not None
    values = value_of(found.labelled, MAP), value_of(found.labelled, MAP50)
    wanted = by_pycocotools(coco, found.predictions.as_table(".json"), there)
    np.testing.assert_allclose(values, wanted, rtol=0, atol=1e-15)
    assert values[0] not in (0, whole[0])
    assert warnings.pop().endswith(MISFIT)
    assert warnings == [
        "labels of 1 picture are not used: no picture is called so.",
        f"{len(missed)} annotations in {coco} of pictures that it does not list are left out: {left['id']}.",
        f"{len(odd)} annotations in {coco} of categories that it does not list are left out: 3.",
        "1 picture of 5 have no labels, and do not count.",
    ]


@needs_library
def test_batches_and_pictures_that_cannot_be_read_shift_nothing(tmp_path: Path) -> None:
    """Labels stay with their pictures, of which the fourth is broken."""
    images = labelled.pictures(tmp_path / "imgs", 12)
    source = labelled.save(labelled.detector(), tmp_path / "m.onnx")
    coco = labelled.write_coco(labelled.some_boxes(images), tmp_path / "coco.json")
    whole = [score.value for score in measured(source, images, coco).labelled]
    (images / "broken.png").write_bytes(b"no picture")
    warnings: list[str] = []
    data = DataOptions((str(images),), samples=None, batch=5, preprocessing=LETTERBOX)
    request = EvaluationOptions(data, against=source, labels=coco, threads=1)
    found = evaluate(source, request, Reporter(warnings.append))
    assert [score.value for score in found.labelled] == whole
    assert [score.value for score in found.other_labelled] == whole
    assert any("broken.png" in text for text in warnings)


@needs_library
def test_beside_another_model(tmp_path: Path, images: Path) -> None:
    source = labelled.save(labelled.detector(), tmp_path / "m.onnx")
    other = labelled.save(labelled.detector(1), tmp_path / "other.onnx")
    coco = labelled.write_coco(labelled.some_boxes(images), tmp_path / "coco.json")
    found, its = measured(source, images, coco, against=other), measured(other, images, coco)
    assert [score.value for score in found.other_labelled] == [score.value for score in its.labelled]
    mine, theirs, differs = (value_of(s, MAP) for s in (found.labelled, found.other_labelled, found.differences))
    assert mine is not None
    assert theirs is not None
    assert differs == mine - theirs
    told = found.as_dict()
    assert (told["map"], told["against"]["map"], told["against"]["differences"]["map"]) == (mine, theirs, differs)
    low, high = told["intervals"]["map_difference"]
    assert low <= differs <= high
    (head,) = told["against"]["heads"]
    assert (head["name"], head["kind"]) == ("y", "detections")
    assert {name: head[name] for name in ("boxes", "float_map")} == {s.name: s.value for s in found.heads[0].scores}
    assert {"map", "map50", "map_difference", "boxes"} <= {row["measure"] for row in found.rows()}
    text = format_evaluation(found, verbose=True)
    assert f"{100 * mine:.2f}" in text
    assert f"difference of mAP {100 * differs:+.2f} points" in text
    assert "top-1" not in text
    same = measured(source, images, coco, against=source)
    assert [(score.value, score.interval) for score in same.differences] == [(0, (0, 0))] * 2


def test_masks(tmp_path: Path, images: Path) -> None:
    """Masks that say what the map says, run by ONNX Runtime and enlarged by Pillow, are right at every place."""
    source = labelled.save(labelled.segmenter(), tmp_path / "m.onnx")
    session = ort.InferenceSession(str(source.path), providers=["CPUExecutionProvider"])
    folder = tmp_path / "masks"
    folder.mkdir()
    for path in sorted(images.iterdir())[:-1]:
        with Image.open(path) as picture:
            small = picture.resize((labelled.SIDE, labelled.SIDE), Image.Resampling.BILINEAR)
            x = np.asarray(small, np.float32).transpose(2, 0, 1)[None] / np.float32(255)
            said = session.run(None, {"x": x})[0][0].argmax(axis=0).astype(np.uint8)
            Image.fromarray(said).resize(picture.size, Image.Resampling.NEAREST).save(folder / path.name)
    warnings: list[str] = []
    exact = PreprocessingOptions("unit", resize="exact")
    found = measured(source, images, folder, preprocessing=exact, warnings=warnings).as_dict()
    assert found["miou"] == found["pixel_accuracy"] == 1
    assert warnings == ["1 picture of 6 have no labels, and do not count."]
    boxed = measured(source, images, folder, preprocessing=LETTERBOX).as_dict()
    assert 0 < boxed["miou"] < boxed["pixel_accuracy"] < 1


@pytest.mark.parametrize(
    ("network", "form", "fact"),
    [
        ("segmenter", "coco", "holds boxes as labels, but no output is read as detections: y: class map"),
        ("detector", "masks", "holds masks as labels, but no output is a map of classes: y: detections"),
    ],
)
@needs_library
def test_labels_of_another_kind(tmp_path: Path, images: Path, network: str, form: str, fact: str) -> None:
    source = labelled.save(getattr(labelled, network)(), tmp_path / "m.onnx")
    labels = tmp_path / "labels"
    if form == "coco":
        labels = labelled.write_coco(labelled.some_boxes(images), tmp_path / "coco.json")
    else:
        labels.mkdir()
        Image.new("L", (8, 8)).save(labels / "000.png")
    with pytest.raises(QconvError, match=fact):
        measured(source, images, labels)


@needs_library
def test_labels_and_pictures_that_do_not_meet(tmp_path: Path, images: Path) -> None:
    source = labelled.save(labelled.detector(), tmp_path / "m.onnx")
    boxes = labelled.some_boxes(images)
    coco = labelled.write_coco({"x": boxes["000"], "001": boxes["001"]}, tmp_path / "coco.json")
    warnings: list[str] = []
    measured(source, images, coco, warnings=warnings)
    assert warnings.pop().endswith(MISFIT)
    assert warnings == [
        "labels of 1 picture are not used: no picture is called so.",
        "5 pictures of 6 have no labels, and do not count.",
    ]
    warnings.clear()
    drawn = measured(source, images, labelled.write_coco(boxes, coco), warnings=warnings, samples=2)
    left = [text for text in warnings if not text.endswith(MISFIT)]
    assert (drawn.images, left) == (2, [])  # of a draw it is no news
    strange = labelled.write_coco({"x": boxes["000"]}, coco)
    with pytest.raises(QconvError, match=r"has labels of none of the pictures, as .*, but of 1 others"):
        measured(source, images, strange)


def state_sizes(boxes: labelled.Boxes, form: str, folder: Path, sizes: dict[str, tuple[object, object]]) -> Path:
    """Labels in COCO JSON or in VOC that state these widths and heights, by stems."""
    if form == "coco":
        path = labelled.write_coco(boxes, folder / "coco.json")
        content = json.loads(path.read_text())
        for entry in content["images"]:
            entry["width"], entry["height"] = sizes[Path(entry["file_name"]).stem]
        path.write_text(json.dumps(content))
        return path
    path = labelled.write_voc(boxes, folder / "voc")
    for stem, (width, height) in sizes.items():
        file = path / f"{stem}.xml"
        stated = f"<annotation><size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
        file.write_text(file.read_text().replace("<annotation>", stated))
    return path


@pytest.mark.parametrize("form", ["coco", "voc"])
@needs_library
def test_boxes_in_pixels_of_another_picture(tmp_path: Path, images: Path, form: str) -> None:
    """Stated sizes are held against the pictures': half of them, both sides in the other order, or their own."""
    source = labelled.save(labelled.detector(), tmp_path / "m.onnx")
    own = {path.stem: labelled.size_of(path) for path in images.iterdir()}
    names = tmp_path / "names.txt"
    names.write_text("\n".join(labelled.NAMES))

    def measure(name: str, sizes: dict[str, tuple[object, object]]) -> list[float | None]:
        folder = tmp_path / name
        folder.mkdir()
        labels = state_sizes(labelled.some_boxes(images), form, folder, sizes)
        return [score.value for score in measured(source, images, labels, classes=names).labelled]

    right = measure("right", {stem: (width, height) for stem, (width, height) in own.items()})
    assert measure("near", {stem: (width + 1, height - 0.5) for stem, (width, height) in own.items()}) == right
    assert measure("zero", dict.fromkeys(own, (0, 0))) == right
    assert measure("none", dict.fromkeys(own, (None, ""))) == right
    width, height = own["002"]
    assert width != height
    one = {**own, "002": (width // 2, height // 2)}
    told = f"002.png are in pixels of a picture of {width // 2}x{height // 2}, but it is {width}x{height}\\.$"
    with pytest.raises(QconvError, match=told) as caught:
        measure("half", one)
    assert caught.value.hint.startswith("scale boxes")
    with pytest.raises(QconvError, match=r"\d.png are in .*, and so with 5 of 5 others\.$"):
        measure("all", {stem: (2 * width, 2 * height) for stem, (width, height) in own.items()})
    with pytest.raises(QconvError, match=f"but it is {width}x{height} as it is seen upright") as caught:
        measure("turned", {**own, "002": (height, width)})
    assert caught.value.hint.startswith("where EXIF turns pictures, label them as they are seen")


@needs_library
def test_boxes_of_a_picture_that_its_exif_turns(tmp_path: Path) -> None:
    """A camera stores 60x40 and says that it lies on its side: it is seen as 40x60, and labelled so."""
    source = labelled.save(labelled.detector(), tmp_path / "m.onnx")
    folder = tmp_path / "imgs"
    folder.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "000.jpg", exif=exif)
    coco = state_sizes({"000": [(1, (2.0, 30.0, 30.0, 58.0))]}, "coco", tmp_path, {"000": (40, 60)})
    coco.write_text(coco.read_text().replace("000.png", "000.jpg"))
    assert value_of(measured(source, folder, coco).labelled, MAP) is not None
    coco.write_text(coco.read_text().replace('"width": 40, "height": 60', '"width": 60, "height": 40'))
    with pytest.raises(QconvError, match="a picture of 60x40, but it is 40x60 as it is seen upright"):
        measured(source, folder, coco)


@needs_library
def test_sizes_of_pictures_without_boxes_say_nothing(tmp_path: Path, images: Path) -> None:
    source = labelled.save(labelled.detector(), tmp_path / "m.onnx")
    boxes = {**labelled.some_boxes(images), "001": []}
    sizes = {path.stem: labelled.size_of(path) for path in images.iterdir()}
    coco = state_sizes(boxes, "coco", tmp_path, {**sizes, "001": (7, 7)})
    assert value_of(measured(source, images, coco).labelled, MAP) is not None


@needs_library
def test_a_class_beyond_the_models(tmp_path: Path, images: Path) -> None:
    """YOLOX's form tells how many classes there are."""
    source = labelled.save(labelled.detector(), tmp_path / "m.onnx")
    yolo = labelled.write_yolo(labelled.some_boxes(images), tmp_path / "yolo", images)
    (yolo / "000.txt").write_text("4 0.5 0.5 0.1 0.1\n")
    with pytest.raises(QconvError, match="has boxes of 4, class 4, but the model has 4"):
        measured(source, images, yolo)


def test_a_class_apart_from_the_score_is_not_one_of_one() -> None:
    """MMDeploy gives boxes with one score each, and numbers of classes beside them; a head of YOLOX a score a class."""
    rows = np.array([[[10.0, 10, 20, 20, 0.9]]], np.float32)
    found = match_suppressed(NetworkFacts({"dets": rows, "labels": np.array([[7]])}, (32, 32)))
    outputs = ModelOutput("dets", True, rows.shape), ModelOutput("labels", False, (1, 1))
    assert found is not None
    assert find_model_classes(NetworkOutputs(outputs, found), found) == ModelClasses({})


@needs_library
@pytest.mark.parametrize("names", [3, 5])
def test_a_list_of_names_has_one_for_each_class(tmp_path: Path, images: Path, names: int) -> None:
    source = labelled.save(labelled.detector(), tmp_path / "m.onnx")
    voc, listed = labelled.write_voc(labelled.some_boxes(images), tmp_path / "voc"), tmp_path / "names.txt"
    listed.write_text("".join(f"{name}\n" for name in (*labelled.NAMES, "more")[:names]))
    with pytest.raises(QconvError, match=f"names.txt lists {names} classes, but the model has 4") as caught:
        measured(source, images, voc, classes=listed)
    assert "every class of the model" in caught.value.hint


def test_samples_have_no_labels(tmp_path: Path, images: Path) -> None:
    source = labelled.save(labelled.detector(), tmp_path / "m.onnx")
    coco = labelled.write_coco(labelled.some_boxes(images), tmp_path / "coco.json")
    folder = tmp_path / "npy"
    folder.mkdir()
    np.save(folder / "000.npy", np.zeros((3, labelled.SIDE, labelled.SIDE), np.float32))
    with pytest.raises(QconvError, match=r"000.npy: what is preprocessed already does not tell where"):
        measured(source, folder, coco, preprocessing=PreprocessingOptions())


def test_neither_labels_nor_another_model(tmp_path: Path, images: Path) -> None:
    source = labelled.save(labelled.detector(), tmp_path / "m.onnx")
    with pytest.raises(QconvError, match="nothing to measure: there are no labels of boxes") as caught:
        measured(source, images, None)
    assert "--labels" in caught.value.hint
    with pytest.raises(QconvError, match="--label-map without --labels"):
        EvaluationOptions(DataOptions(("x",)), label_map=tmp_path)


@pytest.mark.parametrize("labels", ["val_instances.json", "val_labels"])
@needs_library
def test_shared_labels_as_pycocotools(tmp_path: Path, labels: str) -> None:
    """YOLOX-Nano on COCO pictures: 34.99 and 52.74, and pycocotools' on the boxes that were saved to the last digit."""
    place = SHARED / "images" / "coco"
    model = SHARED / "models" / "yolox_nano.onnx"
    if not (place / labels).exists() or not model.exists():
        pytest.skip(f"needs {place / labels} and {model}")
    prep = PreprocessingOptions("raw", color="bgr", resize="letterbox", letterbox_align="top-left")  # type: ignore[arg-type]
    truth = place / "val_instances.json"
    found = measured(Source(str(model), model), place / "val", place / labels, preprocessing=prep, table=".json")
    got = value_of(found.labelled, MAP), value_of(found.labelled, MAP50)
    assert got == pytest.approx((0.3499, 0.5274), abs=1e-4)
    if labels == truth.name:
        assert found.predictions is not None
        wanted = by_pycocotools(truth, found.predictions.as_table(".json"))
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-15)


def test_shared_masks(tmp_path: Path) -> None:
    """DeepLabV3 on 50 pictures, stretched to 257x257: 46.58 and 89.64, as shared/data/README.md states."""
    place, model = SHARED / "images" / "coco", SHARED / "models" / "deeplabv3_257_mv_gpu.onnx"
    if not (place / "val_masks_voc").exists() or not model.exists():
        pytest.skip(f"needs {place / 'val_masks_voc'} and {model}")
    prep = PreprocessingOptions("tf", resize="exact")
    found = measured(Source(str(model), model), place / "val", place / "val_masks_voc", preprocessing=prep).as_dict()
    assert (found["miou"], found["pixel_accuracy"]) == pytest.approx((0.4658, 0.8964), abs=5e-5)
