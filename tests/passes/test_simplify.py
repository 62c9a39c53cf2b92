"""Spellings that only ONNX Runtime is given. Oracle: ONNX Runtime on the network as it was."""

from __future__ import annotations

import numpy as np
import pytest

from qconv.passes.fold import run_float_passes
from tests.support.models import loaded, network, random_feeds, run

SWISH = network("c = Conv(x, w) h = HardSwish(c) y = Conv(h, v)", w=(6, 3, 3, 3), v=(4, 6, 1, 1))


@pytest.mark.parametrize("for_ort", [True, False])
def test_hard_swish_becomes_its_parts_for_onnx_runtime_alone(for_ort: bool) -> None:
    """Other runtimes have a kernel for it as a whole."""
    model = loaded(SWISH)
    run_float_passes(model, for_ort=for_ort)
    between = [node.op_type for node in model.nodes() if node.op_type != "Conv"]
    assert between == (["HardSigmoid", "Mul"] if for_ort else ["HardSwish"])
    feeds = random_feeds(SWISH)
    np.testing.assert_allclose(run(model, feeds)["y"], run(SWISH, feeds)["y"], rtol=1e-6, atol=1e-6)
