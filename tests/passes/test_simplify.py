"""Spellings that only ONNX Runtime is given. Oracle: ONNX Runtime on the network as it was."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from qconv.ir.model import Model, attribute
from qconv.passes.fold import run_float_passes
from tests.support.models import ints, loaded, network, random_feeds, run

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


ROUNDINGS = ("round_prefer_floor", "round_prefer_ceil")


def resized(factors: tuple[float, float], frame: str, rounding: str, side: int = 5, opset: int = 19) -> onnx.ModelProto:
    attributes = f'mode="nearest", coordinate_transformation_mode="{frame}", nearest_mode="{rounding}"'
    scales = np.float32([1, 1, *factors])
    return network(f"y = Resize<{attributes}>(x, , k)", x=("N", 2, side, side + 2), opset=opset, k=scales)


def form_of(model: Model) -> tuple[str, str]:
    node = next(node for node in model.nodes() if node.op_type == "Resize")
    return attribute(node, "coordinate_transformation_mode"), attribute(node, "nearest_mode")


@pytest.mark.parametrize("frame", ["half_pixel", "pytorch_half_pixel", "half_pixel_symmetric"])
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_resize_by_whole_factors_takes_the_first_of_each_block(frame: str, rounding: str) -> None:
    """Pixel for pixel, for every factor and side at which floats could round to another pixel."""
    for factor in (1, 2, 3, 4, 5, 7, 8, 16):
        for side in (1, 2, 13, 127):
            proto = resized((factor, 2), frame, rounding, side)
            model = loaded(proto)
            run_float_passes(model, for_ort=True)
            assert form_of(model) == ("asymmetric", "floor")
            feeds = random_feeds(proto)
            assert np.array_equal(run(model, feeds)["y"], run(proto, feeds)["y"])


def test_resize_to_sizes_is_by_whole_factors_where_they_are() -> None:
    for sizes, known in (([2, 3, 8, 18], True), ([2, 3, 8, 17], False), ([2, 3, 2, 6], False)):
        proto = network('y = Resize<mode="nearest">(x, , , k)', x=(2, 3, 4, 6), k=ints(*sizes))
        model = loaded(proto)
        run_float_passes(model, for_ort=True)
        assert (form_of(model)[1] == "floor") == known
        feeds = random_feeds(proto)
        assert np.array_equal(run(model, feeds)["y"], run(proto, feeds)["y"])


@pytest.mark.parametrize(
    ("factors", "frame", "rounding"),
    [
        ((1.5, 2), "half_pixel", "round_prefer_floor"),
        ((0.5, 0.5), "half_pixel", "round_prefer_floor"),
        ((2, 2), "half_pixel", "ceil"),
        ((2, 2), "asymmetric", "round_prefer_floor"),
        ((2, 2), "align_corners", "round_prefer_floor"),
    ],
)
def test_other_resizes_stay(factors: tuple[float, float], frame: str, rounding: str) -> None:
    model = loaded(resized(factors, frame, rounding))
    run_float_passes(model, for_ort=True)
    assert form_of(model) == (frame, rounding)


def test_other_runtimes_keep_their_form_of_resize() -> None:
    model = loaded(resized((2, 2), "half_pixel", "round_prefer_floor"))
    run_float_passes(model)
    assert form_of(model) == ("half_pixel", "round_prefer_floor")


MAPS = {
    "conv": ("a = Conv(x, w)", True),
    "activation": ("c = Conv(x, w) a = Relu(c)", True),
    "sum": ("c = Conv(x, w) d = Conv(x, w) a = Add(c, d)", True),
    "input": ("a = Relu(x)", False),
    "moved": ("c = Conv(x, w) a = Transpose<perm=[0,1,3,2]>(c)", False),
}


@pytest.mark.parametrize("kind", MAPS)
@pytest.mark.parametrize("side", [6, "H"])
def test_the_maximum_of_what_layers_make_becomes_a_pool(kind: str, side: int | str) -> None:
    """A MaxPool of integers is fast where pixels lie together; its window has to be known."""
    body, layered = MAPS[kind]
    proto = network(f"{body} y = GlobalMaxPool(a)", x=("N", 3, side, side), w=(3, 3, 1, 1))
    model = loaded(proto)
    run_float_passes(model, for_ort=True)
    assert ("MaxPool" in {node.op_type for node in model.nodes()}) == (layered and side == 6)
    feeds = random_feeds(proto)
    assert np.array_equal(run(model, feeds)["y"], run(proto, feeds)["y"])
