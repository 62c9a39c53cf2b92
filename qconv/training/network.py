"""This module runs an ONNX graph, float or quantized, in PyTorch with gradients: the very graph that is deployed.

    network = TorchNetwork(model)
    outputs = network.run({"input": x}, ["output"])

What is fed under a name stands for that tensor, be it an input, a trained weight or scale, or what one block hands to
the next. Only what the wanted tensors need is run. Integers are floats that hold whole numbers; operators are those of
`onnx_ops`, and others are an error that names them.

Quantizer, Clips of integers and dequantizer run as one fake quantize step, with the same numbers and gradients in a
third of the time, because passes over memory are what costs beside convolutions:

    y = round(clamp(x / s, low - z, high - z)) s        z = 0 where there is no zero point
    dy/dx = 1 inside, 0 outside                         dy/ds = sum of (y - x dy/dx) / s

low, high are the narrowest of the type and the Clips, so that no half step beyond the last integer counts as inside.

Source: Esser et al. 2020, arXiv 1902.08153 (LSQ), equation 3. PyTorch runs deterministically.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qconv.errors import QconvError, format_count
from qconv.ir.model import Model, Node, attribute, constant_array, input_of
from qconv.training.onnx_ops import (
    COMPUTE_OPERATORS,
    INT_RANGES,
    SHAPE_OPERATORS,
    Op,
    OperatorFunction,
    OperatorInputs,
    broadcast_tensor,
    first_input,
    optional_input,
    round_straight_through,
)

GraphStep = tuple[Op, list[str | None], list[str]]

FAKE_QUANTIZE = "FakeQuantize"


class _FakeQuantize(torch.autograd.Function):
    """Fake quantization with one scale, as one step. low, high: whole numbers, less the zero point."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: float, high: float) -> Tensor:
        step = float(scale.detach())
        y = torch.div(x, scale.reshape(()))
        y.clamp_(low, high).round_().mul_(scale.reshape(()))
        ctx.save_for_backward(x, y)
        ctx.step, ctx.ends, ctx.shape = step, (low * step, high * step), scale.shape
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,), (x, y) = grads, ctx.saved_tensors
        grad = grad.contiguous()
        inside = torch.ops.aten.hardtanh_backward(grad, x, *ctx.ends)
        scale = None
        if ctx.needs_input_grad[1]:
            moved = torch.dot(grad.reshape(-1), y.reshape(-1)) - torch.dot(inside.reshape(-1), x.reshape(-1))
            scale = (moved / ctx.step).reshape(ctx.shape)
        return inside, scale, None, None


def _run_fake_quantize(op: Op, given: OperatorInputs) -> Tensor:
    """Run a fused step. Inputs: x, scale, zero point, then the limits of the Clips, lower and upper in turns."""
    x, scale, zero = first_input(given), given[1], optional_input(given, 2)
    assert scale is not None
    low, high = _code_limits(op, given)
    fixed = zero is None or (zero.numel() == 1 and not zero.requires_grad)
    if scale.numel() == 1 and fixed:
        middle = 0.0 if zero is None else float(zero)
        found: Tensor = _FakeQuantize.apply(x.contiguous(), scale, low - middle, high - middle)
        return found
    axis = op.get("axis", 1)
    step = broadcast_tensor(scale, x, axis, 0)
    middles = torch.zeros_like(step) if zero is None else broadcast_tensor(zero, x, axis, 0)
    return round_straight_through(torch.clamp(x / step, low - middles, high - middles)) * step


def _code_limits(op: Op, given: OperatorInputs) -> tuple[float, float]:
    """Return the lowest and the highest integer value: the narrowest of the type and the Clips."""
    low, high = (float(end) for end in INT_RANGES[op.codes or 0])
    low = max([low, *(float(end) for end in given[3::2] if end is not None)])
    return low, min([high, *(float(end) for end in given[4::2] if end is not None)])


FUSED_OPERATORS: dict[str, OperatorFunction] = {FAKE_QUANTIZE: _run_fake_quantize}


