"""Run models in whatever ONNX Runtime this Python has; nothing else is needed. Paths come as JSON, results go as JSON.

python compat_worker.py < jobs.json      [{"model", "feeds" (.npz), "out" (.npz), "optimized"}]
"""

from __future__ import annotations

import json
import sys

import numpy as np
import onnxruntime as ort


def run(job: dict[str, str]) -> str | None:
    """The error, or None."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.optimized_model_filepath = job["optimized"]
    try:
        session = ort.InferenceSession(job["model"], options, providers=["CPUExecutionProvider"])
        feeds = dict(np.load(job["feeds"]))
        count = len(next(iter(feeds.values())))
        rows = [session.run(None, {name: array[i : i + 1] for name, array in feeds.items()}) for i in range(count)]
    except Exception as error:  # whatever this version says
        return str(error).strip().splitlines()[0][:200]
    names = [output.name for output in session.get_outputs()]
    np.savez(job["out"], **{n: np.concatenate(c) for n, c in zip(names, zip(*rows))})  # noqa: B905 - Python 3.9
    return None


if __name__ == "__main__":
    print(json.dumps([run(job) for job in json.load(sys.stdin)]))
