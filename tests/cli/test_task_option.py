"""`--task` on the command line, in recipes and in what is recorded of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from click.testing import CliRunner

from qconv.cli.main import cli
from qconv.cli.options import preprocessing_options
from qconv.config.tasks import Tasks
from qconv.errors import QconvError
from tests.support.models import network

BOTH = ("--task", "a=embed", "--task", "b=keypoints")


@pytest.mark.parametrize(
    ("words", "task"),
    [
        ((), "auto"),
        (("--task", "embed"), "embed"),
        (BOTH, "a=embed,b=keypoints"),
        (("--task", "a=embed,b=keypoints"), "a=embed,b=keypoints"),
        (("--task", "segment", "--task", "b=regress"), "segment,b=regress"),
    ],
)
def test_repeated_tasks_are_joined(words: tuple[str, ...], task: str) -> None:
    seen: dict[str, Any] = {}

    @click.command()
    @preprocessing_options
    def command(**options: Any) -> None:
        seen.update(options)

    assert CliRunner().invoke(command, words).exit_code == 0
    assert seen["task"] == task


@pytest.mark.parametrize("words", [("--task", "find"), ("--task", "a=find"), ("--task", "=embed"), ("--task", "")])
def test_what_is_no_task_is_a_usage_error(words: tuple[str, ...]) -> None:
    found = CliRunner().invoke(cli, ["evaluate", "m.onnx", "--images", "imgs", *words])
    assert found.exit_code == 2
    assert "Invalid value for '--task'" in found.output
    assert "keypoints, or OUTPUT=TASK" in found.output


@pytest.mark.parametrize(
    ("words", "of"),
    [(("--task", "detect", "--task", "classify"), "all outputs"), (("--task", "a=embed,b=segment,a=classify"), "a")],
)
def test_two_tasks_for_one_output_are_a_usage_error(words: tuple[str, ...], of: str) -> None:
    """The first, or the last, would be ignored."""
    found = CliRunner().invoke(cli, ["evaluate", "m.onnx", "--images", "imgs", *words])
    assert found.exit_code == 2
    assert f"with two tasks for {of} is not possible" in " ".join(found.output.split())


def test_a_decoder_makes_a_detector() -> None:
    """With another task for all outputs one of both would be ignored; single outputs may have others."""
    with pytest.raises(QconvError, match="--decode with --task regress is not possible"):
        Tasks("regress", "d.py:read")
    for task in ("auto", "detect", "a=embed"):
        assert Tasks(task, "d.py:read").decode == "d.py:read"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model of two outputs, and samples."""
    body = "p = GlobalAveragePool(x) f = Flatten(p) a = Gemm(f, w) b = Gemm(f, v)"
    proto = network(body, x=(1, 3, 8, 8), outputs=("a", "b"), w=(3, 6), v=(3, 8))
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    (tmp_path / "imgs").mkdir()
    rng = np.random.default_rng(0)
    for index in range(4):
        np.save(tmp_path / "imgs" / f"{index}.npy", rng.normal(size=(3, 8, 8)).astype(np.float32))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def kinds_of(*words: str) -> dict[str, str]:
    """What a run of quantize says that outputs are."""
    base = ["quantize", "m.onnx", "--calib", "imgs", "--effort", "fast", "--threads", "1", "--json", "--quiet"]
    found = CliRunner().invoke(cli, [*base, *words])
    assert found.exit_code == 0, found.output
    report = json.loads(found.output)
    return {output["name"]: output["kind"] for output in report["outputs"]}


def test_tasks_of_single_outputs_hold_from_the_option_to_the_recipe(place: Path) -> None:
    """Typed, saved, read again, carried by the file, and as a list in a recipe."""
    wanted = {"a": "embedding", "b": "keypoints"}
    assert kinds_of() == {"a": "class-scores", "b": "class-scores"}
    assert kinds_of(*BOTH, "--save-recipe", "r.toml") == wanted
    assert 'task = "a=embed,b=keypoints"' in (place / "r.toml").read_text()
    assert kinds_of("--recipe", "r.toml") == wanted
    assert kinds_of("--recipe", "m.w8a8.onnx") == wanted
    (place / "list.toml").write_text('task = ["a=embed", "b=keypoints"]\n')
    assert kinds_of("--recipe", "list.toml") == wanted
    found = CliRunner().invoke(cli, ["evaluate", "m.w8a8.onnx", "--against", "m.onnx", "--images", "imgs", "--json"])
    outputs = json.loads(found.stdout)["against"]["outputs"]
    assert [output["kind"] for output in outputs] == list(wanted.values())
    assert {"nearest", "picture_cosine"} <= outputs[0].keys()
    assert {"pck", "keypoint_distance"} <= outputs[1].keys()


def test_an_output_that_the_model_does_not_have(place: Path) -> None:
    with pytest.raises(QconvError, match="has no output 'c', but a, b"):
        cli.main(["quantize", "m.onnx", "--calib", "imgs", "--task", "c=embed"], standalone_mode=False)


def test_the_summary_tells_what_a_task_is_judged_by_first(place: Path) -> None:
    base = ["quantize", "m.onnx", "--calib", "imgs", "--effort", "fast", "--threads", "1"]
    found = CliRunner().invoke(cli, [*base, *BOTH])
    (line,) = [line for line in found.stdout.splitlines() if line.startswith("accuracy")]
    parts = ("embeddings at cosine", "nearest to their own", "of keypoints within 5%", "off by", "SQNR")
    places = [line.find(part) for part in parts]
    assert places[0] > -1
    assert places == sorted(places)
