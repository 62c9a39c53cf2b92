"""A network walked in parts gives what it gives when run as a whole."""

from __future__ import annotations

import contextlib

import numpy as np
import onnx
import pytest

from qconv.ir import stepwise
from qconv.ir.stepwise import MovedOutputs, NetworkTail, StepwiseRun
from qconv.runtime.session import Session
from qconv.storage import ArrayStore
from tests.support.models import ints, loaded, network

NETWORKS = {
    "a residual stream": "a = Conv(x, w) b = Relu(a) c = Conv(b, v) d = Add(b, c) e = Relu(d) y = Conv(e, u)",
    "a branch that is read late": "a = Conv(x, w) b = Relu(a) c = Conv(b, v) d = Conv(c, v) e = Add(d, a)"
    " y = Conv(e, u)",
    "codes": "a = Conv(x, w) q = QuantizeLinear(a, s, z) b = DequantizeLinear(q, s, z) c = Conv(b, v)"
    " d = Add(b, c) y = Conv(d, u)",
}
WEIGHTS = {
    "w": (4, 3, 1, 1),
    "v": (4, 4, 1, 1),
    "u": (5, 4, 3, 3),
    "s": np.array(0.05, np.float32),
    "z": np.array(120, np.uint8),
}


@pytest.mark.parametrize("limit", [0, 10**9])
@pytest.mark.parametrize("body", NETWORKS.values(), ids=NETWORKS)
def test_every_tensor_is_that_of_the_whole_network(body, limit) -> None:
    used = {name: numbers for name, numbers in WEIGHTS.items() if f", {name}" in body}
    proto = network(body, x=("N", 3, 6, 6), outputs=("y",), **used)
    model = loaded(proto)
    rng = np.random.default_rng(0)
    feeds = [{"x": rng.standard_normal((2, 3, 6, 6)).astype(np.float32)} for _ in range(3)]
    layers = [node for node in model.nodes() if node.op_type == "Conv"]
    for node in model.nodes():
        for value in node.outputs:
            if not value.is_graph_output():
                model.graph.outputs.append(value)
    session = Session(model.proto().SerializeToString(), optimize=False)
    del model.graph.outputs[1:]
    with contextlib.closing(ArrayStore(limit)) as store:
        walk = StepwiseRun(model, feeds, store, threads=1)
        for value in [*(node.inputs[0] for node in layers[1:]), model.graph.outputs[0]]:
            for feed, found in zip(feeds, walk.values_of(value), strict=True):
                (expected,) = session.run([value.name], feed)
                np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)
        assert store.in_memory <= limit


def test_codes_are_held_instead_of_floats() -> None:
    proto = network(NETWORKS["codes"], x=(1, 3, 6, 6), **WEIGHTS)
    model = loaded(proto)
    feeds = [{"x": np.ones((1, 3, 6, 6), np.float32)}]
    with contextlib.closing(ArrayStore(10**9)) as store:
        walk = StepwiseRun(model, feeds, store, threads=1)
        conv = next(node for node in model.nodes() if node.name == "c")
        codes, params = walk.codes_of(conv.inputs[0])
        assert params is not None
        assert codes[0].dtype == np.uint8
        assert (float(params.scale), int(params.zero_point)) == (np.float32(0.05), 120)
        walk.values_of(model.graph.outputs[0])
        assert store.in_memory <= 4 * 5 * 6 * 6 * 4 + 4 * 6 * 6


def test_outputs_that_lie_in_front_are_kept() -> None:
    """Heads, one of them read by the network behind it, and what is left to run from each place on."""
    body = "a = Conv(x, w) b = Relu(a) h = Conv(b, u) c = Conv(b, v) d = Relu(c) y = Conv(d, u)"
    proto = network(body, x=("N", 3, 6, 6), outputs=("b", "h", "y"), **{n: WEIGHTS[n] for n in "wvu"})
    model = loaded(proto)
    feeds = [{"x": np.random.default_rng(0).standard_normal((2, 3, 6, 6)).astype(np.float32)}]
    expected = Session(proto.SerializeToString(), optimize=False).run_all(feeds[0])
    layers = [node for node in model.nodes() if node.op_type == "Conv"]
    with contextlib.closing(ArrayStore(10**9)) as store:
        walk = StepwiseRun(model, feeds, store, threads=1, kept=model.graph.outputs)
        for node in layers:
            walk.values_of(node.inputs[0])
            tail = NetworkTail(walk.tail_model(model.graph.outputs), ["b", "h", "y"], threads=1)
            for found, want in zip(next(tail.run([0])), expected, strict=True):
                np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-4)


