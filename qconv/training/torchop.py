"""An ONNX node as the operators in PyTorch take it, and what several of them need."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from qconv.errors import QconvError

Given = Sequence[Tensor | None]


@dataclass(frozen=True, slots=True)
class Op:
    """A node, as far as its operator needs it. codes: element type of what it writes, for QuantizeLinear."""

    name: str
    op_type: str
    attributes: dict[str, Any]
    opset: int
    outputs: int = 1
    codes: int | None = None

    def get(self, name: str, default: Any = None) -> Any:
        """An attribute."""
        return self.attributes.get(name, default)

    def refuse(self, what: str) -> QconvError:
        """The error for something that is not built."""
        fact = f"{self.op_type} {self.name!r} {what}, which qconv does not run in PyTorch."
        return QconvError(fact, "training, synthesized pictures and reconstruction are not possible for this network.")


Run = Callable[[Op, Given], Tensor | tuple[Tensor, ...]]
"""How an operator is run."""


def numbers(x: Tensor) -> list[Any]:
    """The numbers of a shape, of axes and the like."""
    return list(x.reshape(-1).tolist())


def first(given: Given) -> Tensor:
    """The first input, which is there."""
    x = given[0]
    assert x is not None
    return x


def optional(given: Given, index: int) -> Tensor | None:
    """Input `index`, None where the node has none."""
    return given[index] if index < len(given) else None


def every(given: Given) -> list[Tensor]:
    """All inputs that are there."""
    return [x for x in given if x is not None]


def torch_pads(pads: Sequence[int]) -> list[int]:
    """ONNX's pads (all begins, then all ends) as PyTorch's (last axis first, begin and end)."""
    half = len(pads) // 2
    return [pads[i + side * half] for i in reversed(range(half)) for side in (0, 1)]
