"""Is the preprocessing found? On models whose own is known, and on exact copies of them that want another one.

python -m tests.bench.detection [--only NAME]

    bgr      the channels of the first convolution's weights in the other order: the same network for BGR
    halved   those weights doubled: wants everything half as large, as no published recipe has it
    in graph normalised by a Sub and a Mul inside the graph: wants raw pixels
    folded   BatchNorms folded away, so that little is left to tell

A verdict is right or wrong, with a question mark where the user is warned that it is not certain. WRONG is what must
not be: wrong, and no warning.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from tests.bench.cases import CASES, REPOSITORY, Case, Prep, default_data, linked, pictures, require_data
from tests.support.folded import write_folded_float

PICTURES = 128
LEVELS = np.array([0.0, 255.0])
MOST_APART = 0.1
"""Of the range between black and white, within which two recipes count as the same."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.detection", description=__doc__)
    parser.add_argument("--data", type=Path, default=default_data(), help="folder with models/ and images/")
    parser.add_argument("--only", action="append", metavar="NAME", help="this model; repeatable")
    wanted = parser.parse_args()
    require_data(wanted.data)
    verdicts: Counter[str] = Counter()
    for case in CASES:
        if not case.trained or (wanted.only and case.name not in wanted.only):
            continue
        for kind, verdict, words in judged(case, wanted.data):
            verdicts[verdict] += 1
            print(f"{case.name:<20}{kind:<10}{verdict:<7}{words}", flush=True)
    print(", ".join(f"{count} {verdict}" for verdict, count in verdicts.most_common()))


def judged(case: Case, data: Path) -> list[tuple[str, str, str]]:
    """(kind of copy, verdict, what was found) for the model and each copy that can be made of it."""
    found = []
    with tempfile.TemporaryDirectory(prefix="qconv-bench-") as scratch:
        folder = linked(pictures(data / case.calibration_folder, PICTURES), Path(scratch) / "pictures")
        original = data / "models" / case.model
        size = () if "--size" not in case.options else ("--size", f"{case.prep.size[0]}x{case.prep.size[1]}")
        for kind, (make, prep, color) in COPIES.items():
            path = Path(scratch) / f"{kind}.onnx"
            with contextlib.suppress(NotPossible):
                make(original, path, case.prep)
                told = quantized(path, Path(scratch) / "out.onnx", "--calib", str(folder), *size)
                found.append((kind, *verdict_on(told, prep(case.prep), "grey" if case.prep.grey else color)))
    return found


def quantized(model: Path, out: Path, *options: str) -> dict[str, Any]:
    """What `qconv quantize --json` prints."""
    command = [sys.executable, "-m", "qconv", "quantize", str(model), "-o", str(out), "--json", *options]
    done = subprocess.run(command, cwd=REPOSITORY, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def verdict_on(told: dict[str, Any], prep: Prep, color: str) -> tuple[str, str]:
    """What was found beside what is known. Channels of prep are in the order R, G, B."""
    got = told["preprocessing"]
    order = slice(None, None, -1) if got["color"] == "bgr" else slice(None)
    mine = ends(got["scale"], np.asarray(got["mean"])[order], np.asarray(got["std"])[order])
    known = ends(prep.scale, np.asarray(prep.mean), np.asarray(prep.std))
    alike = bool((np.abs(mine - known) <= MOST_APART * np.abs(known[:, 1:] - known[:, :1])).all())
    right = alike and got["color"] == color
    doubts = [text for text in told["warnings"] if "margin" in text]
    words = f"{got['preset']} {got['color']} mean {got['mean']} std {got['std']} margin {got['margin']}"
    return ("right" if right else "wrong" if doubts else "WRONG") + ("?" if doubts else ""), words


def ends(scale: float, mean: Any, std: Any) -> Any:
    """What black and white become, (3, 2)."""
    mean, std = (np.broadcast_to(numbers, 3).reshape(3, 1) for numbers in (mean, std))
    return (LEVELS * scale - mean) / std


# -- copies ------------------------------------------------------------------------------------------------------------


class NotPossible(Exception):
    """This copy cannot be made of this model."""


def itself(model: Path, out: Path, prep: Prep) -> None:
    out.symlink_to(model.resolve())


def bgr(model: Path, out: Path, prep: Prep) -> None:
    with_first_weights(model, out, lambda weight: weight[:, ::-1].copy())


def halved(model: Path, out: Path, prep: Prep) -> None:
    with_first_weights(model, out, lambda weight: weight * 2)


def folded(model: Path, out: Path, prep: Prep) -> None:
    if not any(node.op_type == "BatchNormalization" for node in onnx.load(model).graph.node):
        raise NotPossible
    write_folded_float(model, out)


def in_graph(model: Path, out: Path, prep: Prep) -> None:
    proto = onnx.load(model)
    graph = proto.graph
    (fed, *others) = [value for value in graph.input if value.name not in {i.name for i in graph.initializer}]
    channels_last = fed.type.tensor_type.shape.dim[-1].dim_value in (1, 3)
    if others:
        raise NotPossible
    shape = (1, 1, 1, -1) if channels_last else (1, -1, 1, 1)
    for node in graph.node:
        for index, name in enumerate(node.input):
            if name == fed.name:
                node.input[index] = "normalised"
    # (pixel * scale - mean) / std = (pixel - mean / scale) * (scale / std)
    for name, numbers in (("away", np.array(prep.mean) / prep.scale), ("by", prep.scale / np.array(prep.std))):
        graph.initializer.append(numpy_helper.from_array(numbers.astype(np.float32).reshape(shape), name))
    graph.node.insert(0, onnx.helper.make_node("Mul", ["centred", "by"], ["normalised"], "by"))
    graph.node.insert(0, onnx.helper.make_node("Sub", [fed.name, "away"], ["centred"], "away"))
    onnx.save(proto, out)


def with_first_weights(model: Path, out: Path, change: Callable[[Any], Any]) -> None:
    """The weights of the Conv that reads the input, itself or through a Transpose, changed."""
    proto = onnx.load(model)
    stored = {tensor.name: tensor for tensor in proto.graph.initializer}
    reached: list[str] = [value.name for value in proto.graph.input if value.name not in stored]
    for node in proto.graph.node:
        if node.op_type == "Transpose" and node.input[0] in reached:
            reached += node.output
        if node.op_type == "Conv" and node.input[0] in reached and node.input[1] in stored:
            weight = stored[node.input[1]]
            numbers = numpy_helper.to_array(weight)
            if numbers.shape[1] == 3:
                weight.CopyFrom(numpy_helper.from_array(change(numbers), weight.name))
                onnx.save(proto, out)
                return
    raise NotPossible


def same(prep: Prep) -> Prep:
    return prep


def of_halves(prep: Prep) -> Prep:
    return replace(prep, std=tuple(2 * number for number in prep.std))


def raw(prep: Prep) -> Prep:
    return replace(prep, scale=1.0, mean=(0.0,), std=(1.0,))


COPIES: dict[str, tuple[Callable[[Path, Path, Prep], None], Callable[[Prep], Prep], str]] = {
    "itself": (itself, same, "rgb"),
    "bgr": (bgr, same, "bgr"),
    "halved": (halved, of_halves, "rgb"),
    "in graph": (in_graph, raw, "rgb"),
    "folded": (folded, same, "rgb"),
}


if __name__ == "__main__":
    main()
