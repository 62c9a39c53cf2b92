#!/usr/bin/env bash
# onnxruntime 1.32.0: LRN of floats takes five to nine times as long as its definition in eight standard operators: squares,
# their sum over five channels by a Conv along one line, two square roots and a division. Results are equal to 3e-7 of the
# largest. AlexNet spent 45 % of its time in two LRN once its layers ran in integers.
#
# Seen: milliseconds of one thread, 96 channels of 55x55, beta 0.75: LRN 10.9, in other operators 1.2
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check onnx==1.23.2 onnxruntime==1.32.0 2>/dev/null
"$place/venv/bin/python" - <<'PY'
import time

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

assert onnxruntime.__version__ == "1.32.0"
SHAPE, SIZE, ALPHA = (1, 96, 55, 55), 5, 1e-4
PLACES, NUMBERS = 55 * 55, 96 * 55 * 55
X = np.random.default_rng(0).normal(0, 20, SHAPE).astype(np.float32)
ONE = [helper.make_node("LRN", ["x"], ["y"], size=SIZE, alpha=ALPHA, beta=0.75, bias=1.0)]
MANY = [
    helper.make_node("Mul", ["x", "x"], ["square"]),
    helper.make_node("Reshape", ["square", "line"], ["l"]),
    helper.make_node("Conv", ["l", "w", "bias"], ["s"], dilations=[PLACES], pads=[2 * PLACES, 2 * PLACES]),
    helper.make_node("Reshape", ["s", "map"], ["v"]),
    helper.make_node("Sqrt", ["v"], ["half"]),
    helper.make_node("Sqrt", ["half"], ["quarter"]),
    helper.make_node("Mul", ["half", "quarter"], ["power"]),
    helper.make_node("Div", ["x", "power"], ["y"]),
]
CONSTANTS = {
    "line": np.array([1, 1, NUMBERS]),
    "map": np.array(SHAPE),
    "w": np.full((1, 1, SIZE), ALPHA / SIZE, np.float32),
    "bias": np.ones(1, np.float32),
}


def opened(nodes):
    stored = [numpy_helper.from_array(array, name) for name, array in CONSTANTS.items()] if len(nodes) > 1 else []
    ends = [[helper.make_tensor_value_info(name, TensorProto.FLOAT, SHAPE)] for name in ("x", "y")]
    graph = helper.make_graph(nodes, "g", *ends, stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def seconds(session):
    start = time.process_time()
    session.run(None, {"x": X})
    return time.process_time() - start


both = [opened(ONE), opened(MANY)]
one, many = (session.run(None, {"x": X})[0] for session in both)
turns = np.array([[seconds(session) for session in both] for _ in range(15)])
ratio = float(np.median(turns[:, 0] / turns[:, 1]))
apart = float(np.abs(one - many).max() / np.abs(one).max())
print(f"LRN takes {ratio:.1f} times as long; results differ by {apart:.1e} of the largest")
assert apart < 1e-6, "it changed"
assert ratio > 3, "it changed"
PY
echo "as it was found"
