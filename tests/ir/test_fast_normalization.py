"""LRN in faster operators, written and taken back. Oracles: its definition by ONNX, ONNX's reference, ONNX Runtime."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from qconv.ir.fast_forms import take_back_fast_forms
from qconv.ir.fast_normalization import (
    close_normalizations,
    find_normalization,
    open_normalization,
    read_normalization,
)
from qconv.ir.model import Model, attribute
from tests.support.models import ints, loaded, network, op_types, random_feeds, run
from tests.support.quantized import pictures, quantized

SIZES, BETAS = (1, 3, 4, 5, 11), (0.25, 0.5, 0.75, 1.0, 0.6)
NUMBERS = {"size": 5, "alpha": 0.7, "beta": 0.75, "bias": 1.5}
POWERS = {0.25: "Sqrt Sqrt ", 0.5: "Sqrt ", 0.75: "Sqrt Sqrt Mul ", 1.0: "", 0.6: "Pow "}


def lrn(x: tuple[int | str, ...] = ("N", 7, 5, 3), **instead: float) -> onnx.ModelProto:
    said = ", ".join(f"{key}={number}" for key, number in {**NUMBERS, **instead}.items())
    return network(f"y = LRN<{said}>(x)", x)


def opened(proto: onnx.ModelProto) -> Model:
    model = loaded(proto)
    assert all(open_normalization(model, node) for node in model.nodes() if node.op_type == "LRN")
    onnx.checker.check_model(model.proto(), full_check=True)
    return model


def defined(x: NDArray[np.float32], size: int, alpha: float, beta: float, bias: float) -> NDArray[np.float64]:
    """What ONNX says, in 64 bits: from floor((size - 1) / 2) channels before to ceil((size - 1) / 2) behind."""
    squares = x.astype(np.float64) ** 2
    before, after = (size - 1) // 2, size // 2
    spans = [squares[:, max(0, c - before) : c + after + 1].sum(axis=1) for c in range(x.shape[1])]
    return x / (bias + alpha / size * np.stack(spans, axis=1)) ** beta


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("size", SIZES)
def test_it_is_what_onnx_defines(size: int, beta: float) -> None:
    proto = lrn(size=size, beta=beta)
    model, feeds = opened(proto), random_feeds(proto)
    assert op_types(model) == f"Mul Reshape Conv Reshape {POWERS[beta]}Div"
    got = run(model, feeds)["y"]
    np.testing.assert_allclose(got, defined(feeds["x"], **{**NUMBERS, "size": size, "beta": beta}), rtol=1e-6)
    if size % 2:  # ONNX Runtime has no other
        np.testing.assert_allclose(got, run(proto, feeds)["y"], rtol=2e-6)


@pytest.mark.parametrize("size", SIZES)
def test_it_is_what_the_reference_computes(size: int) -> None:
    """With as many images as channels: onnx takes the number of the one for that of the other."""
    proto = lrn((6, 6, 3, 4), size=size)
    feeds = random_feeds(proto)
    (expected,) = ReferenceEvaluator(proto).run(None, feeds)
    np.testing.assert_allclose(run(opened(proto), feeds)["y"], expected, rtol=2e-6)


@pytest.mark.parametrize("shape", [("N", 4, 1, 1), (1, 1, 3, 5), (3, 2, 7, 1), ("N", 12, 1, 9)])
def test_maps_of_any_shape_and_any_batch(shape: tuple[int | str, ...]) -> None:
    proto = lrn(shape)
    model = opened(proto)
    for batch in (1, 3) if shape[0] == "N" else (int(shape[0]),):
        x = np.random.default_rng(batch).normal(size=(batch, *shape[1:])).astype(np.float32)  # type: ignore[arg-type]
        np.testing.assert_allclose(run(model, {"x": x})["y"], run(proto, {"x": x})["y"], rtol=2e-6)


def test_numbers_that_are_not_said_are_those_of_onnx() -> None:
    proto = network("y = LRN<size=3>(x)", ("N", 4, 3, 3))
    feeds = {"x": 100 * random_feeds(proto)["x"]}
    np.testing.assert_allclose(run(opened(proto), feeds)["y"], run(proto, feeds)["y"], rtol=2e-6)


@pytest.mark.parametrize(
    "proto",
    [
        lrn(("N", 4, "H", 5)),
        lrn(("N", 4, 5, "W")),
        lrn(("N", "C", 5, 5)),
        lrn(("N", 4, 5)),
        lrn(("N", 4, 5, 5, 5)),
        lrn(bias=0.0),
        lrn(bias=-1.0),
        lrn(alpha=-0.1),
    ],
    ids=["height", "width", "channels", "lines", "volumes", "no bias", "negative bias", "negative alpha"],
)
def test_what_has_no_known_size_or_may_have_no_root_is_left_alone(proto: onnx.ModelProto) -> None:
    model = loaded(proto)
    assert not open_normalization(model, model.nodes()[0])
    assert op_types(model) == "LRN"


@pytest.mark.parametrize("alpha", [0.0, 1e-4, 0.7])
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("size", SIZES)
def test_taken_back_it_is_the_lrn_that_it_was(size: int, beta: float, alpha: float) -> None:
    numbers = {"size": size, "alpha": alpha, "beta": beta, "bias": 1.5}
    model = opened(lrn(**numbers))
    close_normalizations(model)
    (node,) = model.nodes()
    assert (node.op_type, node.name, model.proto().graph.output[0].name) == ("LRN", "y", "y")
    assert {key: attribute(node, key) for key in numbers} == pytest.approx(numbers, rel=1e-6)
    assert not model.graph.initializers


def test_two_in_a_row_are_two() -> None:
    proto = network("a = Conv(x, w) b = LRN<size=5>(a) c = LRN<size=3, beta=1.0>(b) y = Mul(c, c)", w=(6, 3, 1, 1))
    model = opened(proto)
    ends = {node.name: end.name for node in model.nodes() if (end := find_normalization(node)) is not None}
    assert set(ends.values()) == {"b", "c"}
    assert all(name.partition("_")[0] == end for name, end in ends.items() if name)
    assert len(ends) == len(model.nodes()) - 2  # the Conv, whose result is normalized, and the Mul
    take_back_fast_forms(model)
    assert op_types(model) == "Conv LRN LRN Mul"


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("before", ["Conv(x, w)", "Mul(x, x)", "Div(x, x)", "Sqrt(x)"])
def test_what_makes_its_data_is_no_part_of_it(before: str, beta: float) -> None:
    model = opened(network(f"d = {before} y = LRN<size=3, beta={beta}>(d)", w=(3, 3, 1, 1)))
    first, *others = model.nodes()
    assert find_normalization(first) is None
    assert {end and end.name for end in map(find_normalization, others)} == {"y"}


FORM = """s = Mul(x, x) l = Reshape(s, line) c = Conv<dilations=[20], pads=[20,20]>(l, w, b) v = Reshape(c, map)
          r = Sqrt(v) y = Div(x, r)"""
FIXED = {"line": ints(0, 1, 60), "map": ints(-1, 3, 4, 5), "w": np.full((1, 1, 3), 0.1, np.float32), "b": np.ones(1)}


def test_the_form_is_known_wherever_it_comes_from() -> None:
    assert read_normalization(form().nodes()[-1]) is not None


@pytest.mark.parametrize(
    ("body", "instead"),
    [
        (FORM.replace("[20]", "[1]").replace("20,20", "1,1"), {}),  # of neighbours in a line of the map
        (FORM.replace("20,20", "40,0"), {}),
        (FORM.replace("Mul(x, x)", "Mul(x, k)"), {"k": 2.0}),
        (FORM.replace("Div(x, r)", "Div(s, r)"), {}),
        (FORM.replace("y = Div", "t = Mul(r, k) y = Div").replace("Div(x, r)", "Div(x, t)"), {"k": 2.0}),
        (FORM, {"w": np.float32([[[0.1, 0.2, 0.1]]])}),
    ],
    ids=["dilation", "pads", "no square", "other data", "factor", "weights"],
)
def test_others_are_left_as_they_are(body: str, instead: dict[str, NDArray]) -> None:
    model = form(body, **instead)
    before = op_types(model)
    assert all(find_normalization(node) is None for node in model.nodes())
    close_normalizations(model)
    assert op_types(model) == before


def test_a_long_row_of_products_is_looked_through_to_no_great_depth() -> None:
    """Each of them reads the one before twice."""
    squares = " ".join(f"m{n + 1} = Mul(m{n}, m{n})" for n in range(200))
    model = loaded(network(f"m0 = Sqrt(x) {squares} y = Div(x, m200)"))
    assert read_normalization(model.nodes()[-1]) is None


def form(body: str = FORM, **instead: NDArray | float) -> Model:
    constants = {**FIXED, "b": np.ones(1, np.float32), **instead}
    return loaded(network(body, ("N", 3, 4, 5), **constants))


# -- in a quantized network --------------------------------------------------------------------------------------------

NET = network(
    "c = Conv<pads=[1,1,1,1]>(x, w, b) r = Relu(c) n = LRN<size=5, alpha=0.5>(r) d = Conv(n, v) y = Relu(d)",
    ("N", 3, 8, 8),
    w=(8, 3, 3, 3),
    b=(8,),
    v=(4, 8, 1, 1),
)


def test_it_is_written_last_and_told() -> None:
    result = quantized(NET, pictures((2, 3, 8, 8))).check()
    assert "LRN" not in result.runs
    assert result.runs.count("QLinearConv") == 2
    assert [change.where for change in result.findings if change.step == "open"] == ["n"]
    assert {island.rule for island in result.audit.islands} <= {"kept", "no-kernel"}
    assert len(result.audit.islands) == 8
    assert all("LRN" in island.why for island in result.audit.islands)
    assert sum("of n, an LRN" in island.why for island in result.audit.islands) == 7
    take_back_fast_forms(result.model)
    assert [node.op_type for node in result.model.nodes()].count("LRN") == 1
    assert not {"Mul", "Sqrt", "Div"} & {node.op_type for node in result.model.nodes()}


@pytest.mark.parametrize("target", ["generic", "openvino"])
def test_other_targets_keep_it(target: str) -> None:
    assert quantized(NET, pictures((2, 3, 8, 8)), target=target).wiring.count("LRN") == 1
