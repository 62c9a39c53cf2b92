"""Several recipes at once: each file is what `quantize` makes of its recipe, and what is said of it was measured."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import Result
from onnxruntime import InferenceSession

from qconv.analysis import trials
from qconv.calibration import observer
from qconv.cli.main import cli
from qconv.errors import QconvError
from qconv.pipeline import collect
from tests.analysis.test_diagnose import plain, saved
from tests.data.test_autodetect import colourful, folder_of, trained_with
from tests.support.libraries import runner

COUNT = 40
RECIPES = """
[w8a8]

[w4]
weight-bits = 4
keep-float = ["k"]

[uncut]
calibrator = "minmax"
equalize = false
"""


@pytest.fixture(autouse=True)
def short_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "TIMING_ROUNDS", 1)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a model, samples and recipes."""
    saved(plain(), tmp_path)
    folder = tmp_path / "samples"
    folder.mkdir()
    rng = np.random.default_rng(5)
    for index in range(COUNT):
        np.save(folder / f"{index:02}.npy", rng.standard_normal((1, 3, 8, 8)).astype(np.float32))
    (tmp_path / "recipes.toml").write_text(RECIPES)
    return tmp_path


def run(place: Path, *words: Any, **how: Any) -> Result:
    fixed = ("quantize", place / "model.onnx", "--calib", place / "samples", "--sweep", place / "recipes.toml")
    return runner().invoke(cli, [str(word) for word in (*fixed, *words)], **how)


def test_every_file_is_what_quantize_makes_of_the_recipe(place: Path) -> None:
    result = run(place, "--effort", "fast", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [row["name"] for row in found["recipes"]] == ["w8a8", "w4", "uncut"]
    assert found["pictures"] == COUNT // 5
    asked = {
        "w8a8": (),
        "w4": ("--weight-bits", "4", "--keep-float", "k"),
        "uncut": ("--calibrator", "minmax", "--no-equalize"),
    }
    for row in found["recipes"]:
        alone = place / "alone.onnx"
        words = ["quantize", str(place / "model.onnx"), "--calib", str(place / "samples"), "--samples", "32"]
        done = runner().invoke(cli, [*words, "--effort", "fast", *asked[row["name"]], "-o", str(alone)])
        assert done.exit_code == 0, done.output
        assert row["output"] == str(place / f"model.{row['name']}.onnx")
        assert Path(row["output"]).read_bytes() == alone.read_bytes()
        assert row["size"] == alone.stat().st_size


def test_accuracy_is_that_of_the_files_on_pictures_held_back(place: Path) -> None:
    """Its 512 numbers a picture are taken for features, where nobody says that they are classes."""
    found = json.loads(run(place, "--effort", "fast", "--json", "--task", "classify").stdout)
    order = np.random.default_rng(0).permutation(COUNT)[-COUNT // 5 :]
    x = np.concatenate([np.load(place / "samples" / f"{index:02}.npy") for index in order])
    (reference,) = InferenceSession(str(place / "model.onnx")).run(None, {"x": x})
    for row in found["recipes"]:
        (got,) = InferenceSession(row["output"]).run(None, {"x": x})
        noise = np.sum((reference.astype(np.float64) - got) ** 2)
        assert row["sqnr_db"] == pytest.approx(
            10 * np.log10(np.sum(reference.astype(np.float64) ** 2) / noise), abs=0.2
        )
        assert row["agreement"] == np.mean(reference.argmax(1) == got.argmax(1))
        assert row["ms"] > 0


def test_pictures_pass_the_network_once(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = []
    watch = observer.observe

    def counted(session: Any, observers: Any, *rest: Any) -> Any:
        watched.append(len(observers))
        return watch(session, observers, *rest)

    monkeypatch.setattr(collect, "observe", counted)
    text = '[one]\n[two]\ncalibrator = "minmax"\n[three]\nweight-bits = 4\n'
    (place / "recipes.toml").write_text(text)
    assert run(place, "--effort", "fast").exit_code == 0
    assert len(watched) == 1


def test_a_recipe_that_fails_lets_the_others_go_on(place: Path) -> None:
    (place / "recipes.toml").write_text('[bad]\nkeep-float = ["*"]\n[good]\n')
    result = run(place, "--effort", "fast", standalone_mode=False)
    assert result.return_value == 1  # which `main` exits with
    text = " ".join(result.stdout.split())
    assert "bad failed: " in text
    assert "nothing to quantize" in text
    assert (place / "model.good.onnx").exists()
    assert not (place / "model.bad.onnx").exists()


def test_a_folder_for_the_results_and_a_table(place: Path) -> None:
    (place / "out").mkdir()
    result = run(place, "--effort", "fast", "-o", place / "out", "--csv", "-")
    assert result.exit_code == 0, result.output
    rows = list(csv.DictReader(io.StringIO(result.stdout)))
    assert [row["name"] for row in rows] == ["w8a8", "w4", "uncut"]
    assert {row["non_dominated"] for row in rows} <= {"true", "false"}
    assert sorted(path.name for path in (place / "out").iterdir()) == [
        "model.uncut.onnx",
        "model.w4.onnx",
        "model.w8a8.onnx",
    ]
    assert not list(place.glob("model.*.onnx"))


def test_the_table_is_narrow_enough(place: Path) -> None:
    text = run(place, "--effort", "fast").stdout
    table = text[text.index("SQNR") : text.index("written:")]  # a path may be as long as it is
    assert max(map(len, table.splitlines())) <= 80


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "has no recipe"),
        ("weight-bits = 4", "outside of any recipe"),
        ("[a]\nweight-bit = 4", "'weight-bit', which is no option"),
        ("[a]\nweight-bits = 9", "--weight-bits 9"),
        ("[a]\nweight-bits = [4, 8]", "not a valid integer"),
        ('[a]\nweight-bits = "four"', "not a valid integer"),
        ("[a]\nsamples = 4", "cannot differ from recipe to recipe"),
        ("[a]\npack = true", "Pass --weight-bits 7"),
        ("[a]\neffort = { no = 1 }", "it takes texts and numbers"),
        ('["a/b"]', "cannot be part of a file's name"),
        ("[a", "is no TOML"),
    ],
)
def test_what_recipes_cannot_be(place: Path, text: str, says: str) -> None:
    (place / "recipes.toml").write_text(text)
    result = run(place)
    assert result.exit_code == 1
    assert says in str(result.exception)
    assert not list(place.glob("model.*.onnx"))


