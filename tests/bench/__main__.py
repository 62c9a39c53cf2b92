"""Measure qconv and ONNX Runtime's own quantizer on real models: print one table, write JSON if asked.

A whole run takes about half an hour on two cores; --work keeps the peer's results and the light models' copies.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import onnxruntime as ort

from tests.bench import table
from tests.bench.cases import BY_NAME, CASES, Case, default_data, require_data
from tests.bench.marks import mark, marks
from tests.bench.runner import Bench, Setup, refusals


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--only", action="append", metavar="NAME", help="this model; repeatable; 'light' for all those")
    parser.add_argument("--data", type=Path, default=default_data(), help="folder with models/ and images/")
    parser.add_argument("--work", type=Path, help="keep files here, and take the peer's results from here")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all that was measured")
    parser.add_argument("--reference", action="store_true", help="score again without graph optimizations")
    parser.add_argument("--refresh-peer", action="store_true", help="do not take the peer's results from --work")
    parser.add_argument("--peer-only", action="store_true", help="fill --work with the peer's results")
    parser.add_argument("--skip-latency", action="store_true")
    parser.add_argument("--skip-cost", action="store_true")
    parser.add_argument("--qconv", default="", metavar="OPTIONS", help="more options for qconv, as one text")
    return parser.parse_args()


def chosen(names: list[str] | None) -> list[Case]:
    if not names:
        return list(CASES)
    unknown = [name for name in names if name not in BY_NAME and name != "light"]
    if unknown:
        sys.exit(f"Error: no model is called {unknown[0]}.\nHint:  choose of: light {' '.join(BY_NAME)}")
    return [case for case in CASES if case.name in names or (case.light and "light" in names)]


def main() -> None:
    wanted = arguments()
    cases = chosen(wanted.only)
    require_data(wanted.data)
    with tempfile.TemporaryDirectory(prefix="qconv-bench-") as scratch:
        setup = Setup(
            data=wanted.data.resolve(),
            work=(wanted.work or Path(scratch)).resolve(),
            reference=wanted.reference,
            refresh_peer=wanted.refresh_peer,
            options=tuple(wanted.qconv.split()),
        )
        setup.work.mkdir(parents=True, exist_ok=True)
        results: dict[str, Any] = {"environment": environment(), "cases": {}}
        for case in cases:
            results["cases"][case.name] = measured(Bench(case, setup), wanted)
            save(results, wanted.json)
        resnet = Bench(BY_NAME["resnet20"], setup)
        if BY_NAME["resnet20"] in cases and not wanted.peer_only:
            results["refusals"] = refusals(setup, resnet.peer_file)
        save(results, wanted.json)
    print(table.text(results))


def measured(bench: Bench, wanted: argparse.Namespace) -> dict[str, Any]:
    """All of one case; stages and their seconds go to stderr. A stage that fails ends its case, not the benchmark."""
    stages = [("peer", bench.measure_peer)]
    if not wanted.peer_only:
        stages.append(("qconv", bench.measure_own))
        if not wanted.skip_latency:
            stages.append(("latency", bench.measure_latency))
        if bench.case.cost and not wanted.skip_cost:
            stages.append(("cost", bench.measure_cost))
    print(f"{bench.case.name:24}", end="", file=sys.stderr, flush=True)
    for name, stage in stages:
        start = time.perf_counter()
        try:
            stage()
        except Exception as error:
            traceback.print_exc()
            bench.found["marks"] = [mark(f"measuring {name}", f"{type(error).__name__}: {error}", "no error", False)]
            return bench.found
        print(f"{name} {time.perf_counter() - start:.1f} s  ", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    if not wanted.peer_only:
        bench.found["marks"] = marks(bench.case, bench.found)
    return bench.found


def environment() -> dict[str, Any]:
    return {"onnxruntime": ort.__version__, "python": platform.python_version(), "machine": platform.machine()}


def save(results: dict[str, Any], path: Path | None) -> None:
    if path is not None:
        path.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
