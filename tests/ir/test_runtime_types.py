"""Types that onnx does not infer. Oracle: the arrays that ONNX Runtime returns."""

from __future__ import annotations

import onnx
import pytest
from onnx import TensorProto, helper

from qconv.ir.files import Source
from qconv.ir.load import load, load_unchanged
from qconv.ir.model import Model, dims, is_tensor
from qconv.ir.runtime_types import parse_type
from tests.support.grown import Grower

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
