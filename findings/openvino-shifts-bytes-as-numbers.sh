#!/usr/bin/env bash
# openvino 2026.4.1: BitShift of uint8 to the left saturates at 255, where the standard drops the bits that leave the
# byte. And what a BitShift to the right makes of constants is rounded where it goes into the weights of a Gemm, with a
# Mod and a Cast behind it: 0x9f >> 4 is 10 there. In the weights of a convolution, or returned, it is 9. Neither says so.
#
# Whoever stores packed numbers and takes them out of bytes so gets other numbers there.
#
# Seen, of the bytes 0x12, 0x9f, 0xff, 0x71
#   shifted left by 4: openvino [255 255 255 255], onnxruntime [ 32 240 240  16]
#   left by 4, then right by 4: openvino [15 15 15 15], onnxruntime [ 2 15 15  1]
#   right by 4, then Mod 16: both [ 1  9 15  7]
#   weights of a Gemm, right by 4, then Mod 16: openvino [ 1. 10. 16.  7.], onnxruntime [ 1.  9. 15.  7.]
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check openvino==2026.4.1 onnx==1.23.2 onnxruntime==1.32.0 2>/dev/null
"$place/venv/bin/python" - "$place" <<'PY'
import sys

import numpy as np
import onnx
import onnxruntime
import openvino
from onnx import TensorProto, helper, numpy_helper

BYTES = np.array([0x12, 0x9F, 0xFF, 0x71], np.uint8)
FOUR, SIXTEEN = np.uint8(4), np.uint8(16)
LEFT = helper.make_node("BitShift", ["x", "four"], ["a"], direction="LEFT")


def of_file(model, x):
    """The first result of a model in openvino, and in onnxruntime."""
    place = f"{sys.argv[1]}/model.onnx"
    onnx.save(helper.make_model(model, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), place)
    core = openvino.Core()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    theirs = core.compile_model(core.read_model(place), "CPU")({"x": x})[0]
    return theirs, onnxruntime.InferenceSession(place, options).run(None, {"x": x})[0]


def in_gemm(nodes):
    """The same for bytes that become the weights of a Gemm: 64 columns of them, of which it adds up one."""
    columns, one = 64, np.zeros((1, 64), np.float32)
    one[0, 5] = 1
    steps = [*nodes, helper.make_node("Cast", [nodes[-1].output[0]], ["f"], to=TensorProto.FLOAT)]
    steps += [helper.make_node("Mul", ["f", "s"], ["w"]), helper.make_node("Gemm", ["x", "w"], ["y"], transB=1)]
    steps[0].input[0] = "bytes"
    constants = [numpy_helper.from_array(FOUR, "four"), numpy_helper.from_array(SIXTEEN, "sixteen")]
    constants += [numpy_helper.from_array(np.repeat(BYTES.reshape(-1, 1), columns, axis=1), "bytes")]
    constants += [numpy_helper.from_array(np.ones((len(BYTES), 1), np.float32), "s")]
    ends = [[helper.make_tensor_value_info("x", TensorProto.FLOAT, (1, columns))]]
    ends.append([helper.make_tensor_value_info("y", TensorProto.FLOAT, (1, len(BYTES)))])
    theirs, ours = of_file(helper.make_graph(steps, "g", *ends, constants), one)
    return theirs.reshape(-1), ours.reshape(-1)


def both(nodes):
    """What openvino and onnxruntime make of the bytes."""
    nodes = [*nodes, helper.make_node("Identity", [nodes[-1].output[0]], ["y"])]
    ends = [[helper.make_tensor_value_info(name, TensorProto.UINT8, BYTES.shape)] for name in ("x", "y")]
    constants = [numpy_helper.from_array(FOUR, "four"), numpy_helper.from_array(SIXTEEN, "sixteen")]
    graph = helper.make_graph(nodes, "g", *ends, constants)
    return of_file(graph, BYTES)


BACK = helper.make_node("BitShift", ["a", "four"], ["b"], direction="RIGHT")
RIGHT = helper.make_node("BitShift", ["x", "four"], ["r"], direction="RIGHT")
MOD = helper.make_node("Mod", ["r", "sixteen"], ["m"])
CASES = {
    "shifted left by 4": ([LEFT], [255] * 4, [32, 240, 240, 16]),
    "left by 4, then right by 4": ([LEFT, BACK], [15] * 4, [2, 15, 15, 1]),
    "right by 4, then Mod 16": ([RIGHT, MOD], [1, 9, 15, 7], [1, 9, 15, 7]),
}
for name, (nodes, *expected) in CASES.items():
    found = both(nodes)
    print(f"{name}: openvino {found[0]}, onnxruntime {found[1]}")
    assert [list(map(int, numbers)) for numbers in found] == expected, "it changed"
found = in_gemm([RIGHT, MOD])
print(f"weights of a Gemm, right by 4, then Mod 16: openvino {found[0]}, onnxruntime {found[1]}")
assert [numbers.tolist() for numbers in found] == [[1, 10, 16, 7], [1, 9, 15, 7]], "it changed"
PY
echo "as it was found"
