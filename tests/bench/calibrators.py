"""Every calibrator on every model, at 8, 6 and 4 bits of activations: from one pass over the pictures each.

python -m tests.bench.calibrators [--only NAME] [--bits 8] [--json FILE]

Weights have 8 bits. One pass writes statistics; each combination is quantized from them, without a picture, and scored
against the float model on pictures that were not used to calibrate.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qconv.config.choices import CALIBRATOR_NAMES
from tests.bench import accuracy
from tests.bench.cases import CASES, REPOSITORY, Array, Case, default_data, linked, pictures, require_data

BITS = (8, 6, 4)
MOST_TESTS = 200


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.calibrators", description=__doc__)
    parser.add_argument("--data", type=Path, default=default_data(), help="folder with models/ and images/")
    parser.add_argument("--only", action="append", metavar="NAME", help="this model; repeatable")
    parser.add_argument("--bits", action="append", type=int, metavar="N", help="of activations; repeatable")
    parser.add_argument("--calibrator", action="append", metavar="NAME", help="repeatable")
    parser.add_argument("--tests", type=int, default=MOST_TESTS, metavar="N", help="pictures to score on, at most")
    parser.add_argument("--qconv", default="", metavar="OPTIONS", help="more options for qconv, as one text")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all that was measured")
    wanted = parser.parse_args()
    require_data(wanted.data)
    cases = [case for case in CASES if case.trained and (not wanted.only or case.name in wanted.only)]
    results: dict[str, Any] = {}
    for case in cases:
        results[case.name] = measured(case, wanted)
        if wanted.json:
            wanted.json.write_text(json.dumps(results, indent=1))
    print(table(results))


def measured(case: Case, wanted: argparse.Namespace) -> dict[str, Any]:
    """{bits: {calibrator: {"sqnr_db", "agreement"}}}"""
    model = wanted.data / "models" / case.model
    tests = pictures(wanted.data / case.test_folder, min(case.tests, wanted.tests))
    inputs = [case.prep(path) for path in tests]
    expected = outputs_of(model, inputs)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="qconv-bench-") as scratch:
        folder, stats, out = (Path(scratch) / name for name in ("pictures", "stats.npz", "out.onnx"))
        linked(pictures(wanted.data / case.calibration_folder, case.calibration), folder)
        quantize(model, out, "--calib", str(folder), "--save-stats", str(stats), *case.options)
        for bits in wanted.bits or BITS:
            found[str(bits)] = {}
            for calibrator in wanted.calibrator or CALIBRATOR_NAMES:
                options = ("--activation-bits", str(bits), "--calibrator", calibrator, *wanted.qconv.split())
                quantize(model, out, "--stats", str(stats), *options)
                scored = score(case, expected, outputs_of(out, inputs))
                found[str(bits)][calibrator] = scored
                print(case.name, bits, calibrator, scored, file=sys.stderr, flush=True)
    return found


def quantize(model: Path, out: Path, *options: str) -> None:
    command = [sys.executable, "-m", "qconv", "quantize", str(model), "-o", str(out), "--quiet", *options]
    subprocess.run(command, cwd=REPOSITORY, check=True)


def outputs_of(model: Path, inputs: Sequence[Array]) -> dict[str, list[Array]]:
    session = accuracy.session(model)
    names = [output.name for output in session.get_outputs()]
    runs = [session.run(names, {session.get_inputs()[0].name: x}) for x in inputs]
    return dict(zip(names, map(list, zip(*runs, strict=True)), strict=True))


def score(case: Case, expected: dict[str, list[Array]], got: dict[str, list[Array]]) -> dict[str, float | None]:
    """The lowest output's SQNR in dB, and its agreement where it is a class score."""
    tallies = []
    for name, refs in expected.items():
        tally = accuracy.Tally()
        for ref, found in zip(refs, got[name], strict=True):
            tally.add(ref, found)
        tallies.append(tally)
    sqnr = min(tally.sqnr_db or 0.0 for tally in tallies)
    agreement = min(tally.equal / tally.positions for tally in tallies) if case.class_scores else None
    return {"sqnr_db": round(sqnr, 2), "agreement": None if agreement is None else round(agreement, 4)}


def table(results: dict[str, Any]) -> str:
    """Markdown: one row a model and bit-width, one column a calibrator, SQNR in dB and agreement in %."""
    names = list(next(iter(next(iter(results.values())).values())))
    lines = [f"| model | bits | {' | '.join(names)} |", "|---" * (len(names) + 2) + "|"]
    for model, by_bits in results.items():
        for bits, found in by_bits.items():
            lines.append(f"| {model} | {bits} | {' | '.join(cell(found[name]) for name in names)} |")
    return "\n".join(lines)


def cell(scored: dict[str, float | None]) -> str:
    agreement = scored["agreement"]
    return f"{scored['sqnr_db']:.1f}" + ("" if agreement is None else f" / {100 * agreement:.1f}")


if __name__ == "__main__":
    main()
