#!/usr/bin/env bash
# onnxruntime 1.32.0: a Gelu that is written out, x / 2 * (1 + erf(x / sqrt(2))), becomes one operator, but not where x
# comes from a DequantizeLinear; a Sum of one tensor in between, which only copies, brings it back.
#
# The optimizer gives each reader of a DequantizeLinear one of its own, so that it can be made one with that reader. The
# two readers of x then read two tensors, and the pattern of a Gelu, which wants one, is not there any more. An Identity
# does not help: it is taken out first. A division by sqrt(2) that is written as a multiplication, or a half between
# the sum and the product, are not known either.
#
# Seen: the operators of the optimized graph (Gelu, Erf), and CPU seconds of one thread over those without Gelu
#   float: 1 Gelu
#   behind a dequantizer: 0 Gelu
#   with an Identity: 0 Gelu
#   with a Sum: 1 Gelu, some 0.7 of the time
#   multiplied by 1 / sqrt(2): 0 Gelu
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check onnxruntime==1.32.0 onnx==1.22.0 2>/dev/null
"$place/venv/bin/python" - "$place" <<'PY'
import sys
import time

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

assert onnxruntime.__version__ == "1.32.0"
SHAPE = (1, 64, 56, 56)
CONSTANTS = {"s": np.float32(0.05), "z": np.uint8(128), "root": np.float32(2**0.5), "inverse": np.float32(0.5**0.5)}
CONSTANTS |= {"one": np.float32(1), "half": np.float32(0.5)}


def build(between, inner=("Div", "root"), codes=True):
    nodes = []
    if codes:
        nodes += [helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"])]
        nodes += [helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"])]
    source = "d" if codes else "x"
    if between:
        nodes.append(helper.make_node(between, [source], ["c"]))
        source = "c"
    nodes += [
        helper.make_node(inner[0], [source, inner[1]], ["i"]),
        helper.make_node("Erf", ["i"], ["e"]),
        helper.make_node("Add", ["e", "one"], ["a"]),
        helper.make_node("Mul", [source, "a"], ["m"]),
        helper.make_node("Mul", ["m", "half"], ["y"]),
    ]
    ends = [[helper.make_tensor_value_info(name, TensorProto.FLOAT, SHAPE)] for name in ("x", "y")]
    constants = [numpy_helper.from_array(np.asarray(array), name) for name, array in CONSTANTS.items()]
    graph = helper.make_graph(nodes, "g", *ends, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def optimized(model):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.optimized_model_filepath = f"{sys.argv[1]}/optimized.onnx"
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session, [node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node].count("Gelu")


def seconds(session):
    start = time.process_time()
    for _ in range(20):
        session.run(None, {"x": X})
    return time.process_time() - start


X = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
CASES = {
    "float": (build(None, codes=False), 1),
    "behind a dequantizer": (build(None), 0),
    "with an Identity": (build("Identity"), 0),
    "with a Sum": (build("Sum"), 1),
    "multiplied by 1 / sqrt(2)": (build(None, ("Mul", "inverse"), codes=False), 0),
}
sessions = {}
for name, (model, expected) in CASES.items():
    sessions[name], found = optimized(model)
    print(f"{name}: {found} Gelu")
    assert found == expected, "it changed"
pair = [sessions["with a Sum"], sessions["behind a dequantizer"]]
turns = np.array([[seconds(session) for session in pair] for _ in range(7)])
ratio = float(np.median(turns[:, 0] / turns[:, 1]))
print(f"time with a Sum over that without: {ratio:.2f}")
assert ratio < 0.9, "it changed"
PY
echo "as it was found"
