"""Makes DequantizeLinear nodes and the constants that they read, of which equal ones are shared."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from qconv.ir.model import DataType, Model, Node, Value
from qconv.quantization.code_attributes import axis_attribute
from qconv.quantizer import QuantParams


@dataclass(slots=True)
class DequantizerWriter:
    """Scales, zero points, limits and dequantizers of one model."""

    model: Model
    _shared: dict[object, Value] = field(default_factory=dict)

    def fixed(self, wish: str, numbers: NDArray[np.generic]) -> Value:
        """A scale, zero point or limit. Equal ones are shared: zero points alone would be a tenth of a small file."""
        key = (numbers.dtype.str, numbers.shape, numbers.tobytes())
        if key not in self._shared:
            self._shared[key] = self.model.constant(wish, numbers)
        return self._shared[key]

    def grid(self, chosen: QuantParams) -> tuple[Value, Value]:
        """Scale and zero point of a quantizer."""
        return self.fixed("scale", chosen.scale), self.fixed("zero_point", chosen.zero_point)

    def dequantizer(self, codes: Value, params: QuantParams, name: str, like: Value) -> Node:
        """A DequantizeLinear that is not in the graph yet."""
        attributes = axis_attribute(params)
        inputs = [codes, *self.grid(params)]
        wish = f"{name}_dq"
        node = self.model.build("DequantizeLinear", inputs, name=wish, output=wish, attributes=attributes, like=like)
        node.outputs[0].dtype = DataType.FLOAT
        if codes.shape is not None:
            node.outputs[0].shape = codes.shape.copy()
        return node
