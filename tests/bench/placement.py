"""What placement by the cost table gains, and what is left in float: every model all in integers, and divided.

    python -m tests.bench.placement [--only NAME] [--threads 1]

Both are timed against the float model, in turns. All in integers is `--target generic`, whose files ONNX Runtime runs
in integers wherever it can. Then the audit of the default result: islands with their reasons.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from qconv.runtime.benchmark import detect_cpu
from tests.bench import latency
from tests.bench.cases import CASES, Case, default_data, require_data
from tests.bench.runner import LATENCY_ROUNDS, Bench, Setup, run


def converted(bench: Bench, *options: str) -> tuple[Path, dict[str, Any]]:
    out = bench.setup.work / f"{bench.case.name}{'.'.join(options).replace('-', '')}.onnx"
    done = run([*bench.command(bench.float_model, bench.folder(8), out), *options])
    if done.returncode:
        raise RuntimeError(done.stderr)
    return out, json.loads(done.stdout)


def measured(case: Case, setup: Setup, threads: int) -> tuple[list[str], list[str]]:
    """A row of the table, and lines about what is in float."""
    bench = Bench(case, setup)
    whole, all_integer = converted(bench, "--target", "generic")
    divided, report = converted(bench)
    models = {"float": bench.float_model, "peer": whole, "qconv": divided}
    times = latency.measure(models, case.prep.size, threads, LATENCY_ROUNDS)
    audits = [found["audit"] for found in (all_integer, report)]
    ratios = [1 / times[f"float/{name}"][1] for name in ("peer", "qconv")]
    counts = [f"{audit['integer']} / {audit['float']}" for audit in audits]
    row = [case.name, counts[0], f"{ratios[0]:.2f}", counts[1], f"{ratios[1]:.2f}"]
    reasons = Counter((island["op"], island["why"]) for island in audits[1]["islands"])
    lines = [f"{case.name}: {count} {op}: {why}" for (op, why), count in reasons.items()]
    for path in (whole, divided):
        for file in path.parent.glob(f"{path.name}*"):
            file.unlink()
    return row, lines


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.placement", description=__doc__)
    parser.add_argument("--only", action="append", metavar="NAME")
    parser.add_argument("--data", type=Path, default=default_data(), help="folder with models/ and images/")
    parser.add_argument("--work", type=Path, help="take the light models' copies from here")
    parser.add_argument("--threads", type=int, default=1)
    wanted = parser.parse_args()
    require_data(wanted.data)
    print(detect_cpu().in_words())
    print("| model | integer / float nodes | time | divided: nodes | time |\n|---|---|---|---|---|")
    left: list[str] = []
    with tempfile.TemporaryDirectory(prefix="qconv-placement-") as scratch:
        setup = Setup(wanted.data.resolve(), (wanted.work or Path(scratch)).resolve())
        for case in CASES:
            if not wanted.only or case.name in wanted.only:
                row, lines = measured(case, setup, wanted.threads)
                print(f"| {' | '.join(row)} |", flush=True)
                left += lines
    print("\nfloat islands of the default result, all others being placed by cost:")
    print("\n".join(left) or "none")


if __name__ == "__main__":
    main()