@pytest.mark.parametrize("words", [("--min-sqnr", "10"), ("--save-stats", "s.npz")])
def test_options_about_one_result(place: Path, words: tuple[str, str]) -> None:
    result = run(place, *words)
    assert result.exit_code == 2
    assert "makes several" in result.stderr


def test_the_folder_must_be_there(place: Path) -> None:
    result = run(place, "-o", place / "nowhere")
    assert result.exit_code == 1
    assert "is no folder" in str(result.exception)


def test_no_recipe_writes_over_the_model(place: Path) -> None:
    (place / "recipes.toml").write_text("[onnx]\n")
    (place / "model.onnx").rename(place / "a.onnx.onnx")
    words = ["quantize", str(place / "a.onnx.onnx"), "--calib", str(place / "samples")]
    result = runner().invoke(cli, [*words, "--sweep", str(place / "recipes.toml"), "--effort", "fast"])
    assert result.exit_code == 0, result.output
    assert onnx.load(place / "a.onnx.onnx.onnx")


def test_the_page_of_a_sweep(place: Path) -> None:
    pytest.importorskip("plotly")
    result = run(place, "--effort", "fast", "--report", place / "page.html")
    assert result.exit_code == 0, result.output
    text = (place / "page.html").read_text()
    for name in ("w8a8", "w4", "uncut"):
        assert name in text


def test_tables_go_over_the_command_line(place: Path) -> None:
    """A named recipe gives way to what was typed, a switch can be put back, a list of numbers is one value."""
    first = '[inner]\npack = false\n[named]\nrecipe-name = "aciq-w4a4"\npack = false\n'
    second = '[several]\nmax-drop = "sqnr:10"\ncandidate-bits = [4, 8]\n'
    seen = []

    def kept(source: Any, entries: Any, reporter: Any) -> Any:
        seen.extend(entry.recipe for entry in entries)
        raise QconvError("no further", "this is a test")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trials, "run_sweep", kept)
        (place / "recipes.toml").write_text(first)
        run(place, "--recipe-name", "aciq-w4a4", "--activation-bits", "6", "--pack")
        (place / "recipes.toml").write_text(second)
        run(place)
    inner, named, several = seen
    assert (inner.weight_bits, inner.activation_bits, inner.pack) == (4, 6, False)
    assert (named.weight_bits, named.activation_bits) == (4, 4)
    assert several.candidate_bits == (4, 8)


def test_pixels_go_into_files_that_take_pixels(tmp_path: Path) -> None:
    folder = folder_of(colourful(), tmp_path / "pictures")
    model = saved(trained_with("imagenet"), tmp_path)
    (tmp_path / "recipes.toml").write_text("[a]\n")
    words = ["quantize", str(model), "--calib", str(folder), "--resize", "exact", "--preprocess", "imagenet"]
    more = ["--effort", "fast", "--embed-preprocessing", "nchw", "--sweep", str(tmp_path / "recipes.toml"), "--json"]
    result = runner().invoke(cli, [*words, *more])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["recipes"][0]["sqnr_db"] > 20


@pytest.mark.parametrize("name", ["model.w4.onnx", "recipes.toml", "model.onnx"])
def test_the_table_writes_nothing_over(place: Path, name: str) -> None:
    result = run(place, "--effort", "fast", "--csv", place / name)
    assert result.exit_code == 1
    assert not (place / "model.w8a8.onnx").exists()


def test_a_file_that_a_recipe_names_lies_beside_it(place: Path) -> None:
    (place / "bits.toml").write_text("[layers]\nc = 4\n")
    (place / "recipes.toml").write_text('[own]\nlayer-bits = "bits.toml"\n')
    result = run(place, "--effort", "fast", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["recipes"][0]["failed"] is None
