"""`qconv study-samples`: table, JSON, chart, refusals."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from PIL import Image

from qconv.cli import quantize, study_samples
from tests.support.cli import Qconv, assert_error, listing


def test_a_study_on_the_terminal(call: Qconv, tiny: Path, calib: Path) -> None:
    """A table and sentences of at most 80 columns; nothing is written but what -o names."""
    done = call("study-samples", tiny, "--calib", calib, "--seeds", 2, "--preprocess", "unit")
    assert (done.status, done.err) == (0, "")
    head, *rows = done.out.decode().splitlines()
    assert head.split()[:3] == ["pictures", "SQNR", "dB"]
    assert [row.split()[0] for row in rows[: rows.index("")]] == ["1", "2", "5", "10", "16"]
    assert max(map(len, [head, *rows])) <= 80
    assert "scored on 4 others, held back" in " ".join(rows)
    assert listing(tiny.parent) == ["model.onnx"]


def test_a_study_as_json(call: Qconv, tiny: Path, calib: Path) -> None:
    done = call("study-samples", tiny, "--calib", calib, "--json", "--seeds", 2, "--holdout", 5, "--preprocess", "raw")
    found = done.json
    assert list(found)[:6] == ["schema", "version", "model", "recipe", "preprocessing", "pictures"]
    assert (found["schema"], found["pictures"], found["holdout"], found["draws"]) == (1, 15, 5, 2)
    assert found["preprocessing"]["preset"] == "raw"
    assert [(p["pictures"], p["seed"]) for p in found["points"]] == [
        *((count, seed) for count in (1, 2, 5, 10) for seed in (0, 1)),
        (15, 0),
    ]
    assert set(found["points"][0]) == {"pictures", "seed", "sqnr_db", "agreement"}
    assert found["enough"] in (None, 1, 2, 5)
    assert [row["pictures"] for row in found["spread"]] == [1, 2, 5, 10, 15]


@pytest.mark.parametrize("name", ["study.png", "study.html", "STUDY.PNG"])
def test_a_study_is_drawn(call: Qconv, tiny: Path, calib: Path, name: str) -> None:
    out = tiny.parent / name
    done = call("study-samples", "-", "--calib", calib, "--seeds", 1, "--quiet", "-o", out, stdin=tiny.read_bytes())
    assert (done.status, done.out, done.err) == (0, b"", "")
    assert listing(tiny.parent) == sorted(["model.onnx", name])
    if name.lower().endswith("png"):
        Image.open(out).verify()
    else:
        assert out.read_text("utf-8").startswith("<!DOCTYPE html>")


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        ((), 2, "pass the calibration pictures"),
        (("--calib", "CALIB", "-o", "study.pdf"), 2, "ends in .png or .html"),
        (("--calib", "CALIB", "-o", ""), 2, "need a name"),
        (("--calib", "CALIB", "--seeds", "0"), 2, "--seeds"),
        (("--calib", "CALIB", "--stats", "s.npz"), 2, "No such option"),
        (("--calib", "CALIB", "--tune-ranges"), 2, "--tune-ranges is not possible in a study"),
        (("--calib", "CALIB", "--tune-latency"), 2, "--tune-latency is not possible in a study"),
        (("--calib", "CALIB", "--activation-bits", "32"), 1, "these options quantize no activation"),
        (("--calib", "CALIB", "--holdout", "20"), 1, "leaves none of the 20 pictures"),
        (("--calib", "CALIB", "-o", "missing/study.png"), 1, "does not exist"),
        (("--calib", "missing"), 1, "does not exist"),
    ],
)
def test_what_study_samples_refuses(
    call: Qconv, tiny: Path, calib: Path, options: tuple[str, ...], status: int, message: str
) -> None:
    """And writes nothing."""
    done = call("study-samples", tiny, *(str(calib) if option == "CALIB" else option for option in options))
    assert done.status == status
    assert message in " ".join(done.err.split())
    assert done.out == b""
    assert listing(tiny.parent) == ["model.onnx"]


def test_a_study_takes_the_options_of_quantize() -> None:
    """A new one of `quantize` is one here, too, unless it is about the file that is written."""
    own = {"calib", "output", "seeds", "holdout", "images", "verbose"}
    names = {option.name for option in quantize.quantize.params} - study_samples.OPTIONS_NOT_STUDIED
    assert {option.name for option in study_samples.study_samples.params} == names | own


def test_a_page_needs_the_extra_and_a_picture_does_not(
    call: Qconv, tiny: Path, calib: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is said before any work."""
    monkeypatch.setitem(sys.modules, "plotly", None)
    options = ("study-samples", tiny, "--calib", calib, "--seeds", 1, "-q", "-o")
    done = call(*options, tiny.with_name("study.html"))
    assert_error(done, r"study\.html needs jinja2 and plotly(?s:.*)pip install 'qconv\[report\]'")
    assert call(*options, tiny.with_name("study.png")).status == 0
    assert listing(tiny.parent) == ["model.onnx", "study.png"]
