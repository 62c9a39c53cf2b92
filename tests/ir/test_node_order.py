"""Files whose nodes stand out of order. Oracle: the same graph in order, in ONNX Runtime."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from qconv.errors import QconvError
from qconv.ir.files import Source, read_proto
from qconv.ir.node_order import sort_nodes
from qconv.ir.original import open_original
from tests.support.models import network, random_feeds, run

BODY = "c = Conv(x, w)  r = Relu(c)  s = Sigmoid(c)  m = Mul(r, s)  y = Add(m, c)"


def reordered(proto: onnx.ModelProto, order: list[int]) -> onnx.ModelProto:
    copy = onnx.ModelProto.FromString(proto.SerializeToString())
    nodes = [onnx.NodeProto.FromString(copy.graph.node[index].SerializeToString()) for index in order]
    del copy.graph.node[:]
    copy.graph.node.extend(nodes)
    return copy


def names(proto: onnx.ModelProto) -> list[str]:
    return [node.output[0] for node in proto.graph.node]


def test_nodes_are_sorted_and_compute_the_same() -> None:
    proto = network(BODY, w=(4, 3, 3, 3))
    mixed = reordered(proto, [4, 3, 1, 2, 0])
    read = read_proto(Source("the test's model", None, mixed.SerializeToString()))
    assert names(read) == ["c", "r", "s", "m", "y"]
    feeds = random_feeds(proto)
    np.testing.assert_array_equal(run(read, feeds)["y"], run(proto, feeds)["y"])


def test_an_order_that_serves_stays() -> None:
    """Even where another node could run earlier."""
    proto = network("c = Conv(x, w)  r = Relu(c)  s = Sigmoid(x)  y = Flatten(r)", outputs=("y", "s"), w=(4, 3, 3, 3))
    before = proto.SerializeToString()
    assert not sort_nodes(proto, "it")
    assert proto.SerializeToString() == before


def test_a_node_waits_for_what_its_bodies_read() -> None:
    """A branch out of order that reads a tensor made behind its If; the runtime refuses such a file."""
    proto = network("h = Identity(x)  y = Relu(h)", x=(2, 3))
    inner = [helper.make_node("Neg", ["a"], ["b"]), helper.make_node("Abs", ["h"], ["a"])]
    branch = helper.make_graph(inner, "then", [], [helper.make_tensor_value_info("b", TensorProto.FLOAT, None)])
    other = helper.make_graph(
        [helper.make_node("Identity", ["h"], ["d"])], "else", [], [helper.make_tensor_value_info("d", 1, None)]
    )
    node = helper.make_node("If", ["yes"], ["z"], then_branch=branch, else_branch=other)
    proto.graph.node.insert(0, node)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array(True), "yes"))
    proto.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, [2, 3]))
    source = Source("the test's model", None, proto.SerializeToString())
    assert names(read_proto(source)) == ["h", "z", "y"]
    x = np.float32([[1, -2, 3], [-4, 5, -6]])
    _, found = open_original(source, 1).run_all({"x": x})
    np.testing.assert_array_equal(found, -np.abs(x))


def test_a_cycle_is_one_error() -> None:
    proto = network(BODY, w=(4, 3, 3, 3))
    proto.graph.node[0].input[0] = "m"
    with pytest.raises(QconvError, match=r"wait for each other in a cycle: (Conv c|Mul m|Relu r)"):
        read_proto(Source("the test's model", None, proto.SerializeToString()))
