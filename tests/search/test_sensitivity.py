"""What a layer costs at the outputs. Oracle: the network with its weights replaced by hand, run by ONNX Runtime."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

from qconv.calibration.observer import export_observed_model, observe
from qconv.config.recipe import Recipe
from qconv.config.targets import TARGETS
from qconv.planning.planner import make_plan
from qconv.quantization.effective_range import EffectiveRange
from qconv.quantization.gptq import read_weight_shape
from qconv.quantization.input_moments import PatchExtractor, accumulate_moments
from qconv.quantization.layer import quantize_layer
from qconv.quantization.layer_rounding import LayerSolver, RoundingEffort
from qconv.quantization.parameters import choose_params
from qconv.quantizer import group_extremes
from qconv.runtime.session import Session
from qconv.search.sensitivity import FLOAT_BITS, SensitivityContext, measure_sensitivities
from tests.support.models import loaded, network

BODY = """
    c = Conv<pads=[1,1,1,1]>(x, w, b) r = Relu(c) d = ConvTranspose<strides=[2,2]>(r, v) g = GlobalAveragePool(d)
    f = Flatten(g) e = Gemm<transB=1>(f, k, s) y = MatMul(e, m)
"""
NET = network(BODY, x=("N", 3, 8, 8), w=(4, 3, 3, 3), b=(4,), v=(4, 6, 2, 2), k=(5, 6), s=(5,), m=(5, 4))
BIASES = {"c": "b", "e": "s"}
WEIGHTS = {"c": "w", "d": "v", "e": "k", "y": "m"}


def batches(count: int = 3) -> list[dict[str, NDArray[np.float32]]]:
    rng = np.random.default_rng(0)
    return [{"x": rng.standard_normal((2, 3, 8, 8)).astype(np.float32)} for _ in range(count)]


def grounds(**options: object) -> SensitivityContext:
    recipe = Recipe(target="generic", saturation_safe=False, **options)  # type: ignore[arg-type]
    model = loaded(NET)
    plan = make_plan(model, recipe, TARGETS[recipe.target])
    observers = plan.observers()
    with export_observed_model(model, observers) as runnable:
        sketches = observe(Session(runnable, threads=1), observers, batches())
    params, _ = choose_params(plan, sketches, recipe)
    return SensitivityContext(model, plan, params, sketches, recipe)


def replaced(node: str, weight: NDArray[np.float32], bias: NDArray[np.floating] | None = None) -> onnx.ModelProto:
    """The network with other weights, and with a bias, of one layer."""
    proto = onnx.ModelProto.FromString(NET.SerializeToString())
    (found,) = (candidate for candidate in proto.graph.node if candidate.output[0] == node)
    for place, numbers in ((1, weight), (2, bias)):
        if numbers is not None:
            del found.input[place:]
            found.input.append(f"new_{place}")
            proto.graph.initializer.append(numpy_helper.from_array(np.float32(numbers), f"new_{place}"))
    return proto


def run_on(proto: onnx.ModelProto, fed: Sequence[dict[str, NDArray[np.float32]]] | None = None) -> NDArray[np.float32]:
    session = Session(proto.SerializeToString(), threads=1)
    return np.concatenate([session.run_all(feeds)[0] for feeds in (batches() if fed is None else fed)])


def noise(reference: NDArray[np.float32], got: NDArray[np.float32]) -> float:
    ref, other = reference.astype(np.float64), got.astype(np.float64)
    return float(np.sum((ref - other) ** 2) / np.sqrt(np.sum(ref**2) * np.sum(other**2)))


@pytest.mark.parametrize("granularity", ["per-channel", "per-tensor", "per-block"])
def test_the_noise_is_that_of_rounded_weights(granularity: str) -> None:
    """Without bias correction, what was measured is what the network gives with these weights in its file."""
    network = grounds(calibrator="minmax", bias_correction="none", weight_granularity=granularity)
    candidate_bits = dict.fromkeys(WEIGHTS, (3, 8, FLOAT_BITS))
    found = measure_sensitivities(network, candidate_bits, batches())
    reference = run_on(NET)
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in NET.graph.initializer}
    for layer in network.plan.layers:
        name = layer.node.name or ""
        stored = constants[WEIGHTS[name]]
        assert found[name].count == stored.size
        assert found[name].noise[FLOAT_BITS] == 0
        for bits in (3, 8):
            spec = replace(layer.weight, bits=bits)
            arranged = layer.arranged(stored)
            params = spec.from_range(*group_extremes(arranged, spec.granularity))
            own = constants.get(BIASES.get(name, ""))
            got = run_on(replaced(name, params.fake_quantize(arranged).reshape(stored.shape), own))
            assert found[name].noise[bits] == pytest.approx(noise(reference, got), rel=1e-3)


def test_the_noise_of_second_order_codes_is_that_on_batches_that_they_were_not_made_for() -> None:
    """All rows of the float network's own tensors are cut out by hand, and the solved layer is put into the network."""
    network, fed = grounds(calibrator="minmax"), batches(24)
    solver = LayerSolver(
        network.recipe,
        network.plan.target,
        RoundingEffort(24, rows=2**20, most_rows=2**20, most_weights=2**20, most_inputs=2**15),
    )
    found = measure_sensitivities(network, dict.fromkeys(WEIGHTS, (3,)), fed, solver)
    apart = [fed[index] for index in (7, 15, 23)]
    plain = measure_sensitivities(network, dict.fromkeys(WEIGHTS, (3,)), apart)
    reference = run_on(NET, apart)
    for layer in network.plan.layers:
        name, source = layer.node.name or "", network.params.sources[layer.node]
        shape = read_weight_shape(layer.node)
        read = tapped_outputs(layer.node.inputs[0].name or "", fed)  # type: ignore[union-attr]
        patches = PatchExtractor.of(layer.node, shape, read[0].shape)
        rows = [patches.rows(x, patches.places(np.arange(patches.positions(x.shape)))) for x in read]
        narrow = replace(layer, weight=replace(layer.weight, bits=3))
        start, _ = quantize_layer(narrow, source, "max", network.plan.target)
        solved, _ = solver.solve(
            start, source, accumulate_moments(zip(rows, rows, strict=True)), EffectiveRange(), anew=False
        )
        weight = solved.weight.dequantize(solved.codes).reshape(shape)
        got = run_on(replaced(name, weight, solved.bias), apart)
        assert found[name].noise[3] == pytest.approx(noise(reference, got), rel=1e-3)
    assert sum(layer.noise[3] for layer in found.values()) < 0.8 * sum(layer.noise[3] for layer in plain.values())


