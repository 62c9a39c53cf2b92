"""The least that any calibration must do: decode and preprocess pictures, run the float model on each.

python -m tests.bench.bare CASE MODEL FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import onnxruntime as ort

from tests.bench.cases import BY_NAME


def main(case: str, model: str, folder: str) -> None:
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    for path in sorted(Path(folder).iterdir()):
        session.run(None, {name: BY_NAME[case].prep(path)})


if __name__ == "__main__":
    main(*sys.argv[1:])
