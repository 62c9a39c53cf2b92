"""The rest of a network behind some tensors, as it runs where these alone are rounded, or one layer is replaced."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from qconv.quant import QuantParams, QuantSpec
from qconv.runtime import Session
from qconv.walk import AT_ONCE, Part, each

NOTHING: Mapping[str, NDArray[Any]] = MappingProxyType({})
RAW = "_not_rounded"
LOW, HIGH, SCALE, ZERO = "rounded_low", "rounded_high", "rounded_scale", "rounded_zero"


class Behind:
    """part: what is run. outputs: of it. rounded: tensors that are fed to it or made in it. spec: of their codes.

    opened: a node, and names for those of its inputs that `run` is handed, by their places.
    Scale and zero point are inputs of the model: one session serves for all that is tried out. Codes of fewer bits than
    their container are clipped in float before.
    """

    def __init__(
        self,
        part: Part,
        outputs: Sequence[str],
        rounded: Sequence[str],
        spec: QuantSpec | None = None,
        opened: tuple[str, Mapping[int, str]] = ("", MappingProxyType({})),
        *,
        threads: int | None,
    ) -> None:
        self._part, self._outputs = part, list(outputs)
        model = onnx.load_from_string(part.proto)
        steps = {name: _copied(name) for name in outputs if name in part.held} | {n: _rounding(n) for n in rounded}
        self._raw = frozenset(steps)
        _insert(model.graph, steps)
        _open(model.graph, *opened)
        if spec is not None:
            code = onnx.helper.np_dtype_to_tensor_dtype(spec.dtype)
            kinds = dict.fromkeys((LOW, HIGH, SCALE), onnx.TensorProto.FLOAT) | {ZERO: code}
            model.graph.input.extend(onnx.helper.make_tensor_value_info(n, kind, ()) for n, kind in kinds.items())
        self._session = Session(
            model.SerializeToString(),
            name="a part of the model",
            threads=threads,
            at_once=AT_ONCE,
            integer_kernels=False,
        )

    def run(
        self, batches: Iterable[int], params: QuantParams | None = None, fed: Mapping[str, NDArray[Any]] = NOTHING
    ) -> Iterator[list[NDArray[Any]]]:
        """The outputs of these batches, one after the other, with the tensors rounded like this.

        fed: numbers for what was opened.
        """
        own = dict(fed)
        if params is not None:
            low, high = params.code_range()
            numbers = {LOW: low, HIGH: high, SCALE: params.scale, ZERO: params.zero_point}
            own |= {name: np.asarray(number) for name, number in numbers.items()}
        return each(self._session, self._outputs, (self._feed(index) | own for index in batches))

    def _feed(self, index: int) -> dict[str, NDArray[Any]]:
        return {_raw(name, self._raw): x for name, x in self._part.feed(index).items()}


def _raw(name: str, raw: Collection[str]) -> str:
    return name + RAW if name in raw else name


def _insert(graph: onnx.GraphProto, steps: Mapping[str, Sequence[onnx.NodeProto]]) -> None:
    """Put nodes behind whatever feeds or makes the tensors of these names; who reads them reads what comes of it."""
    nodes: list[onnx.NodeProto] = []
    for value in graph.input:
        nodes += steps.get(value.name, ())
        value.name = _raw(value.name, steps)
    for node in graph.node:
        made = list(node.output)
        del node.output[:]
        node.output.extend(_raw(name, steps) for name in made)
        nodes += [node, *(step for name in made for step in steps.get(name, ()))]
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)


def _open(graph: onnx.GraphProto, name: str, inputs: Mapping[int, str]) -> None:
    """Make the node of this name read new float inputs of the graph at these places."""
    kind = onnx.TensorProto.FLOAT
    graph.input.extend(onnx.helper.make_tensor_value_info(wish, kind, None) for wish in inputs.values())
    for node in (node for node in graph.node if inputs and node.name == name):
        for index, wish in inputs.items():
            node.input.extend([""] * (index + 1 - len(node.input)))
            node.input[index] = wish


def up_to(most: int, outputs: Iterator[list[NDArray[Any]]]) -> list[list[NDArray[Any]]]:
    """The first of them, one at least, that go into so many bytes."""
    found: list[list[NDArray[Any]]] = []
    size = 0
    for arrays in outputs:
        found.append(arrays)
        size += sum(array.nbytes for array in arrays if isinstance(array, np.ndarray))
        if size >= most:
            break
    return found


def _copied(name: str) -> list[onnx.NodeProto]:
    return [onnx.helper.make_node("Identity", [name + RAW], [name])]


def _rounding(name: str) -> list[onnx.NodeProto]:
    inside, codes = f"{name}_inside", f"{name}_codes"
    return [
        onnx.helper.make_node("Clip", [name + RAW, LOW, HIGH], [inside]),
        onnx.helper.make_node("QuantizeLinear", [inside, SCALE, ZERO], [codes]),
        onnx.helper.make_node("DequantizeLinear", [codes, SCALE, ZERO], [name]),
    ]
