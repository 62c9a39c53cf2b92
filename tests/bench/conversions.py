"""What whole conversions cost: CPU seconds and peak memory, in turns with an earlier commit and with `quantize_static`.

    python -m tests.bench.conversions [--before TREE] [--only NAME,...] [--rounds N] [--best] [--json FILE]

A default run on each network, as a process of its own, by the operating system's accounting; medians over rounds. The
SQNR beside it is of test pictures, which nothing was calibrated with. `--before` names a checkout of another commit.
With `--best` the runs are those of `--effort best --weight-bits 4`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.bench import cost, peer
from tests.bench.accuracy import score
from tests.bench.cases import BY_NAME, REPOSITORY, default_data, pictures, require_data
from tests.bench.runner import Bench, Setup

BEST = ("--effort", "best", "--weight-bits", "4")


@dataclass(frozen=True)
class Bar:
    """What a default run may take at most.

    calibration: pictures. before, peer: CPU seconds, as shares of the commit before and of `quantize_static`.
    """

    name: str
    calibration: int
    before: float
    peer: float
    rss_mb: float


BARS = (
    Bar("mobilenetv2", 128, 0.35, 0.9, 330),
    Bar("efficientnet_lite0", 128, 0.35, 0.9, 360),
    Bar("resnet20", 128, 0.35, 2.0, 130),
    Bar("yolox_nano", 96, 0.35, 1.5, 450),
    Bar("light_resnet50", 64, 0.35, 1.5, 900),
    Bar("light_vgg19", 16, 0.35, 1.5, 1600),
)
BEST_BEFORE = 0.4
"""The share of CPU seconds of the commit before for BEST."""


@dataclass(frozen=True)
class Conversion:
    """One network with its pictures and the commands that convert it, each with the tree that it runs in."""

    bench: Bench
    folder: Path
    scratch: Path
    options: tuple[str, ...]

    def commands(self, before: Path | None, *, with_peer: bool) -> dict[str, tuple[list[str], Path]]:
        model, case = self.bench.float_model, self.bench.case
        found = {"now": (self._own("now"), REPOSITORY)}
        if before is not None:
            found["before"] = (self._own("before"), before)
        if with_peer:
            found["peer"] = (peer.command(case, model, self.folder, self.out("peer")), REPOSITORY)
        return found

    def out(self, name: str) -> Path:
        return self.scratch / f"{name}.onnx"

    def _own(self, name: str) -> list[str]:
        return [*self.bench.command(self.bench.float_model, self.folder, self.out(name)), *self.options]

    def measure(self, commands: dict[str, tuple[list[str], Path]], rounds: int) -> dict[str, Any]:
        """Medians of each command over interleaved rounds, and the SQNR of what it wrote."""
        runs = [{name: cost.spawn(*command) for name, command in commands.items()} for _ in range(rounds)]
        found: dict[str, Any] = {}
        for name in commands:
            own = [run[name] for run in runs]
            if any(run["status"] for run in own):
                sys.exit(f"{self.bench.case.name}, {name}: {own[0]['stderr']}")
            found[name] = {key: float(np.median([run[key] for run in own])) for key in ("cpu_seconds", "rss_mb")}
            found[name]["every_cpu_seconds"] = [run["cpu_seconds"] for run in own]
            found[name]["sqnr_db"] = self._sqnr(self.out(name))
        return found

    def _sqnr(self, quantized: Path) -> float | None:
        case, data = self.bench.case, self.bench.setup.data
        tests = data / case.test_folder
        chosen = pictures(tests if tests.is_dir() else tests.with_name("val"), min(case.tests, 64))
        found: float | None = score(case, self.bench.float_model, quantized, chosen, None)["sqnr_db"]
        return found


def line(bar: Bar, found: dict[str, Any], most_before: float) -> str:
    """One row of the table: what was measured, and the bar where it is missed."""
    now = found["now"]
    cells = [bar.name, f"{now['cpu_seconds']:.1f} s"]
    for name, most in (("before", most_before), ("peer", bar.peer)):
        ratio = now["cpu_seconds"] / found[name]["cpu_seconds"] if name in found else None
        cells.append("-" if ratio is None else f"{ratio:.2f}" + (f" (> {most})" if ratio > most else ""))
    cells.append(f"{now['rss_mb']:.0f} MB" + (f" (> {bar.rss_mb:.0f})" if now["rss_mb"] > bar.rss_mb else ""))
    every = (found.get(name, {}).get("sqnr_db") for name in ("now", "before", "peer"))
    cells += ["-" if sqnr is None else f"{sqnr:.2f}" for sqnr in every]
    return f"| {' | '.join(cells)} |"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.conversions", description=__doc__)
    parser.add_argument("--data", type=Path, default=default_data(), help="folder with models/ and images/")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "qconv-bench")
    parser.add_argument("--before", type=Path, help="a checkout of an earlier commit")
    parser.add_argument("--only", default=",".join(bar.name for bar in BARS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--best", action="store_true", help=f"measure {' '.join(BEST)} instead")
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    require_data(given.data)
    print("| network | CPU | of before | of quantize_static | peak | SQNR dB | before | quantize_static |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    results = {}
    for bar in BARS:
        if bar.name not in given.only.split(","):
            continue
        bench = Bench(BY_NAME[bar.name], Setup(given.data, given.work))
        with tempfile.TemporaryDirectory() as scratch:
            folder = bench.folder(bar.calibration)
            conversion = Conversion(bench, folder, Path(scratch), BEST if given.best else ())
            commands = conversion.commands(given.before, with_peer=not (given.best or given.no_peer))
            results[bar.name] = conversion.measure(commands, given.rounds)
        print(line(bar, results[bar.name], BEST_BEFORE if given.best else bar.before), flush=True)
    if given.json is not None:
        given.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
