"""What the file says of codes by their parameters: axes of scales, and limits of a Clip on codes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qconv.ir.model import Node, clip_bounds
from qconv.quantizer import PerBlock, PerChannel, QuantParams


def axis_attribute(params: QuantParams) -> dict[str, int]:
    """The axis and block size attributes of a quantizer or dequantizer with these parameters."""
    match params.spec.granularity:
        case PerChannel(axis):
            return {"axis": axis}
        case PerBlock(axis, size):
            return {"axis": axis, "block_size": size}
        case _:
            return {}


def integer_clip_bounds(chosen: QuantParams, activation: Node) -> tuple[NDArray[np.integer], NDArray[np.integer]]:
    """The codes of a Relu's or Clip's bounds, () or (C,)."""
    bounds = clip_bounds(activation)
    assert bounds is not None
    shape = (1, chosen.scale.size) if chosen.scale.ndim else ()
    low, high = (chosen.quantize(np.full(shape, bound, np.float32)).reshape(chosen.scale.shape) for bound in bounds)
    return low, high


def has_integer_clip_kernel(chosen: QuantParams) -> bool:
    """ONNX Runtime has Clip and Pad for 8-bit integers, not for 16; they know one limit and one zero for all."""
    return chosen.spec.dtype.itemsize == 1 and not chosen.scale.ndim
