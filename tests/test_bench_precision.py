"""The benchmark of noise and time: ratios of turns, whose files are taken, and what the table says.

Oracle: rows and ratios worked by hand, and one real run on the repository's own network and pictures.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.bench import precision, turns
from tests.bench.cases import BY_NAME, REPOSITORY, SEEDED


def side(decibel: float | None, **changes: Any) -> dict[str, Any]:
    """A file with 3 of 10 nodes in float, made in 12 s."""
    made = {"sqnr_db": decibel, "agreement": None, "boxes": None, "scores": {}, "parts": {}, "left": []}
    return made | {"cpu_seconds": 12.0, "float": 3, "integer": 7} | changes


def network(base: float | None, new: float | None) -> dict[str, Any]:
    """Float takes 4 ms, base 2, new 3."""
    return {
        "sides": {"base": side(base), "new": side(new, left=["Mul_43"])},
        "ms": {"float": [4.0, 4.0, 4.0], "base": [2.0, 2.0, 2.0], "new": [3.0, 3.0, 3.0]},
    }


def cells(results: dict[str, Any], name: str) -> dict[str, str]:
    """The row of a network."""
    lines = [line.strip("|").split("|") for line in precision.table(results, ["base", "new"]).splitlines()]
    found = next(line for line in lines if line[0].strip() == name)
    return dict(zip((cell.strip() for cell in lines[0]), (cell.strip() for cell in found), strict=True))


def test_a_ratio_is_of_medians_between_rounds() -> None:
    """Medians 4 and 2; rounds 2/2, 4/2 and 9/3."""
    assert turns.ratio([2.0, 4.0, 9.0], [2.0, 2.0, 3.0]) == (1.0, 2.0, 3.0)


def test_a_row() -> None:
    found = cells({"net": network(8.8, 20.05)}, "net")
    assert (found["float ms"], found["base dB"], found["new dB"], found["gain dB"]) == ("4.00", "8.8", "20.1", "+11.2")
    assert found["base of float"] == "0.50 (0.50-0.50)"
    assert found["new of float"] == "0.75 (0.75-0.75)"
    assert found["new of base"] == "1.50 (1.50-1.50)"
    assert (found["new CPU s"], found["new float nodes"], found["left"]) == ("12.0", "3 of 10", "- / Mul_43")
    assert (found["parts dB"], found["scores (float: sides)"]) == ("-", "-")


def test_a_file_equal_to_float_has_no_gain() -> None:
    found = cells({"net": network(None, 20.0)}, "net")
    assert (found["base dB"], found["gain dB"]) == ("equal", "-")


def test_scores_stand_beside_those_of_float() -> None:
    own = network(8.8, 20.0)
    for name, value in (("base", 0.288), ("new", 0.338)):
        scored = {"scores": {"map": [0.343, value]}, "boxes": value + 0.5, "parts": {"boxes": 10 * value}}
        own["sides"][name] |= scored
    found = cells({"net": own}, "net")
    assert found["scores (float: sides)"] == "map 34.30: 28.80 / 33.80; boxes 78.8 / 83.8"
    assert found["parts dB"] == "boxes 2.9 / boxes 3.4"


def test_what_all_come_to() -> None:
    """Gains of 6 and 4 below 20 dB; one above loses more than 0.3, one less."""
    pairs = {"a": (10.0, 16.0), "b": (19.0, 23.0), "c": (30.0, 29.5), "d": (30.0, 29.8), "e": (None, None)}
    told = precision.summary({name: network(*pair) for name, pair in pairs.items()}, ["base", "new"])
    assert told == ["Worse by more than 0.3 dB: c -0.5 dB.", "Mean gain of 2 below 20 dB in base: +5.0 dB."]


def test_nothing_is_summed_up_of_one_side() -> None:
    assert precision.summary({"a": network(10.0, 16.0)}, ["base", "zero"]) == []


def test_what_is_kept_of_a_report() -> None:
    report = {
        "audit": {"integer": 5, "float": 2, "islands": [{"node": "a"}], "placed": [{"node": "b"}]},
        "changes": [{"where": "a", "what": "left in float: loud"}, {"where": "b", "what": "absorbed"}],
        **dict.fromkeys(("verify", "time", "peak_rss_mb", "warnings")),
    }
    found = precision.of_report(report)
    assert (found["integer"], found["float"], found["left"]) == (5, 2, ["a"])
    assert found["float_nodes"] == [{"node": "a"}, {"node": "b"}]


def test_every_network_has_a_case() -> None:
    assert set(precision.NAMES) <= set(BY_NAME)
    assert set(SEEDED) <= set(precision.NAMES)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of data as the benchmark wants it, with the repository's own network for resnet20."""
    own = replace(BY_NAME["resnet20"], options=("--preprocess", "imagenet", "--resize", "exact"), labels=False)
    monkeypatch.setitem(precision.BY_NAME, "resnet20", own)
    photos = sorted((REPOSITORY / "calib_samples").glob("*.jpg"))[:12]
    for folder, chosen in (("calib", photos[:6]), ("test", photos[6:])):
        here = tmp_path / "images/cifar10" / folder
        here.mkdir(parents=True)
        for photo in chosen:
            (here / photo.name).symlink_to(photo)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / own.model).symlink_to(REPOSITORY / "tests/models/cifar_mobilenet.onnx")
    return tmp_path


def test_a_run_keeps_its_files_for_the_next_one(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["precision", "resnet20", "--data", str(place), "--rounds", "3", "--base-options", "--effort fast"]
    first, second = place / "first", place / "second"
    monkeypatch.setattr("sys.argv", [*words, "--work", str(first), "--base", str(REPOSITORY), "--sides", "base"])
    precision.main()
    kept = json.loads((first / "base_resnet20.json").read_text())
    assert kept["options"][-2:] == ["--effort", "fast"]
    assert kept["sqnr_db"] > 20
    assert kept["cpu_seconds"] > 0
    assert kept["agreement"] >= 5 / 6

    told = place / "told.json"
    again = [*words, "--work", str(second), "--reuse", str(first), "--new-options", "--effort fast"]
    monkeypatch.setattr("sys.argv", [*again, "--json", str(told)])
    precision.main()
    found = json.loads(told.read_text())["resnet20"]
    assert found["sides"]["base"] == kept
    assert found["sides"]["new"]["sqnr_db"] == pytest.approx(kept["sqnr_db"])
    assert [len(found["ms"][name]) for name in ("float", "base", "new")] == [3, 3, 3]
    assert all(np.array(times).min() > 0 for times in found["ms"].values())
    assert not (second / "base_resnet20.onnx").exists()


def test_a_base_has_to_be_named(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["precision", "--data", str(place), "--work", str(place / "work")])
    with pytest.raises(SystemExit, match="no tree is named for base"):
        precision.main()


def test_a_network_that_is_made_has_to_be_given(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["precision", "repvit", "--data", str(place), "--work", str(place / "work"), "--sides", "new"]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit, match="repvit is made, not shipped"):
        precision.main()
