"""The Python package: every function gives what its command gives, and samples may be arrays."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import qconv
from qconv.cli.main import cli
from qconv.config.data_options import DataOptions
from qconv.data.dataset import ArraySamples
from tests.support.contract import ROOT
from tests.support.libraries import runner

COUNT = 8
FAST = qconv.Recipe(effort="fast")
COMMANDS = {"finetune", "synthesize"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, and the same samples as files and as arrays."""
    folder = tmp_path_factory.mktemp("api")
    shutil.copy(ROOT / "tests/models/cifar_mobilenet.onnx", folder / "m.onnx")
    (folder / "samples").mkdir()
    for index, sample in enumerate(samples()):
        np.savez(folder / "samples" / f"{index:02}.npz", **sample)
    report = qconv.quantize(folder / "m.onnx", folder / "q.onnx", FAST, folder / "samples")
    assert report.model_bytes is None
    return folder


def samples() -> list[dict[str, NDArray[Any]]]:
    rng = np.random.default_rng(0)
    return [{"input": rng.standard_normal((1, 3, 32, 32)).astype(np.float32)} for _ in range(COUNT)]


def printed(*words: object) -> Any:
    done = runner().invoke(cli, [*map(str, words), "--json", "-q"], standalone_mode=False)
    assert done.exception is None, done.exception
    return json.loads(done.stdout)


def without_times(found: Any) -> Any:
    """What does not differ from run to run."""
    if isinstance(found, dict):
        odd = ("us", "time", "seconds", "peak_rss_mb", "output", "model", "float", "version", "cpu")
        return {key: without_times(value) for key, value in found.items() if key not in odd}
    return [without_times(item) for item in found] if isinstance(found, list) else found


def test_there_is_a_function_for_every_command() -> None:
    commands = {name.replace("-", "_") for name in cli.commands} - {"manual"}
    assert commands <= set(qconv.__all__)
    assert all(callable(getattr(qconv, name)) for name in commands)
    assert set(qconv.__all__) <= set(dir(qconv))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        qconv.nothing  # noqa: B018


