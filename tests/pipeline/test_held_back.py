"""Pictures that are held back: how many, that no choice sees them, and that the result is checked on them alone."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qconv import Recipe
from qconv.config.choices import Drop
from qconv.config.data_options import DataOptions
from qconv.data import loader
from qconv.data.dataset import list_samples
from qconv.data.loader import DataLoader
from qconv.pipeline.quantize import quantize
from qconv.report.console import show_report
from qconv.reporter import Reporter
from qconv.runtime.session import Session
from tests.support.models import network
from tests.support.quantized import sqnr

BODY = """c = Conv<pads=[1,1,1,1]>(x, w1, b1) r = Relu(c) d = Conv<group=4,pads=[1,1,1,1]>(r, w2) e = Relu(d)
          p = GlobalAveragePool(e) f = Flatten(p) y = Gemm<transB=1>(f, w3)"""
NET = network(BODY, ("N", 3, 6, 6), w1=(4, 3, 3, 3), b1=(4,), w2=(4, 1, 3, 3), w3=(5, 4))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "net.onnx"
    path.write_bytes(NET.SerializeToString())
    return path


def write(folder: Path, count: int) -> DataOptions:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(count):
        np.save(folder / f"{index:03}.npy", rng.normal(size=(3, 6, 6)).astype(np.float32))
    return DataOptions((str(folder),))


@pytest.mark.parametrize(
    ("count", "samples", "held"),
    [(8, 128, 0), (31, 128, 0), (32, 128, 8), (63, 128, 8), (64, 128, 8), (80, 128, 10), (150, 128, 16), (150, 40, 8)],
)
def test_an_eighth_is_held_back_where_there_are_32(tmp_path: Path, count: int, samples: int, held: int) -> None:
    """The last ones of the draw, so that fewer samples read the first ones of more."""
    write(tmp_path / "pictures", count)
    data = DataOptions((str(tmp_path / "pictures"),), samples=samples)
    feed = DataLoader.of(Session(NET.SerializeToString()), data, Reporter())
    fitted, kept = feed.split()
    paths = list_samples(data).paths
    assert len(fitted.listing.paths) == len(paths) - held
    assert fitted.listing.paths == paths[: len(paths) - held]
    assert (() if kept is None else kept.listing.paths) == paths[len(paths) - held :]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"effort": "best", "tune_ranges": True},
        {"weight_bits": 4, "rounding": "nearest", "bias_correction": "sequential"},
        {"max_drop": Drop("sqnr", 15.0)},
        {"weight_bits": 4, "rounding": "second-order", "calibrator": "mse"},
    ],
    ids=["default", "best", "sequential", "search", "mse"],
)
def test_no_choice_sees_them(source: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    """Whatever lies there, the file has the same bytes, and its score is of that."""
    data = write(tmp_path / "pictures", 40)
    found = []
    for factor in (1.0, 40.0):
        for path in list_samples(data).paths[-8:]:
            np.save(path, np.load(path) * np.float32(factor))
        found.append(quantize(source, None, Recipe(threads=1, **options), data))
    assert found[0][1] == found[1][1]
    checked = [report.verify for report, _ in found]
    assert [(verify.images, verify.held_back) for verify in checked] == [(8, True), (8, True)]
    assert checked[0].sqnr_db is not None
    assert checked[1].sqnr_db is not None
    assert checked[1].sqnr_db < checked[0].sqnr_db - 10


@pytest.mark.parametrize("gate", [None, 0.0])
def test_the_score_is_that_of_the_pictures_held_back(source: Path, tmp_path: Path, gate: float | None) -> None:
    data = write(tmp_path / "pictures", 48)
    report, result = quantize(source, None, Recipe(threads=1, min_sqnr=gate), data)
    assert result is not None
    pictures = [np.load(path) for path in list_samples(data).paths[-8:]]
    sessions = [Session(proto, threads=1) for proto in (NET.SerializeToString(), result)]
    want, got = (session.run_all({"x": np.stack(pictures)})[0] for session in sessions)
    assert report.verify.sqnr_db == pytest.approx(sqnr(want, got), abs=0.01)
    assert report.as_dict()["verify"]["held_back"] is True
    stream = io.StringIO()
    show_report(report, stream, verbose=False)
    assert "(8 pictures held back from calibration)" in stream.getvalue()


@pytest.mark.parametrize("kept", [2**20, 3 * 6 * 6 * 4 * 3])
def test_large_pictures_are_read_again(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: int
) -> None:
    """Where three of them stay in memory, the check is on all 20 the same; of 40 held back on the first 32."""
    data = write(tmp_path / "pictures", 320)
    few = DataOptions(data.paths, samples=20)
    monkeypatch.setattr(loader, "KEPT_BYTES", kept)
    for asked, count in ((few, 20), (DataOptions(data.paths, samples=320), 32)):
        report, result = quantize(source, None, Recipe(threads=1, effort="fast"), asked)
        assert result is not None
        assert report.verify.images == count
        paths = list_samples(asked).paths
        pictures = np.stack([np.load(path) for path in paths[-40 if count == 32 else -20 :][:count]])
        want, got = (Session(p, threads=1).run_all({"x": pictures})[0] for p in (NET.SerializeToString(), result))
        assert report.verify.sqnr_db == pytest.approx(sqnr(want, got), abs=0.01)


def test_nothing_is_held_back_of_statistics_or_few_pictures(source: Path, tmp_path: Path) -> None:
    data, saved = write(tmp_path / "pictures", 40), str(tmp_path / "s.npz")
    few = DataOptions(data.paths, samples=31)
    report, _ = quantize(source, None, Recipe(threads=1), few)
    assert (report.verify.images, report.verify.held_back) == (31, False)
    quantize(source, None, Recipe(threads=1, save_stats=saved), data)
    report, _ = quantize(source, None, Recipe(threads=1, stats=saved), data)
    assert (report.verify.images, report.verify.held_back) == (32, False)
    report, _ = quantize(source, None, Recipe(threads=1, stats=saved))
    assert (report.verify.images, report.verify.held_back) == (0, False)


def test_a_pass_that_ended_early_does_not_leave_pictures_out(tmp_path: Path) -> None:
    """Neither one that stopped by itself, nor one after it that went to the end."""
    data = write(tmp_path / "pictures", 12)
    feed = DataLoader.of(Session(NET.SerializeToString(), threads=1), data, Reporter())
    assert len(feed.take(3, "")) == 3
    assert len(list(feed.iter_batches(""))) == 12
    assert len(list(feed.iter_cached(""))) == 12
    assert len(list(feed.iter_first(""))) == 12
