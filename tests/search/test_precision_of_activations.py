"""Which activations get 16 bits or float, end to end: by `choose_division`, by `--max-drop`, and from a file again.

Oracle: of networks in which one tensor is loud by construction, that one; and counts by hand. The residual stream t
adds a channel that reaches to 1000 and is cut away behind it, so that 8 bits of t are worth nothing to the other one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from qconv.config.data_options import DataOptions
from qconv.config.recipe import Recipe
from qconv.results.quantize import Report
from tests.support.models import network
from tests.test_pipeline import quantized

PICK = np.zeros((4, 4, 1, 1), np.float32)
PICK[:, 1:4, 0, 0] = np.random.default_rng(5).normal(size=(4, 3))
LOUD = np.array([1000.0, 1, 1, 1], np.float32).reshape(1, 4, 1, 1)
TAIL = " ".join(f"c{i} = Conv(c{i - 1}, v{i}) r{i} = Relu(c{i})" if False else "" for i in range(1))
"""The Mul by constants makes channel 0 loud, Conv b reads the others alone."""
BODY = """
a = Conv(x, w) t = Mul(a, k) b = Conv(t, p)
c = Conv(b, v) d = Conv(c, v) e = Conv(d, v) f = Conv(e, v) g = Conv(f, v) h = Conv(g, v) i = Conv(h, v) y = Conv(i, v)
"""
V = np.linalg.qr(np.random.default_rng(2).normal(size=(4, 4)))[0].astype(np.float32).reshape(4, 4, 1, 1)
NET = network(BODY, (1, 3, 8, 8), w=(4, 3, 1, 1), k=LOUD, p=PICK, v=V)
ASKED = {"target": "generic", "candidate_activation_bits": (8, 16), "equalize": False, "rounding": "nearest"}


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("samples")
    for number in range(24):
        drawn = np.random.default_rng(number).normal(size=(3, 8, 8)).astype(np.float32)
        np.save(folder / f"{number:02}.npy", drawn)
    return folder


def run(samples: Path, net: onnx.ModelProto = NET, **options: Any) -> tuple[Report, onnx.ModelProto]:
    return quantized(net, Recipe(**options), DataOptions((str(samples),)))


def bits(report: Report) -> dict[str, Any]:
    return {row.name: row.bits for row in report.tensors if row.kind == "activation"}


def test_the_loud_tensor_gets_16_bits(samples: Path) -> None:
    """t and the Conv behind it: t is read by b, so that the Mul and b compute on 16 bits, and b writes them."""
    report, _ = run(samples, **ASKED, float_budget=0.4)
    before, _ = run(samples, **{**ASKED, "candidate_activation_bits": (8,)})
    wide = {name for name, own in bits(report).items() if own == 16}
    assert "t" in wide
    assert not wide & {"d", "e", "f", "g", "h", "i", "y"}
    assert report.opset == 21
    assert before.opset == 17
    assert (report.verify.sqnr_db or 0) > (before.verify.sqnr_db or 0) + 10
    assert report.precision is not None
    share = report.precision.share
    assert share is not None
    assert (share.count, share.of) == (len(wide), len(bits(report)))
    assert share.elements == pytest.approx(len(wide) / len(bits(report)), abs=0.02)  # all but x have 4 channels