def test_importing_the_package_imports_nothing() -> None:
    code = (
        "import sys; before = set(sys.modules); import qconv\n"
        "print(*sorted(name for name in set(sys.modules) - before if name.startswith(('qconv.', 'numpy', 'onnx'))))\n"
        "assert callable(qconv.audit); qconv.quantize; import qconv.analysis.compare; assert callable(qconv.audit)\n"
        "from qconv import audit; assert callable(audit)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == ""


def test_quantize_gives_the_bytes_where_no_file_is_named(place: Path) -> None:
    report = qconv.quantize(place / "m.onnx", recipe=FAST, data=place / "samples")
    assert report.model_bytes == (place / "q.onnx").read_bytes()
    assert "model_bytes" not in report.as_dict()
    assert report.output == "-"


@pytest.mark.parametrize("kind", ["list", "iterator", "batches", "unbatched", "uneven", "spilled", "bytes"])
def test_arrays_are_as_good_as_files(place: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In their order, read once, in memory or not: the bytes of the result are those with a folder of them."""
    given: Any = samples()
    rows = np.concatenate([sample["input"] for sample in given])
    if kind == "iterator":
        given = once(given)
    elif kind == "batches":
        given = [{"input": rows}]
    elif kind == "unbatched":
        given = [{"input": row} for row in rows]
    elif kind == "uneven":
        given = ({"input": part} for part in (rows[:3], rows[3:4], rows[4:]))
    elif kind == "spilled":
        monkeypatch.setattr(ArraySamples.__init__, "__defaults__", (0,))
        given = [{"input": rows[:5]}, {"input": rows[5:]}]
    model: Any = (place / "m.onnx").read_bytes() if kind == "bytes" else place / "m.onnx"
    report = qconv.quantize(model, None, FAST, given)
    assert report.model_bytes is not None
    expected = (place / "q.onnx").read_bytes()
    if kind == "bytes":  # the file tells the name of its float model
        assert len(report.model_bytes) == pytest.approx(len(expected), abs=200)
    else:
        assert carried(report.model_bytes) == carried(expected)


def carried(file: bytes) -> tuple[bytes, dict[str, str]]:
    """Graph and metadata; of the recipe all but how many samples there may be."""
    import onnx

    model = onnx.load_from_string(file)
    told = {entry.key: entry.value for entry in model.metadata_props}
    recipe = json.loads(told["qconv.recipe"])
    del recipe["samples"]
    return model.graph.SerializeToString(deterministic=True), {**told, "qconv.recipe": json.dumps(recipe)}


def once(given: list[dict[str, NDArray[Any]]]) -> Iterator[dict[str, NDArray[Any]]]:
    """One buffer, filled anew for each sample."""
    buffer = {"input": np.empty_like(given[0]["input"])}
    for sample in given:
        buffer["input"][:] = sample["input"]
        yield buffer


def test_temporary_files_go(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    arrays = ArraySamples(samples(), {"input": 4}, limit=0)
    assert list(tmp_path.iterdir())
    arrays.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ([], "No samples were given"),
        ([3], "int is no sample"),
        ([{}], "dict is no sample"),
        ([{"input": "x"}], "which is no number"),
        ([{"other": np.zeros((1, 3, 32, 32), np.float32)}], "lacks input"),
        ([{"input": np.zeros((1, 3, 8), np.float32)}], "for input 'input', which takes"),
        ([{"input": np.zeros((2, 3, 32, 32), np.float32), "more": np.zeros((3, 1))}], "differ in how many samples"),
    ],
)
def test_what_samples_cannot_be(place: Path, given: Any, says: str) -> None:
    with pytest.raises(qconv.QconvError, match=says):
        qconv.quantize(place / "m.onnx", None, FAST, given)


def test_batches_are_split_and_spilled() -> None:
    given = [{"a": np.arange(12).reshape(2, 3, 2), "b": np.array([[1], [2]])}]
    arrays = ArraySamples(given, {"a": 3, "b": 2}, limit=0)
    first, second = (arrays.read(path) for path in sorted(arrays.listing(None, 0).paths))
    assert first["a"].tolist() == [[0, 1], [2, 3], [4, 5]]
    assert second["a"].tolist() == [[6, 7], [8, 9], [10, 11]]
    assert (first["b"].tolist(), second["b"].tolist()) == ([1], [2])
    assert len(arrays.listing(1, 0).paths) == 1
    arrays.close()


def test_looking_commands(place: Path) -> None:
    model, file = place / "m.onnx", place / "q.onnx"
    for own, name in ((model, "m"), (file, "q")):
        assert qconv.inspect(own).as_dict() == printed("inspect", own), name
    assert without_times(qconv.audit(file).as_dict()) == without_times(printed("audit", file))
    found = qconv.benchmark(model, file, rounds=1).as_dict()
    assert set(found) == set(printed("benchmark", model, file, "--rounds", "1"))


def test_commands_that_read_images(place: Path) -> None:
    model, file, folder = place / "m.onnx", place / "q.onnx", place / "samples"
    compared = printed("compare", model, file, "--images", folder)
    assert qconv.compare(model, file, folder).as_dict() == compared
    assert without_times(qconv.compare(model, file, samples()).as_dict()) == without_times(compared)
    evaluated = printed("evaluate", file, "--images", folder, "--against", model)
    assert qconv.evaluate(file, folder, against=model).as_dict() == evaluated
    assert qconv.evaluate(file, samples(), against=model).as_dict() == evaluated


def test_commands_that_quantize(place: Path) -> None:
    model, folder = place / "m.onnx", place / "samples"
    study = printed("study-samples", model, "--calib", folder, "--seeds", "1")
    assert without_times(qconv.study_samples(model, data=folder, seeds=1).as_dict()) == without_times(study)
    with pytest.raises(qconv.QconvError, match="effort best"):
        qconv.study_samples(model, qconv.Recipe(effort="best"), folder)
    diagnosis = printed("diagnose", model, "--calib", folder, "--effort", "fast")
    found = qconv.diagnose(model, FAST, folder).as_dict()
    assert [row["name"] for row in found["ladder"]] == [row["name"] for row in diagnosis["ladder"]]
    assert found["recommended"] == diagnosis["recommended"]
    with pytest.raises(qconv.QconvError, match="without images"):
        qconv.diagnose(model)
    assert qconv.diagnose(model, FAST, iter(samples())).trials


def test_statistics_add_up(place: Path) -> None:
    parts = [place / "a.npz", place / "b.npz"]
    for part, seed in zip(parts, (0, 1), strict=True):
        recipe = qconv.Recipe(effort="fast", save_stats=str(part))
        qconv.quantize(place / "m.onnx", None, recipe, DataOptions((str(place / "samples"),), 4, seed=seed))
    found = qconv.merge_stats(parts, place / "sum.npz").as_dict()
    assert found == printed("merge-stats", *parts, "-o", place / "sum.npz")


def test_training_commands(place: Path) -> None:
    pytest.importorskip("torch", reason="needs the extra: pip install 'qconv[torch]'")
    found = qconv.finetune(place / "q.onnx", samples(), place / "t.onnx", teacher=place / "m.onnx", epochs=1)
    assert (place / "t.onnx").exists()
    assert found.as_dict()["output"] == str(place / "t.onnx")
    options = qconv.PreprocessingOptions("imagenet")
    made = qconv.synthesize(place / "m.onnx", place / "made", count=1, iterations=1, preprocessing=options)
    assert made.as_dict()["pictures"] == 1
