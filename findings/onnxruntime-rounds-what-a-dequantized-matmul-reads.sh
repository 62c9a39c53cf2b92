#!/usr/bin/env bash
# onnxruntime 1.32.0: where only the weights of a MatMul are quantized (int8 -> DequantizeLinear -> MatMul), the CPU
# provider makes one MatMulNBits of both, which by default rounds what the MatMul reads to 8 bits as well. Nothing says so:
# a file with weights alone gives results that no reading of the file gives.
#
# It takes per-channel scales along the second axis of the weights, and a Gemm that does not transpose them, too. A Gemm
# with transB stays exact, so do weights that are made by Cast and Mul of constants, and a session with
# session.qdq_matmulnbits_accuracy_level=1.
#
# Seen: the operators of the optimized graph, and the largest error over the largest result
#   MatMul: MatMulNBits, 0.0063
#   Gemm: MatMulNBits, 0.0063
#   Gemm with transB: no MatMulNBits, 0.0000
#   MatMul behind Cast and Mul: no MatMulNBits, 0.0000
#   MatMul with accuracy level 1: MatMulNBits, 0.0000
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check onnx==1.23.2 onnxruntime==1.32.0 2>/dev/null
"$place/venv/bin/python" - "$place" <<'PY'
import sys

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

assert onnxruntime.__version__ == "1.32.0"
ROWS, INPUTS, OUTPUTS = 8, 512, 256
rng = np.random.default_rng(0)
CODES = rng.integers(-127, 128, (INPUTS, OUTPUTS)).astype(np.int8)
SCALES = rng.uniform(0.001, 0.002, OUTPUTS).astype(np.float32)
X = rng.normal(size=(ROWS, INPUTS)).astype(np.float32)
WANTED = X.astype(np.float64) @ (CODES.astype(np.float64) * SCALES)


def build(kind):
    turned = kind == "Gemm with transB"
    constants = {"q": CODES.T.copy() if turned else CODES, "s": SCALES, "z": np.zeros(OUTPUTS, np.int8)}
    if "Cast" in kind:
        made = [helper.make_node("Cast", ["q"], ["f"], to=TensorProto.FLOAT), helper.make_node("Mul", ["f", "s"], ["w"])]
    else:
        made = [helper.make_node("DequantizeLinear", ["q", "s", "z"], ["w"], axis=0 if turned else 1)]
    attributes = {"transB": 1} if turned else {}
    made.append(helper.make_node(kind.split()[0], ["x", "w"], ["y"], **attributes))
    ends = [helper.make_tensor_value_info("x", TensorProto.FLOAT, (ROWS, INPUTS))]
    ends.append(helper.make_tensor_value_info("y", TensorProto.FLOAT, (ROWS, OUTPUTS)))
    stored = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(made, "g", ends[:1], ends[1:], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10).SerializeToString()


def run(kind):
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = f"{sys.argv[1]}/optimized.onnx"
    options.log_severity_level = 3
    if "level" in kind:
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = onnxruntime.InferenceSession(build(kind), options, providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {"x": X})
    operators = {node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node}
    return "MatMulNBits" in operators, float(np.abs(got - WANTED).max() / np.abs(WANTED).max())


CASES = {
    "MatMul": (True, True),
    "Gemm": (True, True),
    "Gemm with transB": (False, False),
    "MatMul behind Cast and Mul": (False, False),
    "MatMul with accuracy level 1": (True, False),
}
for kind, (fused, rounded) in CASES.items():
    found, error = run(kind)
    print(f"{kind}: {'' if found else 'no '}MatMulNBits, {error:.4f}")
    assert found == fused, "it changed"
    assert (error > 1e-3) == rounded, "it changed"
PY
echo "as it was found"