@dataclass(frozen=True, slots=True)
class QuantDrop:
    """Fake quantization that leaves a random share of the values unrounded, but within their range, drawn anew each
    time.

    What learns behind it does not depend on the roundings of a few images.

    Source: Wei et al. 2022, arXiv 2203.05740 (QDrop).
    """

    share: float
    generator: torch.Generator

    def run(self, op: Op, given: OperatorInputs) -> Tensor:
        """Run a fused step, as FUSED_OPERATORS do, and leave some of the values unrounded."""
        rounded_all = _run_fake_quantize(op, given)
        x, scale, zero = first_input(given), given[1], optional_input(given, 2)
        assert scale is not None
        step = scale.detach() if scale.numel() == 1 else broadcast_tensor(scale.detach(), x, op.get("axis", 1), 0)
        middle = torch.zeros_like(step)
        if zero is not None:
            middle = zero if zero.numel() == 1 else broadcast_tensor(zero, x, op.get("axis", 1), 0)
        low, high = _code_limits(op, given)
        held = torch.minimum(torch.maximum(x, (low - middle) * step), (high - middle) * step)
        return self.mixed(rounded_all, held)

    def mixed(self, rounded_all: Tensor, exact: Tensor) -> Tensor:
        """Mix a random share of `exact` into `rounded_all`, value by value."""
        drawn = torch.rand(exact.shape, generator=self.generator).to(exact.device)
        return torch.where(drawn < self.share, exact, rounded_all)


def find_fake_quantizers(
    steps: Sequence[GraphStep], constants: Mapping[str, Tensor]
) -> dict[int, tuple[GraphStep, frozenset[str]]]:
    """Find quantizer, Clips and dequantizer that can run as one step.

    Returns:
        By the index of the dequantizer: the fused step, and the names of the integer tensors that it hides.
    """
    made = {name: index for index, step in enumerate(steps) for name in step[2]}
    readers: dict[str, int] = {}
    for step in steps:
        for name in step[1]:
            readers[name or ""] = readers.get(name or "", 0) + 1
    found: dict[int, tuple[GraphStep, frozenset[str]]] = {}
    for index, (op, read, written) in enumerate(steps):
        if op.op_type != "DequantizeLinear" or op.get("block_size", 0):
            continue
        limits: list[str | None] = []
        hidden: list[str] = []
        name = read[0] or ""
        before = steps[made[name]] if name in made else None
        while before is not None and before[0].op_type == "Clip" and readers[name] == 1:
            ends = (*before[1][1:], None, None)[:2]
            if not all(end is None or end in constants for end in ends):
                break
            limits += ends
            hidden.append(name)
            name = before[1][0] or ""
            before = steps[made[name]] if name in made else None
        if before is None or before[0].op_type != "QuantizeLinear" or readers[name] != 1:
            continue
        same = (before[1] + [None])[1:3] == (read + [None])[1:3] and before[0].get("axis", 1) == op.get("axis", 1)
        if same and not before[0].get("block_size", 0) and before[0].codes in INT_RANGES:
            fake = Op(op.name, FAKE_QUANTIZE, before[0].attributes, op.opset, codes=before[0].codes)
            hidden.append(name)
            found[index] = (fake, [*(before[1] + [None])[:3], *limits], written), frozenset(hidden)
    return found


OPERATORS: dict[str, OperatorFunction] = {**COMPUTE_OPERATORS, **SHAPE_OPERATORS}

_RUNNABLE = {**OPERATORS, **FUSED_OPERATORS}

LOWEST_OPSET = 13

UINT8 = 2
"""ONNX element type of integers where neither a zero point nor an attribute gives it."""

TensorsByName = Mapping[str, Tensor]


