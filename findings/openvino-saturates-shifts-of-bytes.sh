#!/usr/bin/env bash
# openvino 2026.4.1: BitShift of uint8 to the left saturates at 255, where the standard drops the bits that leave the
# byte. It does so without a word, and for constants as well, which it computes when it reads the file.
#
# Whoever takes packed numbers out of bytes by a shift to the left and one back gets other numbers there. A shift to the
# right and a Mod, or a BitwiseAnd, are right.
#
# Seen, of the bytes 0x12, 0x9f, 0xff, 0x71
#   shifted left by 4: openvino [255 255 255 255], onnxruntime [ 32 240 240  16]
#   left by 4, then right by 4: openvino [15 15 15 15], onnxruntime [ 2 15 15  1]
#   Mod 16: both [ 2 15 15  1]
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


def both(nodes):
    """What openvino and onnxruntime make of the bytes."""
    nodes = [*nodes, helper.make_node("Identity", [nodes[-1].output[0]], ["y"])]
    ends = [[helper.make_tensor_value_info(name, TensorProto.UINT8, BYTES.shape)] for name in ("x", "y")]
    constants = [numpy_helper.from_array(FOUR, "four"), numpy_helper.from_array(SIXTEEN, "sixteen")]
    graph = helper.make_graph(nodes, "g", *ends, constants)
    place = f"{sys.argv[1]}/model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), place)
    core = openvino.Core()
    theirs = core.compile_model(core.read_model(place), "CPU")({"x": BYTES})[0]
    return theirs, onnxruntime.InferenceSession(place).run(None, {"x": BYTES})[0]


BACK = helper.make_node("BitShift", ["a", "four"], ["b"], direction="RIGHT")
CASES = {
    "shifted left by 4": ([LEFT], [255] * 4, [32, 240, 240, 16]),
    "left by 4, then right by 4": ([LEFT, BACK], [15] * 4, [2, 15, 15, 1]),
    "Mod 16": ([helper.make_node("Mod", ["x", "sixteen"], ["m"])], [2, 15, 15, 1], [2, 15, 15, 1]),
}
for name, (nodes, *expected) in CASES.items():
    found = both(nodes)
    print(f"{name}: openvino {found[0]}, onnxruntime {found[1]}")
    assert [list(map(int, numbers)) for numbers in found] == expected, "it changed"
PY
echo "as it was found"
