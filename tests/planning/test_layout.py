"""Operators that ONNX Runtime cannot compute in NHWC, between layers that it computes there once they read codes.

Oracle: ONNX Runtime with all optimizations, which fails on these files where the layers in front are integer, beside
what the nodes say one by one.
"""

from __future__ import annotations

import numpy as np
import pytest

from tests.support.models import ints, network
from tests.support.quantized import quantized

SAME = "pads=[1,1,1,1]"
CUBIC = 'mode="cubic"'
CROP = 'coordinate_transformation_mode="tf_crop_and_resize"'
FRAGILE = {
    "cubic scales": (f"Resize<{CUBIC}>(b, , scales)", {"scales": np.float32([1, 1, 0.5, 0.75])}),
    "cubic sizes": (f"Resize<{CUBIC}>(b, , , sizes)", {"sizes": ints(1, 8, 6, 9)}),
    "cubic of an open size": (f"Resize<{CUBIC}, axes=[2,3]>(b, , , sizes)", {"sizes": ints(6, 9)}),
    "crop by axes": (
        f"Resize<{CROP}, axes=[2,3]>(b, roi, , sizes)",
        {"roi": np.float32([0.1, 0.2, 0.8, 0.9]), "sizes": ints(6, 9)},
    ),
    "proportion by axes": (
        'Resize<keep_aspect_ratio_policy="not_larger", axes=[2,3]>(b, , , sizes)',
        {"sizes": ints(9, 6)},
    ),
    "centre by axes": ("CenterCropPad<axes=[2,3]>(b, sizes)", {"sizes": ints(14, 8)}),
    "pad by axes": ("Pad(b, widths, , places)", {"widths": ints(1, 0, 2, 1), "places": ints(2, 3)}),
}


@pytest.mark.parametrize("before", ["", "m = MaxPool<kernel_shape=[3,3], pads=[1,1,1,1]>(s)"], ids=["add", "pool"])
@pytest.mark.parametrize("name", FRAGILE)
def test_the_result_loads(name: str, before: str) -> None:
    node, constants = FRAGILE[name]
    proto = network(
        f"""
        a = Conv<{SAME}>(x, w0)  r = Relu(a)  d = Conv<{SAME}>(r, w1)  s = Add(d, r)  {before}
        b = Relu({"m" if before else "s"})  c = {node}  y = Conv<{SAME}>(c, w2)
        """,
        x=(1, 3, 12, 12),
        opset=19,
        w0=(8, 3, 3, 3),
        w1=(8, 8, 3, 3),
        w2=(4, 8, 3, 3),
        **constants,
    )
    quantized(proto).check(20.0)