def test_weights_may_change_ahead() -> None:
    proto = network("a = Conv(x, w) y = Conv(a, v)", x=(1, 3, 4, 4), w=(4, 3, 1, 1), v=(4, 4, 1, 1))
    model = loaded(proto)
    feeds = [{"x": np.ones((1, 3, 4, 4), np.float32)}]
    with contextlib.closing(ArrayStore(10**9)) as store:
        walk = StepwiseRun(model, feeds, store, threads=1)
        last = model.nodes()[1]
        before = walk.values_of(last.inputs[0])[0].copy()
        model.set_input(last, 1, model.constant("doubled", 2 * np.eye(4, dtype=np.float32).reshape(4, 4, 1, 1)))
        np.testing.assert_allclose(walk.values_of(model.graph.outputs[0])[0], 2 * before, rtol=1e-6)


def test_a_body_reads_what_lies_outside() -> None:
    """An If whose branches read a tensor of the graph that only they read."""
    branch = (
        "then_branch = g () => (float[1,4,4,4] t) { t = Relu(a) },"
        " else_branch = h () => (float[1,4,4,4] e) { e = Neg(a) }"
    )
    text = (
        '<ir_version: 8, opset_import: ["" : 17]> g (float[1,3,4,4] x, bool c) => (float[1,4,4,4] y)'
        f" {{ a = Conv(x, w) b = If(c) <{branch}> y = Conv(b, v) }}"
    )
    proto = onnx.parser.parse_model(text)
    rng = np.random.default_rng(0)
    for name, shape in (("w", (4, 3, 1, 1)), ("v", (4, 4, 1, 1))):
        numbers = rng.standard_normal(shape).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(numbers, name))
    model = loaded(proto)
    feeds = [{"x": np.ones((1, 3, 4, 4), np.float32), "c": np.array(True)}]
    (expected,) = Session(proto.SerializeToString()).run_all(feeds[0])
    with contextlib.closing(ArrayStore(10**9)) as store:
        walk = StepwiseRun(model, feeds, store, threads=1)
        for node in model.nodes():
            if node.op_type == "Conv":
                walk.values_of(node.inputs[0])
        np.testing.assert_allclose(walk.values_of(model.graph.outputs[0])[0], expected, atol=1e-5)


def test_large_constants_are_fed(monkeypatch) -> None:
    monkeypatch.setattr("qconv.ir.stepwise.LARGE_CONSTANT_BYTES", 1)
    proto = network("a = Flatten(x) y = Gemm(a, w)", x=(1, 3, 4, 4), w=(48, 5), p=ints(1))
    model = loaded(proto)
    feeds = [{"x": np.random.default_rng(0).standard_normal((1, 3, 4, 4)).astype(np.float32)}]
    (expected,) = Session(proto.SerializeToString()).run_all(feeds[0])
    with contextlib.closing(ArrayStore(10**9)) as store:
        found = StepwiseRun(model, feeds, store, threads=1).values_of(model.graph.outputs[0])[0]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("held", [0, 2**29], ids=["as a whole", "in parts"])
def test_outputs_move_with_an_error_as_when_all_is_run(held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors before a branch, in it, on its shortcut, behind it, and where no output reads them."""
    monkeypatch.setattr(stepwise, "TAIL_BYTES", held)
    body = (
        "a = Conv(x, w) b = Add(a, e1) c = Conv(b, v) d = Add(c, e2) f = Relu(d) g = Add(b, e3) h = Add(f, g) "
        "k = Add(h, e4) z = Conv(k, v) y = Conv(g, u) m = Add(a, e5) n = Relu(m)"
    )
    errors = ["e1", "e2", "e3", "e4", "e5"]
    proto = network(body, x=("N", 3, 6, 6), outputs=("z", "y"), **{name: WEIGHTS[name] for name in "wvu"})
    for name in errors:
        sides = [f"{name}_{axis}" for axis in range(4)]
        proto.graph.input.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, sides))
    model = loaded(proto)
    rng = np.random.default_rng(0)
    whole = Session(model.proto().SerializeToString(), threads=1)
    moved = MovedOutputs.of(model, errors, ["z", "y"], name="a network", threads=1)
    assert bool(moved.tails) == bool(held)
    for count in (1, 2):
        feeds = {"x": rng.standard_normal((count, 3, 6, 6)).astype(np.float32)}
        feeds |= dict.fromkeys(errors, np.zeros((1, 1, 1, 1), np.float32))
        own = [numbers.copy() for numbers in moved.start(feeds)]
        for name in errors:
            error = rng.standard_normal((count, 4, 6, 6)).astype(np.float32)
            got = moved.by(name, error)
            for place, expected in enumerate(whole.run(["z", "y"], {**feeds, name: error})):
                np.testing.assert_allclose(got[place], expected, rtol=1e-5, atol=1e-5)
            reached = {"e1": (0, 1), "e2": (0,), "e3": (0, 1), "e4": (0,), "e5": ()}[name]
            assert all((place in reached) == (not np.array_equal(got[place], own[place])) for place in (0, 1))
