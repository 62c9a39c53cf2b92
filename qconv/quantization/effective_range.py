"""The effective range of a layer's outputs: the part of it that its readers see.

    seen(y) = min(max(y, low), high)            Relu or Clip bounds, ends of the codes

Errors are measured inside that range: the float and the quantized network may differ a lot below a Relu without any
effect, and least squares would see nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconv.ir.model import Node, Value, clip_bounds, constant_array, input_of
from qconv.quantization.input_moments import (
    InputMoments,
)
from qconv.quantizer import QuantParams

Float32 = NDArray[np.float32]

UNBOUNDED = (-math.inf, math.inf)


@dataclass(frozen=True, slots=True)
class EffectiveRange:
    """The part of a layer's output range that its readers see.

    bounds: of the activation behind the layer.
    codes: least and largest number that the codes of the output stand for.
    centre: mean output to add to outputs of centred rows, (G, 1, O).
    """

    bounds: tuple[float, float] = UNBOUNDED
    codes: tuple[float, float] = UNBOUNDED
    centre: NDArray[np.floating[Any]] | float = 0.0

    @classmethod
    def of_consumers(cls, node: Node, activations: Mapping[Value, QuantParams]) -> EffectiveRange:
        """The range that the consumers of a layer's output see, in a network whose tensors have these parameters."""
        value = node.outputs[0]
        bounds = UNBOUNDED
        readers = {use.node for use in value.uses()}
        if value not in activations and len(readers) == 1 and not value.is_graph_output():
            (reader,) = readers
            found = clip_bounds(reader)
            if found is not None:
                bounds, value = found, reader.outputs[0]
        params = activations.get(value)
        if params is None or params.scale.ndim:
            return cls(bounds)
        low, high = (float(end) for end in params.code_range())
        return cls(bounds, (low, high))

    @property
    def ends(self) -> tuple[float, float]:
        """Bounds and codes together."""
        return max(self.bounds[0], self.codes[0]), min(self.bounds[1], self.codes[1])

    def around(self, node: Node, rows: Float32, seen: InputMoments) -> EffectiveRange:
        """The range for outputs of centred rows. rows: the float weights (G, O, K)."""
        centre = np.einsum("gok,gk->go", rows, seen.float_mean)
        bias = constant_array(input_of(node, 2)) if node.op_type != "MatMul" else None
        if bias is not None:
            centre = centre + np.broadcast_to(bias.reshape(-1), (centre.size,)).reshape(centre.shape)
        return replace(self, centre=centre[:, None].astype(np.float32))

    def of_float(self, outputs: Float32) -> Float32:
        """Clip outputs (G, n, O) of the float network to what readers see."""
        return np.clip(outputs + self.centre, *self.bounds)

    def of_rounded(self, outputs: Float32) -> Float32:
        """Clip outputs (G, n, O) of the quantized network to what readers see: bounds and codes."""
        return np.clip(outputs + self.centre, *self.ends)