def tapped_outputs(name: str, fed: Sequence[dict[str, NDArray[np.float32]]]) -> list[NDArray[np.float32]]:
    """A tensor of the float network, batch by batch, by ONNX Runtime."""
    if name == "x":
        return [feeds["x"] for feeds in fed]
    proto = onnx.ModelProto.FromString(NET.SerializeToString())
    proto.graph.output.append(onnx.ValueInfoProto(name=name))
    session = Session(proto.SerializeToString(), threads=1)
    return [session.run([name], feeds)[0] for feeds in fed]


def test_inputs_of_the_float_network_need_no_weights_solved_anew() -> None:
    """C = H: W' = (W H + r W) (H + r I)^-1 = W, whatever the ridge."""
    network = grounds(calibrator="minmax")
    solver = LayerSolver(
        network.recipe,
        network.plan.target,
        RoundingEffort(24, rows=4, most_rows=4096, most_weights=2**20, most_inputs=2**15),
    )
    rng = np.random.default_rng(0)
    rows = [rng.standard_normal((1, 40, 27)).astype(np.float32) for _ in range(16)]
    (start,) = (chosen for chosen in network.params.layers if chosen.layer.node.name == "c")
    seen, source = accumulate_moments(zip(rows, rows, strict=True)), network.params.sources[start.layer.node]
    anew, same = (solver.solve(start, source, seen, EffectiveRange(), anew=anew)[0] for anew in (True, False))
    assert (anew.codes == same.codes).mean() > 0.99  # ties and the last digit apart
    np.testing.assert_allclose(anew.weight.scale, same.weight.scale, rtol=1e-3)


def test_fewer_bits_cost_more_and_bias_correction_less() -> None:
    candidate_bits = dict.fromkeys(WEIGHTS, (2, 4, 8))
    plain, corrected = (
        measure_sensitivities(grounds(calibrator="minmax", bias_correction=kind), candidate_bits, batches())
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
    measure_sensitivities(network, {"c": (4,), "y": (4,)}, batches(), progress=lambda *done: heard.append(done))
    assert network.model.proto().SerializeToString() == before
    assert heard == [(0, 2), (1, 2), (2, 2)]
