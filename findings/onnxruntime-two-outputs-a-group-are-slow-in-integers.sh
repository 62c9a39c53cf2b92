#!/usr/bin/env bash
# onnxruntime 1.32.0: a Conv with one input and two outputs a group (a depthwise layer with a multiplier of 2) takes a
# multiple of float's time between quantizers, while the depthwise layer with one output a group does not.
#
# The CPU provider has an integer kernel for depthwise layers, where groups are as many as inputs and outputs. With two
# outputs a group it falls back to a matrix product for each group, of one column by two, which the packing of its
# operands outweighs. In float both layers run alike, in a blocked layout. FastViT begins its stages so (7x7, stride 2,
# twice the channels): its file in integers is slower than float by these few layers alone.
#
# Seen on an x86 CPU with VNNI, one thread, CPU seconds of a layer between two pointwise ones, 7x7 with stride 2 on 64x64:
#   48 inputs, 48 outputs, 48 groups: 1.0 times float's time
#   48 inputs, 96 outputs, 48 groups: 7.6 times float's time
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check onnxruntime==1.32.0 onnx==1.22.0 2>/dev/null
"$place/venv/bin/python" - <<'PY'
import time

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

assert onnxruntime.__version__ == "1.32.0"
CHANNELS, SIDE = 48, 64


def build(outputs, integers):
    rng = np.random.default_rng(0)
    constants = {"s": np.float32(0.05), "z": np.uint8(128)}
    nodes = []

    def pair(x, name):
        nodes.append(helper.make_node("QuantizeLinear", [x, "s", "z"], [f"{name}_q"]))
        nodes.append(helper.make_node("DequantizeLinear", [f"{name}_q", "s", "z"], [name]))
        return name

    def conv(x, name, shape, group, **how):
        weight = rng.normal(size=shape).astype(np.float32) / np.sqrt(np.prod(shape[1:])).astype(np.float32)
        if integers:
            constants[f"{name}_w_q"] = np.clip(np.rint(weight / 0.02), -127, 127).astype(np.int8)
            constants[f"{name}_w_s"], constants[f"{name}_w_z"] = np.float32(0.02), np.int8(0)
            nodes.append(helper.make_node("DequantizeLinear", [f"{name}_w_q", f"{name}_w_s", f"{name}_w_z"], [f"{name}_w"]))
        else:
            constants[f"{name}_w"] = weight
        nodes.append(helper.make_node("Conv", [x, f"{name}_w"], [name], group=group, **how))
        return pair(name, f"{name}_r") if integers else name

    x = pair("x", "xr") if integers else "x"
    a = conv(x, "a", (CHANNELS, CHANNELS, 1, 1), 1)
    b = conv(a, "b", (outputs, 1, 7, 7), CHANNELS, pads=[3] * 4, strides=[2, 2])
    y = conv(b, "c", (CHANNELS, outputs, 1, 1), 1)
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (1, CHANNELS, SIDE, SIDE))],
        [helper.make_tensor_value_info(y, TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def seconds(session, x):
    session.run(None, {"x": x})
    start = time.process_time()
    for _ in range(20):
        session.run(None, {"x": x})
    return time.process_time() - start


x = np.random.default_rng(1).normal(size=(1, CHANNELS, SIDE, SIDE)).astype(np.float32)
ratios = {}
for outputs in (CHANNELS, 2 * CHANNELS):
    sessions = [build(outputs, integers) for integers in (False, True)]
    turns = np.array([[seconds(session, x) for session in sessions] for _ in range(7)])
    ratios[outputs] = float(np.median(turns[:, 1] / turns[:, 0]))
    print(f"{CHANNELS} inputs, {outputs} outputs, {CHANNELS} groups: {ratios[outputs]:.1f} times float's time")
assert ratios[2 * CHANNELS] > 2 > ratios[CHANNELS], "it changed"
PY
echo "as it was found"
