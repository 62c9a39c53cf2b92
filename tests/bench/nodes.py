"""Where files spend their time: each node beside the best kernel that was seen, over all files, for its kind of work.

    python -m tests.bench.nodes FILE ... [--runs N] [--most N]

Kinds of work are dense and depthwise convolutions, sums, pools and so on, whether a kernel takes codes or floats. Work
is counted in multiplications and numbers written for layers, in the numbers of the largest tensor for all others. The
best rate of a kind is that of its fastest node with enough work to measure. What a file's nodes of a kind take beyond
their work at that rate is what a better kernel or another form could gain at most.

Times are of the profiler of ONNX Runtime, one thread: the lower quartile of the runs of each node.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

KINDS = {
    "QLinearConv": "Conv", "FusedConv": "Conv", "ConvInteger": "Conv",
    "QGemm": "Gemm", "QLinearMatMul": "Gemm", "MatMul": "Gemm", "FusedGemm": "Gemm", "MatMulIntegerToFloat": "Gemm",
    "QLinearAdd": "Add", "QLinearMul": "Mul", "QLinearConcat": "Concat", "QLinearSigmoid": "Sigmoid",
    "QLinearAveragePool": "AveragePool", "NhwcMaxPool": "MaxPool", "QLinearGlobalAveragePool": "GlobalAveragePool",
    "QLinearLeakyRelu": "LeakyRelu", "QLinearSoftmax": "Softmax",
}  # fmt: skip
WEIGHTS_AT = {"QLinearConv": 3, "QGemm": 3, "QLinearMatMul": 3}
WRITTEN_NUMBER = 30
"""A number that a layer writes takes as long as so many multiplications."""

LEAST_US = 20.0
"""A node that takes less says little of its kernel."""


@dataclass(frozen=True)
class Timed:
    """One node of the graph that ONNX Runtime makes of a file. work: units of its kind."""

    file: str
    op_type: str
    kind: str
    work: float
    us: float


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.nodes", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--runs", type=int, default=40, help="of each file")
    parser.add_argument("--most", type=int, default=20, help="rows of the table")
    wanted = parser.parse_args()
    nodes = [node for file in wanted.files for node in profiled(file, wanted.runs)]
    print("| file | kernels | nodes | ms | share | beyond the best kernel | share |\n|---|---|---|---|---|---|---|")
    for row in differences(nodes)[: wanted.most]:
        print(f"| {' | '.join(row)} |")


def differences(nodes: Sequence[Timed]) -> list[list[str]]:
    """Rows of the table, the largest share of a file's time first."""
    best: dict[str, float] = {}
    for node in nodes:
        if node.us >= LEAST_US:
            best[node.kind] = min(node.us / node.work, best.get(node.kind, math.inf))
    whole: dict[str, float] = defaultdict(float)
    alike: dict[tuple[str, str], list[Timed]] = defaultdict(list)
    for node in nodes:
        whole[node.file] += node.us
        alike[node.file, node.kind].append(node)
    rows = []
    for (file, kind), found in alike.items():
        us = sum(node.us for node in found)
        beyond = us - sum(node.work for node in found) * best.get(kind, 0.0)
        if kind in best:
            rows.append((beyond / whole[file], file, kind, found, us, beyond))
    rows.sort(key=lambda row: -row[0])
    return [
        [
            *(file, f"{kind}: {', '.join(sorted({node.op_type for node in found}))}", str(len(found))),
            *(f"{us / 1000:.2f}", f"{us / whole[file]:.0%}", f"{beyond / 1000:.2f}", f"{share:.0%}"),
        ]
        for share, file, kind, found, us, beyond in rows
    ]


def profiled(file: Path, runs: int) -> Iterator[Timed]:
    """The nodes of a file with their times."""
    with tempfile.TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        options.enable_profiling, options.profile_file_prefix = True, f"{folder}/profile"
        options.optimized_model_filepath = f"{folder}/optimized.onnx"
        session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        feeds = {wanted.name: random_input(wanted.shape, wanted.type) for wanted in session.get_inputs()}
        for _ in range(runs):
            session.run(None, feeds)
        events = json.loads(Path(session.end_profiling()).read_text())
        graph = onnx.load(f"{folder}/optimized.onnx", load_external_data=False).graph
    shapes = {constant.name: list(constant.dims) for constant in graph.initializer}
    weights = {
        node.name: shapes.get(node.input[WEIGHTS_AT.get(node.op_type, 1)]) for node in graph.node if node.input[1:]
    }
    times: dict[str, list[float]] = defaultdict(list)
    told: dict[str, Mapping[str, Any]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            name = event["name"].removesuffix("_kernel_time")
            times[name].append(event["dur"])
            told[name] = event["args"]
    for name, durations in times.items():
        op_type = told[name]["op_name"]
        kind, work = kind_and_work(op_type, told[name], weights.get(name))
        yield Timed(file.stem, op_type, kind, max(work, 1.0), float(np.percentile(durations, 25)))


def random_input(shape: Sequence[int | str | None], kind: str) -> np.ndarray[Any, Any]:
    """Open sizes count as one."""
    sizes = [size if isinstance(size, int) and size > 0 else 1 for size in shape]
    numbers = np.random.default_rng(0).uniform(0, 1, sizes)
    return numbers.astype(np.float32) if "float" in kind else (numbers * 255).astype(np.uint8)


def kind_and_work(op_type: str, told: Mapping[str, Any], weights: Sequence[int] | None) -> tuple[str, float]:
    """A kind of work and its units; weights: the shape of those of a layer."""
    kind = KINDS.get(op_type, op_type)
    read, written = (
        [list(*tensor.values()) for tensor in told.get(f"{side}_type_shape", [])] for side in ("input", "output")
    )
    numbers = float(math.prod(written[0])) if written else 1.0
    if kind == "Conv" and weights:
        inputs, taps = weights[1], math.prod(weights[2:])
        depthwise = inputs == 1 and weights[0] > 1 and bool(read) and 1 not in (read[0][1], read[0][-1])
        if depthwise:
            return f"depthwise {'x'.join(map(str, weights[2:]))}", numbers
        return ("Conv 1x1" if taps == 1 else "Conv"), numbers * (inputs * taps + WRITTEN_NUMBER)
    if kind == "Gemm" and weights:
        return kind, float(math.prod(weights))
    return kind, max([numbers, *(float(math.prod(sizes)) for sizes in read)])


if __name__ == "__main__":
    main()
