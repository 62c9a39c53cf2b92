"""What the curve of time and noise predicts, against what points of it have: SQNR and time, carried out.

    python -m tests.bench.curve --work DIR [--models DIR] [--points 2] [NAME ...]

Points are those between the fastest and the most accurate one, evenly by their place on the curve; each is written as
the search builds it, with weights to the nearest. Its noise is that of all parts of the outputs on pictures that
quantizing has not seen; its time is in CPU seconds over that of the fastest division, in turns, on one thread.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from qconv.ir import files
from qconv.ir.subgraph import runnable_with_outputs
from qconv.metrics.output_parts import measure_output_noise
from qconv.runtime.session import Session
from qconv.search import precision_choice
from tests.bench import turns
from tests.bench.cases import BY_NAME, Case, default_data, pictures, require_data
from tests.bench.precision import Places, input_of

NAMES = ("yolox_nano", "efficientnet_b0", "mobilenetv4", "yolo11n")
PICTURES = 64


def capture(case: Case, places: Places) -> dict[str, Any]:
    """Quantize a network in this process. Returns the search for its division, and what carried points out."""
    from qconv.cli.main import cli

    found: dict[str, Any] = {}
    take = precision_choice.DivisionCurve.take

    def listen(curve: Any, index: int) -> Any:
        trial = curve.trial
        model = trial.folded.model.copy()  # the run goes on to quantize its own
        folded = replace(trial.folded, model=model, plan=precision_choice.replan(trial.folded.plan, model))
        found.update(search=curve.search, folded=folded, trial=trial, chosen=index)
        return take(curve, index)

    out = places.work / f"curve_{case.name}.onnx"
    words = ["quantize", str(places.model(case)), "--calib", str(places.calibration(case)), "-o", str(out)]
    with mock.patch.object(precision_choice.DivisionCurve, "take", listen):
        cli([*words, "--threads", "1", "--quiet", *case.options], standalone_mode=False)
    return found


def carry_out(found: dict[str, Any], index: int, path: Path) -> None:
    """Write point `index` of the curve as a file."""
    folded, trial = found["folded"], found["trial"]
    names = {node.name for node in found["search"].points[index].integer}
    whole = precision_choice.replan(folded.plan, folded.model, floats={})
    own = replace(trial, folded=folded, whole=whole)
    model = own.build(frozenset(node for node in whole.integer if node.name in names))
    with files.stage_model(model, path) as staged:
        staged.commit(path)


def noise_of(found: dict[str, Any], path: Path, case: Case, places: Places) -> float:
    """SQNR in dB of a file, as the search measures it, on other pictures."""
    trial, folded = found["trial"], found["folded"]
    with runnable_with_outputs(folded.model, trial.names) as runnable:
        clean = Session(runnable, threads=1)
    quantized = Session(str(path), threads=1)
    name = input_of(places.model(case))
    feeds = [{name: case.prep(picture)} for picture in pictures(places.tests(case), PICTURES)]
    expected = (clean.run(trial.names, feed) for feed in feeds)
    got = (quantized.run(trial.names, feed) for feed in feeds)
    return -10 * math.log10(measure_output_noise(trial.parts, trial.names, expected, got))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.curve", description=__doc__)
    parser.add_argument("names", nargs="*", default=NAMES)
    parser.add_argument("--data", type=Path, default=default_data())
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--models", type=Path)
    parser.add_argument("--points", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    wanted = parser.parse_args()
    require_data(wanted.data)
    places = Places(wanted.data.resolve(), wanted.work.resolve(), None, wanted.models)
    places.work.mkdir(parents=True, exist_ok=True)
    print("| network | point | time: predicted | measured | off | dB: by noises | corrected | measured | off |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in wanted.names:
        case = BY_NAME[name]
        found = capture(case, places)
        search = found["search"]
        last = len(search.points) - 1
        chosen = [round(at) for at in np.linspace(0, last, wanted.points + 2)[1:-1]]
        paths = {f"{index}": places.work / f"point_{name}_{index}.onnx" for index in (0, *chosen)}
        for index in (0, *chosen):
            carry_out(found, index, paths[f"{index}"])
        feeds = places.work / f"curve_{name}.npz"
        np.savez(feeds, **{input_of(places.model(case)): case.prep(pictures(places.tests(case), 1)[0])})
        times = turns.take_turns(paths, feeds, wanted.rounds)
        corrected = search.corrected()
        for index in chosen:
            point = search.points[index]
            predicted = point.time / search.points[0].time
            _, own, _ = turns.ratio(times[f"{index}"], times["0"])
            decibels = noise_of(found, paths[f"{index}"], case, places)
            cells = [f"{predicted:.3f}", f"{own:.3f}", f"{predicted / own - 1:+.1%}", f"{point.sqnr_db:.1f}"]
            cells += [f"{corrected[index]:.1f}", f"{decibels:.1f}", f"{corrected[index] - decibels:+.1f}"]
            print(f"| {name} | {index} of {last} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
