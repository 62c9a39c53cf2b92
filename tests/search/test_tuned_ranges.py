"""The steps that set ranges, end to end: what a rare object needs, and what a loud tensor needs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from qconv.config.data_options import DataOptions
from qconv.config.recipe import Recipe
from qconv.errors import Change
from qconv.ir.files import Source
from qconv.pipeline.quantize import quantize
from qconv.runtime.session import Session
from tests.support.models import network

ONE = np.ones((1, 1, 1, 1), np.float32)
BODY = "a = Conv(x, w) b = Relu(a) c = Conv(b, v) d = Sub(c, t) y = Relu(d)"
RECIPE = Recipe(threads=1, equalize=False, calibrator="percentile", percentile=99.0, float_budget=0.0)


def picture(number: int, top: float) -> np.ndarray:
    """Noise up to 1, and an object in one place."""
    x = np.random.default_rng(number).uniform(0, 1, (1, 16, 16)).astype(np.float32)
    x[0, 8, 8] = top
    return x


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of 40 has an object, and none of those that are held back."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(40):
        np.save(folder / f"{number:02}.npy", picture(number, 40.0 if number == 17 else 0.5))
    return folder


@pytest.mark.parametrize("tuned", [True, False])
def test_the_object_that_one_picture_has_is_found(pictures: Path, tuned: bool) -> None:
    """Oracle: 40 - 20 by hand, to a step of 8 bits. A percentile cuts it off, which tuning mends."""
    proto = network(BODY, ("N", 1, 16, 16), w=ONE, v=ONE, t=np.float32(20))
    source = Source("m", None, proto.SerializeToString())
    report, result = quantize(source, None, replace(RECIPE, tune_ranges=tuned), DataOptions((str(pictures),)))
    assert result is not None
    (found,) = Session(result).run(["y"], {"x": picture(99, 40.0)[None]})
    assert bool(abs(found.max() - 20) < 0.3) is tuned
    wider = [f for f in report.findings if isinstance(f, Change) and "wider" in f.kind]
    assert bool(wider) is tuned


def test_an_output_that_is_no_tensor_of_numbers_leaves_ranges_alone(pictures: Path) -> None:
    """Nothing to judge by: the run goes on without the steps."""
    proto = network(
        "a = Conv(x, w) b = Relu(a) s = Conv(b, v) y = SequenceConstruct(s)", ("N", 1, 16, 16), w=ONE, v=ONE
    )
    value = onnx.helper.make_tensor_sequence_value_info("y", onnx.TensorProto.FLOAT, None)
    proto.graph.output[0].CopyFrom(value)
    source = Source("m", None, proto.SerializeToString())
    report, _ = quantize(source, None, replace(RECIPE, tune_ranges=True), DataOptions((str(pictures),)))
    assert not [finding for finding in report.findings if finding.step == "ranges"]
