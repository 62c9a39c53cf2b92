"""High channels are lowered exactly; the oracle is ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from qconv.calibration.observer import Observer, estimate_channel_ranges, observe_each_image, open_observed_session
from qconv.calibration.sketch import SketchContents
from qconv.config.data_options import DataOptions
from qconv.data.loader import DataLoader
from qconv.errors import Change
from qconv.ir.model import Model, constant_array
from qconv.passes.absorb_biases import absorb_biases, find_absorption_candidates
from qconv.passes.fold import run_float_passes
from qconv.reporter import Reporter
from qconv.runtime.session import Session
from tests.support.models import loaded, network, run

BODY = "c = Conv(x, w, b) r = Relu(c) m = MaxPool<kernel_shape=[2,2]>(r) d = Conv<{pads}>(m, v, e) y = Relu(d)"
HIGH = np.float32([0.0, 40.0, 60.0, 0.0])


def high(pads: str = "pads=[0,0,0,0]") -> onnx.ModelProto:
    """Two of four channels are far above zero on every picture."""
    return network(BODY.format(pads=pads), x=(1, 3, 8, 8), w=(4, 3, 3, 3), b=HIGH, v=(5, 4, 3, 3), e=(5,))


@pytest.fixture
def feed(tmp_path: Path) -> DataLoader:
    rng = np.random.default_rng(0)
    for index in range(12):
        np.save(tmp_path / f"{index}.npy", rng.standard_normal((1, 3, 8, 8)).astype(np.float32))
    session = Session(high().SerializeToString(), threads=1)
    return DataLoader.of(session, DataOptions((str(tmp_path),)), Reporter())


def lowered(model: Model, feed: DataLoader) -> list[Change]:
    found = find_absorption_candidates(model)
    observers = [Observer(candidate.result.name or "", SketchContents.CHANNELS) for candidate in found]
    channels = (
        estimate_channel_ranges(
            observe_each_image(open_observed_session(model, observers, 1), observers, feed.iter_batches("test"))
        )
        if observers
        else {}
    )
    return absorb_biases(model, found, channels)


def test_high_channels_are_lowered_exactly(feed: DataLoader) -> None:
    proto = high()
    model = loaded(proto)
    run_float_passes(model)
    (change,) = lowered(model, feed)
    assert change.where == "c"
    bias = constant_array(model.nodes()[0].inputs[2])
    assert bias is not None
    assert bias[[0, 3]].tolist() == HIGH[[0, 3]].tolist()
    assert np.all(bias[[1, 2]] < HIGH[[1, 2]] / 2)
    for feeds in feed.iter_batches("test"):
        expected, got = run(proto, feeds)["y"], run(model, feeds)["y"]
        np.testing.assert_allclose(got, expected, atol=2e-5 * np.abs(expected).max())


def test_zero_padding_between_is_refused(feed: DataLoader) -> None:
    model = loaded(high("pads=[1,1,1,1]"))
    run_float_passes(model)
    before = model.proto().SerializeToString()
    assert lowered(model, feed) == []
    assert model.proto().SerializeToString() == before


def test_nothing_high_nothing_done(feed: DataLoader) -> None:
    body = BODY.format(pads="pads=[0,0,0,0]")
    proto = network(body, x=(1, 3, 8, 8), w=(4, 3, 3, 3), b=np.zeros(4, np.float32), v=(5, 4, 3, 3), e=(5,))
    model = loaded(proto)
    run_float_passes(model)
    assert lowered(model, feed) == []
