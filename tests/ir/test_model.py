"""sympy stays away until it is needed, and is itself then. In processes of their own: imports happen once."""

from __future__ import annotations

import subprocess
import sys

import onnx_ir
import pytest


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
