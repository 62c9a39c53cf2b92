#!/usr/bin/env bash
# onnxruntime 1.32.0: the optimizer takes out a Dropout whose training_mode is a constant true, so that the same file
# drops numbers with optimizations off and none with them on.
#
# ONNX says that a Dropout with training_mode true drops at random and scales what is left, also at inference: people
# export that on purpose, to estimate uncertainty from several runs (Monte Carlo dropout). The optimizer removes the node
# between two others at its default level, as it would one that does nothing. All runs are then equal, and the estimate
# is that the network is certain.
#
# Seen, for 1,000 ones and a ratio of 0.5 between two Abs:
#   ORT_DISABLE_ALL Abs Dropout Abs 506 of 1000 are zero, two runs are not equal
#   ORT_ENABLE_ALL Abs Abs 0 of 1000 are zero, two runs are equal
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
nodes = [
    helper.make_node("Abs", ["x"], ["a"]),
    helper.make_node("Dropout", ["a", "ratio", "training"], ["d"]),
    helper.make_node("Abs", ["d"], ["y"]),
]
values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1000]) for name in "xy"]
constants = {"ratio": np.float32(0.5), "training": np.bool_(True)}
tensors = [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()]
graph = helper.make_graph(nodes, "g", values[:1], values[1:], tensors)
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
x, found = np.ones(1000, np.float32), {}
for level in ("ORT_DISABLE_ALL", "ORT_ENABLE_ALL"):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    options.optimized_model_filepath = path = os.path.join(os.environ["PLACE"], f"{level}.onnx")
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    one, other = (session.run(None, {"x": x})[0] for _ in range(2))
    kinds = [node.op_type for node in onnx.load(path).graph.node]
    found[level] = kinds, int((one == 0).sum()), bool((one == other).all())
    print(level, *kinds, f"{found[level][1]} of 1000 are zero, two runs are {'equal' if found[level][2] else 'not equal'}")
kinds, zeros, equal = found["ORT_DISABLE_ALL"]
assert "Dropout" in kinds and 400 < zeros < 600 and not equal, "it changed"
kinds, zeros, equal = found["ORT_ENABLE_ALL"]
assert "Dropout" not in kinds and zeros == 0 and equal, "it changed"
PY
echo "as it was found"
