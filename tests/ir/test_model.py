"""sympy stays away until it is needed, and is itself then, in processes of their own, as imports happen once; and
models are written as onnx-ir writes them."""

from __future__ import annotations

import subprocess
import sys

import onnx
import onnx_ir
import pytest

from qconv.ir.model import Model


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_pipeline_does_without_sympy() -> None:
    assert python("import qconv.pipeline.quantize, sys; print('sympy' in sys.modules)") == "False"


@pytest.mark.skipif(not hasattr(onnx_ir.SymbolicDim, "__add__"), reason="onnx-ir before 0.2 does not calculate")
def test_onnx_ir_gets_it_when_it_calculates() -> None:
    """(N + 1) * 2, floor and max: an attribute of the library, and two functions that were taken at import."""
    code = "d = (ir.SymbolicDim('N') + 1) * 2; e = ir.SymbolicDim('max(N, floor(M/2))') + 0; print(d, '|', e)"
    assert python(f"from qconv.ir.model import ir; {code}") == python(f"import onnx_ir as ir; {code}")


@pytest.mark.parametrize("first", ["import qconv.ir.model", "import sympy; import qconv.ir.model"])
def test_everyone_else_gets_the_library_itself(first: str) -> None:
    assert python(f"{first}; import sympy; print(sympy.__file__ is not None, sympy.Integer(2) + 2)") == "True 4"


@pytest.mark.parametrize("annotated", [False, True])
def test_a_model_is_written_as_onnx_ir_writes_it_but_for_shapes_in_between(annotated: bool) -> None:
    """Bodies, trailing inputs, documentation and metadata included; what says of scales only onnx-ir can write."""
    text = """
        <ir_version: 8, opset_import: ["" : 17, "own" : 2], producer_name: "by hand", doc_string: "a model",
         metadata_props: ["a" : "1"]>
        net (float[N, 2] x, bool c) => (float[N, 2] y)
        <float[2] w = {1, 2}, float scale = {0.5}> {
            [first] a = Clip (x, , w0)
            w0 = Constant <value = float {3}> ()
            b = Add (a, w)
            y = If (c) <then_branch = t () => (float[N, 2] p) { p = Mul (b, scale) },
                        else_branch = e () => (float[N, 2] q) { q = Identity (b) }>
        }"""
    proto = onnx.parser.parse_model(text)
    nodes = list(proto.graph.node)
    del proto.graph.node[:]
    proto.graph.node.extend([nodes[1], nodes[0], *nodes[2:]])
    proto.graph.doc_string, proto.graph.node[1].doc_string = "a graph", "a node"
    if annotated:
        own = proto.graph.quantization_annotation.add(tensor_name="b")
        own.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="scale")
    inner = onnx_ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    expected = onnx_ir.to_proto(inner)
    assert expected.graph.value_info
    del expected.graph.value_info[:]
    assert Model(inner).proto().SerializeToString(deterministic=True) == expected.SerializeToString(deterministic=True)
    assert bool(Model(inner).proto().graph.quantization_annotation) == annotated
