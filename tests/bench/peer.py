"""The peer: ONNX Runtime's own quant_pre_process and quantize_static, with its usual settings for this purpose.

    python -m tests.bench.peer CASE MODEL FOLDER OUT [how [method [granularity [operators]]]]

`how` says what is left out of the preparation, for files that it fails on: "full", "no-symbolic" or "none".
`method` is the calibrator, "MinMax" by default, and `granularity` that of weights, "per-channel". `operators` are those
that are quantized, joined by commas; all by default.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.bench.cases import BY_NAME, REPOSITORY, Case

SETTINGS = "QDQ, per_channel, QUInt8 activations, QInt8 weights, MinMax"
METHODS = ("MinMax", "Entropy", "Percentile")
PREPARATIONS = ("full", "no-symbolic", "none")


def command(
    case: Case, model: Path, folder: Path, out: Path, how: str = "full", operators: Sequence[str] = ()
) -> list[str]:
    files = [case.name, str(model), str(folder), str(out)]
    restricted = [METHODS[0], "per-channel", ",".join(operators)] if operators else []
    return [sys.executable, "-m", "tests.bench.peer", *files, how, *restricted]


def convert(
    case: Case, model: Path, folder: Path, out: Path, sample: Path, operators: Sequence[str] = ()
) -> dict[str, Any]:
    """Quantize `model`; where that fails, its upgraded and folded form. operators: these alone, all where none is said.

    {"error": of the file as it is or None, "input": "as is" or "folded", "how", "failed": [other tries]}, with
    "input" None if nothing worked.
    """
    error = attempt(case, model, folder, out, sample, operators=operators)
    if error is None:
        return {"error": None, "input": "as is", "how": "full", "failed": []}
    folded = out.with_suffix(".folded.onnx")
    from tests.support.folded import write_folded_float

    write_folded_float(model, folded)
    failed: list[str] = []
    for how in PREPARATIONS:
        again = attempt(case, folded, folder, out, sample, how, operators)
        if again is None:
            return {"error": error, "input": "folded", "how": how, "failed": failed}
        failed.append(f"folded, {how}: {again}")
    return {"error": error, "input": None, "how": None, "failed": failed}


def attempt(
    case: Case, model: Path, folder: Path, out: Path, sample: Path, how: str = "full", operators: Sequence[str] = ()
) -> str | None:
    """Make `out` and try it on one picture. The first line of the error, or None."""
    out.unlink(missing_ok=True)
    done = subprocess.run(
        command(case, model, folder, out, how, operators), cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    if done.returncode < 0:
        return f"killed by signal {-done.returncode}"
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        return next((line.removeprefix("peer: ") for line in lines if line.startswith("peer: ")), lines[-1])
    from tests.bench.accuracy import session

    try:
        made = session(out)
        made.run(None, {made.get_inputs()[0].name: case.prep(sample)})
    except Exception as error:  # whatever the runtime says of a file that it does not like
        return f"made a file that does not run: {_first_line(error)}".replace(f"Load model from {out} failed:", "")
    return None


def _first_line(error: Exception) -> str:
    text = next((line for line in str(error).splitlines() if line.strip()), "")
    if not text:  # a bare assertion: where it stands says more
        frame = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{Path(frame.filename).name}:{frame.lineno} {frame.line}"
    return f"{type(error).__name__}: {text}"[:400]


def main(
    case: str,
    model: str,
    folder: str,
    out: str,
    how: str = "full",
    method: str = "MinMax",
    granularity: str = "per-channel",
    operators: str = "",
) -> None:
    stage = "import"
    try:
        from onnxruntime.quantization import (
            CalibrationDataReader,
            CalibrationMethod,
            QuantFormat,
            QuantType,
            quantize_static,
        )
        from onnxruntime.quantization.shape_inference import quant_pre_process

        class Reader(CalibrationDataReader):  # type: ignore[misc]
            def __init__(self, feeds: Iterator[dict[str, np.ndarray]]) -> None:
                self.feeds = feeds

            def get_next(self) -> dict[str, np.ndarray] | None:
                return next(self.feeds, None)

        with tempfile.TemporaryDirectory() as scratch:
            ready = model
            if how != "none":
                stage = "quant_pre_process"
                ready = str(Path(scratch) / "ready.onnx")
                quant_pre_process(model, ready, skip_symbolic_shape=how == "no-symbolic")
            stage = "quantize_static"
            quantize_static(
                ready,
                out,
                Reader(_feeds(BY_NAME[case], ready, folder)),
                quant_format=QuantFormat.QDQ,
                per_channel=granularity == "per-channel",
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                calibrate_method=CalibrationMethod[method],
                op_types_to_quantize=operators.split(",") if operators else None,
            )
    except Exception as error:
        sys.exit(f"peer: {stage}: {_first_line(error)}")


def _feeds(case: Case, model: str, folder: str) -> Iterator[dict[str, np.ndarray]]:
    import onnx

    graph = onnx.load(model, load_external_data=False).graph
    constants = {tensor.name for tensor in graph.initializer}
    name = next(value.name for value in graph.input if value.name not in constants)
    return ({name: case.prep(path)} for path in sorted(Path(folder).iterdir()))


if __name__ == "__main__":
    main(*sys.argv[1:])
