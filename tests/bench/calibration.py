"""What calibration costs: every calibrator at 100 and 400 pictures, beside a bare inference and the peer's methods.

python -m tests.bench.calibration [--only NAME] [--data DIR] [--json FILE]

Peak memory must not grow with the pictures, and the time stay within 1.5 s and twice the bare inference. The peer keeps
the tensors of all pictures for Entropy and Percentile, so that these run with the smaller set alone.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qconv.config.choices import CALIBRATOR_NAMES
from tests.bench import cost, peer
from tests.bench.cases import BY_NAME, Case, default_data, linked, pictures, require_data

MODELS = ("resnet20", "mobilenetv2", "efficientnet_lite0")
COUNTS = (100, 400)
ROUNDS = 3
MOST_PEER_PICTURES = 100  # of the methods that keep everything


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.calibration", description=__doc__)
    parser.add_argument("--data", type=Path, default=default_data(), help="folder with models/ and images/")
    parser.add_argument("--only", action="append", metavar="NAME", help="this model; repeatable")
    parser.add_argument("--rounds", type=int, default=ROUNDS, metavar="N")
    parser.add_argument("--skip-peer", action="store_true")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all that was measured")
    wanted = parser.parse_args()
    require_data(wanted.data)
    results: dict[str, Any] = {}
    for name in wanted.only or MODELS:
        results[name] = measured(BY_NAME[name], wanted.data, wanted.rounds, skip_peer=wanted.skip_peer)
        if wanted.json:
            wanted.json.write_text(json.dumps(results, indent=1))
    print(table(results))


def measured(case: Case, data: Path, rounds: int, *, skip_peer: bool) -> dict[str, Any]:
    """{count: {command: {"seconds", "rss_mb"}}}; None for a command that failed."""
    found = {}
    model = data / "models" / case.model
    with tempfile.TemporaryDirectory(prefix="qconv-bench-") as scratch:
        for count in COUNTS:
            chosen = pictures(data / case.calibration_folder, count)
            repeated = (chosen * -(-count // len(chosen)))[:count]
            folder = linked(repeated, Path(scratch) / f"pictures{count}")
            commands = dict(own_commands(case, model, folder, Path(scratch) / "own.onnx", count))
            commands["bare"] = [sys.executable, "-m", "tests.bench.bare", case.name, str(model), str(folder)]
            if not skip_peer:
                commands |= dict(peer_commands(case, model, folder, Path(scratch) / "peer.onnx", count))
            print(f"{case.name}, {count} pictures", file=sys.stderr, flush=True)
            found[str(count)] = cost.measure(commands, rounds)
    return found


def own_commands(case: Case, model: Path, folder: Path, out: Path, count: int) -> Iterator[tuple[str, list[str]]]:
    for calibrator in CALIBRATOR_NAMES:
        own = [sys.executable, "-m", "qconv", "quantize", str(model), "--calib", str(folder), "-o", str(out)]
        own += ["--quiet", "--samples", str(count), "--calibrator", calibrator, *case.options]
        yield calibrator, own


def peer_commands(case: Case, model: Path, folder: Path, out: Path, count: int) -> Iterator[tuple[str, list[str]]]:
    for method in peer.METHODS:
        if method == "MinMax" or count <= MOST_PEER_PICTURES:
            yield f"quantize_static {method}", [*peer.command(case, model, folder, out), method]


def table(results: dict[str, Any]) -> str:
    """Markdown: one row a command, one column a model and number of pictures."""
    columns = [(model, count) for model, counts in results.items() for count in counts]
    names = dict.fromkeys(name for counts in results.values() for runs in counts.values() for name in runs)
    lines = [f"| | {' | '.join(f'{model}, {count}' for model, count in columns)} |", "|---" * (len(columns) + 1) + "|"]
    limits = [cell(limit(results[model][count]["bare"])) for model, count in columns]
    for name in names:
        cells = [cell(results[model][count].get(name)) for model, count in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines.append(f"| limit | {' | '.join(limits)} |")
    return "\n".join(lines)


def limit(bare: dict[str, float]) -> dict[str, float]:
    seconds = cost.OWN_SECONDS + cost.TIMES_BARE * bare["seconds"]
    return {"seconds": seconds, "rss_mb": cost.OWN_MB + cost.TIMES_BARE_RSS * bare["rss_mb"]}


def cell(run: dict[str, float] | None) -> str:
    return "-" if run is None else f"{run['seconds']:.1f} s, {run['rss_mb']:.0f} MB"


if __name__ == "__main__":
    main()
