"""Copies of the onnx package's light models with weights that mean something.

As shipped their weights are one constant, so that every picture gives the same output. Here they become seeded
He-normal draws; BatchNorm gets a gain near 1, a shift near 0 and the mean and variance that its input really has; the
last layer is centred, so that the class found depends on the picture.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import NodeProto, helper, numpy_helper

from tests.bench.cases import Array

LOGIT_SPREAD = 2.0


def he_copy(source: Path, out: Path, inputs: Sequence[Array], seed: int = 0) -> None:
    """Write the copy of `source` at `out`; `inputs` are the pictures that its statistics are taken from."""
    model = onnx.load(source)
    weights = _own_constants(model)
    _draw(model, weights, np.random.default_rng(seed))
    _measure_batch_norms(model, weights, inputs)
    _centre_last_layer(model, weights, inputs)
    _store(model, weights)
    onnx.checker.check_model(model)
    onnx.save(model, out)


Weights = dict[str, NDArray[Any]]


def _own_constants(model: onnx.ModelProto) -> Weights:
    """Take initializers and ConstantOfShape results out of the graph, as arrays by name."""
    graph = model.graph
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for node in [n for n in graph.node if n.op_type == "ConstantOfShape"]:
        shape = weights.pop(node.input[0])
        weights[node.output[0]] = np.zeros(shape.astype(int), np.float32)
        graph.node.remove(node)
    listed = [value for value in graph.input if value.name not in weights and not value.name.endswith("__SHAPE")]
    del graph.initializer[:], graph.input[:]
    graph.input.extend(listed)
    model.ir_version = 4  # from here on initializers need not be listed as inputs
    return weights


def _store(model: onnx.ModelProto, weights: Weights) -> None:
    del model.graph.initializer[:]
    model.graph.initializer.extend(numpy_helper.from_array(np.ascontiguousarray(w), n) for n, w in weights.items())


def _draw(model: onnx.ModelProto, weights: Weights, rng: np.random.Generator) -> None:
    """Fill every float constant by the part that it plays for its reader."""
    for node in model.graph.node:
        for position, name in enumerate(node.input):
            origin = _origin(model, name)
            if origin in weights and weights[origin].dtype == np.float32:
                centre, spread = _part(node, position, weights[origin].shape)
                weights[origin] = rng.normal(centre, spread, weights[origin].shape).astype(np.float32)


def _origin(model: onnx.ModelProto, name: str) -> str:
    """The constant behind a Reshape or an Unsqueeze; the name itself where there is none."""
    behind = (n.input[0] for n in model.graph.node if n.op_type in ("Reshape", "Unsqueeze") and n.output[0] == name)
    return next(behind, name)


def _part(node: NodeProto, position: int, shape: tuple[int, ...]) -> tuple[float, float]:
    """Centre and standard deviation of the constant at an input of a node."""
    if node.op_type in ("Conv", "Gemm") and position == 1:
        fan_in = np.prod(shape[1:]) if node.op_type == "Conv" else shape[-1 if _flag(node, "transB") else -2]
        return 0.0, float(np.sqrt(2 / fan_in))
    if node.op_type == "BatchNormalization":
        return ((1.0, 0.1), (0.0, 0.1), (0.0, 0.0), (1.0, 0.0))[position - 1]
    return (1.0, 0.1) if node.op_type == "Mul" else (0.0, 0.05)


def _flag(node: NodeProto, name: str) -> int:
    return next((a.i for a in node.attribute if a.name == name), 0)


def _run(
    model: onnx.ModelProto, weights: Weights, taps: Sequence[str], inputs: Iterable[Array]
) -> Iterator[list[Array]]:
    """The tensors `taps`, input by input."""
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    _store(probe, weights)
    known = {value.name for value in probe.graph.output}
    probe.graph.output.extend(onnx.ValueInfoProto(name=name) for name in taps if name not in known)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(probe.SerializeToString(), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    for x in inputs:
        yield session.run(list(taps), {name: x})


def _measure_batch_norms(model: onnx.ModelProto, weights: Weights, inputs: Sequence[Array]) -> None:
    """One pass in which each BatchNorm normalizes by the picture at hand shows all their inputs as they will be."""
    norms = [node for node in model.graph.node if node.op_type == "BatchNormalization"]
    if not norms:
        return
    trial, trial_weights = onnx.ModelProto(), dict(weights)
    trial.CopyFrom(model)
    nodes: list[NodeProto] = []
    for node in trial.graph.node:
        nodes.extend(_by_picture(node, trial_weights) if node.op_type == "BatchNormalization" else [node])
    del trial.graph.node[:]
    trial.graph.node.extend(nodes)
    taps = [node.input[0] for node in norms]
    moments = [
        [(x.mean((0, 2, 3)), np.square(x).mean((0, 2, 3))) for x in maps]
        for maps in _run(trial, trial_weights, taps, inputs)
    ]
    for node, pairs in zip(norms, zip(*moments, strict=True), strict=True):
        means, squares = np.mean(pairs, axis=0)  # (C,) each
        weights[node.input[3]] = means.astype(np.float32)
        weights[node.input[4]] = (squares - means**2).clip(1e-3).astype(np.float32)


def _by_picture(node: NodeProto, weights: Weights) -> list[NodeProto]:
    x, gain, shift, out = node.input[0], node.input[1], node.input[2], node.output[0]
    for name in (gain, shift):
        weights[f"{name}_map"] = weights[name].reshape(-1, 1, 1)
    return [
        helper.make_node("MeanVarianceNormalization", [x], [f"{out}_normal"], axes=[0, 2, 3]),
        helper.make_node("Mul", [f"{out}_normal", f"{gain}_map"], [f"{out}_scaled"]),
        helper.make_node("Add", [f"{out}_scaled", f"{shift}_map"], [out]),
    ]


def _centre_last_layer(model: onnx.ModelProto, weights: Weights, inputs: Sequence[Array]) -> None:
    """Take the mean over pictures off each class score, and bring what is left to a sane spread."""
    last = [node for node in model.graph.node if node.op_type in ("Conv", "Gemm")][-1]
    if len(last.input) < 3:
        last.input.append(f"{last.input[1]}_bias")
        weights[last.input[2]] = np.zeros(weights[last.input[1]].shape[0], np.float32)
    weight, bias = _origin(model, last.input[1]), _origin(model, last.input[2])
    scores = np.concatenate([taps[0] for taps in _run(model, weights, [last.output[0]], inputs)])  # (n, classes, ...)
    axes = tuple(axis for axis in range(scores.ndim) if axis != 1)
    weights[bias] = weights[bias] - scores.mean(axes).reshape(weights[bias].shape)
    final = next((n.input[0] for n in model.graph.node if n.op_type == "Softmax"), model.graph.output[0].name)
    spreads = [taps[0].std() for taps in _run(model, weights, [final], inputs)]
    factor = np.float32(LOGIT_SPREAD / np.median(spreads))
    for name in (weight, bias):
        weights[name] = weights[name] * factor
