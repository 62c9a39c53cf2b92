"""Hashes of results by two checkouts, made in one run: a move of code must change no byte.

    python -m tests.bench.golden BEFORE AFTER [--recipes NAME ...]

BEFORE and AFTER are folders of two checkouts. Hashes differ between kinds of CPU, so that none is stored: both sides
are made here and now, each by its own code, with the model and the pictures that AFTER carries. Exit status 1 where a
file, or the JSON report without times and memory, differs; keys that only AFTER has count as no difference.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

MEASURED = ("time", "us", "peak_rss_mb", "slowdown", "slowdown_range", "speed")
"""Keys of the report that no two runs share."""
QUANTIZE = ("--preprocess", "imagenet", "--resize", "exact")
RECIPES: dict[str, tuple[str, ...]] = {
    "w8a8-fast": ("--effort", "fast"),
    "w8a8": (),
    "w8a8-best": ("--effort", "best", "--samples", "24"),
    "w4a8": ("--weight-bits", "4"),
    "w4a4-best": ("--weight-bits", "4", "--activation-bits", "4", "--effort", "best", "--samples", "24"),
    "per-tensor": ("--weight-granularity", "per-tensor"),
    "per-block": ("--weight-granularity", "per-block", "--block-size", "8", "--weight-bits", "4"),
    "packed": ("--weight-bits", "4", "--activation-bits", "32", "--pack"),
    "w16a16": ("--weight-bits", "16", "--activation-bits", "16"),
    "mixed": ("--max-drop", "sqnr:25", "--candidate-bits", "4,8", "--samples", "24"),
    "data-free": ("--calib", "none"),
    "tensorrt": ("--target", "tensorrt"),
    "openvino": ("--target", "openvino"),
    "pixels": ("--embed-preprocessing", "nhwc"),
    "entropy": ("--calibrator", "entropy"),
    "percentile": ("--calibrator", "percentile", "--bias-correction", "sequential", "--effort", "fast"),
    "aciq": ("--calibrator", "aciq", "--weight-calibrator", "mse", "--effort", "fast"),
}


def main() -> int:
    """Compare; print a line a recipe."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--recipes", nargs="*", default=list(RECIPES), choices=list(RECIPES))
    wanted = parser.parse_args()
    different = 0
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        shutil.copy(wanted.after / "tests" / "models" / "cifar_mobilenet.onnx", place / "model.onnx")
        shutil.copytree(wanted.after / "calib_samples", place / "imgs")
        for name in wanted.recipes:
            before, after = (made_by(tree.resolve(), RECIPES[name], place) for tree in (wanted.before, wanted.after))
            after = after[0], json.dumps(known_alone(json.loads(before[1]), json.loads(after[1])), sort_keys=True)
            same = before == after
            different += not same
            print(f"{'same     ' if same else 'DIFFERENT'}  {name:12}  {before[0][:16]}  {after[0][:16]}", flush=True)
            if not same:
                print("\n".join(differences(json.loads(before[1]), json.loads(after[1]))))
    return int(different > 0)


def made_by(tree: Path, options: tuple[str, ...], place: Path) -> tuple[str, str]:
    """Hash of the file and the report, without what is measured, that the code in `tree` makes of `options`."""
    out = place / "out.onnx"
    out.unlink(missing_ok=True)
    calib = () if "--calib" in options else ("--calib", "imgs", "--seed", "3")
    done = subprocess.run(
        [sys.executable, "-m", "qconv", "quantize", "model.onnx", *calib, *QUANTIZE, *options]
        + ["-o", out.name, "--json", "--quiet", "--threads", "1"],
        cwd=place,
        env={**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"{tree} makes nothing of {' '.join(options)}: {done.stderr}")
    report = without_measured(json.loads(done.stdout))
    return hashlib.sha256(out.read_bytes()).hexdigest(), json.dumps(report, sort_keys=True)


def without_measured(found: Any) -> Any:
    """A report without the keys that no two runs share."""
    if isinstance(found, dict):
        return {key: without_measured(value) for key, value in found.items() if key not in MEASURED}
    return [without_measured(value) for value in found] if isinstance(found, list) else found


def known_alone(before: Any, after: Any) -> Any:
    """What AFTER says under the keys that BEFORE has, too."""
    if isinstance(before, dict) and isinstance(after, dict):
        return {key: known_alone(before[key], value) for key, value in after.items() if key in before}
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        return [known_alone(one, other) for one, other in zip(before, after, strict=True)]
    return after


def differences(before: Any, after: Any, place: str = "") -> list[str]:
    """Where two reports differ, at most twenty lines."""
    if isinstance(before, dict) and isinstance(after, dict):
        keys = sorted(before.keys() | after.keys())
        return [d for key in keys for d in differences(before.get(key), after.get(key), f"{place}.{key}")][:20]
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        pairs = enumerate(zip(before, after, strict=True))
        return [d for i, (one, other) in pairs for d in differences(one, other, f"{place}[{i}]")][:20]
    return [] if before == after else [f"    {place}: {str(before)[:200]} -> {str(after)[:200]}"]


if __name__ == "__main__":
    sys.exit(main())
