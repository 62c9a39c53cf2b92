"""`--decode` in all commands that compare models: its number is there, its errors are told, and no file carries it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnxruntime import InferenceSession

from tests.support import labelled
from tests.support.cli import BODY, QUICK, Qconv, assert_error, net
from tests.support.reference import MANUAL

DECODER = """\
import numpy as np

def boxes(outputs):
    (scores,) = outputs.values()
    return [[0, 0, 4, 4, 0.9, scores.argmax()]]
"""


def test_the_example_of_the_manual_reads_what_it_says() -> None:
    """A box from (32, 64), 64 wide and 96 high, of class 1; another one says nothing."""
    (example,) = re.findall(r"^```python\n(.*?)^```$", (MANUAL / "detection.md").read_text("utf-8"), re.M | re.S)
    assert len([line for line in example.splitlines() if line.strip()]) <= 10
    scope: dict[str, Any] = {}
    exec(example, scope)
    head = np.array([[[0.5, 0.5, 0.1, 0.1, 0, 0.0005], [0.1, 0.2, 0.2, 0.3, 0.1, 0.9]]])
    assert scope["boxes"]({"head": head}) == pytest.approx(np.array([[32, 64, 96, 160, 0.9, 1]]))


@pytest.fixture
def decoder(tmp_path: Path) -> Path:
    """One box a picture, of the class with the highest score."""
    file = tmp_path / "mine.py"
    file.write_text(DECODER)
    return file


def test_quantize_counts_boxes(call: Qconv, tiny: Path, calib: Path, decoder: Path) -> None:
    found = call("quantize", tiny, "--calib", calib, *QUICK, "--json", "--decode", f"{decoder}:boxes").json
    (output,) = found["verify"]["outputs"]
    assert output["kind"] == "detections"
    (head,) = found["verify"]["heads"]
    assert 0 <= head["boxes"] <= 1
    assert head["boxes_count"] == found["verify"]["images"]  # one a picture
    assert "decode" not in str(found["recipe"])


def test_other_commands_take_it(call: Qconv, tiny: Path, calib: Path, decoder: Path) -> None:
    said = ("--decode", f"{decoder}:boxes")
    out = tiny.parent / "out.onnx"
    assert call("quantize", tiny, "--calib", calib, *QUICK, "-o", out).status == 0
    evaluated = call("evaluate", out, "--images", calib, "--against", tiny, "--json", *said).json
    assert [o["kind"] for o in evaluated["against"]["outputs"]] == ["detections"]
    assert [o["kind"] for o in evaluated["against"]["heads"]] == ["detections"]
    assert 0 <= evaluated["against"]["boxes"] <= 1
    compared = call("compare", tiny, out, "--images", calib, "--json", *said).json
    assert 0 <= compared["outputs"][-1]["boxes"] <= 1
    assert call("diagnose", tiny, "--calib", calib, "--effort", "fast", *said).status == 0
    assert call("study-samples", tiny, "--calib", calib, "--seeds", 1, *said).status == 0


@pytest.mark.parametrize(
    ("command", "given"),
    [
        ("quantize", ("MODEL", "--calib", "CALIB")),
        ("evaluate", ("MODEL", "--images", "CALIB", "--against", "MODEL")),
        ("compare", ("MODEL", "MODEL", "--images", "CALIB")),
        ("diagnose", ("MODEL", "--calib", "CALIB")),
        ("study-samples", ("MODEL", "--calib", "CALIB")),
    ],
)
def test_a_file_that_does_not_load_is_told_at_once(
    call: Qconv, tiny: Path, calib: Path, decoder: Path, command: str, given: tuple[str, ...]
) -> None:
    decoder.write_text("import nothing_of_this_name\n")
    places = {"MODEL": tiny, "CALIB": calib}
    done = call(command, *(places.get(word, word) for word in given), "--decode", f"{decoder}:boxes")
    assert_error(done, "mine.py:boxes does not load: ModuleNotFoundError")


def test_an_error_in_the_function_is_no_traceback(call: Qconv, tiny: Path, calib: Path, decoder: Path) -> None:
    decoder.write_text("def boxes(outputs):\n    return 1 / 0\n")
    done = call("quantize", tiny, "--calib", calib, *QUICK, "--decode", f"{decoder}:boxes")
    assert done.status == 1
    assert "mine.py:boxes failed: ZeroDivisionError: division by zero in line 2." in done.err
    assert "Traceback" not in done.err
    assert sorted(path.name for path in tiny.parent.iterdir()) == ["model.onnx"]


TOO_SURE = """\
def boxes(outputs):
    (scores,) = outputs.values()
    return [[0, 0, 4, 4, scores.max(), 1]]
