"""A network prepared for every command alike. Oracles: what `quantize` reports, and ONNX Runtime."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from PIL import Image

from qconv.analysis.sample_study import StudyRequest, study_samples
from qconv.config.data_options import DataOptions, Layout, PreprocessingOptions
from qconv.config.recipe import Recipe
from qconv.errors import QconvError
from qconv.ir.files import Source
from qconv.pipeline.prepare import Stopwatch, load_float, prepare
from qconv.pipeline.quantize import quantize
from qconv.planning import planner
from qconv.reporter import Reporter
from qconv.results.scores import SQNR
from tests.support.models import network

BODY = "c = Conv(x, w)  n = BatchNormalization(c, s, b, m, v)  r = Relu(n)  f = Flatten(r)  y = Gemm(f, g)"
SIDE = 6


@pytest.fixture
def source(tmp_path: Path) -> Source:
    rng = np.random.default_rng(3)
    stored = {"s": np.ones(4), "b": np.zeros(4), "m": rng.normal(size=4), "v": np.ones(4)}
    stored = {name: array.astype(np.float32) for name, array in stored.items()}
    proto = network(BODY, ("N", 3, SIDE, SIDE), w=(4, 3, 3, 3), g=(4 * 16, 5), **stored)
    path = tmp_path / "model.onnx"
    onnx.save(proto, path)
    return Source(str(path), path)


@pytest.fixture
def images(tmp_path: Path) -> DataOptions:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(10):
        pixels = np.random.default_rng(number).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return DataOptions((str(folder),), preprocessing=PreprocessingOptions(preset="unit"))


def test_the_plan_is_the_one_that_quantize_carries_out(source: Source, images: DataOptions) -> None:
    recipe, clock = Recipe(effort="fast", threads=1), Stopwatch()
    found = prepare(source, recipe, images, Reporter(), clock=clock)
    report, _ = quantize(source, None, recipe, images)
    planned = {value.name for value in found.plan.activations}
    assert planned == {row.name for row in report.tensors if row.kind == "activation"}
    assert [node.op_type for node in found.model.nodes()].count("BatchNormalization") == 0
    assert found.data.model_preprocessing is not None
    assert report.preprocessing == found.data.model_preprocessing.as_dict()
    assert found.size == report.float_bytes
    assert set(clock.seconds) == {"load", "detect", "fold", "plan"}


def test_pixels_are_planned_where_they_are_embedded(source: Source, images: DataOptions) -> None:
    found = prepare(source, Recipe(embed_preprocessing=Layout.NHWC), images, Reporter())
    (pixels,) = found.model.graph.inputs
    assert pixels.dtype == onnx.TensorProto.UINT8
    assert found.plan.given


def test_a_model_is_loaded_as_it_is_and_only_prepared_ones_must_have_layers(
    source: Source, images: DataOptions
) -> None:
    """A sweep finds out how pictures are fed before it knows whether its first recipe can be carried out."""
    nothing = Recipe(keep_float=("*",))
    loaded = load_float(source, nothing, images, Reporter())
    assert "BatchNormalization" in [node.op_type for node in loaded.model.nodes()]
    assert loaded.data.preprocessing is not None
    with pytest.raises(QconvError, match="nothing to quantize"):
        prepare(source, nothing, images, Reporter())


def test_what_is_read_is_never_written_over(source: Source, images: DataOptions, tmp_path: Path) -> None:
    assert source.path is not None
    with pytest.raises(QconvError, match="is the model itself"):
        load_float(source, Recipe(), images, Reporter(), written={"the output": source.path})
    twice = {"the output": tmp_path / "a", "the table": tmp_path / "a"}
    with pytest.raises(QconvError, match="is both the output and the table"):
        load_float(source, Recipe(), images, Reporter(), written=twice)


def test_a_study_scores_the_network_that_takes_pixels(source: Source, images: DataOptions, tmp_path: Path) -> None:
    """Its last point is the file that quantize makes, run by ONNX Runtime on pictures that were held back."""
    recipe = Recipe(embed_preprocessing=Layout.NHWC, effort="fast", threads=1)
    curve = study_samples(source, recipe, images, StudyRequest(draws=1, holdout=3))
    assert curve.preprocessing is not None
    assert curve.preprocessing["embedded"] is not None
    out = tmp_path / "q.onnx"
    last = curve.points[-1]
    plain = Recipe(embed_preprocessing=Layout.NHWC, effort="fast", equalize=False, tune_ranges=False, threads=1)
    quantize(source, out, plain, DataOptions(images.paths, samples=last.pictures, preprocessing=images.preprocessing))
    files = sorted(Path(images.paths[0]).iterdir())
    held = [files[index] for index in np.random.default_rng(0).permutation(10)[7:]]
    pixels = np.stack([np.asarray(Image.open(file)) for file in held])
    (expected,) = ort.InferenceSession(str(source.path)).run(
        None, {"x": np.float32(pixels.transpose(0, 3, 1, 2) / np.float32(255))}
    )
    session = ort.InferenceSession(str(out))
    (got,) = session.run(None, {session.get_inputs()[0].name: pixels})
    sqnr = 10 * math.log10((expected.astype(np.float64) ** 2).sum() / ((expected - got).astype(np.float64) ** 2).sum())
    assert last.pictures == 7
    assert last.value_of(SQNR) == pytest.approx(sqnr, rel=1e-3)


def test_the_plan_is_made_once_and_again_only_where_the_network_has_changed(
    source: Source, images: DataOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is placed in float, equalized, walked or searched here: the first plan serves to the end."""
    made: list[Recipe] = []
    real = planner._Planner.choose_layers

    def counted(self: planner._Planner) -> None:
        made.append(self.recipe)
        real(self)

    monkeypatch.setattr(planner._Planner, "choose_layers", counted)
    quantize(source, None, Recipe(target="generic", effort="fast", threads=1), images)
    assert len(made) == 1
