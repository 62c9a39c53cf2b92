"""Networks that draw at random, from a seed: what is found, and what is stilled for statistics."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import helper

from qconv import Recipe
from qconv.analysis.evaluate import evaluate
from qconv.analysis.evaluation import EvaluationOptions
from qconv.config.data_options import DataOptions
from qconv.ir.chance import describe_random_nodes, find_random_nodes, still
from qconv.ir.files import Source
from qconv.ir.load import load_unchanged
from qconv.ir.subgraph import runnable_with_outputs
from qconv.pipeline.quantize import quantize
from qconv.reporter import Reporter
from qconv.runtime.session import Session
from tests.support.models import loaded, network

DRAWS = int(os.environ.get("QCONV_DRAWS", "60"))

SOURCES = {
    "Dropout(r, ratio, on)": True,
    "Dropout(r, ratio, off)": False,
    "Dropout(r, none, on)": False,
    "Dropout(r)": False,
    "RandomNormalLike(r)": True,
    "RandomUniformLike<low = 0.0, high = 1.0>(r)": True,
    "Bernoulli(s)": True,
    "Relu(r)": False,
}
CONSTANTS = {
    "ratio": np.float32(0.5),
    "none": np.float32(0.0),
    "on": np.array(True),
    "off": np.array(False),
}


def draw(seed: int) -> tuple[onnx.ModelProto, list[str]]:
    """A chain of layers with some of the sources between them. Returns also the names of those that draw."""
    rng = np.random.default_rng(seed)
    body, name, random = "", "x", []
    for index in range(int(rng.integers(1, 4))):
        source = str(rng.choice(list(SOURCES)))
        body += f" r{index} = Conv<pads=[1,1,1,1]>({name}, w) s{index} = Sigmoid(r{index})"
        call = source.replace("(r", f"(r{index}").replace("(s", f"(s{index}")
        body += f" d{index} = {call} a{index} = Add(d{index}, r{index})"
        name = f"a{index}"
        if SOURCES[source]:
            random.append(f"d{index}")
    used = {n: np.asarray(v) for n, v in CONSTANTS.items() if f", {n}" in body}
    weights = rng.normal(size=(3, 3, 3, 3)).astype(np.float32) / 5
    return network(f"{body} y = Sigmoid({name})", (1, 3, 6, 6), w=weights, **used), random


def run(data: str | bytes) -> NDArray:
    x = np.random.default_rng(0).normal(size=(1, 3, 6, 6)).astype(np.float32)
    (found,) = Session(data, optimize=False).run(["y"], {"x": x})
    return found


@pytest.mark.parametrize("seed", range(DRAWS))
def test_random_nodes_are_found_and_stilled(seed: int) -> None:
    """What is run for statistics is the same twice, in sessions of their own, and the model itself keeps its draws."""
    proto, random = draw(seed)
    model = loaded(proto)
    assert [node.outputs[0].name for node in find_random_nodes(model)] == random
    assert bool(describe_random_nodes(model)) == bool(random)
    with runnable_with_outputs(model, ()) as runnable:
        np.testing.assert_array_equal(run(runnable), run(runnable))
    kinds = [node.op_type for node in model.nodes()]
    assert kinds == [node.op_type for node in loaded(proto).nodes()]
    session = Session(model.proto().SerializeToString(), optimize=False)
    x = {"x": np.random.default_rng(0).normal(size=(1, 3, 6, 6)).astype(np.float32)}
    assert np.array_equal(session.run_all(x)[0], session.run_all(x)[0]) == (not random)


@pytest.mark.parametrize("on", [False, True])
def test_a_constant_node_says_whether_a_dropout_drops(on: bool) -> None:
    """As it stands in a file, before constants are lifted."""
    proto = network("y = Dropout(x, ratio, on)", (1, 3, 6, 6), ratio=np.float32(0.5), on=np.array(on))
    kept = {tensor.name: onnx.TensorProto.FromString(tensor.SerializeToString()) for tensor in proto.graph.initializer}
    del proto.graph.initializer[:]
    nodes = [helper.make_node("Constant", [], [name], value=tensor) for name, tensor in kept.items()]
    whole = [*nodes, *(onnx.NodeProto.FromString(node.SerializeToString()) for node in proto.graph.node)]
    del proto.graph.node[:]
    proto.graph.node.extend(whole)
    model = load_unchanged(proto, Source("net.onnx", None, b""))
    assert bool(describe_random_nodes(model)) == on


def test_draws_inside_bodies_are_stilled() -> None:
    inside = helper.make_graph([helper.make_node("RandomNormal", [], ["n"], shape=[2])], "body", [], [])
    graph = helper.make_graph(
        [helper.make_node("If", ["c"], ["y"], then_branch=inside, else_branch=inside)], "g", [], []
    )
    still(graph)
    for attribute in graph.node[0].attribute:
        assert [a.name for a in attribute.g.node[0].attribute] == ["shape", "seed"]


def test_a_dropout_in_training_mode_is_told_with_its_size_and_changes_no_byte(tmp_path: Path) -> None:
    """It is half of the signal that is dropped: E[(x - 2 x b)^2] = x^2, so that two runs are some 0 dB apart."""
    rng = np.random.default_rng(0)
    for index in range(8):
        np.save(tmp_path / f"{index}.npy", rng.normal(size=(3, 6, 6)).astype(np.float32))
    body = "c = Conv<pads=[1,1,1,1]>(x, w) r = Relu(c) d = Dropout(r, ratio, on) e = Conv(d, w) y = Relu(e)"
    constants = {name: np.asarray(CONSTANTS[name]) for name in ("ratio", "on")}
    source = tmp_path / "random.onnx"
    source.write_bytes(network(body, (1, 3, 6, 6), w=(3, 3, 3, 3), **constants).SerializeToString())
    heard: list[str] = []
    results = [
        quantize(source, None, Recipe(threads=1), DataOptions((str(tmp_path),), glob="*.npy"), Reporter(heard.append))
        for _ in range(2)
    ]
    assert results[0][1] == results[1][1]
    told = next(text for text in heard if text.startswith("Dropout 'd' is in training mode"))
    decibel = float(re.search(r"SQNR (-?[0-9.]+) dB", told)[1])  # type: ignore[index]
    assert -10 < decibel < 20
    out = tmp_path / "q.onnx"
    out.write_bytes(results[0][1] or b"")
    heard.clear()
    asked = EvaluationOptions(DataOptions((str(tmp_path),), glob="*.npy"), Source(str(source), source), threads=1)
    evaluate(Source(str(out), out), asked, Reporter(heard.append))
    assert [text for text in heard if text.startswith("Dropout 'd' is in training mode")]
    sqnr = results[0][0].verify.sqnr_db
    assert sqnr is not None
    assert sqnr > 25


def test_a_draw_that_changes_nothing_is_not_told(tmp_path: Path) -> None:
    for index in range(8):
        np.save(tmp_path / f"{index}.npy", np.random.default_rng(index).normal(size=(3, 6, 6)).astype(np.float32))
    body = "c = Conv<pads=[1,1,1,1]>(x, w) n = RandomNormalLike(c) z = Mul(n, nothing) y = Add(c, z)"
    source = tmp_path / "random.onnx"
    proto = network(body, (1, 3, 6, 6), w=(3, 3, 3, 3), nothing=np.float32(0))
    source.write_bytes(proto.SerializeToString())
    heard: list[str] = []
    data = DataOptions((str(tmp_path),), glob="*.npy")
    quantize(source, None, Recipe(threads=1), data, Reporter(heard.append))
    evaluate(Source("", source), EvaluationOptions(data, Source("", source), threads=1), Reporter(heard.append))
    assert not [text for text in heard if "random" in text]
