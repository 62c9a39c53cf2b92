"""Options on how pictures are fed beside files that say it themselves: one rule in every command.

What contradicts itself on the command line is a usage error. What contradicts a file is an error that names the file's
part. All else is put over what the file says.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest

from tests.support import labelled
from tests.support.cli import Qconv, assert_error

EXACT = ("--preprocess", "unit", "--resize", "exact")
TOP_LEFT = ("--preprocess", "unit", "--resize", "letterbox", "--letterbox-align", "top-left")
ULTRALYTICS = {"author": "Ultralytics", "stride": "32", "task": "detect", "names": "{0: 'cat'}"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With m.onnx, which tells nothing, u.onnx, which is letterboxed as its metadata say, and pictures."""
    monkeypatch.chdir(tmp_path)
    proto = labelled.detector()
    labelled.save(proto, tmp_path / "m.onnx")
    onnx.helper.set_model_props(proto, ULTRALYTICS)
    labelled.save(proto, tmp_path / "u.onnx")
    labelled.pictures(tmp_path / "imgs")
    return tmp_path


def make(call: Qconv, *options: str) -> str:
    """q.onnx, which carries how it is fed."""
    words = ("quantize", "m.onnx", "--calib", "imgs", "--effort", "fast", "-o", "q.onnx", "-q")
    assert call(*words, *options).status == 0
    return "q.onnx"


COMMANDS: dict[str, tuple[str, ...]] = {
    "quantize": ("quantize", "m.onnx", "--calib", "imgs"),
    "evaluate": ("evaluate", "m.onnx", "--images", "imgs", "--against", "m.onnx"),
    "compare": ("compare", "m.onnx", "q.onnx", "--images", "imgs"),
    "diagnose": ("diagnose", "m.onnx", "--calib", "imgs"),
    "study-samples": ("study-samples", "m.onnx", "--calib", "imgs"),
    "finetune": ("finetune", "q.onnx", "--images", "imgs"),
    "synthesize": ("synthesize", "m.onnx", "-o", "made"),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--resize", "exact", "--letterbox-fill", "0"), "--letterbox-fill with --resize exact is not possible. Pass"),
        (("--resize", "256", "--letterbox-align", "center"), "--letterbox-align with --resize 256 is not possible."),
        (("--scale", "0"), "--scale is zero: all pictures would look the same."),
        (("--std", "1,0,1"), "--std has a zero: pixels cannot be divided by it."),
        (("--mean", "nan"), "--mean"),
    ],
)
def test_options_that_contradict_each_other(call: Qconv, command: str, options: tuple[str, ...], told: str) -> None:
    """No file is looked at: none is there."""
    done = call(*COMMANDS[command], *options)
    assert done.status == 2
    assert told in " ".join(done.err.split())


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "synthesize"])
@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--decode", "mine.py"), "--decode mine.py is not possible. Name a file and a function in it"),
        (("--decode", "mine.py:f", "--task", "classify"), "--decode with --task classify is not possible."),
    ],
)
def test_decoders_that_cannot_be(call: Qconv, command: str, options: tuple[str, ...], told: str) -> None:
    done = call(*COMMANDS[command], *options)
    assert done.status == 2
    assert told in " ".join(done.err.split())


@pytest.mark.parametrize("option", [("--letterbox-fill", "0"), ("--letterbox-align", "center")])
@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "synthesize"])
def test_a_letterbox_that_is_none(call: Qconv, folder: Path, command: str, option: tuple[str, str]) -> None:
    """The file says --resize exact, or no file says anything."""
    if command == "finetune":
        pytest.importorskip("torch")
    make(call, *EXACT)
    done = call(*COMMANDS[command], *option)
    told = "--resize auto, the default, as the file tells no other"
    if command in ("compare", "finetune"):  # which open the file first, for its float model
        told = "--resize exact, as the model beside m.onnx says"
    assert_error(done, f"{option[0]} is not possible: pictures are not letterboxed but resized by {told}.")


def test_the_files_own_metadata_are_named(call: Qconv, folder: Path) -> None:
    done = call("evaluate", make(call, *EXACT), "--images", "imgs", "--labels", coco(folder), "--letterbox-fill", "0")
    assert_error(done, "but resized by --resize exact, as the file's metadata says")


def test_a_letterbox_without_pictures(call: Qconv, folder: Path) -> None:
    done = call("quantize", "m.onnx", "--calib", "none", "--preprocess", "unit", "--letterbox-fill", "0")
    assert_error(done, "but resized by --resize auto, the default")


