"""What packing saves and costs: size, time to load, peak memory, time of a run. Prints a line for each model and width.

    python -m tests.bench.packing [--data DIR] [--bits 4,2]

Each network is quantized twice, packed and not, with `--edge-bits 4`. Loading is timed in processes of its own, in
turns, as CPU time of one thread with ONNX Runtime; runs are timed in turns, too. Outputs have to be equal bit by bit.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tests.bench.accuracy import session
from tests.bench.cases import CASES, Case, default_data, pictures
from tests.bench.turns import ratio, take_turns

NAMES = ("mobilenetv2", "efficientnet_lite0", "kerascnn", "efficientnet_b0", "yolox_nano")
ROUNDS, LOADS = 9, 7

LOADER = """
import resource, sys, time
import onnxruntime as ort
options = ort.SessionOptions()
options.intra_op_num_threads, options.log_severity_level = 1, 4
start = time.process_time()
session = ort.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
print(time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def quantized(case: Case, data: Path, out: Path, options: Sequence[str]) -> None:
    command = [sys.executable, "-m", "qconv", "quantize", str(data / "models" / case.model), "-o", str(out)]
    command += ["--calib", str(data / case.calibration_folder), "--samples", "16", "--quiet", *case.options]
    subprocess.run([*command, "--edge-bits", "4", "--effort", "fast", *options], check=True, capture_output=True)


def loads(files: Sequence[Path]) -> list[tuple[float, float]]:
    """CPU seconds of a first load and peak memory in MB, medians of processes in turns."""
    found: list[list[list[float]]] = [[] for _ in files]
    for _ in range(LOADS):
        for rows, path in zip(found, files, strict=True):
            done = subprocess.run([sys.executable, "-c", LOADER, str(path)], capture_output=True, text=True, check=True)
            rows.append([float(number) for number in done.stdout.split()])
    return [(float(np.median(rows, axis=0)[0]), float(np.median(rows, axis=0)[1]) / 1024) for rows in found]


def line(case: Case, data: Path, bits: int, folder: Path) -> str:
    """One row of the table."""
    plain, packed = folder / "plain.onnx", folder / "packed.onnx"
    quantized(case, data, plain, ("--weight-bits", str(bits)))
    quantized(case, data, packed, ("--weight-bits", str(bits), "--pack"))
    x = case.prep(pictures(data / case.test_folder, 1)[0])
    results = []
    for path in (plain, packed):
        opened = session(path)
        results.append(opened.run(None, {opened.get_inputs()[0].name: x}))
    equal = all(np.array_equal(a, b) for a, b in zip(*results, strict=True))
    feeds = folder / "feeds.npz"
    np.savez(feeds, **{opened.get_inputs()[0].name: x})
    turns = take_turns({"plain": plain, "packed": packed}, feeds, ROUNDS)
    (load, peak), (own_load, own_peak) = loads([plain, packed])
    _, time, _ = ratio(turns["packed"], turns["plain"])
    size, of_float = packed.stat().st_size, packed.stat().st_size / (data / "models" / case.model).stat().st_size
    cells = (case.name, f"W{bits}A8", f"{size / 1e6:.2f} MB", f"{of_float:.3f}", "equal" if equal else "DIFFER")
    return " | ".join((*cells, f"{time:.3f}", f"{own_load / load:.2f}", f"{own_peak / peak:.2f}"))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.packing", description=__doc__)
    parser.add_argument("--data", type=Path, default=default_data(), help="folder with models/ and images/")
    parser.add_argument("--bits", default="4,2")
    given = parser.parse_args()
    print("| model | bits | size | of float | outputs | time of a run | of loading | peak memory of it |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="qconv-packing-") as scratch:
        for bits in map(int, given.bits.split(",")):
            for case in CASES:
                if case.name in NAMES:
                    print(f"| {line(case, given.data, bits, Path(scratch))} |", flush=True)


if __name__ == "__main__":
    main()
