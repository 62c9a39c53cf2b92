"""The other peer: NNCF's post-training quantization of an ONNX file.

    PYTHON -m tests.bench.nncf_peer CASE MODEL FOLDER OUT HOW

PYTHON is that of an environment with nncf, onnx, onnxruntime and pillow, which need not have qconv. HOW: "performance"
(its default), "mixed" (asymmetric activations), or "accurate" (mixed, and bias correction layer by layer).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from tests.bench.cases import BY_NAME

os.environ["CI"] = "true"  # its telemetry stays at home


def main(case: str, model: str, folder: str, out: str, how: str) -> None:
    import nncf
    import onnx

    loaded = onnx.load(model)
    constants = {tensor.name for tensor in loaded.graph.initializer}
    name = next(value.name for value in loaded.graph.input if value.name not in constants)
    paths = sorted(Path(folder).iterdir())
    quantized = nncf.quantize(
        loaded,
        nncf.Dataset(paths, lambda path: {name: BY_NAME[case].prep(path)}),
        preset=nncf.QuantizationPreset.PERFORMANCE if how == "performance" else nncf.QuantizationPreset.MIXED,
        subset_size=len(paths),
        fast_bias_correction=how != "accurate",
    )
    onnx.save(quantized, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
