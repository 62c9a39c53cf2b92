#!/usr/bin/env bash
# onnxruntime 1.32.0: QuantizeLinear behind a MaxPool is moved in front of it also where the Indices of the MaxPool are
# used, so that the Indices come out as others.
#
# A MaxPool picks the largest number and says where it stands. Its maximum may as well be rounded before as behind, and
# so the optimizer moves a quantizer to the front. The place may not: of numbers that are equal as codes the first one is
# taken. With the optimizer off, or with nothing quantized behind, the Indices are those of float. Networks that pool
# with Indices and put features back by them (MaxUnpool, SegNet) get features at wrong places, and nothing is said.
#
# Seen, for a quantizer with 16 steps over the range of the input:
#   ORT_DISABLE_ALL MaxPool QuantizeLinear DequantizeLinear 0.0% of the places differ
#   ORT_ENABLE_ALL QuantizeLinear DequantizeLinear MaxPool QuantizeLinear DequantizeLinear 20.7% of the places differ
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check onnxruntime==1.32.0 onnx==1.22.0 2>/dev/null
PLACE=$place "$place/venv/bin/python" - <<'PY'
import os

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

assert onnxruntime.__version__ == "1.32.0"
SHAPE = (1, 4, 32, 32)
nodes = [
    helper.make_node("MaxPool", ["x"], ["m", "places"], kernel_shape=[4, 4], strides=[4, 4]),
    helper.make_node("QuantizeLinear", ["m", "scale", "zero"], ["codes"]),
    helper.make_node("DequantizeLinear", ["codes", "scale", "zero"], ["y"]),
]
constants = {"scale": np.float32(1 / 16), "zero": np.uint8(0)}
graph = helper.make_graph(
    nodes,
    "g",
    [helper.make_tensor_value_info("x", TensorProto.FLOAT, SHAPE)],
    [helper.make_tensor_value_info("y", TensorProto.FLOAT, None), helper.make_tensor_value_info("places", TensorProto.INT64, None)],
    [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
)
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
x = np.random.default_rng(0).uniform(0, 1, SHAPE).astype(np.float32)
blocks = x.reshape(1, 4, 8, 4, 8, 4).transpose(0, 1, 2, 4, 3, 5).reshape(1, 4, 8, 8, 16)
within = blocks.argmax(-1)
rows = np.arange(8)[:, None] * 4 + within // 4
columns = np.arange(8)[None, :] * 4 + within % 4
right = np.arange(4)[:, None, None] * 1024 + rows * 32 + columns
differ = {}
for level in ("ORT_DISABLE_ALL", "ORT_ENABLE_ALL"):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    options.optimized_model_filepath = path = os.path.join(os.environ["PLACE"], f"{level}.onnx")
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    (places,) = session.run(["places"], {"x": x})
    differ[level] = float((places != right).mean())
    print(level, *(node.op_type for node in onnx.load(path).graph.node), f"{differ[level]:.1%} of the places differ")
assert differ["ORT_DISABLE_ALL"] == 0 and differ["ORT_ENABLE_ALL"] > 0.1, "it changed"
PY
echo "as it was found"
