"""Patches times weights are what ONNX Runtime's convolutions give."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from qconv.ir.layers import weight_rows_of
from qconv.quantization.input_moments import PatchExtractor
from qconv.runtime.session import Session
from tests.support.models import loaded

LAYERS = [
    ("Conv", {}, (2, 6, 7, 9), (4, 6, 3, 3)),
    ("Conv", {"strides": [2, 3], "pads": [1, 0, 2, 3]}, (2, 6, 7, 9), (4, 6, 3, 2)),
    ("Conv", {"dilations": [2, 1], "pads": [2, 1, 2, 1]}, (1, 6, 7, 9), (4, 6, 3, 3)),
    ("Conv", {"group": 2, "pads": [1, 1, 1, 1]}, (2, 6, 7, 9), (4, 3, 3, 3)),
    ("Conv", {"group": 6, "strides": [2, 2], "pads": [1, 1, 1, 1]}, (2, 6, 8, 9), (12, 1, 3, 3)),
    ("Conv", {"auto_pad": "SAME_UPPER", "strides": [2, 2]}, (2, 6, 8, 9), (4, 6, 3, 4)),
    ("Conv", {"auto_pad": "SAME_LOWER", "strides": [2, 1]}, (2, 6, 8, 9), (4, 6, 4, 3)),
    ("Conv", {"auto_pad": "VALID"}, (2, 6, 8, 9), (4, 6, 4, 3)),
    ("Conv", {"pads": [1, 2], "strides": [2]}, (2, 3, 11), (4, 3, 5)),
    ("Conv", {"pads": [1] * 6}, (1, 3, 4, 5, 6), (4, 3, 2, 3, 3)),
    ("ConvTranspose", {}, (2, 6, 4, 5), (6, 4, 3, 3)),
    ("ConvTranspose", {"strides": [2, 3], "pads": [1, 0, 2, 1], "output_padding": [1, 2]}, (2, 6, 4, 5), (6, 4, 3, 4)),
    ("ConvTranspose", {"group": 3, "strides": [2, 2], "dilations": [2, 1]}, (2, 6, 4, 5), (6, 2, 3, 3)),
    ("ConvTranspose", {"auto_pad": "SAME_UPPER", "strides": [2, 2]}, (2, 6, 4, 5), (6, 4, 3, 3)),
    ("ConvTranspose", {"auto_pad": "SAME_LOWER", "strides": [2, 2]}, (2, 6, 4, 5), (6, 4, 3, 3)),
    ("ConvTranspose", {"output_shape": [9, 10], "strides": [2, 2]}, (2, 6, 4, 5), (6, 4, 3, 4)),
    ("ConvTranspose", {"output_shape": [13, 12], "strides": [3, 2]}, (2, 6, 4, 5), (6, 4, 2, 3)),
    ("ConvTranspose", {"auto_pad": "SAME_UPPER", "strides": [3, 3]}, (2, 6, 4, 5), (6, 4, 2, 1)),
    ("ConvTranspose", {"auto_pad": "SAME_LOWER", "strides": [3, 2]}, (2, 6, 4, 5), (6, 4, 2, 1)),
    ("MatMul", {}, (2, 5, 7), (7, 3)),
    ("MatMul", {}, (7,), (7, 3)),
    ("Gemm", {}, (4, 7), (7, 3)),
    ("Gemm", {"transB": 1}, (4, 7), (3, 7)),
]


@pytest.mark.parametrize(("op_type", "attributes", "shape", "weight"), LAYERS)
def test_rows_times_weights_are_the_outputs(op_type, attributes, shape, weight) -> None:
    rng = np.random.default_rng(0)
    x, w = (rng.standard_normal(size).astype(np.float32) for size in (shape, weight))
    proto = onnx.helper.make_model(
        onnx.helper.make_graph(
            [onnx.helper.make_node(op_type, ["x", "w"], ["y"], name="y", **attributes)],
            "g",
            [onnx.helper.make_tensor_value_info("x", 1, shape)],
            [onnx.helper.make_tensor_value_info("y", 1, None)],
            [onnx.numpy_helper.from_array(w, "w")],
        ),
        opset_imports=[onnx.helper.make_opsetid("", 17)],
        ir_version=8,
    )
    (expected,) = Session(proto.SerializeToString()).run_all({"x": x})
    (node,) = loaded(proto).nodes()
    patches = PatchExtractor.of(node, w.shape, x.shape)
    at = np.arange(patches.positions(x.shape))
    by_group = np.einsum("gnj,goj->gon", patches.rows(x, patches.places(at)), weight_rows_of(node, w))
    if patches.axes:
        channels = expected.reshape(len(x), by_group.shape[0], by_group.shape[1], -1).transpose(1, 2, 0, 3)
        want = channels.reshape(by_group.shape)
    else:
        want = expected.reshape(-1, expected.shape[-1]).T[None]
    np.testing.assert_allclose(by_group, want, atol=1e-4)
    some = at[::3]
    parts = patches.entries(x.shape)
    picked = patches.rows(x, patches.places(some)).reshape(patches.groups, parts, len(some), -1)
    every = patches.rows(x, patches.places(at)).reshape(patches.groups, parts, len(at), -1)
    np.testing.assert_array_equal(picked, every[:, :, ::3])
