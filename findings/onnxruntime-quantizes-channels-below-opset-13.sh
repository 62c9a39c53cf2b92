#!/usr/bin/env bash
# onnxruntime 1.32.0: quantize_static(per_channel=True) of a model of opset 11 or 12 writes a file that does not load.
#
# QuantizeLinear and DequantizeLinear have had an axis since opset 13. The quantizer leaves 11
# and 12 as they are, writes the axis all the same, says nothing of it, and ends well. The file is refused when it is
# opened. Detectors are often exported at opset 11. Per tensor, or at opset 13, the same call writes a good file.
#
# Seen:
#   opset 11, per channel: Unrecognized attribute: axis
#   opset 12, per channel: Unrecognized attribute: axis
#   opset 13, per channel: runs
#   opset 11, per tensor: runs
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check \
  onnxruntime==1.32.0 onnx==1.22.0 sympy==1.14.0 2>/dev/null
cd "$place"
"$place/venv/bin/python" - <<'PY'
import logging

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

assert onnxruntime.__version__ == "1.32.0"
logging.disable(logging.WARNING)  # it recommends its own preprocessing
X = np.random.default_rng(0).normal(size=(1, 3, 8, 8)).astype(np.float32)
WEIGHTS = np.random.default_rng(1).normal(size=(4, 3, 3, 3)).astype(np.float32)


class Pictures(CalibrationDataReader):
    def __init__(self):
        self.left = [{"x": X}]

    def get_next(self):
        return self.left.pop() if self.left else None


def ending(opset, per_channel):
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, X.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (1, 4, 6, 6))],
        [numpy_helper.from_array(WEIGHTS, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=7)
    onnx.checker.check_model(model)
    onnx.save(model, "float.onnx")
    quantize_static("float.onnx", "codes.onnx", Pictures(), quant_format=QuantFormat.QDQ, per_channel=per_channel)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        onnxruntime.InferenceSession("codes.onnx", options, providers=["CPUExecutionProvider"]).run(None, {"x": X})
    except Exception as error:
        return str(error)
    return "runs"


REFUSED = "Unrecognized attribute: axis"
for opset, per_channel, told in ((11, True, REFUSED), (12, True, REFUSED), (13, True, "runs"), (11, False, "runs")):
    got = ending(opset, per_channel)
    print(f"opset {opset}, per {'channel' if per_channel else 'tensor'}: {told if told in got else got}")
    assert told in got, "it changed"
PY
echo "as it was found"
