"""Spellings that only ONNX Runtime is given. Oracle: ONNX Runtime on the network as it was."""

from __future__ import annotations

import re

import numpy as np
import onnx
import pytest

from qconv.ir.model import Model, attribute
from qconv.passes.fold import run_float_passes
from tests.support.models import ints, loaded, network, op_types, random_feeds, run
from tests.support.quantized import SAME, pictures, quantized

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


FAR = 2**63 - 1
PLACES = {
    "o": ints(0),
    "oo": ints(0, 0),
    "i": ints(1),
    "far": ints(FAR),
    "fars": ints(FAR, 2**31 - 1),
    "beyond": ints(1000),
    "ends": ints(7, 1000),
    "n": ints(1),
    "h": ints(2),
    "u": ints(3),
    "nh": ints(1, 2),
    "hu": ints(2, 3),
    "behind": ints(-1, -2),
    "one": ints(1),
    "two": ints(2),
    "three": ints(3),
    "both": ints(2, 3),
    "back": ints(-2),
    "short": ints(6),
    "cut": ints(-1),
}
"""Constants of Slices of (N, 4, 7, 10): starts, ends, axes and steps."""


def stepped(
    body: str, x: tuple[int | str, ...] = ("N", 3, 7, 10), outputs: tuple[str, ...] = ("y",)
) -> onnx.ModelProto:
    read = set(re.findall(r"\w+", body))
    constants = {name: numbers for name, numbers in {**PLACES, "w": (4, 3, 1, 1)}.items() if name in read}
    return network(body, x, outputs, **constants)  # type: ignore[arg-type]


def pools(model: Model) -> list[list[int]]:
    """The strides of pools of single places; no Slice is left beside them."""
    found = [node for node in model.nodes() if node.op_type == "MaxPool"]
    assert not found or "Slice" not in op_types(model)
    return [attribute(node, "strides") for node in found if attribute(node, "kernel_shape") == [1, 1]]


@pytest.mark.parametrize(
    ("slices", "strides"),
    [
        ("a = Slice(c, o, far, h, two) y = Slice(a, o, far, u, two)", [2, 2]),
        ("a = Slice(c, o, beyond, u, two) y = Slice(a, o, beyond, h, three)", [3, 2]),
        ("a = Slice(c, o, far, h, two) y = Slice(a, o, far, h, three)", [6, 1]),
        ("a = Slice(c, o, far, h, two) b = Slice(a, o, far, u, two) r = Add(b, b) y = Slice(r, o, far, u, two)", None),
        ("y = Slice(c, oo, ends, hu, both)", [2, 3]),
        ("y = Slice(c, oo, fars, behind, both)", [3, 2]),
        ("y = Slice(c, o, beyond, u, three)", [1, 3]),
        ("r = Relu(c) y = Slice(r, o, far, h, two)", [2, 1]),
    ],
)
@pytest.mark.parametrize("x", [("N", 3, 7, 10), ("N", 3, 8, 13), ("N", 3, 1, 2)])
def test_every_nth_place_of_what_layers_make_is_a_pool_of_single_places(
    slices: str, strides: list[int] | None, x: tuple[int | str, ...]
) -> None:
    proto = stepped(f"c = Conv(x, w) {slices}", x)
    model, feeds = loaded(proto), random_feeds(proto)
    if x[2] == 8 and "ends" in slices:
        strides = []  # the Slice ends at 7
    run_float_passes(model, for_ort=True)
    assert pools(model) == ([[2, 2], [1, 2]] if strides is None else [strides] if strides else [])
    assert np.array_equal(run(model, feeds)["y"], run(proto, feeds)["y"])
    onnx.checker.check_model(model.proto(), full_check=True)


@pytest.mark.parametrize(("end", "known"), [("far", True), ("beyond", False)])
def test_a_size_that_is_open_ends_where_an_end_is_the_farthest(end: str, known: bool) -> None:
    proto = stepped(f"c = Conv(x, w) y = Slice(c, o, {end}, h, two)", ("N", 3, "H", "W"))
    model = loaded(proto)
    run_float_passes(model, for_ort=True)
    assert pools(model) == ([[2, 1]] if known else [])
    x = np.random.default_rng(0).normal(size=(2, 3, 9, 4)).astype(np.float32)
    assert np.array_equal(run(model, {"x": x})["y"], run(proto, {"x": x})["y"])


