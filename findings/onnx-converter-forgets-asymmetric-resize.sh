#!/usr/bin/env bash
# onnx 1.22.0: raising Resize from opset 10 to 11 and beyond moves the pixels of linear interpolation.
#
# Resize of opset 10 has no attribute for coordinates: place i of the output lies at i / scale of the input, which opset
# 11 calls "asymmetric". Opset 11 has "half_pixel" as its default, (i + 0.5) / scale - 0.5. The version converter adds
# the new inputs, but no attribute, so that the raised model interpolates elsewhere; its checker is content, and runtimes
# compute what it says. A segmenter of 2019 that a tool raises before it works on it (quantizers and optimizers do, as
# QuantizeLinear for channels needs opset 13) has other masks then, and no word was said.
#
# Seen, of the row 0 4 8 12 and twice the size:
#   opset 10   0  2  4  6  8 10 12 12
#   raised     0  1  3  5  7  9 11 12
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check onnx==1.22.0 onnxruntime==1.32.0 2>/dev/null
"$place/venv/bin/python" - <<'PY'
import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper, version_converter

assert onnx.__version__ == "1.22.0"
graph = helper.make_graph(
    [helper.make_node("Resize", ["x", "scales"], ["y"], mode="linear")],
    "g",
    [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 1, 1, 4])],
    [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 1, 1, 8])],
    [numpy_helper.from_array(np.float32([1, 1, 1, 2]), "scales")],
)
old = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 10)], ir_version=5)
new = version_converter.convert_version(old, 13)
onnx.checker.check_model(new)
x = np.float32([0, 4, 8, 12]).reshape(1, 1, 1, 4)
rows = []
for name, model in (("opset 10", old), ("raised", new)):
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    rows.append(session.run(None, {"x": x})[0].reshape(-1).tolist())
    print(f"{name:9s}", *(f"{number:2.0f}" for number in rows[-1]))
assert rows[0] == [0, 2, 4, 6, 8, 10, 12, 12], "it changed"
assert rows[1] == [0, 1, 3, 5, 7, 9, 11, 12], "it changed"
assert not any(a.name == "coordinate_transformation_mode" for node in new.graph.node for a in node.attribute), "it changed"
PY
echo "as it was found"
