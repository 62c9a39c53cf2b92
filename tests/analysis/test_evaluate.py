"""Labelled pictures: scores against ONNX Runtime and numpy used by hand, labels from every kind of folder."""

from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from PIL import Image

from qconv.analysis.compare import compare_on_images
from qconv.analysis.evaluate import evaluate
from qconv.analysis.evaluation import Evaluation, EvaluationOptions
from qconv.config.data_options import DataOptions, Layout, PreprocessingOptions, ResizeFilter
from qconv.config.recipe import Recipe
from qconv.data.dataset import class_folders_of, find_classes
from qconv.errors import QconvError
from qconv.ir.files import Source
from qconv.pipeline.quantize import quantize
from qconv.report.text import format_evaluation
from qconv.reporter import Reporter
from qconv.results.scores import COSINE, value_of
from tests.support.models import network

NAMES = ("ant", "bee", "cat", "dog", "elk", "fox", "gnu", "hen")
BODY = "c = Conv(x, w)  r = Relu(c)  p = GlobalAveragePool(r)  f = Flatten(p)  y = Gemm(f, g)"
WEIGHTS = {"w": (16, 3, 3, 3), "g": (16, 8)}
MAP = "c = Conv<pads=[1,1,1,1]>(x, w)  r = Relu(c)  y = Conv(r, v)"


