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
    commands = {name.replace("-", "_") for name in cli.load_all()} - {"manual"}
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
        ([None], "NoneType is no sample"),
        (3, "int is neither a path nor a list of samples"),
        ({"input": np.zeros((1, 3, 32, 32), np.float32)}, "dict is neither a path nor a list of samples"),
        (b"samples", "bytes is neither a path"),
        (["samples", 3], "images .* is not possible"),
        ([{"input": np.zeros((1, 3, 32, 32))}, "samples"], "str is no sample"),
        ([{"input": [[1, 2], [3]]}], "'input' holds list, which is no array"),
        ([{}], "dict is no sample"),
        ([{"input": "x"}], "which is no number"),
        ([{"other": np.zeros((1, 3, 32, 32), np.float32)}], "^sample 0 of the given arrays lacks input"),
        ([{"input": np.zeros((1, 3, 8), np.float32)}], "^sample 0 of the given arrays has shape 1x3x8 for input"),
        ([{"input": np.full((1, 3, 32, 32), np.nan, np.float32)}], "^sample 0 of the given arrays holds NaN"),
        ([{"input": np.zeros((2, 3, 32, 32), np.float32), "more": np.zeros((3, 1))}], "differ in how many samples"),
    ],
)
def test_what_samples_cannot_be(place: Path, given: Any, says: str) -> None:
    with pytest.raises(qconv.QconvError, match=says):
        qconv.quantize(place / "m.onnx", None, FAST, given)