class TorchNetwork:
    """A model of opset 13 or later, run in PyTorch.

    The model stays as it is; its constants are copied to the device, in float32 for floats and 8- and 16-bit integers.
    They are in `constants` by name and may be replaced.

    Raises:
        QconvError: The model has operators that cannot be run.
    """

    def __init__(self, model: Model, device: str = "cpu") -> None:
        require_operators(model)
        self.device = torch.device(device)
        self.inputs = [v.name or "" for v in model.graph.inputs if v.name not in model.graph.initializers]
        self.outputs = [value.name or "" for value in model.graph.outputs]
        self.constants = {name: self._constant(constant_array(v)) for name, v in model.graph.initializers.items()}
        self._steps = [self._step(node, model.opset) for node in model.nodes()]
        self._makers = {name: index for index, step in enumerate(self._steps) for name in step[2] if name}
        self._fakes = find_fake_quantizers(self._steps, self.constants)
        self._orders: dict[tuple[frozenset[str], tuple[str, ...]], list[tuple[GraphStep, list[str]]]] = {}

    def run(
        self, given: TensorsByName, wanted: Sequence[str] | None = None, drop: QuantDrop | None = None
    ) -> dict[str, Tensor]:
        """Compute tensors.

        Args:
            given: Values by name, of inputs or of any tensor in between.
            wanted: Names of the tensors to compute; the outputs by default.
            drop: Leaves a share of the roundings out, where a quantizer and its dequantizer run as one step.

        Returns:
            The wanted tensors by name.
        """
        wanted = self.outputs if wanted is None else wanted
        known: dict[str, Tensor] = dict(given)
        constants = self.constants
        for (op, read, made), done in self._order(frozenset(given), tuple(wanted)):
            try:
                values = [None if name is None else known[name] if name in known else constants[name] for name in read]
                run = _RUNNABLE[op.op_type] if drop is None or op.op_type not in FUSED_OPERATORS else drop.run
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
        """Return the names of all tensors read between `given` and `wanted`, constants included."""
        steps = self._order(frozenset(given), tuple(wanted))
        return frozenset(name for (_, read, _), _ in steps for name in read if name)

    def on_arrays(self, given: Mapping[str, NDArray[Any]]) -> dict[str, Tensor]:
        """Move arrays to the device; integers of 8 and 16 bits become float32."""
        return {name: self._constant(numbers) for name, numbers in given.items()}

    def _order(self, given: frozenset[str], wanted: tuple[str, ...]) -> list[tuple[GraphStep, list[str]]]:
        """List the nodes that must run, in order, and the tensors that nobody reads any more after each."""
        key = (given, wanted)
        if key not in self._orders:
            needed: dict[int, GraphStep] = {}
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

    def _chosen(self, index: int, named: frozenset[str]) -> GraphStep:
        """Return a node, or the fused step of a dequantizer where nobody names the integers before it."""
        if index in self._fakes:
            fake, hidden = self._fakes[index]
            if not hidden & named:
                return fake
        return self._steps[index]

    def _step(self, node: Node, opset: int) -> GraphStep:
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
    """Raise QconvError for a model with operators that cannot be run, or of an opset that is too low."""
    if model.opset < LOWEST_OPSET:
        fact = f"The model is of opset {model.opset}, and PyTorch is given {LOWEST_OPSET} or later."
        raise QconvError(fact, "quantize it again: qconv raises the opset.")
    unknown = Counter(_describe_node(node) for node in model.nodes() if _describe_node(node) not in OPERATORS)
    if unknown:
        told = ", ".join(f"{kind} ({count})" for kind, count in sorted(unknown.items()))
        fact = f"qconv cannot run {format_count(len(unknown), 'operator')} of this model in PyTorch: {told}."
        raise QconvError(fact, "training, synthesized pictures and reconstruction are not possible for it.")


def _describe_node(node: Node) -> str:
    return node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}"


def to_arrays(found: Iterable[Tensor]) -> list[NDArray[np.float32]]:
    """Copy tensors to numpy arrays, without gradients."""
    return [tensor.detach().to("cpu").numpy() for tensor in found]


@contextlib.contextmanager
def run_deterministically(threads: int | None) -> Iterator[None]:
    """Make PyTorch deterministic with so many threads inside the context; earlier settings come back."""
    before, exactly = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    if threads is not None:
        torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        torch.use_deterministic_algorithms(exactly)


def half_cosine(step: int, steps: int) -> float:
    """Compute the factor on a learning rate at a step: half a cosine, from 1 down to nearly 0."""
    return 0.5 * (1 + math.cos(math.pi * step / steps))


def resolve_device(wish: str) -> str:
    """Resolve one of choices.DEVICES to a device. Raises QconvError for a GPU that is not there."""
    if wish == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if wish == "cuda" and not torch.cuda.is_available():
        raise QconvError("PyTorch finds no GPU.", "pass --device cpu, or install a build of PyTorch for it.")
    return wish