def coco(folder: Path) -> Path:
    pytest.importorskip("faster_coco_eval")
    return labelled.write_coco(labelled.some_boxes(folder / "imgs"), folder / "coco.json")


def fed(call: Qconv, *words: object) -> str:
    """How pictures were fed, in words."""
    done = call(*words)
    assert done.status == 0, done.err
    return " ".join(done.out.decode().split())


def test_parts_of_the_files_letterbox_can_be_replaced(call: Qconv, folder: Path) -> None:
    """By one command and by the others, for what qconv wrote and for what Ultralytics writes."""
    beside = ("--images", "imgs", "--against", "m.onnx")
    out = make(call, *TOP_LEFT)
    assert "letterboxed to the top left, filled with 0; the file's metadata, with --letterbox-fill" in fed(
        call, "evaluate", out, *beside, "--letterbox-fill", 0
    )
    assert "letterboxed; the file's metadata, with --letterbox-align" in fed(
        call, "compare", "m.onnx", out, "--images", "imgs", "--letterbox-align", "center"
    )
    quantize = ("quantize", "u.onnx", "--calib", "imgs", "--effort", "fast")
    assert "letterboxed, filled with 0; the file's metadata by Ultralytics" in fed(
        call, *quantize, "--letterbox-fill", 0
    )


@pytest.mark.parametrize(
    ("options", "prep"),
    [
        (("--color", "bgr"), {"preset": "unit", "color": "bgr", "resize": "letterbox"}),
        (("--scale", "1/128"), {"preset": "unit", "scale": 1 / 128, "resize": "letterbox"}),
        (("--filter", "bicubic"), {"preset": "unit", "filter": "bicubic", "resize": "letterbox"}),
        (("--preprocess", "tf"), {"preset": "tf", "mean": [1.0], "resize": "letterbox"}),
        (("--resize", "exact"), {"preset": "unit", "resize": "exact"}),
    ],
)
def test_one_option_leaves_the_rest_as_the_metadata_say(
    call: Qconv, folder: Path, options: tuple[str, ...], prep: dict[str, Any]
) -> None:
    """A single option beside Ultralytics' metadata threw all of them away: the file got ImageNet's numbers."""
    words = ("quantize", "u.onnx", "--calib", "imgs", "--effort", "fast", "--json")
    found = call(*words, *options).json["preprocessing"]
    assert {name: found[name] for name in prep} == prep


def test_preset_and_metadata_are_joined_in_evaluate_too(call: Qconv, folder: Path) -> None:
    text = fed(call, "evaluate", "u.onnx", "--images", "imgs", "--against", "u.onnx", "--preprocess", "tf")
    assert "(pixel x 1/127.5 - [1]) / [1], NCHW 32x32, letterboxed; --preprocess tf" in text


def test_the_usual_filter_can_be_asked_for(call: Qconv, folder: Path) -> None:
    """It was taken for nothing said, and the file's bicubic one stayed."""
    out = make(call, *EXACT, "--filter", "bicubic")
    words = ("evaluate", out, "--images", "imgs", "--against", "m.onnx")
    assert "stretched, bicubic filter; the file's metadata" in fed(call, *words)
    assert "stretched; the file's metadata, with --filter" in fed(call, *words, "--filter", "bilinear")


@pytest.mark.parametrize(
    ("options", "idle"),
    [
        (("--mean", "5"), "--mean"),
        (("--preprocess", "tf", "--color", "bgr"), "--preprocess and --color"),
        (("--layout", "nchw"), "--layout"),
    ],
)
def test_what_a_file_that_takes_pixels_does_itself(
    call: Qconv, folder: Path, options: tuple[str, ...], idle: str
) -> None:
    """Alone it says so; beside its float model they are that one's options."""
    labels = coco(folder)
    out = make(call, *TOP_LEFT, "--embed-preprocessing", "nhwc")
    plain = call("evaluate", out, "--images", "imgs", "--labels", labels, "--json")
    done = call("evaluate", out, "--images", "imgs", "--labels", labels, "--json", *options)
    assert done.json["map"] == plain.json["map"]
    assert f"q.onnx takes pixels and normalizes them itself: {idle} is not used." in done.err
    assert "is not used" not in plain.err
    beside = call("evaluate", out, "--images", "imgs", "--against", "m.onnx", *options)
    assert "is not used" not in beside.err
