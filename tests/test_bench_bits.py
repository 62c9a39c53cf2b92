"""The accuracy benchmark: what it runs, what it skips, what it keeps, what it prints.

Oracle: rows worked by hand, and one real run on the repository's own network and pictures.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.bench import bits, bits_table
from tests.bench.cases import BY_NAME, CASES, REPOSITORY
from tests.bench.published import PUBLISHED, Published, beside
from tests.bench.variants import PEERS, SETTINGS, VARIANTS, Setting, Variant, given, known_options, setting, unknown

HELP = """
Options:
  --calib DIR|FILE                Calibration pictures, see --samples.
  -o, --output OUT                Result.
  --rounding [nearest|second-order]
                                  Which way weights round.
  --saturation-safe / --no-saturation-safe
                                  7-bit weights.
"""
KNOWN = known_options(HELP)


def row(**changes: Any) -> dict[str, Any]:
    """980 of 1000 right in float, 970 afterwards."""
    made = {
        **{"model": "mobilenetv2", "granularity": "per-channel", "setting": "W4A8", "variant": "nearest"},
        **{"pictures": 128, "tests": 1000, "agreement": 0.912, "sqnr_db": 12.34, "ratio": 0.25, "bytes": 100},
        "top1": {"float": 98.0, "quantized": 97.0},
        "flips": {"won": 0, "lost": 10, "p_value": 2 / 2**10},
        **{"seconds": 3.21, "solve_seconds": None, "peak_rss_mb": 150.4, "error": None, "commit": "abc"},
    }
    return made | changes


def cells(text: str, variant: str = "nearest") -> dict[str, str]:
    """The row of one variant in the first table."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    found = next(line for line in lines[2:] if line[3] == variant)
    return dict(zip(lines[0], found, strict=True))


# ---- settings and options


@pytest.mark.parametrize(("text", "want"), [("W4A8", (4, 8)), ("w16a8", (16, 8)), ("W3", (3, 32)), ("W4A32", (4, 32))])
def test_a_setting_is_two_numbers_of_bits(text: str, want: tuple[int, int]) -> None:
    assert setting(text) == Setting(*want)


@pytest.mark.parametrize("text", ["", "4A8", "W4A", "A8", "W4A8x"])
def test_what_is_no_setting(text: str) -> None:
    with pytest.raises(ValueError, match="no setting"):
        setting(text)


def test_options_are_read_off_the_help() -> None:
    assert dict(KNOWN) == {
        "--calib": None,
        "--output": None,
        "--rounding": {"nearest", "second-order"},
        "--saturation-safe": None,
        "--no-saturation-safe": None,
    }


@pytest.mark.parametrize(
    ("options", "want"),
    [
        ((), None),
        (("--rounding", "nearest", "--no-saturation-safe"), None),
        (("--effort", "best"), "--effort"),
        (("--rounding", "reconstruct"), "--rounding reconstruct"),
        (("--samples", "4"), "--samples"),  # named in a description is not known
    ],
)
def test_the_first_unknown_option(options: tuple[str, ...], want: str | None) -> None:
    assert unknown(options, KNOWN) == want


def test_pinned_options_are_given_as_far_as_they_are_known() -> None:
    variant = Variant("now", "", ("--calib", "x"), pinned=("--effort", "fast", "--rounding", "nearest"))
    assert given(variant, KNOWN) == ("--rounding", "nearest", "--calib", "x")


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_options_of_variants_are_pairs(variant: Variant) -> None:
    for words in (variant.options, variant.pinned):
        assert all(word.startswith("--") for word in words[::2])
        assert not any(word.startswith("--") for word in words[1::2])
        assert len(words) % 2 == 0


def test_names_are_told_apart() -> None:
    names = [way.name for way in (*VARIANTS, *PEERS)]
    assert len(set(names)) == len(names)


# ---- what is run


def jobs(*argv: str, case: str = "resnet20", known: str = HELP) -> list[tuple[str, str, str, int]]:
    bench = bits.Bench(bits.arguments(argv))
    bench.known = known_options(known)
    chosen = next(c for c in CASES if c.name == case)
    return [(j.granularity, str(j.setting), j.name, j.pictures) for j in bench.jobs(chosen)]


def test_every_setting_and_granularity_is_run() -> None:
    found = {job[:2] for job in jobs("--variant", "nearest")}
    assert found == {(g, str(s)) for g in ("per-channel", "per-tensor") for s in SETTINGS}