def picture(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    level = np.random.default_rng(seed).integers(0, 200, (1, 1, 3))
    noise = np.random.default_rng(seed).integers(0, 56, (8, 8, 3))
    Image.fromarray((level + noise).astype(np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five pictures for each of eight classes."""
    root = tmp_path / "imgs"
    for index, name in enumerate(NAMES):
        for number in range(5):
            picture(root / name / f"{number}.png", 10 * index + number)
    return root


def saved(proto: onnx.ModelProto, place: Path, name: str = "model.onnx") -> Source:
    path = place / name
    path.write_bytes(proto.SerializeToString())
    return Source(str(path), path)


def classifier(**instead: NDArray) -> onnx.ModelProto:
    return network(BODY, ("N", 3, 8, 8), **{**WEIGHTS, **instead})


def scored(
    source: Source,
    images: Path,
    against: Source | None = None,
    classes: Path | None = None,
    offset: int = 0,
    table: str | None = None,
    **more: object,
) -> Evaluation:
    options = {"preprocessing": PreprocessingOptions("unit"), "samples": None} | more
    data = DataOptions((str(images),), **options)  # type: ignore[arg-type]
    return evaluate(source, EvaluationOptions(data, against, classes, offset, table, threads=1))


def by_hand(source: Source, root: Path) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Scores and labels of all pictures in the order of their paths; pixels over 255, nothing else."""
    paths = sorted(root.rglob("*.png"), key=Path.as_posix)
    session = ort.InferenceSession(str(source.path), providers=["CPUExecutionProvider"])
    rows = []
    for path in paths:
        x = np.asarray(Image.open(path)).transpose(2, 0, 1)[None].astype(np.float32) / np.float32(255)
        rows.append(session.run(None, {"x": x})[0][0])
    return np.stack(rows), np.array([NAMES.index(path.parent.name) for path in paths])


def test_top1_and_top5(folder: Path, tmp_path: Path) -> None:
    source = saved(classifier(), tmp_path)
    found = scored(source, folder)
    scores, labels = by_hand(source, folder)
    order = np.argsort(-scores, axis=1)
    assert found.top1 is not None
    assert found.top5 is not None
    assert found.top1.value == pytest.approx(np.mean(order[:, 0] == labels))
    assert found.top5.value == pytest.approx(np.mean((order[:, :5] == labels[:, None]).any(axis=1)))
    assert 0 < found.top1.value < found.top5.value < 1
    assert found.images == 40


def test_against_another_model(folder: Path, tmp_path: Path) -> None:
    one = saved(classifier(), tmp_path)
    rng = np.random.default_rng(5)
    other = saved(classifier(g=rng.standard_normal((16, 8)).astype(np.float32)), tmp_path, "other.onnx")
    found = scored(other, folder, against=one)
    (mine, labels), (its, _) = by_hand(other, folder), by_hand(one, folder)
    right, wrong = mine.argmax(1) == labels, its.argmax(1) == labels
    assert found.flips is not None
    assert (found.flips.won, found.flips.lost) == (np.sum(right & ~wrong), np.sum(wrong & ~right))
    (output,) = found.outputs
    wide = its.astype(np.float64)
    assert output.sqnr_db == pytest.approx(10 * np.log10(np.sum(wide**2) / np.sum((wide - mine) ** 2)), abs=1e-4)
    cosine = np.sum(wide * mine) / np.linalg.norm(wide) / np.linalg.norm(mine)
    assert value_of(output.scores, COSINE) == pytest.approx(cosine, abs=1e-6)
    assert output.agreement is not None
    assert output.agreement == np.mean(mine.argmax(1) == its.argmax(1))
    told = found.as_dict()
    assert set(told) >= {"model", "images", "top1", "top5", "against", "intervals"}
    assert set(told["against"]) >= {"model", "top1", "top5", "agreement", "sqnr_db", "flips"}
    low, high = told["intervals"]["sqnr_db"]
    assert low < told["against"]["sqnr_db"] < high
    said = its.argmax(1)
    by_class = np.mean([np.mean(mine.argmax(1)[said == c] == c) for c in np.unique(said)])
    assert told["against"]["class_agreement"] == pytest.approx(by_class)
    assert {row["measure"]: row["value"] for row in found.rows()}["class_agreement"] == pytest.approx(by_class)
    assert f"{100 * by_class:.2f}" in format_evaluation(found, verbose=False)


def test_a_model_equals_itself(folder: Path, tmp_path: Path) -> None:
    source = saved(classifier(), tmp_path)
    found = scored(source, folder, against=source)
    assert found.flips is not None
    assert (found.flips.won, found.flips.lost, found.flips.p_value) == (0, 0, 1.0)
    assert found.outputs[0].sqnr_db is None


@pytest.mark.parametrize("batch", [1, 3, 7])
def test_batches_change_nothing(folder: Path, tmp_path: Path, batch: int) -> None:
    """A last short one included."""
    source = saved(classifier(), tmp_path)
    alone, together = scored(source, folder), scored(source, folder, batch=batch)
    assert alone.top1 == together.top1


def test_a_model_with_a_batch_of_its_own_sees_every_picture_once(folder: Path, tmp_path: Path) -> None:
    whole = saved(classifier(), tmp_path)
    fixed = saved(network(BODY, (7, 3, 8, 8), **WEIGHTS), tmp_path, "fixed.onnx")
    assert scored(fixed, folder).top1 == scored(whole, folder).top1


def test_a_quantized_file_is_fed_as_its_metadata_says(folder: Path, tmp_path: Path) -> None:
    """No option is given; the float model is fed alike, whether or not the file takes pixels."""
    source = saved(classifier(), tmp_path)
    for layout in (None, Layout.NHWC):
        out = tmp_path / f"quantized{layout}.onnx"
        recipe, data = (
            Recipe(embed_preprocessing=layout, keep_float=("y",)),
            DataOptions((str(folder),), preprocessing=PreprocessingOptions("caffe")),
        )
        quantize(source, out, recipe, data)
        found = scored(Source(str(out), out), folder, against=source, preprocessing=PreprocessingOptions())
        assert found.outputs[0].sqnr_db is not None
        assert found.outputs[0].sqnr_db > 30
        assert "metadata" in found.words
        bicubic = PreprocessingOptions(filter=ResizeFilter.BICUBIC)
        words = scored(Source(str(out), out), folder, against=source, preprocessing=bicubic).words
        assert words.endswith(", bicubic filter; the file's metadata, with --filter")


def test_a_quantized_file_holds_what_it_was_made_for(folder: Path, tmp_path: Path) -> None:
    """For the float model beside it, too, and for comparisons; the option wins, and what cannot be is ignored."""
    source, out = saved(classifier(), tmp_path), tmp_path / "landmarks.onnx"
    data = DataOptions((str(folder),), preprocessing=PreprocessingOptions("unit"), task="regress")
    quantize(source, out, Recipe(effort="fast"), data)
    made = Source(str(out), out)
    assert scored(made, folder, against=source).outputs[0].kind == "regression"
    assert scored(source, folder, against=made).outputs[0].kind == "regression"
    assert scored(made, folder, against=source, task="classify").outputs[0].kind == "class-scores"
    read = compare_on_images(source, made, DataOptions((str(folder),)), Reporter()).compared
    assert [output.kind for output in read.outputs] == ["regression"]
    odd = onnx.load(out)
    for entry in odd.metadata_props:
        entry.value = entry.value.replace('"task": "regress"', '"task": "segment"')
    assert "segment" in str(odd.metadata_props)
    assert scored(saved(odd, tmp_path, "odd.onnx"), folder, against=source).outputs[0].kind == "class-scores"


def test_maps_have_no_labels_but_agree(folder: Path, tmp_path: Path) -> None:
    source = saved(network(MAP, ("N", 3, 8, 8), w=(4, 3, 3, 3), v=(5, 4, 1, 1)), tmp_path)
    found = scored(source, folder, against=source)
    assert found.top1 is None
    assert found.outputs[0].agreement is not None
    assert found.outputs[0].agreement == 1
    with pytest.raises(QconvError, match="nothing to measure"):
        scored(source, folder)
    with pytest.raises(QconvError, match="labels say nothing"):
        scored(source, folder, against=source, offset=1)


def test_a_broken_picture_moves_no_label(folder: Path, tmp_path: Path) -> None:
    source = saved(classifier(), tmp_path)
    (folder / "cat" / "0.png").write_bytes(b"no picture")
    found = scored(source, folder)
    (folder / "cat" / "0.png").unlink()
    assert found.images == 39
    assert found.top1 == scored(source, folder).top1


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_scores_that_are_no_numbers_are_an_error(folder: Path, tmp_path: Path, bad: float) -> None:
    weights = np.ones((16, 8), np.float32)
    weights[0, 0] = bad
    with pytest.raises(QconvError, match="holds NaN or infinity"):
        scored(saved(classifier(g=weights), tmp_path), folder)


def test_numbers_that_are_none_count_as_noise_without_bound(folder: Path, tmp_path: Path) -> None:
    """In a map of the model's own; where the other model has none itself, there is nothing to be near to."""
    kernel = np.random.default_rng(0).standard_normal((5, 4, 1, 1)).astype(np.float32)
    broken = kernel.copy()
    broken[0] = np.nan
    sources = [
        saved(network(MAP, ("N", 3, 8, 8), w=(4, 3, 3, 3), v=v), tmp_path, f"{i}.onnx")
        for i, v in enumerate((kernel, broken))
    ]
    found = scored(sources[1], folder, against=sources[0])
    assert found.outputs[0].sqnr_db is not None
    assert found.outputs[0].sqnr_db < -1000
    assert scored(sources[0], folder, against=sources[1]).outputs[0].sqnr_db is None
    assert json.loads(json.dumps(found.as_dict(), allow_nan=False))


def test_pixels_are_not_normalised_twice(folder: Path, tmp_path: Path) -> None:
    """Options are for the float model where the file does it itself; what takes bytes gets no other numbers."""
    source, out = saved(classifier(), tmp_path), tmp_path / "pixels.onnx"
    caffe = PreprocessingOptions("caffe")
    quantize(source, out, Recipe(embed_preprocessing=Layout.NHWC), DataOptions((str(folder),), preprocessing=caffe))
    found = scored(Source(str(out), out), folder, against=source, preprocessing=caffe)
    assert found.outputs[0].sqnr_db is not None
    assert found.outputs[0].sqnr_db > 25
    found = scored(saved(bytes_in(), tmp_path, "bytes.onnx"), folder, preprocessing=caffe)
    assert "raw" in found.words or "as they are" in found.words or "pixel" in found.words


def bytes_in() -> onnx.ModelProto:
    body = """n = Cast<to=1>(x)  c = Conv(n, w)  r = Relu(c)  p = GlobalAveragePool(r)
              f = Flatten(p)  y = Gemm(f, g)"""
    proto = network(body, ("N", 3, 8, 8), **WEIGHTS)
    proto.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.UINT8
    return proto


def test_what_cannot_be_is_said_before_the_pictures_are_run(folder: Path, tmp_path: Path) -> None:
    source, done = saved(classifier(), tmp_path), []
    listing = tmp_path / "few.txt"
    listing.write_text("ant\n")
    request = EvaluationOptions(
        DataOptions((str(folder),), preprocessing=PreprocessingOptions("unit")), classes=listing
    )
    with pytest.raises(QconvError, match="is not in"):
        evaluate(source, request, Reporter(on_progress=lambda stage, count, total: done.append(count)))
    assert done == []
    loose = tmp_path / "loose"
    picture(loose / "0.png", 1)
    with pytest.raises(QconvError, match="nothing to measure"):
        evaluate(
            source,
            EvaluationOptions(DataOptions((str(loose),), preprocessing=PreprocessingOptions("unit"))),
            Reporter(on_progress=lambda stage, count, total: done.append(count)),
        )
    assert done == []


def test_a_list_of_paths_needs_the_order_of_classes(folder: Path, tmp_path: Path) -> None:
    source, listing, classes = saved(classifier(), tmp_path), tmp_path / "list.txt", tmp_path / "classes.txt"
    listing.write_text("\n".join(map(str, sorted(folder.rglob("*.png")))))
    classes.write_text("\ufeff" + "\n".join(NAMES), encoding="utf-8")
    with pytest.raises(QconvError, match="not the order of their class folders") as caught:
        scored(source, listing)
    assert "--classes" in caught.value.hint
    assert scored(source, listing, classes=classes).top1 == scored(source, folder).top1


def test_samples_need_no_word_about_preprocessing(folder: Path, tmp_path: Path) -> None:
    source, out, heard = saved(classifier(), tmp_path), tmp_path / "q.onnx", []
    quantize(source, out, Recipe(), DataOptions((str(folder),), preprocessing=PreprocessingOptions("unit")))
    samples = tmp_path / "samples"
    samples.mkdir()
    for number in range(3):
        np.save(samples / f"{number}.npy", np.random.default_rng(number).random((3, 8, 8), np.float32))
    request = EvaluationOptions(DataOptions((str(samples),)), against=source, threads=1)
    found = evaluate(Source(str(out), out), request, Reporter(heard.append))
    assert (found.images, heard) == (3, [])


# -- labels ------------------------------------------------------------------------------------------------------------


def test_a_list_of_classes_gives_the_order(folder: Path, tmp_path: Path) -> None:
    source = saved(classifier(), tmp_path)
    scores, labels = by_hand(source, folder)
    order = NAMES[::-1]
    expected = np.mean(scores.argmax(1) == len(NAMES) - 1 - labels)
    listing = tmp_path / "list.txt"
    listing.write_text("".join(f"{name} the animal called {name}\n" for name in order))
    found = scored(source, folder, classes=listing)
    (folder / "classes.txt").write_text("\n".join(order))
    for top1 in (found.top1, scored(source, folder).top1):
        assert top1 is not None
        assert top1.value == expected


def test_an_offset_shifts_the_labels(folder: Path, tmp_path: Path) -> None:
    """An output more, for `background`, in front of the others."""
    weights = np.random.default_rng(0).standard_normal((16, 8)).astype(np.float32)
    plain = saved(classifier(g=weights), tmp_path)
    wide = saved(classifier(g=np.concatenate([np.full((16, 1), -9, np.float32), weights], axis=1)), tmp_path, "w.onnx")
    assert scored(wide, folder, offset=1).top1 == scored(plain, folder).top1
    with pytest.raises(QconvError, match="8 class folders do not fit 9 outputs"):
        scored(wide, folder)


def test_numbers_as_names_are_labels(tmp_path: Path) -> None:
    root = tmp_path / "imgs"
    for name in ("0", "2", "10"):
        (root / name).mkdir(parents=True)
    classes = find_classes(DataOptions(str(root)), None)
    assert classes is not None
    assert classes.labels(["10", "2", "0"], offset=0, outputs=11) == [10, 2, 0]
    with pytest.raises(QconvError, match="label 10, but the model has 10 outputs"):
        classes.labels(["10"], offset=0, outputs=10)


def split(folder: Path, place: Path) -> list[Path]:
    """The pictures in two folders with class folders of the same names; the second lacks the last class."""
    parts = [place / "one", place / "two"]
    for index, path in enumerate(sorted(folder.rglob("*.png"))):
        part = parts[index % 2 if path.parent.name != NAMES[-1] else 0]
        (part / path.parent.name / "deep").mkdir(parents=True, exist_ok=True)
        shutil.copy(path, part / path.parent.name / "deep")
    return parts


def scored_in(source: Source, *images: Path, classes: Path | None = None) -> Evaluation:
    data = DataOptions(tuple(map(str, images)), samples=None, preprocessing=PreprocessingOptions("unit"))
    return evaluate(source, EvaluationOptions(data, classes=classes, threads=1))


@pytest.mark.parametrize("order", [1, -1])
def test_class_folders_are_found_below_the_path_that_a_picture_came_from(
    folder: Path, tmp_path: Path, order: int
) -> None:
    source, parts = saved(classifier(), tmp_path), split(folder, tmp_path)[::order]
    assert scored_in(source, *parts).top1 == scored(source, folder).top1
    listing = parts[0] / "classes.txt"
    listing.write_text("\n".join(NAMES))
    assert scored_in(source, *parts).labels == str(listing)
    shutil.copy(listing, parts[1])
    assert scored_in(source, *parts).top1 == scored(source, folder).top1
    (parts[1] / "classes.txt").write_text("\n".join(NAMES[::-1]))
    with pytest.raises(QconvError, match="list different classes"):
        scored_in(source, *parts)
    assert scored_in(source, *parts, classes=listing).top1 == scored(source, folder).top1


def test_a_class_that_paths_leave_open_is_refused(folder: Path, tmp_path: Path) -> None:
    source, loose = saved(classifier(), tmp_path), tmp_path / "loose"
    picture(loose / "0.png", 1)
    with pytest.raises(QconvError, match=r"0\.png lies in no class folder, others do"):
        scored_in(source, loose, folder)
    picture(folder / "ant" / "deep" / "9.png", 1)
    with pytest.raises(QconvError, match="lies in the class folders ant and deep, as given paths lie in each other"):
        scored_in(source, folder, folder / "ant")


def test_folders_above_and_beside_the_working_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    given = [Path("../imgs/ant/0.png"), Path("bee/0.png")]
    assert class_folders_of(given, DataOptions((".", "../imgs"))) == ["ant", "bee"]
    assert class_folders_of(given, DataOptions(tuple(map(str, given)))) == ["ant", "bee"]
    assert class_folders_of(given[1:], DataOptions("bee")) == [None]


@pytest.mark.parametrize(
    ("text", "fact"),
    [
        ("", "is empty"),
        ("ant\n\nbee\n", "empty line 2"),
        ("ant\nant\n", "lists ant twice"),
        ("ant\nbee\n", "cat is not in"),
        ("\n".join((*NAMES, "owl")), "list.txt lists 9 classes, but the model has 8"),
    ],
)
def test_a_list_that_is_none(folder: Path, tmp_path: Path, text: str, fact: str) -> None:
    listing = tmp_path / "list.txt"
    listing.write_text(text)
    with pytest.raises(QconvError, match=fact):
        scored(saved(classifier(), tmp_path), folder, classes=listing)


def test_pictures_beside_class_folders(folder: Path, tmp_path: Path) -> None:
    picture(folder / "loose.png", 1)
    with pytest.raises(QconvError, match=r"loose\.png lies in no class folder"):
        scored(saved(classifier(), tmp_path), folder)


def test_models_with_other_outputs_are_not_compared(folder: Path, tmp_path: Path) -> None:
    one = saved(classifier(), tmp_path)
    other = saved(network(BODY.replace("y =", "z ="), ("N", 3, 8, 8), outputs=("z",), **WEIGHTS), tmp_path, "o.onnx")
    with pytest.raises(QconvError, match="has no output 'z', but y"):
        scored(other, folder, against=one)


# -- predictions -------------------------------------------------------------------------------------------------------


def test_predictions_as_a_table(folder: Path, tmp_path: Path) -> None:
    source = saved(classifier(), tmp_path)
    found = scored(source, folder, against=source)
    scores, labels = by_hand(source, folder)
    assert found.predictions is not None
    rows = list(csv.DictReader(io.StringIO(found.predictions.as_csv().decode())))
    assert [int(row["top1"]) for row in rows] == scores.argmax(1).tolist()
    assert [int(row["label"]) for row in rows] == labels.tolist()
    assert [row["label_name"] for row in rows] == [NAMES[label] for label in labels]
    assert [float(row["score1"]) for row in rows] == pytest.approx(scores.max(1).tolist())
    assert [row["correct"] == "1" for row in rows] == (scores.argmax(1) == labels).tolist()
    assert all(row["against_top1"] == row["top1"] for row in rows)


def test_predictions_as_arrays(folder: Path, tmp_path: Path) -> None:
    source = saved(classifier(), tmp_path)
    found = scored(source, folder, table=".npz")
    scores, labels = by_hand(source, folder)
    assert found.predictions is not None
    arrays = np.load(io.BytesIO(found.predictions.as_npz()))
    np.testing.assert_allclose(arrays["y"], scores, rtol=1e-4, atol=1e-5)
    assert arrays["labels"].tolist() == labels.tolist()
    assert arrays["paths"].tolist() == sorted(path.as_posix() for path in folder.rglob("*.png"))


@pytest.mark.parametrize("name", ["file", "allow_pickle", "paths", "args"])
def test_outputs_of_any_name_are_saved(folder: Path, tmp_path: Path, name: str) -> None:
    body = BODY.replace("y = Gemm", f"{name} = Gemm") + f"  s = ReduceSum<keepdims=0>({name})"
    source = saved(network(body, (1, 3, 8, 8), outputs=(name, "s"), **WEIGHTS), tmp_path)
    found = scored(source, folder, against=source, table=".npz")
    assert found.predictions is not None
    arrays = np.load(io.BytesIO(found.predictions.as_npz()))
    scores = arrays[f"{name}_output" if name == "paths" else name]
    np.testing.assert_allclose(arrays["s"], scores.sum(axis=1), rtol=1e-3, atol=1e-4)
