"""Types that onnx does not infer. Oracle: the arrays that ONNX Runtime returns."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from qconv.errors import QconvError
from qconv.ir.files import Source
from qconv.ir.load import load, load_unchanged
from qconv.ir.model import Model, dims, is_tensor
from qconv.ir.runtime_types import infer_shapes, parse_type, settle_pools
from qconv.runtime.session import Session
from tests.support.grown import Grower
from tests.support.libraries import skip_without

CONTRIB = "com.microsoft"


def values(model: Model) -> dict[str, tuple[int | None, ...] | None]:
    """The shape of every result of the main graph that is a tensor of floats."""
    made = [value for node in model.nodes() for value in node.outputs]
    assert all(value.type is not None for value in made)
    return {value.name or "": None if dims(value) is None else tuple(dims(value)) for value in made if is_tensor(value)}


@pytest.mark.parametrize("read", [lambda proto, source: load(proto, source)[0], load_unchanged])
def test_operators_of_the_runtime_and_all_behind_them_get_types(read) -> None:
    g = Grower(0)
    x = g.input([1, 3, 8, 8])
    t = g.op("Gelu", g.conv(x, 3, 4), domain=CONTRIB)
    weight = g.const(g.weights(4, 4, 3, 3))
    t = g.op("FusedConv", t, weight, domain=CONTRIB, activation="Relu", pads=[1, 1, 1, 1])
    t = g.conv(t, 4, 5)
    g.output(t, None)
    found = values(read(g.model(), Source("it", None, b"")))
    assert list(found.values()) == [(1, 4, 8, 8)] * 3 + [(1, 5, 8, 8)]


def test_types_of_integers_and_sequences() -> None:
    """A sequence of an operator that onnx does not know is no tensor, and integers are no floats."""
    g = Grower(0)
    x = g.input([2, 6])
    t = g.op("Gelu", x, domain=CONTRIB)
    pieces = g.op("SplitToSequence", t, axis=1)
    places = g.op("ArgMax", t)
    g.output(g.op("ConcatFromSequence", pieces, axis=1), None)
    g.output(places, None, TensorProto.INT64)
    model = load(g.model(), Source("it", None, b""))[0]
    made = {node.op_type: node.outputs[0] for node in model.nodes()}
    assert not is_tensor(made["SplitToSequence"])
    assert made["ArgMax"].dtype == TensorProto.INT64


@pytest.mark.parametrize(
    ("word", "kind"),
    [
        ("tensor(float)", helper.make_tensor_type_proto(TensorProto.FLOAT, [2, None])),
        ("tensor(bfloat16)", helper.make_tensor_type_proto(TensorProto.BFLOAT16, [2, None])),
        ("seq(tensor(int64))", helper.make_sequence_type_proto(helper.make_tensor_type_proto(TensorProto.INT64, None))),
    ],
)
def test_words_of_the_runtime(word: str, kind: onnx.TypeProto) -> None:
    assert parse_type(word, (2, None)) == kind


def random_pool(rng: np.random.Generator, opset: int) -> tuple[str, dict[str, Any], tuple[int, int]]:
    """A pool, and sides of a map that its kernel fits into."""
    kind = str(rng.choice(["MaxPool", "AveragePool"]))
    kernel, strides = rng.integers(1, 6, 2), rng.integers(1, 6, 2)
    dilated = rng.random() < 0.5 and (kind == "MaxPool" or opset >= 19)
    dilations = rng.integers(1, 4, 2) if dilated else np.ones(2, int)
    told: dict[str, Any] = {"kernel_shape": kernel.tolist(), "strides": strides.tolist(), "ceil_mode": 1}
    told |= {"dilations": dilations.tolist()} if dilated else {}
    padding = str(rng.choice(["", "SAME_UPPER", "SAME_LOWER", "VALID"]))
    told |= {"auto_pad": padding} if padding else {"pads": [int(rng.integers(0, k)) for k in (*kernel, *kernel)]}
    if padding.startswith("SAME") and dilated:
        told["ceil_mode"] = int(rng.integers(0, 2))
    sides = (kernel - 1) * dilations + 1 + rng.integers(0, 12, 2)
    return kind, told, (int(sides[0]), int(sides[1]))


@pytest.mark.parametrize("opset", [13, 17, 19, 22])
def test_pools_have_the_sizes_that_the_runtime_gives_them(opset: int) -> None:
    """One behind the other, so that an error would reach the second. Written out, they give the same numbers."""
    if opset == 22:
        skip_without("onnxruntime", "1.22", "this opset does")
    rng, differing, written = np.random.default_rng(opset), 0, 0
    for _ in range(150):
        kind, told, sides = random_pool(rng, opset)
        first = helper.make_node(kind, ["x"], ["a"], **told)
        second = helper.make_node("MaxPool", ["a"], ["y"], kernel_shape=[1, 1], strides=[2, 2], ceil_mode=1)
        x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 1, *sides])
        outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "ay"]
        graph = helper.make_graph([first, second], "g", [x], outputs)
        proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
        session = Session(proto.SerializeToString(), optimize=False, threads=1)
        fed = {"x": rng.normal(size=(1, 1, *sides)).astype(np.float32)}
        try:
            results = session.run(["a", "y"], fed)
        except QconvError:  # no pool of the runtime has negative pads
            continue
        ran = [list(result.shape) for result in results]
        outputs = [infer(proto).graph.output for infer in (infer_shapes, onnx.shape_inference.infer_shapes)]
        found, plain = ([[side.dim_value for side in o.type.tensor_type.shape.dim] for o in outs] for outs in outputs)
        assert found == ran, (kind, told, sides)
        differing += plain != ran
        settled = settle_pools(proto)
        assert (settled == 0) or plain != ran
        again = Session(proto.SerializeToString(), optimize=False, threads=1).run(["a", "y"], fed)
        for result, expected in zip(again, results, strict=True):
            np.testing.assert_allclose(result, expected, rtol=1e-6)
        written += settled
    assert differing >= 10
    assert written >= differing // 2


def test_sides_that_are_not_known_stay_unknown() -> None:
    pool = helper.make_node("MaxPool", ["x"], ["y"], kernel_shape=[2, 2], strides=[3, 3], ceil_mode=1)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 1, "h", 18])
    graph = helper.make_graph([pool], "g", [x], [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    inferred = infer_shapes(proto)
    assert inferred.graph.node == proto.graph.node
    assert [side.dim_value for side in inferred.graph.output[0].type.tensor_type.shape.dim][:3] == [1, 1, 0]