"""

POOLED = BODY.replace("y = ", "h = ")


def test_rows_that_are_no_boxes_are_told_by_every_command(call: Qconv, calib: Path, tmp_path: Path) -> None:
    """The network puts out 1 to e, and the function takes these for scores."""
    (tmp_path / "mine.py").write_text(TOO_SURE)
    model = tmp_path / "m.onnx"
    model.write_bytes(net(f"{POOLED}  s = Sigmoid(h)  y = Exp(s)").SerializeToString())
    fed = ("--samples", 4, "--preprocess", "unit")
    out = tmp_path / "q.onnx"
    assert call("quantize", model, "--calib", calib, "--effort", "fast", *fed, "-o", out).status == 0
    (tmp_path / "sweep.toml").write_text("[a]\neffort = 'fast'\n")
    for words in (
        ("quantize", model, "--calib", calib),
        ("quantize", model, "--calib", calib, "--sweep", tmp_path / "sweep.toml"),
        ("evaluate", model, "--images", calib, "--against", model),
        ("compare", model, out, "--images", calib),
        ("diagnose", model, "--calib", calib),
        ("study-samples", model, "--calib", calib),
    ):
        done = call(*words, *fed, "--decode", f"{tmp_path / 'mine.py'}:boxes")
        assert_error(done, r"mine.py:boxes: row 0 of picture 0 of a batch has the score [12]\.\d+, which is not from")


def test_a_float_model_without_boxes_is_told(call: Qconv, tiny: Path, calib: Path, tmp_path: Path) -> None:
    """A gate cannot be held by boxes that nobody shows: that is an error in how the model is fed or read."""
    (tmp_path / "mine.py").write_text("def boxes(outputs):\n    return []\n")
    said = ("--decode", f"{tmp_path / 'mine.py'}:boxes")
    done = call("quantize", tiny, "--calib", calib, *QUICK, *said, "-o", tmp_path / "q.onnx")
    assert done.status == 0
    assert "the float model shows no box on these pictures" in done.err
    pair = ("evaluate", tmp_path / "q.onnx", "--against", tiny, "--images", calib, *said)
    for gate in ("--min-boxes", "--min-map"):
        assert_error(call(*pair, gate, 0.5), f"{gate} needs boxes, and the float model shows none above 0.25")


def test_the_command_that_a_diagnosis_prints_has_the_decoder(
    call: Qconv, tiny: Path, calib: Path, decoder: Path
) -> None:
    said = ("--decode", f"{decoder}:boxes")
    found = call("diagnose", tiny, "--calib", calib, *QUICK, *said, "--json").json
    assert " ".join(said) in found["recommended"]


def test_what_a_file_says_beside_the_float_model_is_measured(call: Qconv, calib: Path, tmp_path: Path) -> None:
    """Scores above 1 are no error of the function where the float model has none."""
    (tmp_path / "mine.py").write_text(TOO_SURE)
    for name, body in (("m.onnx", "y = Sigmoid(h)"), ("q.onnx", "s = Sigmoid(h)  y = Exp(s)")):
        (tmp_path / name).write_bytes(net(f"{POOLED}  {body}").SerializeToString())
    said = ("--decode", f"{tmp_path / 'mine.py'}:boxes", "--samples", 4, "--preprocess", "unit", "--images", calib)
    found = call("evaluate", tmp_path / "q.onnx", "--against", tmp_path / "m.onnx", "--json", *said).json
    assert found["against"]["boxes"] == 1
    assert_error(
        call("evaluate", tmp_path / "m.onnx", "--against", tmp_path / "q.onnx", *said), "which is not from 0 to 1"
    )


def test_a_name_without_a_function_is_a_usage_error(call: Qconv, tiny: Path, calib: Path) -> None:
    done = call("quantize", tiny, "--calib", calib, "--decode", "mine.py")
    assert done.status == 2
    assert "FILE.py:FUNCTION" in done.err


def test_it_needs_pictures(call: Qconv, tiny: Path, decoder: Path) -> None:
    done = call("quantize", tiny, "--calib", "none", "--decode", f"{decoder}:boxes")
    assert done.status == 2
    assert "--decode" in done.err


def test_no_recipe_runs_code(call: Qconv, tiny: Path, calib: Path, decoder: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f'decode = "{decoder}:boxes"\n')
    done = call("quantize", tiny, "--calib", calib, "--recipe", recipe)
    assert_error(done, "which runs code")


def test_saved_recipes_are_without_it(call: Qconv, tiny: Path, calib: Path, decoder: Path, tmp_path: Path) -> None:
    saved = tmp_path / "saved.toml"
    options = ("--decode", f"{decoder}:boxes", "--save-recipe", saved)
    assert call("quantize", tiny, "--calib", calib, *QUICK, *options).status == 0
    assert "decode" not in saved.read_text()
    assert b"mine.py" not in (tiny.parent / "model.w8a8.onnx").read_bytes()


@pytest.fixture
def calls(tmp_path: Path) -> Path:
    """A file with a letter for each call of the decoder in counting.py, and labels.json beside it."""
    calls = tmp_path / "calls"
    note = f"    with open({str(calls)!r}, 'a') as file: file.write('x')\n"
    counting = DECODER.replace("    (scores", f"{note}    (scores")
    (tmp_path / "counting.py").write_text(counting)
    return calls


@pytest.fixture
def boxes(calib: Path, tmp_path: Path) -> Path:
    """A label of each picture."""
    paths = sorted(path for path in calib.iterdir() if path.suffix in (".jpg", ".png"))
    boxes: labelled.Boxes = {path.stem: [(0, (0.0, 0.0, 4.0, 4.0))] for path in paths}
    text = labelled.write_coco(boxes, tmp_path / "labels.json").read_text()
    for path in paths:
        text = text.replace(f'"{path.stem}.png"', f'"{path.name}"')
    (tmp_path / "labels.json").write_text(text)
    return tmp_path / "labels.json"


@pytest.mark.parametrize("labelled_too", [False, True])
def test_evaluate_reads_each_models_boxes_once(
    call: Qconv, tiny: Path, calib: Path, calls: Path, boxes: Path, labelled_too: bool
) -> None:
    """Two more pictures are two more calls for each of two models, whoever asks for their boxes."""
    folder = calls.parent
    words = ("--decode", f"{folder / 'counting.py'}:boxes", "--resize", "exact", "--preprocess", "unit")
    if labelled_too:
        pytest.importorskip("faster_coco_eval")
        words += ("--labels", str(boxes), "--save-predictions", str(folder / "found.json"))
    seen = []
    for count in (1, 3):
        calls.write_text("")
        done = call("evaluate", tiny, "--images", calib, "--against", tiny, "--samples", count, *words, "-q")
        assert done.status == 0, done.err
        seen.append(len(calls.read_text()))
    assert seen[1] - seen[0] == 4


@pytest.mark.parametrize("batch", [1, 2])
def test_quantize_reads_each_models_boxes_once(
    call: Qconv, tiny: Path, calib: Path, calls: Path, boxes: Path, batch: int
) -> None:
    """A picture more that the result is checked on is a call more for each of two models, with labels and without."""
    pytest.importorskip("faster_coco_eval")
    words = ("--decode", f"{calls.parent / 'counting.py'}:boxes", "--resize", "exact", "--preprocess", "unit")
    seen = []
    for count, labels in ((4, ()), (8, ()), (4, ("--labels", boxes)), (8, ("--labels", boxes))):
        calls.write_text("")
        shared = ("--samples", count, "--batch", batch, "--effort", "fast", "--json")
        done = call("quantize", tiny, "--calib", calib, *shared, *words, *labels)
        assert done.status == 0, done.err
        seen.append((len(calls.read_text()), done.json["verify"]["images"]))
    for (fewer, some), (more, all_) in (seen[:2], seen[2:]):
        assert more - fewer == 2 * (all_ - some) == 8


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_a_detector_that_takes_pixels_finds_the_same_boxes(
    call: Qconv, tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In 16 bits nothing is lost: what ONNX Runtime makes of bytes is what the float model makes of fractions."""
    monkeypatch.chdir(tmp_path)
    labelled.save(labelled.detector(), tmp_path / "m.onnx")
    images = labelled.pictures(tmp_path / "imgs")
    fed = ("--preprocess", "unit", "--resize", "letterbox", "--letterbox-align", "top-left", "--letterbox-fill", "0")
    bits = ("--weight-bits", "16", "--activation-bits", "16", "--edge-bits", "16", "--effort", "fast")
    words = ("quantize", "m.onnx", "--calib", images, *fed, *bits, "--embed-preprocessing", layout)
    made = call(*words, "-o", "e.onnx", "--min-boxes", "1", "--json")
    assert made.status == 0, made.err
    assert made.json["verify"]["heads"][0]["boxes"] == 1
    found = call("evaluate", "e.onnx", "--images", images, "--against", "m.onnx", "--json").json
    assert found["against"]["boxes"] == 1
    assert found["against"]["sqnr_db"] > 60
    pixels = np.random.default_rng(1).integers(0, 256, (1, 3, labelled.SIDE, labelled.SIDE), dtype=np.uint8)
    taken = pixels if layout == "nchw" else np.moveaxis(pixels, 1, 3)
    (own,) = InferenceSession("m.onnx").run(None, {"x": pixels.astype(np.float32) / 255})
    (other,) = InferenceSession("e.onnx").run(None, {"x": taken})
    assert other == pytest.approx(own, abs=2e-3)
