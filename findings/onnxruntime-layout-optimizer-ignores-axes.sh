#!/usr/bin/env bash
# onnxruntime 1.32.0: a quantized network with Resize or Pad by `axes` (opset 18) loads or runs only unoptimized.
#
# The CPU provider turns Conv between dequantizers and quantizers into one that takes NHWC, and then moves the
# transposes around it through the operators behind. In front of a Resize or a Pad it permutes the numbers of scales,
# sizes or pads as if there were one for every axis, also where `axes` says that there are only two. So a valid file
# fails with an error: Resize by scales and Pad at the first run (an index of a Gather that nobody wrote is out of
# bounds), Resize by sizes when it is loaded. The same network in float, or with optimizations off, runs. PyTorch's
# exporter writes such a Resize for `interpolate`.
#
# Another limit shows in the same place: Resize "cubic" to a smaller size is computed for NCHW alone, and the moved
# transposes make NHWC of it.
#
# Seen:
#   Resize scales, all axes: runs
#   Resize scales, axes 2 3: Gather: indices element out of data bounds
#   Resize sizes, axes 2 3: Number of elements of input 'sizes' (0) does not match the number of axes (2)
#   Pad, all axes: runs
#   Pad, axes 2 3: Gather: indices element out of data bounds
#   Resize cubic 0.5, all axes: 'Cubic' mode only supports
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check onnxruntime==1.32.0 onnx==1.22.0 2>/dev/null
"$place/venv/bin/python" - <<'PY'
import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

assert onnxruntime.__version__ == "1.32.0"
X = np.random.default_rng(0).normal(size=(1, 8, 12, 12)).astype(np.float32)
CODES = np.random.default_rng(1).integers(-127, 128, (8, 8, 3, 3)).astype(np.int8)


def network(op_type, inputs, numbers, **attributes):
    """Two Conv between dequantizers and quantizers, and an operator between them."""
    constants = {"scale": np.float32(0.03), "zero": np.uint8(128), "step": np.float32(0.01), "none": np.int8(0)}
    constants |= {"codes": CODES, **numbers}
    nodes = [helper.make_node("DequantizeLinear", ["codes", "step", "none"], ["weights"])]

    def rounded(name):
        nodes.append(helper.make_node("QuantizeLinear", [name, "scale", "zero"], [f"{name}_q"]))
        nodes.append(helper.make_node("DequantizeLinear", [f"{name}_q", "scale", "zero"], [f"{name}_d"]))
        return f"{name}_d"

    nodes.append(helper.make_node("Conv", [rounded("x"), "weights"], ["a"], pads=[1, 1, 1, 1]))
    nodes.append(helper.make_node(op_type, [rounded("a"), *inputs], ["b"], **attributes))
    nodes.append(helper.make_node("Conv", [rounded("b"), "weights"], ["c"], pads=[1, 1, 1, 1]))
    rounded("c")
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, X.shape)],
        [helper.make_tensor_value_info("c_d", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9).SerializeToString()


def ending(model, level):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = level
    try:
        onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"]).run(None, {"x": X})
    except Exception as error:
        return str(error)
    return "runs"


F, I, TWO = np.float32, np.int64, {"axes": [2, 3]}
CASES = {
    "Resize scales, all axes": ("Resize", ["", "n"], {"n": F([1, 1, 2, 2])}, {}, "runs"),
    "Resize scales, axes 2 3": ("Resize", ["", "n"], {"n": F([2, 2])}, TWO, "indices element out of data bounds"),
    "Resize sizes, axes 2 3": ("Resize", ["", "", "n"], {"n": I([24, 24])}, TWO, "does not match the number of axes"),
    "Pad, all axes": ("Pad", ["n"], {"n": I([0, 0, 1, 1, 0, 0, 1, 1])}, {}, "runs"),
    "Pad, axes 2 3": ("Pad", ["n", "", "k"], {"n": I([1, 1, 1, 1]), "k": I([2, 3])}, {}, "indices element out of"),
    "Resize cubic 0.5, all axes": ("Resize", ["", "n"], {"n": F([1, 1, 0.5, 0.5])}, {"mode": "cubic"}, "'Cubic' mode only"),
}
levels = onnxruntime.GraphOptimizationLevel
for name, (op_type, inputs, numbers, attributes, told) in CASES.items():
    model = network(op_type, inputs, numbers, **attributes)
    got = ending(model, levels.ORT_ENABLE_ALL)
    print(f"{name}: {got.splitlines()[0][-110:] if got != 'runs' else got}")
    assert told in got, "it changed"
    assert ending(model, levels.ORT_DISABLE_ALL) == "runs", "it changed"
PY
echo "as it was found"
