#!/usr/bin/env bash
# onnx-ir 0.1.14: Model.clone drops type and shape of what its nodes compute, outputs of the model among them.
#
# The clone of a valid model keeps the types of its inputs; its outputs have neither type nor shape, and nothing is said.
# Written to a file it is refused by onnx's checker ("Field 'type' of 'value_info' is required but missing"). The clone
# of onnx-ir 0.1.15 keeps them, so that whoever edits clones and writes them, as a search over variants of a model does,
# needs 0.1.15. That version imports `packaging` without asking for it among its dependencies: alone in a new
# environment it ends in ModuleNotFoundError, which is why it is installed here by name.
#
# Seen with onnx 1.18.0 on Python 3.11: the lines behind `expected`.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
cat > "$place/clone.py" <<'PY'
from importlib.metadata import version

import onnx
import onnx_ir as ir
from onnx import TensorProto, helper

ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in ("x", "y")]
graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", ends[:1], ends[1:])
proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
onnx.checker.check_model(proto)
copy = ir.from_proto(proto).clone()
try:
    onnx.checker.check_model(ir.to_proto(copy))
    verdict = "accepted"
except onnx.checker.ValidationError:
    verdict = "refused"
(x,), (y,) = copy.graph.inputs, copy.graph.outputs
print("onnx-ir", version("onnx-ir"), "input", x.dtype, "output", y.dtype, verdict)
PY
expected="onnx-ir 0.1.14 input FLOAT output None refused
onnx-ir 0.1.15 input FLOAT output FLOAT accepted"
for version in 0.1.14 0.1.15; do
  python3 -m venv "$place/$version"
  "$place/$version/bin/pip" install --quiet --disable-pip-version-check \
    "onnx-ir==$version" onnx==1.18.0 numpy==2.2.6 packaging==25.0 2>/dev/null
  "$place/$version/bin/python" "$place/clone.py" | tee -a "$place/seen"
done
[ "$(cat "$place/seen")" = "$expected" ] && echo "as it was found"
