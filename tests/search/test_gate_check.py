"""Whether a candidate holds gates: against a float model and copies of it that are off by a known amount."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qconv.config.data_options import DataOptions
from qconv.config.recipe import Recipe
from qconv.data.loader import DataLoader
from qconv.reporter import Reporter
from qconv.runtime.session import Session
from qconv.search.gate_check import GateCheck
from tests.support.models import loaded, network


@pytest.mark.parametrize(("least", "holds"), [(19.9, True), (20.1, False)])
def test_a_gate_is_held_against_the_float_model(tmp_path: Path, least: float, holds: bool) -> None:
    """Weights a tenth too large: 10 log10(1 / 0.1^2) = 20 dB."""
    rng = np.random.default_rng(0)
    for index in range(3):
        np.save(tmp_path / f"{index}.npy", rng.standard_normal((2, 6, 6)).astype(np.float32))
    w = rng.standard_normal((3, 2, 1, 1)).astype(np.float32)
    body, shape = "y = Conv(x, w)", ("N", 2, 6, 6)
    original = Session(network(body, shape, w=w).SerializeToString())
    feed = DataLoader.of(original, DataOptions((str(tmp_path),)), Reporter())
    check = GateCheck(Recipe(threads=1, min_sqnr=least), original, feed, None, Reporter())
    assert check.holds(loaded(network(body, shape, w=np.float32(1.1) * w))) is holds
    assert check.holds(loaded(network(body, shape, w=w)))
