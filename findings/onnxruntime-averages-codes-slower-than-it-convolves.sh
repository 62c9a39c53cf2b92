#!/usr/bin/env bash
# onnxruntime 1.32.0: an AveragePool of codes between integer convolutions takes 10 to 20 times as long as a depthwise
# convolution that averages the same windows, with the same results.
#
# Seen: microseconds of the node in the profile, one thread, 128 channels of 56x56, windows of 2x2, AVX2
#   QLinearAveragePool 1200 to 2200, QLinearConv with 128 groups and equal weights 80 to 100
#   results of both differ by 0.00 codes
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check onnx==1.23.2 onnxruntime==1.32.0 2>/dev/null
"$place/venv/bin/python" - "$place" <<'PY'
import json
import sys

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

assert onnxruntime.__version__ == "1.32.0"
rng = np.random.default_rng(0)
CHANNELS, SIDE, STEP = 128, 56, 0.05
X = rng.normal(size=(1, CHANNELS, SIDE, SIDE)).astype(np.float32)
WEIGHTS = rng.integers(-50, 50, (CHANNELS, CHANNELS, 1, 1)).astype(np.int8)


def build(kind):
    """A 1x1 convolution, the average, and a 1x1 convolution; every tensor between quantizer and dequantizer."""
    constants = {"s": np.float32(STEP), "z": np.uint8(128), "w": WEIGHTS, "ws": np.full(CHANNELS, 2e-3, np.float32)}
    constants |= {"wz": np.zeros(CHANNELS, np.int8), "eye": np.full((CHANNELS, 1, 2, 2), 64, np.int8)}
    constants |= {"es": np.full(CHANNELS, 1 / 256, np.float32)}
    stored = [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()]
    nodes = []

    def rounded(name):
        nodes.append(helper.make_node("QuantizeLinear", [name, "s", "z"], [f"{name}q"]))
        nodes.append(helper.make_node("DequantizeLinear", [f"{name}q", "s", "z"], [f"{name}d"]))
        return f"{name}d"

    def weights(name, codes, scales):
        nodes.append(helper.make_node("DequantizeLinear", [codes, scales, "wz"], [name], axis=0))
        return name

    nodes.append(helper.make_node("Conv", [rounded("x"), weights("w1", "w", "ws")], ["a"]))
    window = {"strides": [2, 2], "kernel_shape": [2, 2]}
    if kind == "pool":
        nodes.append(helper.make_node("AveragePool", [rounded("a")], ["b"], **window))
    else:
        nodes.append(helper.make_node("Conv", [rounded("a"), weights("w2", "eye", "es")], ["b"], group=CHANNELS, **window))
    nodes.append(helper.make_node("Conv", [rounded("b"), weights("w3", "w", "ws")], ["c"]))
    rounded("c")
    ends = [[helper.make_tensor_value_info("x", TensorProto.FLOAT, X.shape)]]
    ends += [[helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("cd", "bd")]]
    graph = helper.make_graph(nodes, "g", *ends, stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()


def measured(kind, wanted):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.enable_profiling = True
    options.profile_file_prefix = f"{sys.argv[1]}/{kind}"
    session = onnxruntime.InferenceSession(build(kind), options, providers=["CPUExecutionProvider"])
    for _ in range(20):
        results = session.run(None, {"x": X})
    events = [event for event in json.load(open(session.end_profiling())) if event["name"].endswith("_kernel_time")]
    names = sorted({event["args"]["op_name"] for event in events})
    taken = {}
    for event in events:
        if event["args"]["op_name"] == wanted:
            taken.setdefault(event["name"], []).append(event["dur"])
    return names, [float(np.median(runs)) for runs in taken.values()], results[1]


names, (pool,), averages = measured("pool", "QLinearAveragePool")
print(f"as AveragePool: {', '.join(names)}; QLinearAveragePool takes {pool:.0f} us")
names, layers, same = measured("layer", "QLinearConv")
assert len(layers) == 3, "it changed"
print(f"as depthwise Conv: {', '.join(names)}; the quickest of three QLinearConv takes {min(layers):.0f} us")
print(f"largest difference of the averages: {np.abs(averages - same).max() / STEP:.2f} codes")
assert np.abs(averages - same).max() <= 1.01 * STEP, "it changed"
assert pool > 4 * min(layers), "it changed"
PY
echo "as it was found"
