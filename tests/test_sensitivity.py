"""What a layer costs at the outputs. Oracle: the network with its weights replaced by hand, run by ONNX Runtime."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import onnx
import pytest
from models import loaded, network
from numpy.typing import NDArray
from onnx import numpy_helper

from qconv.calibrate import tapped, watch
from qconv.params import choose_params
from qconv.planner import make_plan
from qconv.quant import extremes
from qconv.recipe import Recipe
from qconv.runtime import Session
from qconv.sensitivity import FLOAT, WORST, Network, noise_of, sensitivities
from qconv.targets import TARGETS

BODY = """
    c = Conv<pads=[1,1,1,1]>(x, w, b) r = Relu(c) d = ConvTranspose<strides=[2,2]>(r, v) g = GlobalAveragePool(d)
    f = Flatten(g) e = Gemm<transB=1>(f, k, s) y = MatMul(e, m)
"""
NET = network(BODY, x=("N", 3, 8, 8), w=(4, 3, 3, 3), b=(4,), v=(4, 6, 2, 2), k=(5, 6), s=(5,), m=(5, 4))
WEIGHTS = {"c": "w", "d": "v", "e": "k", "y": "m"}


def batches(count: int = 3) -> list[dict[str, NDArray[np.float32]]]:
    rng = np.random.default_rng(0)
    return [{"x": rng.standard_normal((2, 3, 8, 8)).astype(np.float32)} for _ in range(count)]


def grounds(**options: object) -> Network:
    recipe = Recipe(target="generic", saturation_safe=False, **options)  # type: ignore[arg-type]
    model = loaded(NET)
    plan = make_plan(model, recipe, TARGETS[recipe.target])
    taps = plan.taps()
    with tapped(model, taps) as runnable:
        sketches = watch(Session(runnable, threads=1), taps, batches())
    params, _ = choose_params(plan, sketches, recipe)
    return Network(model, plan, params, sketches, recipe)


def replaced(weight: str, numbers: NDArray[np.float32]) -> onnx.ModelProto:
    proto = onnx.ModelProto.FromString(NET.SerializeToString())
    tensor = next(tensor for tensor in proto.graph.initializer if tensor.name == weight)
    tensor.CopyFrom(numpy_helper.from_array(numbers, weight))
    return proto


def run_on(proto: onnx.ModelProto) -> NDArray[np.float32]:
    session = Session(proto.SerializeToString(), threads=1)
    return np.concatenate([session.run_all(feeds)[0] for feeds in batches()])


@pytest.mark.parametrize("granularity", ["per-channel", "per-tensor", "per-block"])
def test_the_noise_is_that_of_rounded_weights(granularity: str) -> None:
    """Without bias correction, what was measured is what the network gives with these weights in its file."""
    network = grounds(calibrator="minmax", bias_correction="none", weight_granularity=granularity)
    wishes = dict.fromkeys(WEIGHTS, (3, 8, FLOAT))
    found = sensitivities(network, wishes, batches())
    reference = run_on(NET).astype(np.float64)
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in NET.graph.initializer}
    for layer in network.plan.layers:
        name = layer.node.name or ""
        stored = constants[WEIGHTS[name]]
        assert found[name].count == stored.size
        assert found[name].noise[FLOAT] == 0
        for bits in (3, 8):
            spec = replace(layer.weight, bits=bits)
            arranged = layer.arranged(stored)
            params = spec.from_range(*extremes(arranged, spec.granularity))
            got = run_on(replaced(WEIGHTS[name], params.fake(arranged).reshape(stored.shape)))
            expected = np.sum((reference - got) ** 2) / np.sum(reference**2)
            assert found[name].noise[bits] == pytest.approx(expected, rel=1e-3)


def test_fewer_bits_cost_more_and_bias_correction_less() -> None:
    wishes = dict.fromkeys(WEIGHTS, (2, 4, 8))
    plain, corrected = (
        sensitivities(grounds(calibrator="minmax", bias_correction=kind), wishes, batches())
        for kind in ("none", "measured")
    )
    for name in WEIGHTS:
        costs = [plain[name].noise[bits] for bits in (2, 4, 8)]
        assert all(more > 8 * less for more, less in itertools.pairwise(costs))
    assert sum(corrected[name].noise[2] for name in "cde") < sum(plain[name].noise[2] for name in "cde")


def test_the_network_stays_as_it_is() -> None:
    network = grounds(calibrator="minmax")
    before = network.model.proto().SerializeToString()
    heard: list[tuple[int, int]] = []
    sensitivities(network, {"c": (4,), "y": (4,)}, batches(), lambda *done: heard.append(done))
    assert network.model.proto().SerializeToString() == before
    assert heard == [(1, 2), (2, 2)]


def test_noise_by_hand() -> None:
    """(1 - 2)^2 / (1 + 4) and, of whole numbers, one of two: the sum over outputs. No number counts as worst."""
    ref = [[np.float32([[1, 2]]), np.array([3, 4])]]
    assert noise_of(ref, [[np.float32([[2, 2]]), np.array([3, 5])]]) == pytest.approx(1 / 5 + 1 / 2)
    assert noise_of(ref, ref) == 0
    assert noise_of(ref, [[np.float32([[np.nan, 2]]), np.array([3, 4])]]) == WORST
    unknown = [[np.float32([[np.inf, 2]])]]
    assert noise_of(unknown, [[np.float32([[5, 1]])]]) == pytest.approx(1 / 4)
    assert noise_of([[np.zeros(2, np.float32)]], [[np.ones(2, np.float32)]]) == 0  # nothing to compare with
