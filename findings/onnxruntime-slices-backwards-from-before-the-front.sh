#!/usr/bin/env bash
# onnxruntime 1.32.0 and onnx 1.22.0: two backward Slices of the same numbers keep other places in the runtime than in
# onnx's reference evaluator and in Python.
#
# An end of INT64_MAX or INT32_MAX, which is "as far as it goes" forwards, is so backwards, too: the runtime keeps all
# places down to the front, where the reference keeps none, as the end lies behind the start. A start before the front is
# the front itself, so that the runtime keeps one place and the reference none. onnx's shape inference agrees with the
# reference in the first case, and with the runtime in the second. An end of INT64_MIN is the front for all.
#
# Seen, of six places:
#   5 to INT64_MAX by -1: runtime [5, 4, 3, 2, 1, 0], reference [], inferred 0
#   5 to INT32_MAX by -1: runtime [5, 4, 3, 2, 1, 0], reference [], inferred 0
#   -100 to INT64_MIN by -1: runtime [0], reference [], inferred 1
#   5 to INT64_MIN by -1: runtime [5, 4, 3, 2, 1, 0], reference [5, 4, 3, 2, 1, 0], inferred 6
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check onnxruntime==1.32.0 onnx==1.22.0 2>/dev/null
"$place/venv/bin/python" - <<'PY'
import numpy as np
import onnx
import onnxruntime
from onnx.reference import ReferenceEvaluator

assert (onnxruntime.__version__, onnx.__version__) == ("1.32.0", "1.22.0")
LARGEST, LEAST = 2**63 - 1, -(2**63)
X = np.arange(6, dtype=np.float32)


def kept(start, end, step):
    numbers = {"starts": [start], "ends": [end], "axes": [0], "steps": [step]}
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Slice", ["x", *numbers], ["y"])],
        "g",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, X.shape)],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
        [onnx.helper.make_tensor(name, onnx.TensorProto.INT64, [1], value) for name, value in numbers.items()],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (runtime,) = session.run(None, {"x": X})
    (reference,) = ReferenceEvaluator(model).run(None, {"x": X})
    inferred = onnx.shape_inference.infer_shapes(model).graph.output[0].type.tensor_type.shape.dim[0].dim_value
    return runtime.astype(int).tolist(), reference.astype(int).tolist(), inferred


WORDS = {2**31 - 1: "INT32_MAX", LARGEST: "INT64_MAX", LEAST: "INT64_MIN"}
for (start, end, step), expected in {
    (5, LARGEST, -1): ([5, 4, 3, 2, 1, 0], [], 0),
    (5, 2**31 - 1, -1): ([5, 4, 3, 2, 1, 0], [], 0),
    (-100, LEAST, -1): ([0], [], 1),
    (5, LEAST, -1): ([5, 4, 3, 2, 1, 0], [5, 4, 3, 2, 1, 0], 6),
}.items():
    got = kept(start, end, step)
    print(f"{start} to {WORDS[end]} by {step}: runtime {got[0]}, reference {got[1]}, inferred {got[2]}")
    assert got == expected, "it changed"
PY
echo "as it was found"
