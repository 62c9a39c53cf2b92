"""Recipes in files: what is saved is read back to the same bytes, what is typed wins, and errors name file and key."""

from __future__ import annotations

import json
import shlex
import shutil
import tomllib
from pathlib import Path
from typing import Any

import onnx
import pytest
from click.testing import Result

from qconv.cli.main import cli
from qconv.cli.quantize import quantize as quantize_command
from qconv.cli.recipe_file import given_options
from qconv.config.data_options import DataOptions
from qconv.config.recipe import Recipe
from qconv.errors import QconvError
from tests.support.contract import ROOT
from tests.support.libraries import runner

IMAGES = 6
FAST = ("--samples", "4", "--effort", "fast")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder, which is the current one, with a model and pictures."""
    shutil.copy(ROOT / "tests/models/cifar_mobilenet.onnx", tmp_path / "m.onnx")
    (tmp_path / "imgs").mkdir()
    for picture in sorted((ROOT / "calib_samples").glob("*.jpg"))[:IMAGES]:
        shutil.copy(picture, tmp_path / "imgs")
    (tmp_path / "bits.toml").write_text('[layers]\n"*depthwise*" = 8\n"*" = { weights = 4, activations = 8 }\n')
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*words: str | Path) -> Result:
    return runner().invoke(cli, [str(word) for word in words], standalone_mode=False)


def done(*words: str | Path) -> None:
    result = run(*words)
    assert result.exception is None, result.exception


def asked_for(*words: str) -> tuple[Recipe, DataOptions]:
    """The recipe and the images of `qconv quantize m WORDS`."""
    with quantize_command.make_context("quantize", ["m", *words]) as context:
        return given_options({name: value for name, value in context.params.items() if name != "model"}).request()


def asked(*words: str) -> Recipe:
    """The recipe alone."""
    return asked_for(*words)[0]


RECIPES = {
    "defaults": FAST,
    "bits of layers": (*FAST, "--layer-bits", "bits.toml"),
    "globs": (*FAST, "--keep-float", "*stem*", "--keep-float", "odd \"na'me\\", "--keep-float-op", "Gemm"),
    "named": ("--samples", "4", "--recipe-name", "aciq-w4a4"),
    "switches": ("--samples", "4", "--no-equalize", "--no-tune-ranges", "--rounding", "nearest", "--saturation-safe"),
    "packed": (*FAST, "--weight-bits", "4", "--activation-bits", "32", "--pack", "--edge-bits", "4"),
    "pixels": (*FAST, "--preprocess", "imagenet", "--scale", "1/255", "--embed-preprocessing", "nhwc"),
    "no pictures": ("--calib", "none", "--preprocess", "imagenet"),
}


@pytest.mark.parametrize("words", RECIPES.values(), ids=list(RECIPES))
def test_what_is_saved_makes_the_same_bytes(place: Path, words: tuple[str, ...]) -> None:
    """Wherever the file lies, and also where only the model is left, which carries the recipe."""
    calib = () if "none" in words else ("--calib", "imgs")
    done("quantize", "m.onnx", *calib, *words, "-o", "a.onnx", "--save-recipe", "there/r.toml", "-q")
    done("quantize", "m.onnx", "--recipe", "there/r.toml", "-o", "b.onnx", "-q")
    assert Path("b.onnx").read_bytes() == Path("a.onnx").read_bytes()
    done("quantize", "m.onnx", "--recipe", "a.onnx", *calib, "-o", "c.onnx", "-q")
    assert Path("c.onnx").read_bytes() == Path("a.onnx").read_bytes()


def test_what_inspect_prints_is_what_a_recipe_holds(place: Path) -> None:
    words = ("--weight-bits", "4", "--mean", "0.1,0.2,1/3", "--keep-float", "a b", *FAST)
    done("quantize", "m.onnx", "--calib", "imgs", *words, "-o", "a.onnx", "--save-recipe", "r.toml", "-q")
    found = json.loads(run("inspect", "a.onnx", "--json").stdout)
    recipe, data = asked_for("--recipe", "r.toml")
    assert asked_for("--calib", "imgs", *found["options"]) == (recipe, data)
    assert recipe.as_dict(data) == found["recipe"]
    carried = {entry.key: entry.value for entry in onnx.load("a.onnx").metadata_props}["qconv.recipe"]
    assert json.loads(carried) == found["recipe"]
    assert tomllib.loads(Path("r.toml").read_text())["calib"] == ["imgs"]
    assert shlex.join(found["options"]) in " ".join(run("inspect", "a.onnx").stdout.split())


def test_a_search_is_saved_as_it_was_asked_for(place: Path) -> None:
    """A model that was found by one is a recipe with the bits that it has, which need no search."""
    search = ("--max-drop", "sqnr:15", "--candidate-bits", "4,8")
    done("quantize", "m.onnx", "--calib", "imgs", *FAST, *search, "-o", "a.onnx", "--save-recipe", "r.toml", "-q")
    assert tomllib.loads(Path("r.toml").read_text())["max-drop"] == "sqnr:15.0"
    done("quantize", "m.onnx", "--recipe", "r.toml", "-o", "b.onnx", "-q")
    assert Path("b.onnx").read_bytes() == Path("a.onnx").read_bytes()
    found = asked("--recipe", "a.onnx", "--calib", "imgs")
    assert not found.searches
    assert {bits.weights for _, bits in found.layer_bits} <= {4, 8}


def test_steering_options_are_saved(place: Path) -> None:
    steering = ("--batch", "2", "--threads", "1", "--min-agreement", "0", "--min-sqnr", "-5")
    done("quantize", "m.onnx", "--calib", "imgs", *FAST, *steering, "--save-recipe", "r.toml", "-q")
    assert asked_for("--recipe", "r.toml") == asked_for("--calib", "imgs", *FAST, *steering)


def test_what_is_typed_wins(place: Path) -> None:
    Path("there/r.toml").write_text(
        'calib = ["../imgs"]\nweight-bits = 4\neffort = "fast"\npack = false\nkeep-float = ["a"]\nequalize = true\n'
        'layer-bits = "../bits.toml"\n'
    )
    found, data = asked_for("--recipe", "there/r.toml")
    assert (found.weight_bits, found.effort, found.equalize, found.keep_float) == (4, "fast", True, ("a",))
    assert data.paths == ("there/../imgs",)
    assert len(found.layer_bits) == 2
    found = asked("--recipe", "there/r.toml", "--weight-bits", "8", "--no-equalize", "--keep-float", "b")
    assert (found.weight_bits, found.effort, found.equalize, found.keep_float) == (8, "fast", False, ("b",))
    # also where what is typed is the default, and where a named recipe is typed
    assert asked("--recipe", "there/r.toml", "--effort", "balanced").effort == "balanced"
    assert asked("--recipe", "there/r.toml", "--recipe-name", "aciq-w4a4").equalize is False


def test_a_named_recipe_in_a_file_gives_way_to_what_stands_beside_it(place: Path) -> None:
    Path("r.toml").write_text('calib = "imgs"\nrecipe-name = "aciq-w4a4"\nactivation-bits = 6\n')
    found = asked("--recipe", "r.toml")
    assert (found.weight_bits, found.activation_bits, found.calibrator) == (4, 6, "aciq")
    assert asked("--recipe", "r.toml", "--activation-bits", "5").activation_bits == 5


@pytest.mark.parametrize(
    ("text", "fact", "hint"),
    [
        ("weight-bit = 4", "r.toml says 'weight-bit', which is no option", "did you mean weight-bits"),
        ("weight_bits = 4", "r.toml says 'weight_bits', which is no option", "did you mean weight-bits"),
        ("o = 'x'", "r.toml says 'o', which is no option", "write options of quantize"),
        ("output = 'x'", "r.toml says 'output', which says where", "pass --output on the command line"),
        ("json = true", "r.toml says 'json', which says where", "pass --json on the command line"),
        ("recipe = 'r.toml'", "r.toml says 'recipe', which names another recipe", "write its lines here"),
        ("weight-bits = 'four'", "r.toml says weight-bits = \"four\": 'four' is not a valid integer", "write options"),
        ("weight-bits = [4, 8]", "r.toml says weight-bits = [4, 8]: '4,8' is not a valid integer", "write options"),
        ("weight-bits = true", "r.toml says weight-bits = true: it takes texts and numbers", "write options"),
        ("pack = 1", "r.toml says pack = 1: true and false", "write options"),
        ("effort = 'bst'", "r.toml says effort = \"bst\": 'bst' is not one of", "write options"),
        ("keep-float = [['a']]", 'r.toml says keep-float = [["a"]]: it takes', "write options"),
        ("samples = 0", "r.toml says samples = 0: 0 is not in the range", "write options"),
        ("[layer-bits]\na = 9", "r.toml gives 'a' weights of 9 bits", "use 2 to 8"),
        ("weight-bits", "r.toml is no TOML", "write options"),
    ],
)
def test_errors_name_file_and_key(place: Path, text: str, fact: str, hint: str) -> None:
    Path("r.toml").write_text(text)
    error = run("quantize", "m.onnx", "--recipe", "r.toml", "--calib", "imgs").exception
    assert isinstance(error, QconvError)
    assert error.message.startswith(fact)
    assert error.message.endswith(".")
    assert hint in error.hint


@pytest.mark.parametrize("carried", [None, "{}}", "[]", '{"weight_bits": 99}', '{"keep_float": 3}'])
def test_models_that_carry_no_recipe(place: Path, carried: str | None) -> None:
    if carried is not None:
        model = onnx.load("m.onnx")
        model.metadata_props.add(key="qconv.recipe", value=carried)
        onnx.save(model, "m.onnx")
    error = run("quantize", "m.onnx", "--recipe", "m.onnx", "--calib", "imgs").exception
    assert isinstance(error, QconvError)
    assert "m.onnx carries no recipe" in error.message


def test_what_does_not_go_together_names_the_file(place: Path) -> None:
    Path("r.toml").write_text("percentile = 99.9\ncalibrator = 'minmax'")
    result = runner().invoke(cli, ["quantize", "m.onnx", "--recipe", "r.toml", "--calib", "imgs"])
    assert result.exit_code == 2
    assert "--percentile with --calibrator minmax" in result.stderr
    assert "r.toml says --percentile 99.9 --calibrator minmax." in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("file", "words", "same"),
    [
        ("percentile = 99\ncalibrator = 'percentile'", ("--calibrator", "minmax"), ("--calibrator", "minmax")),
        (
            "block-size = 16\nweight-granularity = 'per-block'",
            ("--weight-granularity", "per-channel"),
            ("--weight-granularity", "per-channel"),
        ),
        (
            "block-size = 16",
            ("--weight-granularity", "per-block"),
            ("--weight-granularity", "per-block", "--block-size", "16"),
        ),
        ("calib = 'none'\nfallback = 'random'", ("--calib", "imgs"), ("--calib", "imgs")),
        ("samples = 4\nseed = 3\nglob = '*.jpg'\nbatch = 2", ("--calib", "none"), ("--calib", "none")),
        ("samples = 4\nseed = 3", ("--stats", "s.npz"), ("--stats", "s.npz")),
        ("calibrator = 'mse'", ("--activation-bits", "32"), ("--activation-bits", "32")),
        (
            "percentile = 99.9\ncalibrator = 'percentile'",
            ("--recipe-name", "aciq-w4a4"),
            ("--recipe-name", "aciq-w4a4"),
        ),
        ("pack = true\nweight-bits = 4", ("--no-pack",), ("--weight-bits", "4")),
        ("tune-latency = true", ("--no-tune-latency",), ()),
    ],
)
def test_what_is_typed_takes_what_goes_with_it_along(
    place: Path, file: str, words: tuple[str, ...], same: tuple[str, ...]
) -> None:
    """Else nothing that is typed could undo the line of the file."""
    Path("r.toml").write_text(file)
    assert asked_for("--recipe", "r.toml", *words) == asked_for(*same)


def test_a_recipe_that_cannot_be_saved_is_told_before_the_work(place: Path) -> None:
    for out, says in (
        ("no/r.toml", "does not exist"),
        ("m.onnx", "would be written over"),
        (next(Path("imgs").iterdir()), "is among the pictures of imgs"),
        ("out.onnx", "is both --save-recipe and the output"),
    ):
        words = ("quantize", "m.onnx", "--calib", "imgs", *FAST, "-o", "out.onnx", "--save-recipe", out)
        assert says in str(run(*words).exception)
        assert not Path("out.onnx").exists()
    assert "needs the name of a file" in str(
        run("quantize", "m.onnx", "--calib", "imgs", "--save-recipe", "-").exception
    )
    Path("r.toml").write_text("effort = 'fast'\n")
    words = ("quantize", "m.onnx", "--calib", "imgs", "--recipe", "r.toml", "--save-recipe", "r.toml")
    assert "would be written over" in str(run(*words).exception)


def test_other_commands_take_recipes(place: Path) -> None:
    Path("r.toml").write_text("calib = 'imgs'\nweight-bits = 4\nsamples = 4\n")
    found = json.loads(run("study-samples", "m.onnx", "--recipe", "r.toml", "--seeds", "1", "--json").stdout)
    assert found["recipe"]["weight_bits"] == 4
    Path("r.toml").write_text("calib = 'imgs'\neffort = 'fast'\nequalize = false\n")  # as a study does anyway
    done("study-samples", "m.onnx", "--recipe", "r.toml", "--seeds", "1")
    Path("r.toml").write_text("calib = 'imgs'\neffort = 'best'\n")
    assert "which is not for study-samples" in str(run("study-samples", "m.onnx", "--recipe", "r.toml").exception)
    Path("best.toml").write_text("effort = 'best'\n")
    error = run("study-samples", "m.onnx", "--recipe", "best.toml", "--calib", "imgs").exception
    assert "best.toml says 'effort', which is not for study-samples." in str(error)
    Path("bits.toml").write_text("calib = 'imgs'\neffort = 'fast'\n[layer-bits]\n'*' = 4\n")
    found = json.loads(run("diagnose", "m.onnx", "--recipe", "bits.toml", "--json").stdout)
    words = shlex.split(found["recommended"])
    assert ("--layer-bits" in words) == ("--weight-bits" not in words or "bits.toml" in words)
    at = words.index("--layer-bits")
    assert asked("--calib", "imgs", "--layer-bits", words[at + 1]).layer_bits[0][1].weights == 4


def sweep(text: str, *words: str) -> dict[str, Any]:
    Path("sweep.toml").write_text(text)
    result = run("quantize", "m.onnx", *FAST, "--sweep", "sweep.toml", "--json", "-q", *words)
    assert result.exception is None, result.exception
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_a_recipe_of_a_sweep_may_be_a_file(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qconv.analysis.trials.TIMING_ROUNDS", 1)
    Path("there/own.toml").write_text("weight-bits = 4\nedge-bits = 4\n[layer-bits]\n'*' = 6\n")
    Path("all.toml").write_text("calib = 'imgs'\nseed = 3\n")
    text = '[a]\nrecipe = "there/own.toml"\nedge-bits = 8\n[b]\n'
    first, second = sweep(text, "--recipe", "all.toml")["recipes"]
    assert first["options"] == "--recipe there/own.toml --edge-bits 8"
    recipes = [json.loads(run("inspect", row["output"], "--json").stdout)["recipe"] for row in (first, second)]
    assert [row["weight_bits"] for row in recipes] == [4, 8]
    assert [row["edge_bits"] for row in recipes] == [8, 8]
    assert [row["seed"] for row in recipes] == [3, 3]
    assert [len(row["layer_bits"]) for row in recipes] == [1, 0]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('[a]\nrecipe = "own.toml"', "'samples', which cannot differ from recipe to recipe"),
        ('[a]\nrecipe = "sweep.toml"', "sweep.toml says 'a', which is no option"),
        ("[a]\n[a.layer-bits]\nb = 4", "a file of their own"),
        ("[a]\nrecipes = 'x'", "did you mean recipe"),
    ],
)
def test_what_a_recipe_of_a_sweep_cannot_be(place: Path, text: str, says: str) -> None:
    Path("own.toml").write_text("samples = 4\n")
    Path("sweep.toml").write_text(text)
    error = run("quantize", "m.onnx", "--calib", "imgs", "--sweep", "sweep.toml").exception
    assert isinstance(error, QconvError)
    assert says in f"{error.message} {error.hint}"