OTHER_SLICES = {
    "later start": ("c = Conv(x, w) y = Slice(c, i, far, h, two)", ("y",)),
    "backwards": ("c = Conv(x, w) y = Slice(c, cut, far, h, back)", ("y",)),
    "backwards from the first": ("c = Conv(x, w) y = Slice(c, o, far, h, back)", ("y",)),
    "channels and rows": ("c = Conv(x, w) y = Slice(c, oo, fars, nh, both)", ("y",)),
    "channels before": ("c = Conv(x, w) a = Slice(c, o, far, n, two) y = Slice(a, o, far, h, two)", ("y",)),
    "shorter": ("c = Conv(x, w) y = Slice(c, o, short, h, two)", ("y",)),
    "without the last": ("c = Conv(x, w) y = Slice(c, o, cut, h, two)", ("y",)),
    "computed end": (
        "c = Conv(x, w) m = ReduceMax<keepdims=0>(x) k = Cast<to=7>(m) e = Reshape(k, n) y = Slice(c, o, e, h, two)",
        ("y",),
    ),
    "input": ("y = Slice(x, o, far, h, two)", ("y",)),
    "made of the input": ("r = Relu(x) a = Slice(r, o, far, h, two) y = Slice(a, o, far, u, two)", ("y",)),
    "moved": ("c = Conv(x, w) t = Transpose<perm=[0,1,3,2]>(c) y = Slice(t, o, far, h, two)", ("y",)),
    "read between": (
        "c = Conv(x, w) a = Slice(c, o, far, h, two) y = Slice(a, o, far, u, two) z = Relu(a)",
        ("y", "z"),
    ),
    "returned between": ("c = Conv(x, w) a = Slice(c, o, far, h, two) y = Slice(a, o, far, u, two)", ("y", "a")),
}


@pytest.mark.parametrize("kind", OTHER_SLICES)
def test_other_slices_stay(kind: str) -> None:
    body, outputs = OTHER_SLICES[kind]
    proto = stepped(body, outputs=outputs)
    model, feeds = loaded(proto), random_feeds(proto)
    run_float_passes(model, for_ort=True)
    assert "MaxPool" not in op_types(model)
    assert op_types(model).split().count("Slice") == body.count("Slice")
    for name, numbers in run(proto, feeds).items():
        assert np.array_equal(run(model, feeds)[name], numbers)


SHORTCUT = network(
    f"""c = Conv<{SAME}>(x, w) r = Relu(c) a = Slice(r, o, far, h, two) b = Slice(a, o, far, u, two)
        s = Pad(b, wider) d = Conv<{SAME}, strides=[2,2]>(r, v) e = Add(d, s) y = Relu(e)""",
    ("N", 3, 9, 8),
    w=(4, 3, 3, 3),
    v=(8, 4, 3, 3),
    wider=ints(0, 2, 0, 0, 0, 2, 0, 0),
    **{name: PLACES[name] for name in ("o", "far", "h", "u", "two")},  # type: ignore[arg-type]
)


def test_the_shortcut_of_a_residual_network_is_a_pool_of_codes() -> None:
    result = quantized(SHORTCUT, pictures((2, 3, 9, 8))).check()
    assert result.audit.islands == ()
    assert "Slice" not in result.runs
    (pool,) = [node for node in result.optimized.proto.graph.node if "MaxPool" in node.op_type]
    assert result.optimized.writers[pool.input[0]].op_type in ("QLinearConv", "Transpose")


def test_other_runtimes_keep_their_slices() -> None:
    model = loaded(SHORTCUT)
    run_float_passes(model)
    assert op_types(model).split().count("Slice") == 2
    assert quantized(SHORTCUT, pictures((2, 3, 9, 8)), target="openvino").check().wiring.count("MaxPool") == 0