def test_unknown_variants_are_skipped_and_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert jobs("--variant", "best", "--variant", "nearest", "--setting", "W4A8", "--granularity", "per-channel") == [
        ("per-channel", "W4A8", "nearest", 128)
    ]
    assert capsys.readouterr().err == "best is skipped: `quantize --help` does not know --effort\n"


def test_a_known_variant_is_run() -> None:
    known = HELP + "  --effort [fast|balanced|best]   How long.\n"
    one = ("--setting", "W4A8", "--granularity", "per-channel", "--variant", "best")
    assert [job[2] for job in jobs(*one, known=known)] == ["best"]


def test_more_options_have_a_name_of_their_own() -> None:
    one = ("--setting", "W4A8", "--granularity", "per-channel", "--variant", "nearest")
    assert [job[2] for job in jobs(*one, "--qconv", "--edge-bits 4")] == ["nearest --edge-bits 4"]


def test_peers_are_for_8_bits_and_keep_few_large_pictures() -> None:
    peers = ("--variant", "static-minmax", "--variant", "static-entropy", "--granularity", "per-tensor")
    assert jobs(*peers, case="mobilenetv2") == [
        ("per-tensor", "W8A8", "static-minmax", 128),
        ("per-tensor", "W8A8", "static-entropy", 32),
    ]
    assert [job[3] for job in jobs(*peers)] == [128, 128]


def test_nncf_needs_its_interpreter(capsys: pytest.CaptureFixture[str]) -> None:
    assert jobs("--variant", "nncf") == []
    assert "nncf is skipped: --nncf PYTHON is not given" in capsys.readouterr().err
    assert jobs("--variant", "nncf", "--nncf", "python3") == [("per-channel", "W8A8", "nncf", 128)]


def test_a_network_without_labels_is_measured_at_a_few_settings_for_its_size() -> None:
    assert jobs("--variant", "nearest", case="light_resnet50") == [
        ("per-channel", "W8A8", "nearest", 128),
        ("per-channel", "W4A8", "nearest", 128),
    ]


def test_resume_needs_a_file() -> None:
    with pytest.raises(SystemExit):
        bits.arguments(["--resume"])


@pytest.mark.parametrize(
    ("times", "want"), [({"load": 1.0}, None), ({"round": 2.0}, 2.0), ({"equalize": 0.5, "round": 2.0}, 2.5)]
)
def test_seconds_of_solving(times: dict[str, float], want: float | None) -> None:
    assert bits.solve_seconds(times) == want


# ---- what is printed


def test_a_row() -> None:
    found = cells(bits_table.text({"rows": [row()]}))
    assert found["agreement %"] == "91.2"
    assert found["SQNR dB"] == "12.3"
    assert found["top-1 % (float)"] == "97.00 (98.00)"
    assert found["drop"] == "-1.00"
    assert found["p"] == "0.002"
    assert (found["seconds"], found["solving"], found["MB"]) == ("3.2", "-", "150")
    assert found["pictures"] == "128 / 1000"


def test_a_row_beside_itself_without_optimizations() -> None:
    plain = {"agreement": 0.95, "sqnr_db": 20.0, "top1": {"float": 98.0, "quantized": 97.5}}
    found = cells(bits_table.text({"rows": [row(reference=plain, solve_seconds=1.25)]}))
    assert (found["agreement %"], found["SQNR dB"], found["solving"]) == ("91.2 [95.0]", "12.3 [20.0]", "1.2")


def test_a_row_without_labels() -> None:
    found = cells(bits_table.text({"rows": [row(model="light_resnet50", top1=None, flips=None, solve_seconds=30.0)]}))
    assert (found["agreement %"], found["solving"]) == ("91.2", "30.0")
    assert {found["top-1 % (float)"], found["drop"], found["p"]} == {"-"}
    assert "top-1" not in bits_table.line(row(top1=None, flips=None, scored_in=1.0))


def test_a_failed_row_says_why() -> None:
    text = bits_table.text({"rows": [row(error="Error: no.")], "skipped": {"best": "not known"}})
    assert cells(text)["agreement %"] == "failed"
    assert "- mobilenetv2 per-channel W4A8 nearest failed: Error: no.\n" in text + "\n"
    assert "- best is skipped: not known\n" in text + "\n"


