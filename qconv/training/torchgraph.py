"""An ONNX graph, float or quantized, run in PyTorch: the very graph that is deployed, with gradients.

    network = Network(model)
    outputs = network.run({"input": x}, ["output"])

Any tensor can be given instead of computed: what is fed under a name stands for it, be it the network's input, a weight
or scale that is being trained, or what one block hands to the next. Only what the wanted tensors still need is run.

Codes are floats that hold whole numbers; scales and weights are tensors like others. How operators are run is in
torchmath.py and torchplaces.py; one that is in neither is an error that names it.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qconv.errors import QconvError, format_count
from qconv.ir.model import Model, Node, attribute, constant_array, input_of
from qconv.training.torchfake import FUSED, Drop, Step, fakes
from qconv.training.torchmath import COMPUTING
from qconv.training.torchop import Op, Run
from qconv.training.torchplaces import MOVING

OPERATORS: dict[str, Run] = {**COMPUTING, **MOVING}
_RUN = {**OPERATORS, **FUSED}
LOWEST_OPSET = 13
UINT8 = 2
"""Type of codes where neither a zero point nor an attribute tells it."""
Numbers = Mapping[str, Tensor]


class Network:
    """A model of opset 13 or later as PyTorch runs it.

    model: stays as it is; its constants are copied. device: where everything lies. constants: by name, to be replaced
    at will; those of floats and of codes are float32. Raises QconvError for operators that cannot be run.
    """

    def __init__(self, model: Model, device: str = "cpu") -> None:
        require_operators(model)
        self.device = torch.device(device)
        self.inputs = [v.name or "" for v in model.graph.inputs if v.name not in model.graph.initializers]
        self.outputs = [value.name or "" for value in model.graph.outputs]
        self.constants = {name: self._constant(constant_array(v)) for name, v in model.graph.initializers.items()}
        self._steps = [self._step(node, model.opset) for node in model.nodes()]
        self._makers = {name: index for index, step in enumerate(self._steps) for name in step[2] if name}
        self._fakes = fakes(self._steps, self.constants)
        self._orders: dict[tuple[frozenset[str], tuple[str, ...]], list[tuple[Step, list[str]]]] = {}

    def run(self, given: Numbers, wanted: Sequence[str] | None = None, drop: Drop | None = None) -> dict[str, Tensor]:
        """The wanted tensors, the outputs by default. given: by names, of inputs or of anything in between.

        drop: of roundings, where a quantizer and its dequantizer run as one step.
        """
        wanted = self.outputs if wanted is None else wanted
        known: dict[str, Tensor] = dict(given)
        constants = self.constants
        for (op, read, made), done in self._order(frozenset(given), tuple(wanted)):
            try:
                values = [None if name is None else known[name] if name in known else constants[name] for name in read]
                run = _RUN[op.op_type] if drop is None or op.op_type not in FUSED else drop.run
                found = run(op, values)
            except (RuntimeError, ValueError, IndexError, TypeError) as error:
                fact = f"{op.op_type} {op.name!r} does not run in PyTorch: {str(error).splitlines()[0]}"
                raise QconvError(
                    fact, "check the shapes of what it reads; please report it if the model is right."
                ) from None
            for name, value in zip(made, found if isinstance(found, tuple) else (found,), strict=False):
                known[name] = value
            for name in done:
                known.pop(name, None)
        return {name: known[name] if name in known else self.constants[name] for name in wanted}

    def read(self, given: Iterable[str], wanted: Sequence[str]) -> frozenset[str]:
        """The names of all that is read on the way from what is given to what is wanted, constants included."""
        steps = self._order(frozenset(given), tuple(wanted))
        return frozenset(name for (_, read, _), _ in steps for name in read if name)

    def on_arrays(self, given: Mapping[str, NDArray[Any]]) -> dict[str, Tensor]:
        """Arrays as tensors on the device; whole numbers of 8 and 16 bits become floats."""
        return {name: self._constant(numbers) for name, numbers in given.items()}

    def _order(self, given: frozenset[str], wanted: tuple[str, ...]) -> list[tuple[Step, list[str]]]:
        """The nodes that must run, in order, and what nobody reads any more after each."""
        key = (given, wanted)
        if key not in self._orders:
            needed: dict[int, Step] = {}
            queue = [name for name in wanted if name not in given]
            while queue:
                index = self._makers.get(queue.pop())
                if index is not None and index not in needed:
                    needed[index] = self._chosen(index, given | frozenset(wanted))
                    queue += [name for name in needed[index][1] if name is not None and name not in given]
            last: dict[str, int] = {}
            for index in sorted(needed):
                for name in (*needed[index][1], *needed[index][2]):
                    if name is not None and name not in wanted:
                        last[name] = index
            done: dict[int, list[str]] = {index: [] for index in sorted(needed)}
            for name, index in last.items():
                done[index].append(name)
            self._orders[key] = [(needed[index], names) for index, names in done.items()]
        return self._orders[key]

    def _chosen(self, index: int, named: frozenset[str]) -> Step:
        """The node itself, or one step for a dequantizer and its quantizer, where nobody names the codes between."""
        if index in self._fakes:
            fake, hidden = self._fakes[index]
            if not hidden & named:
                return fake
        return self._steps[index]

    def _step(self, node: Node, opset: int) -> Step:
        attributes = {name: attribute(node, name) for name in node.attributes}
        zero = input_of(node, 2)
        kind = (None if zero is None else zero.dtype) or attributes.get("output_dtype") or UINT8
        op = Op(
            name=sys.intern(node.name or ""),
            op_type=node.op_type,
            attributes=attributes,
            opset=opset,
            outputs=len(node.outputs),
            codes=int(kind) if node.op_type == "QuantizeLinear" else None,
        )
        return op, [None if v is None else v.name for v in node.inputs], [v.name or "" for v in node.outputs]

    def _constant(self, numbers: NDArray[Any] | None) -> Tensor:
        assert numbers is not None
        kept = numbers.dtype in (np.dtype(np.int64), np.dtype(np.int32), np.dtype(bool))
        whole = np.ascontiguousarray(numbers if kept else numbers.astype(np.float32)).reshape(numbers.shape)
        found = torch.from_numpy(whole.copy())
        # shapes and axes are read on the way, and stay where that costs nothing
        return found if numbers.dtype == np.int64 else found.to(self.device)


def require_operators(model: Model) -> None:
    """Raise QconvError for a model with operators that are not built, or of an opset that is too low."""
    if model.opset < LOWEST_OPSET:
        fact = f"The model is of opset {model.opset}, and PyTorch is given {LOWEST_OPSET} or later."
        raise QconvError(fact, "quantize it again: qconv raises the opset.")
    unknown = Counter(_called(node) for node in model.nodes() if _called(node) not in OPERATORS)
    if unknown:
        told = ", ".join(f"{kind} ({count})" for kind, count in sorted(unknown.items()))
        fact = f"qconv cannot run {format_count(len(unknown), 'operator')} of this model in PyTorch: {told}."
        raise QconvError(fact, "training, synthesized pictures and reconstruction are not possible for it.")


def _called(node: Node) -> str:
    return node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}"


def as_arrays(found: Iterable[Tensor]) -> list[NDArray[np.float32]]:
    """Tensors as numpy has them, without their gradients."""
    return [tensor.detach().to("cpu").numpy() for tensor in found]
