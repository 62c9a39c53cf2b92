"""Samples with a batch, drawn at random: files that hold one sample, with and without its axis, or a whole batch."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from qconv.analysis.evaluate import evaluate
from qconv.analysis.evaluation import EvaluationOptions
from qconv.config.data_options import DataOptions
from qconv.data.loader import DataLoader
from qconv.errors import QconvError
from qconv.ir.files import Source
from qconv.reporter import Reporter
from qconv.runtime.session import Session
from tests.support.models import network

DRAWS = int(os.environ.get("QCONV_DRAWS", "60"))
SHAPE = (3, 7, 5)


def net(batch: int | str) -> onnx.ModelProto:
    return network(
        "c = Conv(x, w) r = Relu(c) p = GlobalAveragePool(r) y = Flatten(p)", (batch, *SHAPE), w=(4, 3, 3, 3)
    )


@pytest.mark.parametrize("seed", range(DRAWS))
def test_every_row_is_fed_once_and_in_order(seed: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(seed)
    batch = [1, 2, 3, "N"][rng.integers(4)]
    size = batch if isinstance(batch, int) else int(rng.integers(1, 4))
    zipped = bool(rng.integers(0, 2))
    rows: dict[str, list[NDArray]] = {}
    for index in range(int(rng.integers(size, 7))):
        form = int(rng.integers(0, 3 if batch in (2, 3) else 2))
        shape = (SHAPE, (1, *SHAPE), (size, *SHAPE))[form]
        array = rng.normal(size=shape).astype(np.float32)
        name = f"{index}.{'npz' if zipped else 'npy'}"
        np.savez(tmp_path / name, x=array) if zipped else np.save(tmp_path / name, array)
        rows[name] = list(array.reshape(-1, *SHAPE))
    session = Session(net(batch).SerializeToString(), threads=1)
    feed = DataLoader.of(session, DataOptions((str(tmp_path),), batch=size), Reporter(pytest.fail))
    names = [path.parent.name if path.parent != tmp_path else path.name for path in feed.listing.paths]
    expected = [row for name in dict.fromkeys(names) for row in rows[name]]
    fed = [row for feeds in feed.iter_batches("") for row in feeds["x"]]
    whole = len(expected) if not isinstance(batch, int) else max(size, len(expected) // size * size)
    assert len(fed) == whole
    for row, wanted in zip(fed, expected, strict=False):
        np.testing.assert_array_equal(row, wanted)


def test_a_batch_that_is_not_the_models_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "0.npy", np.zeros((4, *SHAPE), np.float32))
    for batch in (2, "N", 1):
        session = Session(net(batch).SerializeToString(), threads=1)
        feed = DataLoader.of(session, DataOptions((str(tmp_path),)), Reporter())
        with pytest.raises(QconvError, match="has shape 4x3x7x5 for input 'x'"):
            list(feed.iter_batches(""))


def test_rows_of_a_batch_are_scored_with_the_class_of_their_file(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in "abcd":
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "0.npy", rng.normal(size=(2, *SHAPE)).astype(np.float32))
    source = Source("net", None, net(2).SerializeToString())
    found = evaluate(source, EvaluationOptions(DataOptions((str(tmp_path),), samples=None), threads=1))
    assert found.images == 8
    session, hits = Session(net(2).SerializeToString()), 0
    for label, name in enumerate("abcd"):
        (scores,) = session.run_all({"x": np.load(tmp_path / name / "0.npy")})
        hits += int((scores.argmax(axis=1) == label).sum())
    assert found.top1 is not None
    assert found.top1.value == hits / 8
    assert found.predictions is not None
