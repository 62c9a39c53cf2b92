#!/usr/bin/env bash
# onnx 1.23.2 and onnxruntime 1.32.0 disagree on how many places some pools have, and the runtime runs them all the same:
# - ceil_mode, a last window that lies in the padding alone: onnx counts it up to opset 21, and from 22 on it does not;
#   ONNX Runtime leaves it out in all opsets.
# - auto_pad SAME with dilations: onnx gives ceil(side / stride) places; ONNX Runtime pads as if there were no dilations,
#   and has fewer.
# So the shapes that shape inference gives to all that is behind such a pool are not those of a run, and a Reshape or a
# kernel over the whole map that is written by them does not fit. Pads that are written out, without ceil_mode and
# auto_pad, have one reading.
#
# Seen: places as onnx infers them / as ONNX Runtime returns them
#   MaxPool, kernel 2, stride 3, ceil_mode, side 18       opset 17: 7 / 6    opset 21: 7 / 6    opset 22: 6 / 6
#   MaxPool, kernel 3, dilation 2, SAME_UPPER, side 12    opset 17: 12 / 10  opset 21: 12 / 10  opset 22: 12 / 10
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check onnx==1.23.2 onnxruntime==1.32.0 2>/dev/null
"$place/venv/bin/python" - <<'PY'
import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, shape_inference

assert onnxruntime.__version__ == "1.32.0"
POOLS = {
    "ceil_mode": (18, {"kernel_shape": [2], "strides": [3], "ceil_mode": 1}),
    "dilations": (12, {"kernel_shape": [3], "dilations": [2], "auto_pad": "SAME_UPPER"}),
}


def places(kind, opset):
    side, said = POOLS[kind]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 1, side])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 1, "places"])
    graph = helper.make_graph([helper.make_node("MaxPool", ["x"], ["y"], **said)], "g", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    inferred = shape_inference.infer_shapes(model, strict_mode=True).graph.output[0].type.tensor_type.shape.dim[2]
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {"x": np.zeros((1, 1, side), np.float32)})
    return inferred.dim_value, result.shape[2]


found = {(kind, opset): places(kind, opset) for kind in POOLS for opset in (17, 21, 22)}
for (kind, opset), (inferred, ran) in found.items():
    print(f"{kind} opset {opset}: {inferred} / {ran}")
assert [found["ceil_mode", opset] for opset in (17, 21, 22)] == [(7, 6), (7, 6), (6, 6)]
assert [found["dilations", opset] for opset in (17, 21, 22)] == [(12, 10)] * 3
PY