def test_any_iterable_of_paths_is_as_good_as_a_list(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[DataOptions] = []

    def evaluate(source: object, request: Any, reporter: object) -> None:
        seen.append(request.data)

    monkeypatch.setattr("qconv.api.analysis_evaluate.evaluate", evaluate)
    parts = [place / name for name in ("b", "a", "c")]
    for given in (parts, tuple(parts), iter(parts), (str(part) for part in parts), dict.fromkeys(parts).keys()):
        qconv.evaluate(place / "q.onnx", given)
    qconv.evaluate(place / "q.onnx", set(parts))
    names = tuple(map(str, parts))
    assert [set(data.paths) for data in seen] == [set(names)] * 6
    assert [data.paths for data in seen[:4]] == [names] * 4
    assert seen[5].paths == tuple(sorted(names))
    assert {data.samples for data in seen} == {None}


MODEL = "tests/models/cifar_mobilenet.onnx"


@pytest.mark.parametrize(
    ("call", "fact", "fix"),
    [
        (lambda: qconv.evaluate(MODEL, None, against=MODEL), "An evaluation without images", "pass a folder"),  # type: ignore[arg-type]
        (lambda: qconv.evaluate(MODEL, DataOptions()), "An evaluation without images", "pass a folder"),
        (lambda: qconv.compare(MODEL, MODEL, DataOptions()), "A comparison without images", "pass a folder"),
        (lambda: qconv.diagnose(MODEL), "A diagnosis without images", "pass a folder"),
        (lambda: qconv.study_samples(MODEL, data=[]), "No samples were given", "iterable of mappings"),
        (lambda: qconv.study_samples(MODEL), "A study without images", "pass a folder"),
        (lambda: qconv.study_samples(MODEL, data="imgs", seeds=0), "--seeds 0", "use 1 or more"),
        (lambda: qconv.study_samples(MODEL, data="imgs", holdout=0), "--holdout 0", "use 1 or more"),
        (lambda: qconv.study_samples(MODEL, qconv.Recipe(effort="fast", stats="s"), "imgs"), "--stats", "leave it out"),
        (lambda: qconv.study_samples(MODEL, qconv.Recipe(effort="fast", equalize=True), "i"), "--equalize", "leave it"),
        (lambda: qconv.diagnose(MODEL, qconv.Recipe(min_sqnr=3), "imgs"), "--min-sqnr", "leave it out"),
        (lambda: qconv.diagnose(MODEL, qconv.Recipe(data_free=True), "imgs"), "--calib none beside", "leave one of"),
        (lambda: qconv.merge_stats([], "x.npz"), "no statistics to add up", "save_stats"),
        (lambda: qconv.merge_stats("none.npz", "x.npz"), "none.npz", ""),
        (lambda: qconv.merge_stats(["none.npz"], "-"), "output '-'", "name a file"),
        (lambda: qconv.quantize(MODEL, "-", FAST, "imgs"), "output '-'", "name a file"),
        (lambda: DataOptions(""), "paths with an empty text", "name folders"),
        (lambda: qconv.diagnose(MODEL, images=""), "images with an empty text", "name folders"),
        (lambda: qconv.evaluate(MODEL, "imgs", classes=""), "--classes ''", "a path"),
        (lambda: qconv.inspect(MODEL, target="foo"), "--target foo", "ort-cpu"),
        (lambda: qconv.quantize(MODEL, "", FAST, "imgs"), "output ''", "name a file"),
        (lambda: qconv.quantize(MODEL, None, "fast", "imgs"), "recipe 'fast'", "Recipe"),  # type: ignore[arg-type]
        (lambda: qconv.quantize(None, None, FAST, "imgs"), "NoneType is no model", "or its bytes"),  # type: ignore[arg-type]
        (lambda: qconv.quantize("", None, FAST, "imgs"), "An empty text is no model", "pass the path"),
        (lambda: qconv.quantize(MODEL, None, FAST, "imgs", print), "reporter", "Reporter"),  # type: ignore[arg-type]
        (lambda: qconv.evaluate(MODEL, "imgs", label_offset="1"), "--label-offset '1'", "whole number"),  # type: ignore[arg-type]
        (lambda: qconv.evaluate(MODEL, "imgs", threads=0), "--threads 0", "use 1 to 1024"),
        (lambda: qconv.evaluate(MODEL, "imgs", classes=3), "--classes 3", "a path"),  # type: ignore[arg-type]
        (lambda: qconv.compare(MODEL, MODEL, "imgs", threads="2"), "--threads '2'", "a whole number"),  # type: ignore[arg-type]
        (lambda: qconv.inspect(MODEL, 3), "--target 3", "a text"),  # type: ignore[arg-type]
        (lambda: qconv.audit(MODEL, batch=0), "--batch 0", "use 1 or more"),
        (lambda: qconv.audit(MODEL, batch=-1), "--batch -1", "use 1 or more"),
        (lambda: qconv.audit(MODEL, batch=10**9), "batches of|not fit into memory", ""),
        (lambda: qconv.audit(MODEL, size=32), "--size 32", "a whole number, a whole number"),  # type: ignore[arg-type]
        (lambda: qconv.audit(MODEL, size=(0, 8)), "--size 0x8", "at least 1x1"),
        (lambda: qconv.audit(MODEL, threads=-5), "--threads -5", "use 1 to 1024"),
        (lambda: qconv.audit(MODEL, threads=10**9), "--threads 1000000000", "use 1 to 1024"),
        (lambda: qconv.audit(MODEL, threads=None), "--threads None", "a whole number"),  # type: ignore[arg-type]
        (lambda: qconv.benchmark(), "no model to time", "pass one"),
        (lambda: qconv.benchmark([MODEL]), "list is no model", "or its bytes"),  # type: ignore[arg-type]
        (lambda: qconv.benchmark(MODEL, rounds=0), "--rounds 0", "use 1 or more"),
        (lambda: qconv.benchmark(MODEL, rounds=-1), "--rounds -1", "use 1 or more"),
        (lambda: qconv.benchmark(MODEL, threads=-3), "--threads -3", "use 1 to 1024"),
        (lambda: qconv.benchmark(MODEL, batch=0), "--batch 0", "use 1 or more"),
        (lambda: qconv.benchmark(b"no model"), "^the given model ", ""),
    ],
)
def test_what_cannot_be_is_refused_in_words(call: Any, fact: str, fix: str) -> None:
    with pytest.raises(qconv.QconvError, match=fact) as caught:
        call()
    assert fix in caught.value.hint
    assert len(caught.value.message) < 300


@pytest.mark.parametrize(
    ("kind", "wrong", "fact"),
    [
        ("finetune", {"batch": 0}, "--batch 0"),
        ("finetune", {"epochs": 0}, "--epochs 0"),
        ("finetune", {"holdout": 0}, "--holdout 0"),
        ("finetune", {"device": "tpu"}, "--device tpu"),
        ("finetune", {"learning_rate": float("nan")}, "--learning-rate nan"),
        ("finetune", {"learning_rate": -1.0}, "--learning-rate -1.0"),
        ("finetune", {"learning_rate": 101}, "--learning-rate 101"),
        ("finetune", {"learning_rate": "1"}, "--learning-rate '1'"),
        ("finetune", {"augment": "no"}, "--augment 'no'"),
        ("finetune", {"min_agreement": 2}, "--min-agreement 2"),
        ("finetune", {"classes": "c.txt"}, "--classes or --label-offset without --labels"),
        ("finetune", {"label_offset": 1}, "--classes or --label-offset without --labels"),
        ("finetune", {"images": DataOptions("imgs", batch=8)}, r"DataOptions\(batch=8\)"),
        ("finetune", {"images": DataOptions()}, "Training without images"),
        ("finetune", {"output": "-"}, "output '-'"),
        ("finetune", {"quant": b"bytes"}, "model b'bytes'"),
        ("synthesize", {"count": 0}, "--count 0"),
        ("synthesize", {"count": -1}, "--count -1"),
        ("synthesize", {"seed": -1}, "--seed -1"),
        ("synthesize", {"device": "xx"}, "--device xx"),
        ("synthesize", {"iterations": -1}, "--iterations -1"),
        ("synthesize", {"batch": 0}, "--batch 0"),
        ("synthesize", {"task": "find"}, "--task find"),
        ("synthesize", {"threads": 0}, "--threads 0"),
        ("synthesize", {"preprocessing": "imagenet"}, "preprocessing 'imagenet'"),
        ("synthesize", {"output": "-"}, "output '-'"),
    ],
)
def test_training_that_cannot_be_is_refused_in_words(kind: str, wrong: dict[str, Any], fact: str) -> None:
    pytest.importorskip("torch", reason="needs the extra: pip install 'qconv[torch]'")
    usual = {"finetune": {"quant": "q.onnx", "images": "imgs", "output": "t.onnx"}}
    given = usual.get(kind, {"model": "m.onnx", "output": "made"})
    with pytest.raises(qconv.QconvError, match=fact) as caught:
        getattr(qconv, kind)(**{**given, **wrong})
    assert caught.value.hint


def test_models_of_a_benchmark_may_be_bytes(place: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """They lie in a temporary file while it lasts, and have a name."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    model = (place / "m.onnx").read_bytes()
    found = qconv.benchmark(model, place / "q.onnx", rounds=np.int64(1), threads=1).as_dict()
    assert [row["path"] for row in found["models"]] == ["the given model", str(place / "q.onnx")]
    assert not list(tmp_path.iterdir())
    with pytest.raises(qconv.QconvError, match=r"^the given model does not fit"):
        qconv.benchmark(model, batch=10**9)


def test_a_single_path_is_as_good_as_a_list_of_one(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, ...]] = []

    class Seen(Exception):
        """Ends a call before its work."""

    def look(case: Any, reporter: object) -> None:
        seen.append(case.images)
        raise Seen

    monkeypatch.setattr("qconv.api.analysis_diagnose.diagnose", look)
    for images in ("imgs", Path("imgs"), ["imgs"], iter([Path("imgs")])):
        with pytest.raises(Seen):
            qconv.diagnose(place / "m.onnx", FAST, place / "samples", images=images)
    assert seen == [("imgs",)] * 4


def test_each_call_tells_its_warnings(place: Path) -> None:
    reporter, heard = qconv.Reporter(), []
    recipe = qconv.Recipe(effort="fast", keep_float="nothing-of-that-name")  # type: ignore[arg-type]
    for _ in range(2):
        before = len(reporter.warnings)
        report = qconv.quantize(place / "m.onnx", None, recipe, samples()[:2], reporter)
        heard.append(reporter.warnings[before:])
        assert heard[-1] == report.warnings
    assert heard[0] == heard[1] != []


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


def test_numbers_of_numpy_and_views_of_dictionaries_keep_their_order() -> None:
    given = qconv.PreprocessingOptions(mean=dict.fromkeys((0.9, 0.1, 0.5)).keys(), std=np.array(0.5))  # type: ignore[arg-type]
    assert (given.mean, given.std) == ((0.9, 0.1, 0.5), (0.5,))


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


def test_labels_are_refused_where_nothing_is_measured_by_them(place: Path) -> None:
    """A comparison, a study and training would take them without a word."""
    data = DataOptions((str(place / "samples"),), classes=place / "m.onnx")
    for run in (
        lambda: qconv.compare(place / "m.onnx", place / "q.onnx", data),
        lambda: qconv.study_samples(place / "m.onnx", None, data),
    ):
        with pytest.raises(qconv.QconvError, match="with --classes is not possible"):
            run()
    with pytest.raises(qconv.QconvError, match="--label-map without --labels"):
        DataOptions(("x",), label_map=place)