def test_rows_come_in_declared_order() -> None:
    mixed = [row(variant="best"), row(setting="W8A8"), row(model="resnet20"), row(granularity="per-tensor"), row()]
    text = bits_table.text({"rows": mixed})
    found = [re.split(r"\s*\|\s*", line)[1:5] for line in text.splitlines() if line[:1] == "|"][2:7]
    assert found == [
        ["resnet20", "per-channel", "W4A8", "nearest"],
        ["mobilenetv2", "per-channel", "W8A8", "nearest"],
        ["mobilenetv2", "per-channel", "W4A8", "nearest"],
        ["mobilenetv2", "per-channel", "W4A8", "best"],
        ["mobilenetv2", "per-tensor", "W4A8", "nearest"],
    ]


def test_published_drops_stand_beside() -> None:
    """AdaRound's MobileNetV2: 71.72 before, 69.25 after."""
    text = bits_table.text({"rows": [row(), row(variant="static-minmax")]})
    assert cells(text)["published drop"] == "-45.07 .. -2.47 (2)"
    line = next(line for line in text.splitlines() if "Nagel et al. 2020" in line)
    assert re.split(r"\s*\|\s*", line)[5:9] == ["AdaRound", "69.25 (71.72)", "-2.47", "mobilenetv2: nearest -1.00"]


def test_one_published_drop_is_named() -> None:
    assert bits_table.drops(beside("efficientnet_lite0", "W4A8", "per-channel")) == "-0.94 AdaRound"
    assert bits_table.drops([]) == "-"


@pytest.mark.parametrize("entry", PUBLISHED, ids=lambda entry: f"{entry.source} {entry.method} {entry.network}")
def test_published_numbers_are_percent(entry: Published) -> None:
    assert 0 <= entry.quantized <= 100
    assert entry.before is None or entry.quantized < entry.before + 0.1
    assert setting(entry.setting) in SETTINGS


# ---- a real run


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of data as the benchmark wants it: six pictures to calibrate, six in two classes to score.

    The network is the repository's own, fed as resnet20 is: peers look that up by its name in their own processes.
    """
    own = replace(BY_NAME["resnet20"], options=("--preprocess", "imagenet", "--resize", "exact"))
    monkeypatch.setattr(bits, "MODELS", ("resnet20",))
    monkeypatch.setitem(bits.BY_NAME, "resnet20", own)
    photos = sorted((REPOSITORY / "calib_samples").glob("*.jpg"))[:12]
    for folder, chosen in (("calib", photos[:6]), ("test/a", photos[6:9]), ("test/b", photos[9:])):
        here = tmp_path / "images/cifar10" / folder
        here.mkdir(parents=True)
        for photo in chosen:
            (here / photo.name).symlink_to(photo)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / own.model).symlink_to(REPOSITORY / "tests/models/cifar_mobilenet.onnx")
    return tmp_path


def test_a_run_is_kept_resumed_and_printed_again(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = place / "found.json"
    one = ["--data", str(place), "--setting", "W8A8", "--granularity", "per-channel", "--json", str(kept), "--resume"]
    bits.main([*one, "--variant", "nearest"])
    first = capsys.readouterr().out
    found = json.loads(kept.read_text())["rows"]
    assert [(r["variant"], r["pictures"], r["tests"], r["error"]) for r in found] == [("nearest", 128, 6, None)]
    assert found[0]["sqnr_db"] > 20
    assert found[0]["agreement"] >= 5 / 6
    assert found[0]["peak_rss_mb"] > 0

    bits.main([*one, "--variant", "nearest", "--variant", "static-minmax"])
    again = json.loads(kept.read_text())["rows"]
    assert again[0] == found[0]
    assert [(r["variant"], r["error"]) for r in again[1:]] == [("static-minmax", None)]
    assert again[1]["sqnr_db"] > 10

    capsys.readouterr()
    bits.main(["--markdown", str(kept)])
    assert cells(capsys.readouterr().out) == cells(first)


def test_a_network_without_labels_is_scored_against_its_float_self(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(bits.BY_NAME, "resnet20", replace(bits.BY_NAME["resnet20"], labels=False))
    monkeypatch.setattr(bits, "TIMED", {"resnet20": (setting("W8A8"),)})
    bits.main(["--data", str(place), "--variant", "nearest"])
    out = capsys.readouterr().out
    assert float(cells(out)["SQNR dB"]) > 20
    assert cells(out)["drop"] == "-"
    assert out.count("| resnet20 ") == 1


def test_a_run_that_fails_is_a_row(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--setting", "W8A8", "--variant", "nearest", "--granularity", "per-channel", "--qconv", "--opset 5"]
    bits.main(["--data", str(place), *options])
    out = capsys.readouterr().out
    assert cells(out, "nearest --opset 5")["agreement %"] == "failed"
    assert "Error: " in out
