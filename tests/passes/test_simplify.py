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


GATES = {
    "Conv": ("g = GlobalAveragePool(x) s = Conv(g, w, b)", {"w": (3, 3, 1, 1), "b": (3,)}),
    "Conv without bias": ("g = GlobalAveragePool(x) s = Conv(g, w)", {"w": (3, 3, 1, 1)}),
}


@pytest.mark.parametrize("kind", GATES)
@pytest.mark.parametrize(("alpha", "beta"), [(0.2, 0.5), (1 / 6, 0.5), (3.0, -0.2)])
def test_the_gate_behind_a_layer_becomes_a_clip(kind: str, alpha: float, beta: float) -> None:
    body, constants = GATES[kind]
    proto = network(
        f"{body} h = HardSigmoid<alpha={alpha:.8f}, beta={beta}>(s) m = Mul(x, h) y = Conv(m, v)",
        v=(4, 3, 1, 1),
        **constants,
    )
    model = loaded(proto)
    run_float_passes(model, for_ort=True)
    assert "Clip" in {node.op_type for node in model.nodes()}
    assert "HardSigmoid" not in {node.op_type for node in model.nodes()}
    feeds = random_feeds(proto)
    np.testing.assert_allclose(run(model, feeds)["y"], run(proto, feeds)["y"], rtol=1e-5, atol=1e-6)


LEFT = {
    "read elsewhere": ("s = Conv(x, w) h = HardSigmoid(s) y = Mul(s, h)", ("y",)),
    "returned": ("s = Conv(x, w) h = HardSigmoid(s) y = Mul(x, h)", ("y", "s")),
    "falling": ("s = Conv(x, w) h = HardSigmoid<alpha=-0.2>(s) y = Mul(x, h)", ("y",)),
    "no layer": ("s = Relu(x) h = HardSigmoid(s) c = Mul(x, h) y = Conv(c, w)", ("y",)),
}


@pytest.mark.parametrize("kind", LEFT)
def test_other_gates_stay(kind: str) -> None:
    body, outputs = LEFT[kind]
    model = loaded(network(body, outputs=outputs, w=(3, 3, 1, 1)))
    run_float_passes(model, for_ort=True)
    assert "HardSigmoid" in {node.op_type for node in model.nodes()}
