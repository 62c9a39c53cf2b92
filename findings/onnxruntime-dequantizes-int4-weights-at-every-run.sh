#!/usr/bin/env bash
# onnxruntime 1.32.0: a convolution between quantized tensors runs in integers with int8 weights, and in float with the
# same weights as int4: they are dequantized at every run. A Cast of the int4 codes to int8 in front of the
# DequantizeLinear, which is computed when the file is loaded, brings the integer kernel back, with the same results.
#
# Seen: operators of the optimized graph, and CPU seconds of one thread over those with int8 weights
#   int8: QLinearConv, 1.0
#   int4: DequantizeLinear and Conv, 3.7 on a CPU without VNNI
#   int4 behind a Cast: QLinearConv, 1.0, results equal to those of int8
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check onnx==1.23.2 onnxruntime==1.32.0 2>/dev/null
"$place/venv/bin/python" - "$place" <<'PY'
import sys
import time

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

assert onnxruntime.__version__ == "1.32.0"
rng = np.random.default_rng(0)
CHANNELS, SIDE = 96, 14
CODES = rng.integers(-8, 8, (CHANNELS, CHANNELS, 3, 3)).astype(np.int8)
SCALES = rng.uniform(0.01, 0.02, CHANNELS).astype(np.float32)
X = rng.normal(size=(1, CHANNELS, SIDE, SIDE)).astype(np.float32)


def build(kind):
    constants = {"s": np.float32(0.05), "z": np.uint8(128), "ws": SCALES, "wz": np.zeros(CHANNELS, np.int8)}
    constants |= {"ys": np.float32(0.5)}
    stored = [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()]
    nodes = [helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"])]
    nodes += [helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"])]
    if kind == "int8":
        stored.append(numpy_helper.from_array(CODES, "w"))
        codes = ["w", "ws", "wz"]
    else:
        low = CODES.reshape(-1).astype(np.uint8) & 15
        raw = (low[0::2] | (low[1::2] << 4)).tobytes()
        stored.append(TensorProto(name="w", data_type=TensorProto.INT4, dims=CODES.shape, raw_data=raw))
        codes = ["w", "ws"]
    if kind == "int4 behind a Cast":
        nodes.append(helper.make_node("Cast", ["w"], ["c"], to=TensorProto.INT8))
        codes = ["c", "ws", "wz"]
    nodes += [helper.make_node("DequantizeLinear", codes, ["f"], axis=0)]
    nodes += [helper.make_node("Conv", ["d", "f"], ["r"], pads=[1, 1, 1, 1])]
    nodes += [helper.make_node("QuantizeLinear", ["r", "ys", "z"], ["o"])]
    nodes += [helper.make_node("DequantizeLinear", ["o", "ys", "z"], ["y"])]
    ends = [[helper.make_tensor_value_info(name, TensorProto.FLOAT, X.shape)] for name in ("x", "y")]
    graph = helper.make_graph(nodes, "g", *ends, stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10).SerializeToString()


def opened(kind):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.optimized_model_filepath = f"{sys.argv[1]}/optimized.onnx"
    session = onnxruntime.InferenceSession(build(kind), options, providers=["CPUExecutionProvider"])
    return session, {node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node}


def seconds(session):
    start = time.process_time()
    for _ in range(10):
        session.run(None, {"x": X})
    return time.process_time() - start


CASES = {"int8": True, "int4": False, "int4 behind a Cast": True}
sessions, results = {}, {}
for kind, integer in CASES.items():
    sessions[kind], operators = opened(kind)
    print(f"{kind}: {', '.join(sorted(operators))}")
    assert ("QLinearConv" in operators) == integer, "it changed"
    assert bool({"Conv", "FusedConv"} & operators) != integer, "it changed"
    (results[kind],) = sessions[kind].run(None, {"x": X})
assert np.array_equal(results["int8"], results["int4 behind a Cast"]), "it changed"
turns = np.array([[seconds(session) for session in sessions.values()] for _ in range(7)])
ratios = np.median(turns / turns[:, :1], axis=0)
print("times over int8's:", *(f"{name} {ratio:.2f}" for name, ratio in zip(sessions, ratios, strict=True)))
assert ratios[1] > 2 > 1.3 > ratios[2], "it changed"
PY
echo "as it was found"
