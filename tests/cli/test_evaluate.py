"""`qconv evaluate`: alone and against another model, predictions, errors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qconv.data.label_files import SCHEMA
from tests.support import labelled
from tests.support.cli import Qconv, assert_error, listing


def test_evaluate_alone_and_against(call: Qconv, tiny: Path, calib: Path, twenty: Path) -> None:
    out = tiny.parent / "q.onnx"
    assert call("quantize", tiny, "--calib", calib, "--preprocess", "unit", "-o", out, "--quiet").status == 0
    alone = call("evaluate", out, "--images", twenty).out.decode()
    assert "20 pictures, labels by the folders in alphabetical order" in " ".join(alone.split())
    assert max(map(len, alone.replace(str(tiny.parent), "").splitlines())) <= 80
    found = call("evaluate", out, "--images", twenty, "--against", tiny, "--json").json
    assert set(found) >= {"model", "images", "top1", "top5", "against", "intervals"}
    assert found["images"] == 20
    assert found["against"]["agreement"] > 0.8
    assert set(found["against"]["flips"]) == {"won", "lost", "p_value"}
    text = " ".join(call("evaluate", out, "--images", twenty, "--against", tiny).out.decode().split())
    assert "McNemar" in text
    assert "SQNR dB" in text


def test_evaluate_reads_a_pipe(call: Qconv, tiny: Path, twenty: Path) -> None:
    done = call("evaluate", "-", "--images", twenty, "--preprocess", "unit", "--json", stdin=tiny.read_bytes())
    assert done.json["model"] == "the model on standard input"


def test_predictions_do_not_replace_what_is_read(call: Qconv, tiny: Path, twenty: Path) -> None:
    names = tiny.parent / "names.csv"
    names.write_text("".join(f"{folder.name}\n" for folder in sorted(twenty.iterdir())))
    done = call(
        *("evaluate", tiny, "--images", twenty, "--preprocess", "unit", "--classes", names),
        *("--save-predictions", names),
    )
    assert_error(done, "would be written over")
    assert "image" not in names.read_text()


def test_folders_of_pictures_add_up(call: Qconv, tiny: Path, twenty: Path) -> None:
    """The second one replaced the first without a word."""
    one, two = sorted(twenty.iterdir())[:2]
    words = ("evaluate", tiny, "--against", tiny, "--preprocess", "unit", "--json")
    counts = [call(*words, "--images", folder).json["images"] for folder in (one, two)]
    assert call(*words, "--images", one, "--images", two).json["images"] == sum(counts)


def test_the_schema_needs_no_model(call: Qconv) -> None:
    done = call("evaluate", "--schema")
    assert done.status == 0
    assert done.out.decode() == SCHEMA


def test_boxes_by_labels(call: Qconv, tmp_path: Path) -> None:
    """The table of measures, boxes as a file, and the paths of what is wrong."""
    pytest.importorskip("faster_coco_eval", reason="needs the extra: pip install 'qconv[detect]'")
    images = labelled.pictures(tmp_path / "imgs")
    model = tmp_path / "m.onnx"
    labelled.save(labelled.detector(), model)
    coco = labelled.write_coco(labelled.some_boxes(images), tmp_path / "coco.json")
    words = ("evaluate", model, "--images", images, "--preprocess", "unit", "--resize", "letterbox", "--labels", coco)
    found = call(*words, "--against", model, "--save-predictions", tmp_path / "boxes.csv", "--json").json
    assert 0 < found["map"] < found["map50"] < 1
    assert found["labels"] == f"{coco} (COCO JSON)"
    assert found["against"]["differences"] == {"map": 0, "map50": 0}
    assert (tmp_path / "boxes.csv").read_text().startswith("path,x1,y1,x2,y2,score,class,name\n")
    text = call(*words).out.decode()
    assert "mAP %" in text
    assert f"{100 * found['map']:.2f}" in text
    assert_error(call(*words[:-1], tmp_path / "none.json"), "none.json does not exist")
    assert_error(call(*words, "--save-predictions", coco), "would be written over")
    assert_error(call(*words, "--label-map", tmp_path / "no.toml"), "no.toml cannot be read")


@pytest.mark.parametrize("labels", [False, True])
def test_gates_of_a_detector(call: Qconv, tmp_path: Path, labels: bool) -> None:
    """Each takes the number that is told; by labels mAP is the file's own, else that beside the float model's boxes."""
    pytest.importorskip("faster_coco_eval", reason="needs the extra: pip install 'qconv[detect]'")
    images, model, out = labelled.pictures(tmp_path / "imgs"), tmp_path / "m.onnx", tmp_path / "q.onnx"
    labelled.save(labelled.detector(), model)
    how = ("--preprocess", "unit", "--resize", "letterbox")
    words = ("--weight-bits", "3", "--edge-bits", "3", "--effort", "fast", "-o", out)
    assert call("quantize", model, "--calib", images, *how, *words).status == 0
    plain = ("evaluate", out, "--images", images, *how, "--against", model)
    if labels:
        plain = (*plain, "--labels", labelled.write_coco(labelled.some_boxes(images), tmp_path / "coco.json"))
    told = call(*plain, "--json").json
    assert told["gates"] == []
    (head,) = told["against"]["heads"]
    got = {"min-map": told["map"] if labels else head["float_map"], "min-boxes": head["boxes"]}
    got["min-sqnr"] = told["against"]["sqnr_db"]
    for name, value in got.items():
        for want, status in ((value - 1e-4, 0), (value + 1e-4, 3)):
            done = call(*plain, f"--{name}", repr(want), "--json")
            (gate,) = done.json["gates"]
            assert (done.status, gate["held"], gate["got"]) == (status, status == 0, value)
            assert ("fell short" in done.err) == (status == 3)
            by_labels = labels and name == "min-map"
            assert gate["float"] == (told["against"]["map"] if by_labels else None)
        assert f"gate --{name} {want:g}: fell short" in " ".join(call(*plain, f"--{name}", want).out.decode().split())


def test_gates_of_a_classifier(call: Qconv, tiny: Path, twenty: Path) -> None:
    words = ("evaluate", tiny, "--images", twenty, "--preprocess", "unit")
    top1 = call(*words, "--json").json["top1"]
    for want, status in ((top1, 0), (top1 + 0.01, 3)):
        done = call(*words, "--min-top1", want, "--json")
        named = {"name": "min-top1", "want": want, "got": top1, "held": status == 0, "float": None, "float_held": None}
        assert (done.status, done.json["gates"]) == (status, [named])
    assert call(*words, "--against", tiny, "--min-agreement", "1", "--min-top1", top1).status == 0
    assert call(*words, "--against", tiny, "--min-sqnr", "200").status == 0  # nothing differs


def test_gates_of_a_segmenter(call: Qconv, tmp_path: Path) -> None:
    images, model, masks = labelled.pictures(tmp_path / "imgs"), tmp_path / "m.onnx", tmp_path / "masks"
    labelled.save(labelled.segmenter(), model)
    masks.mkdir()
    rng = np.random.default_rng(0)
    for path in images.iterdir():
        with Image.open(path) as shown:
            ids = rng.integers(0, labelled.CLASSES, shown.size[::-1], dtype=np.uint8)
        Image.fromarray(ids).save(masks / path.name)
    words = ("evaluate", model, "--images", images, "--preprocess", "unit", "--resize", "exact", "--labels", masks)
    miou = call(*words, "--json").json["miou"]
    assert call(*words, "--min-miou", miou - 1e-4).status == 0
    assert call(*words, "--min-miou", miou + 1e-4).status == 3
    assert_error(call(*words, "--min-map", "0.5"), "--min-map needs outputs that are read as boxes")
    assert_error(call(*words, "--min-top1", "0.5"), "--min-top1 needs class scores")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--min-boxes", "0.5"), "--min-boxes 0.5 without --against"),
        (("--min-sqnr", "10"), "--against"),
        (("--min-map", "0.5"), "pass labels, or the float model with --against"),
        (("--min-top1", "2"), "use a share from 0 to 1"),
        (("--min-sqnr", "nan", "--against", "x"), "use a number of db"),
    ],
)
def test_gates_on_what_is_not_measured(
    call: Qconv, tiny: Path, twenty: Path, words: tuple[str, ...], told: str
) -> None:
    done = call("evaluate", tiny, "--images", twenty, "--preprocess", "unit", *words)
    assert done.status == 2
    assert told in " ".join(done.err.lower().split())


def test_what_needs_labels_of_boxes_or_a_letterbox(call: Qconv, tiny: Path, twenty: Path) -> None:
    words = ("evaluate", tiny, "--images", twenty, "--preprocess", "unit")
    assert call(*words, "--label-map", "map.toml").status == 2
    done = call(*words, "--letterbox-fill", "0")
    assert done.status != 0
    assert "pass --resize letterbox" in done.err.lower()
    assert_error(call(*words, "--save-predictions", tiny.parent / "p.json"), "is read as boxes")


@pytest.mark.parametrize("name", ["p.csv", "p.npz"])
def test_predictions_appear_whole(call: Qconv, tiny: Path, twenty: Path, name: str) -> None:
    out = tiny.parent / name
    done = call("evaluate", tiny, "--images", twenty, "--preprocess", "unit", "--save-predictions", out, "--quiet")
    assert (done.status, done.out) == (0, b"")
    assert sorted(listing(tiny.parent)) == ["model.onnx", name]
    if name == "p.csv":
        assert len(out.read_text().splitlines()) == 21


@pytest.mark.parametrize(
    ("arguments", "fact"),
    [
        (("--images", "nowhere"), "nowhere does not exist"),
        (("--images", "IMAGES", "--classes", "nothing.txt"), "nothing.txt cannot be read"),
        (("--images", "IMAGES", "--label-offset", "5"), "10 class folders, shifted by 5, do not fit 10 outputs"),
        (("--images", "IMAGES", "--against", "nothing.onnx"), "nothing.onnx"),
        (("--images", "IMAGES", "--save-predictions", "no/such/p.csv"), "no/such"),
    ],
)
def test_evaluate_says_what_is_wrong(
    call: Qconv, tiny: Path, twenty: Path, arguments: tuple[str, ...], fact: str
) -> None:
    given = [str(twenty) if argument == "IMAGES" else argument for argument in arguments]
    assert_error(call("evaluate", tiny, "--preprocess", "unit", *given), fact)


@pytest.mark.parametrize(
    "arguments",
    [(), ("--images", "x", "--save-predictions", "p.txt"), ("--images", "x", "--against", "-"), ("--images", "")],
)
def test_evaluate_has_usage_errors(call: Qconv, tiny: Path, arguments: tuple[str, ...]) -> None:
    assert call("evaluate", tiny, *arguments).status == 2


def test_a_seed_is_of_a_draw(call: Qconv, tiny: Path, twenty: Path) -> None:
    assert call("evaluate", tiny, "--images", twenty, "--seed", "3").status == 2
    done = call("evaluate", tiny, "--images", twenty, "--preprocess", "unit", "--seed", "3", "--samples", "5", "--json")
    assert done.json["images"] == 5
