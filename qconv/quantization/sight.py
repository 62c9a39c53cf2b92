"""What of a layer's outputs reaches whoever reads them: what the activation behind lets through, and what has codes.

    seen(y) = min(max(y, low), high)        low, high: the bounds of a Relu or Clip, or the ends of the codes

Two networks may differ a lot below a Relu, where that is nothing to the network behind it: whatever is clipped before
a layer is far from where it should be behind it, and least squares see nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconv.ir.model import Node, Value, clip_bounds, constant_array, input_of
from qconv.quantization.moments import Moments
from qconv.quantizer import QuantParams

Float32 = NDArray[np.float32]
OPEN = (-math.inf, math.inf)


@dataclass(frozen=True, slots=True)
class Sight:
    """bounds: of the activation behind the layer; codes: of what is written of it.

    centre: what outputs of rows less their means lack, (G, 1, O).
    """

    bounds: tuple[float, float] = OPEN
    codes: tuple[float, float] = OPEN
    centre: NDArray[np.floating[Any]] | float = 0.0

    @classmethod
    def behind(cls, node: Node, activations: Mapping[Value, QuantParams]) -> Sight:
        """Of a layer in a network whose tensors have these parameters."""
        value = node.outputs[0]
        bounds = OPEN
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

    def around(self, node: Node, rows: Float32, seen: Moments) -> Sight:
        """For outputs of rows whose mean was removed. rows: the float weights (G, O, K)."""
        centre = np.einsum("gok,gk->go", rows, seen.float_mean)
        bias = constant_array(input_of(node, 2)) if node.op_type != "MatMul" else None
        if bias is not None:
            centre = centre + np.broadcast_to(bias.reshape(-1), (centre.size,)).reshape(centre.shape)
        return replace(self, centre=centre[:, None].astype(np.float32))

    def of_float(self, outputs: Float32) -> Float32:
        """What reaches the readers in the float network, (G, n, O)."""
        return np.clip(outputs + self.centre, *self.bounds)

    def of_rounded(self, outputs: Float32) -> Float32:
        """The same in the quantized one."""
        low, high = (end(pair) for end, pair in zip((max, min), zip(self.bounds, self.codes, strict=True), strict=True))
        return np.clip(outputs + self.centre, low, high)
