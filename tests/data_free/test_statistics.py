"""Whole runs without a picture; the oracle is the float network on real ones."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from qconv.calibration.sketch import Sketch
from qconv.config.choices import FALLBACKS
from qconv.config.data_options import DataOptions, Layout, PreprocessingOptions
from qconv.config.recipe import Recipe, make_request
from qconv.config.serialization import command_line_options, recipe_from_dict
from qconv.data.loader import DataLoader
from qconv.data_free.statistics import WIDENING_FACTORS, sketch_distribution
from qconv.errors import Change, QconvError, Skipped
from qconv.ir.channel_stats import ChannelDistribution
from qconv.ir.files import Source
from qconv.metrics.comparison import verify
from qconv.pipeline import quantize
from qconv.reporter import Reporter
from qconv.results.quantize import Report
from qconv.runtime.session import Session
from tests.support.folded import write_folded_float
from tests.support.models import network, statistics

HERE = Path(__file__).parents[1]
CIFAR = HERE / "models" / "cifar_mobilenet.onnx"
PHOTOS = HERE.parent / "calib_samples"
DATA = Path(os.environ.get("QCONV_DATA") or HERE.parents[1] / "shared" / "data")


def request(**options: Any) -> tuple[Recipe, DataOptions]:
    preset = options.pop("preset", "imagenet")
    return make_request({"calib": "none", "preprocessing": PreprocessingOptions(preset), **options})


def made(tmp_path: Path, model: Path | onnx.ModelProto = CIFAR, **options: Any) -> tuple[Report, Path]:
    if isinstance(model, onnx.ModelProto):
        onnx.save(model, tmp_path / "model.onnx")
        model = tmp_path / "model.onnx"
    out = tmp_path / "out.onnx"
    report, _ = quantize.quantize(Source(str(model), model), out, *request(**options))
    return report, out


def sqnr(out: Path, model: Path = CIFAR, samples: int = 24) -> float:
    """Of the written file on photographs, in dB."""
    sessions = [Session(str(path)) for path in (model, out)]
    data = DataOptions((str(PHOTOS),), samples=samples, preprocessing=PreprocessingOptions("imagenet"))
    feed = DataLoader.of(sessions[0], data, Reporter(print))
    found = verify(*sessions, feed.iter_batches("test")).sqnr_db
    assert found is not None
    return found


def whats(report: Report, kind: str) -> list[Change]:
    return [found for found in report.findings if isinstance(found, Change) and (found.kind or found.what) == kind]


def test_a_real_network_keeps_its_outputs(tmp_path: Path) -> None:
    """As near as with pictures that are watched, and nearest codes."""
    report, out = made(tmp_path)
    without = sqnr(out)
    looked, data = (
        Recipe(effort="fast", equalize=False),
        DataOptions((str(PHOTOS),), samples=32, preprocessing=PreprocessingOptions("imagenet")),
    )
    quantize.quantize(Source(str(CIFAR), CIFAR), out, looked, data)
    assert without > 25
    assert without > sqnr(out) - 6
    assert whats(report, "ranges by what BatchNormalization says")
    assert whats(report, "bias corrected by the means that BatchNormalization says")


@pytest.mark.parametrize("granularity", ["per-tensor", "per-channel"])
def test_equalization_needs_no_picture(tmp_path: Path, granularity: str) -> None:
    report, _ = made(tmp_path, weight_granularity=granularity)
    assert [found for found in report.findings if isinstance(found, Change) and found.step == "equalize"]


def test_nothing_is_claimed_that_was_not_measured(tmp_path: Path) -> None:
    report, _ = made(tmp_path)
    assert report.verify.images == 0
    assert report.verify.outputs == ()
    assert report.gates == []
    assert report.audit.integer > 0
    assert report.audit.total_us is not None  # it was run all the same


def test_the_same_bytes_every_time_and_the_recipe_in_them(tmp_path: Path) -> None:
    _, out = made(tmp_path)
    first = out.read_bytes()
    _, out = made(tmp_path)
    assert out.read_bytes() == first
    props = {prop.key: prop.value for prop in onnx.load(out).metadata_props}
    told = json.loads(props["qconv.recipe"])
    assert command_line_options(told) == ["--preprocess", "imagenet", "--calib", "none"]
    again = recipe_from_dict(told)
    assert again is not None
    assert again.data_free
    assert again.as_dict(DataOptions(preprocessing=PreprocessingOptions("imagenet"))) == told


@pytest.mark.parametrize("layout", list(Layout))
def test_pixels_go_in(tmp_path: Path, layout: Layout) -> None:
    _, out = made(tmp_path, embed_preprocessing=layout)
    session = Session(str(out))
    (_, dtype, shape), *_ = session.inputs
    assert dtype == np.uint8
    assert shape[1:] == ((3, 32, 32) if layout is Layout.NCHW else (32, 32, 3))


@pytest.mark.parametrize(
    "options",
    [
        {"effort": "fast"},
        {"weight_bits": 4},
        {"activation_bits": 32, "weight_bits": 4},
        {"activation_bits": 16},
        {"target": "tensorrt"},
        {"target": "openvino"},
        {"calibrator": "output-mse"},
        {"calibrator": "aciq", "bit_allocation": "both", "weight_bits": 4, "activation_bits": 4},
        {"weight_granularity": "per-block"},
    ],
    ids=str,
)
def test_options_that_need_no_pictures(tmp_path: Path, options: dict[str, Any]) -> None:
    _, out = made(tmp_path, **options)
    few = options.get("activation_bits") == 4
    assert sqnr(out, samples=8) > (0 if few else 10)


def unknown() -> onnx.ModelProto:
    """A layer whose output no BatchNormalization reads, nor that of the layer in front of it."""
    return network(
        "c = Conv(x, w) n = BatchNormalization(c, gamma, beta, mean, var) r = Relu(n) d = Conv(r, v) e = Relu(d)"
        " f = Conv(e, u) s = Relu(f) p = GlobalAveragePool(s) q = Flatten(p) y = Gemm(q, g)",
        x=("N", 3, 16, 16),
        w=(8, 3, 3, 3),
        v=(6, 8, 3, 3),
        u=(6, 6, 1, 1),
        g=(6, 4),
        **statistics(8),
    )


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(QconvError, match=r"says nothing of \d tensors of \d that need a range: 's'") as error:
        made(tmp_path, unknown())
    assert "no BatchNormalization follows Conv f, nor those in front of it" in error.value.message
    assert "--fallback random" in error.value.hint
    assert not (tmp_path / "out.onnx").exists()


def test_it_is_watched_on_made_up_pictures_where_that_is_asked_for(tmp_path: Path) -> None:
    report, out = made(tmp_path, unknown(), fallback="random")
    watched = {change.where for change in whats(report, "ranges by random pictures")}
    assert "s" in watched
    assert {change.where for change in whats(report, "ranges guessed by weights")} == {"e"}
    assert "r" in {change.where for change in whats(report, "ranges by what BatchNormalization says")}
    assert [change.where for change in whats(report, "range by what pixels can be")] == ["x"]
    assert sqnr(out, tmp_path / "model.onnx", samples=8) > 10


def test_a_network_folded_before_tells_nothing(tmp_path: Path) -> None:
    write_folded_float(CIFAR, tmp_path / "folded.onnx")
    with pytest.raises(QconvError, match="says nothing of"):
        made(tmp_path, tmp_path / "folded.onnx")
    report, out = made(tmp_path, tmp_path / "folded.onnx", fallback="random")
    assert [text for text in report.warnings if "analytic corrects no layer" in text]
    assert not [text for text in report.warnings if "measured" in text]
    assert [found for found in report.findings if isinstance(found, Skipped) and found.step == "bias"]
    assert sqnr(out) > 15


def test_every_fallback_has_its_pictures() -> None:
    assert tuple(WIDENING_FACTORS) == FALLBACKS
    assert min(WIDENING_FACTORS.values()) >= 1


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"calib": ("none", "pictures")}, "--calib none beside pictures"),
        ({"samples": 5}, "--samples with --calib none"),
        ({"batch": 2}, "--batch with --calib none"),
        ({"glob": "*.png"}, "--glob with --calib none"),
        ({"stats": "x"}, "--stats with --calib none"),
        ({"save_stats": "x"}, "--save-stats with --calib none"),
        ({"min_sqnr": 3}, "A gate with --calib none"),
        ({"effort": "best"}, "--effort best with --calib none"),
        ({"rounding": "second-order"}, "--rounding second-order with --calib none"),
        ({"tune_ranges": True}, "--tune-ranges with --calib none"),
        ({"bias_correction": "measured"}, "--bias-correction measured with --calib none"),
        ({"target_size": 0.2}, "A search for bits without pictures"),
        ({"fallback": "hope"}, "--fallback hope"),
        ({"calib": ("pictures",), "fallback": "random"}, "--fallback without --calib none"),
    ],
    ids=str,
)
def test_what_needs_pictures_is_refused(options: dict[str, Any], what: str) -> None:
    with pytest.raises(QconvError, match=f"^{what}"):
        make_request({"calib": "none"} | options)


def test_defaults_without_pictures() -> None:
    found = Recipe(data_free=True)
    assert (found.data_free, found.rounding) == (True, "nearest")
    assert (found.bias_correction, found.calibrator) == ("analytic", "minmax")
    assert (found.equalize, found.tune_ranges) == (True, False)
    assert make_request({"calib": "none"}) == (found, DataOptions())
    assert DataOptions("./none").paths == ("./none",)  # type: ignore[arg-type]
    with pytest.raises(QconvError, match="paths with 'none'"):
        DataOptions(("none",))


def test_a_sketch_is_what_a_large_sample_leaves() -> None:
    """Extremes six deviations away, cut off; means; and the same quantiles in histogram and columns."""
    mean, std = np.array([0.5, -1.0, 4.0]), np.array([1.0, 2.0, 1.5])
    told = ChannelDistribution(mean, std).clipped(0.0, 6.0)
    found: Sketch = sketch_distribution("t", told)
    assert found.lows.tolist() == [0, 0, 0]
    assert found.highs.tolist() == [6, 6, 6]
    np.testing.assert_allclose(found.means, told.mean, rtol=1e-6)
    sample = np.clip(np.random.default_rng(0).normal(mean, std, (200_000, 3)), 0, 6)
    columns = found.columns.reshape(-1, 3)
    for share in (0.3, 0.5, 0.9):
        np.testing.assert_allclose(np.quantile(columns, share, axis=0), np.quantile(sample, share, axis=0), atol=0.05)
    histogram = found.histogram()
    average = float(histogram.centres @ histogram.shares)
    assert average == pytest.approx(sample.mean(), rel=0.01)
    assert abs(np.corrcoef(columns.T)[0, 1]) < 0.2  # channels keep to orders of their own


@pytest.mark.skipif(not DATA.is_dir(), reason="needs the models of $QCONV_DATA or ../shared/data")
def test_resnet20_by_its_own_statistics(tmp_path: Path) -> None:
    model = DATA / "models" / "resnet20_cifar10.onnx"
    _, out = made(tmp_path, model, preset="auto")
    sessions = [Session(str(path)) for path in (model, out)]
    pictures = (str(DATA / "images/cifar10/test"),)
    data = DataOptions(pictures, samples=200, preprocessing=PreprocessingOptions("imagenet"))
    feed = DataLoader.of(sessions[0], data, Reporter(print))
    found = verify(*sessions, feed.iter_batches("test"))
    assert found.sqnr_db is not None
    assert found.sqnr_db > 25
    assert found.agreement is not None
    assert found.agreement >= 0.95
