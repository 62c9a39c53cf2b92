"""Networks in the form that they are trained in, with branches: what it brings to merge them, as a table.

    python -m tests.bench.branches --work DIR --models DIR --base TREE [--rounds N] [NAME ...]

`base` quantizes by the tree at TREE, one that merges nothing, `new` by this tree. --models is a folder with networks by
`tests.bench.seeded_networks`; --work keeps all files, and those of base are taken from there where they are.

    off, merged: off
              what float32 does to the network as it is, and to the merged one: the largest difference of the outputs
              from those of the network as it is in float64, by onnx's reference evaluator, as a share of the largest
    time      CPU time over that of the float network as it is: medians of turns
    size      bytes over those of the merged float network
    dB        SQNR at the outputs on pictures that are no calibration
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from qconv.runtime.session import Session
from tests.bench import turns
from tests.bench.cases import BRANCHED, BY_NAME, REPOSITORY, Case, default_data, pictures, require_data
from tests.bench.precision import Found, Places, Side, decibel, input_of, one_side
from tests.support.folded import write_folded_float

PICTURES = 4
HEADS = (
    *("network", "float ms", "off", "merged: off", "merged: time", "base: time", "size", "dB"),
    *("new: time", "time of merged", "size", "dB"),
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.branches", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BRANCHED)}; all by default")
    parser.add_argument("--data", type=Path, default=default_data(), help="folder with models/ and images/")
    parser.add_argument("--work", type=Path, required=True, help="files are kept here")
    parser.add_argument("--models", type=Path, required=True, help="folder with the networks")
    parser.add_argument("--base", type=Path, required=True, metavar="TREE", help="another checkout")
    parser.add_argument("--rounds", type=int, default=9, help="turns that each file is timed")
    wanted = parser.parse_args()
    require_data(wanted.data)
    if unknown := [name for name in wanted.names if name not in BRANCHED]:
        parser.error(f"no network is called {unknown[0]}")
    places = Places(wanted.data.resolve(), wanted.work.resolve(), None, wanted.models)
    places.work.mkdir(parents=True, exist_ok=True)
    sides = [Side("base", wanted.base.resolve()), Side("new", REPOSITORY)]
    print(f"| {' | '.join(HEADS)} |\n|{'---|' * len(HEADS)}", flush=True)
    for name in wanted.names or BRANCHED:
        cells = measured(BY_NAME[name], sides, places, wanted.rounds)
        print(f"| {' | '.join(cells)} |", flush=True)


def measured(case: Case, sides: Sequence[Side], places: Places, rounds: int) -> list[str]:
    """The row of a network."""
    model, merged = places.model(case), places.work / f"merged_{case.name}.onnx"
    write_folded_float(model, merged)
    files, found = {"float": model, "merged": merged}, dict[str, Found]()
    for side in sides:
        files[side.name], found[side.name] = one_side(case, side, places, places.work)
    feeds = places.work / f"{case.name}.npz"
    fed = [case.prep(path) for path in pictures(places.tests(case), PICTURES)]
    np.savez(feeds, **{input_of(model): fed[0]})
    ms = turns.take_turns(files, feeds, rounds)

    def time_of(own: str, other: str = "float") -> str:
        return f"{turns.ratio(ms[own], ms[other])[1]:.3f}"

    def size_of(name: str) -> str:
        return f"{files[name].stat().st_size / merged.stat().st_size:.3f}"

    cells = [case.name, f"{np.median(ms['float']):.2f}", *off_exact(model, merged, fed), time_of("merged")]
    cells += [time_of("base"), size_of("base"), decibel(found["base"]["sqnr_db"])]
    return [*cells, time_of("new"), time_of("new", "merged"), size_of("new"), decibel(found["new"]["sqnr_db"])]


def off_exact(model: Path, merged: Path, fed: Sequence[np.ndarray]) -> list[str]:
    """How far both are from the first in float64, every node run as it stands in its file."""
    exact = ReferenceEvaluator(in_double(onnx.load(model)))
    sides = [Session(str(path), optimize=False, threads=1) for path in (model, merged)]
    worst = [0.0, 0.0]
    for picture in fed:
        want = exact.run(None, {input_of(model): picture.astype(np.float64)})
        for at, side in enumerate(sides):
            pairs = zip(want, side.run_all({input_of(model): picture}), strict=True)
            worst[at] = max(worst[at], *(float(np.abs(a - b).max() / np.abs(a).max()) for a, b in pairs))
    return [f"{off:.1e}" for off in worst]


def in_double(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with its constants of float32 in float64."""
    constants = [at.t for node in model.graph.node if node.op_type == "Constant" for at in node.attribute]
    for tensor in (*model.graph.initializer, *constants):
        if tensor.data_type == onnx.TensorProto.FLOAT:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float64), tensor.name))
    return model


if __name__ == "__main__":
    main()
