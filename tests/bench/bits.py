"""Accuracy at every bit-width: the qconv command in its variants, and at 8 bits other tools, on labelled pictures.

    make bench-accuracy     or    python -m tests.bench.bits [--only resnet20] [--setting W4A8] [--variant nearest]

Calibration pictures calibrate, test pictures score. Each row is one run of a command, and --json keeps it: --resume
goes on where a run was stopped, --markdown FILE prints without measuring. First and last layer have 8 bits, qconv's
default. A whole run of one variant takes about ten minutes on two cores, and so do the peers.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import onnxruntime as ort

from qconv.runtime.benchmark import detect_cpu
from tests.bench import accuracy, bits_table, cost, light, peer
from tests.bench.cases import (
    BY_NAME,
    CASES,
    REPOSITORY,
    Array,
    Case,
    default_data,
    label,
    light_file,
    linked,
    pictures,
    require_data,
)
from tests.bench.variants import (
    GRANULARITIES,
    NAMES,
    PEERS,
    SETTINGS,
    VARIANTS,
    W8A8,
    Known,
    Peer,
    Setting,
    Variant,
    given,
    known_options,
    setting,
    unknown,
)

TIMED = {"light_resnet50": (W8A8, setting("W4A8"))}
"""Measured for their size at these settings, per channel: weights are seeded draws, so that there are no labels."""
MODELS = (*(case.name for case in CASES if case.labels), *TIMED)
SOLVE = ("equalize", "ranges", "round")  # of the stages in --json's "time"
THREADS = 2
VERSIONS = "import importlib.metadata as m; print(*(f'{n} {m.version(n)}' for n in ('nncf', 'onnx', 'onnxruntime')))"
KEY = ("model", "granularity", "setting", "variant", "pictures", "tests")

Row = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One row to be measured."""

    way: Variant | Peer
    setting: Setting
    granularity: str
    pictures: int
    more: str = ""  # options for qconv on top of the way's own

    @property
    def name(self) -> str:
        return f"{self.way.name} {self.more}".strip()

    def key(self, case: Case, tests: int) -> Row:
        values = (case.name, self.granularity, str(self.setting), self.name, self.pictures, tests)
        return dict(zip(KEY, values, strict=True))


@dataclass
class Model:
    """One case: its files, and what its float model says of the test pictures, which is looked up once."""

    case: Case
    data: Path
    scratch: Path
    most_tests: int | None = None
    reference: bool = False

    @cached_property
    def path(self) -> Path:
        if not self.case.light:
            return self.data / "models" / self.case.model
        path = self.scratch / "he.onnx"
        watched = pictures(self.data / self.case.calibration_folder, self.case.calibration)
        light.he_copy(light_file(self.case), path, [self.case.prep(picture) for picture in watched])
        return path

    @cached_property
    def tests(self) -> list[Path]:
        count = self.case.tests if self.most_tests is None else min(self.case.tests, self.most_tests)
        return pictures(self.data / self.case.test_folder, count)

    @cached_property
    def labels(self) -> list[int]:
        folder = self.data / self.case.test_folder
        return [label(path, folder) for path in self.tests] if self.case.labels else []

    @cached_property
    def inputs(self) -> list[Array]:
        return [self.case.prep(path) for path in self.tests]

    @cached_property
    def expected(self) -> dict[str, list[Array]]:
        return self.outputs(self.path)

    def folder(self, count: int) -> Path:
        chosen = pictures(self.data / self.case.calibration_folder, count)
        return linked(chosen, self.scratch / f"{self.case.pictures}_{len(chosen)}")

    def outputs(self, path: Path, *, reference: bool = False) -> dict[str, list[Array]]:
        session = accuracy.session(path, reference=reference, threads=THREADS)
        names = [output.name for output in session.get_outputs()]
        runs = [session.run(names, {session.get_inputs()[0].name: x}) for x in self.inputs]
        return dict(zip(names, map(list, zip(*runs, strict=True)), strict=True))

    def score(self, path: Path) -> Row:
        scored = self._scored(path)
        found = {key: scored[key] for key in ("agreement", "sqnr_db", "top1", "flips")}
        if self.reference:
            plain = self._scored(path, reference=True)
            found["reference"] = {key: plain[key] for key in ("agreement", "sqnr_db", "top1")}
        return found

    def _scored(self, path: Path, *, reference: bool = False) -> Row:
        got = self.outputs(path, reference=reference)
        tallies: dict[str, accuracy.Tally] = {}
        for name, refs in self.expected.items():
            tallies[name] = accuracy.Tally()
            for ref, found in zip(refs, got[name], strict=True):
                tallies[name].add(ref, found)
        first = next(iter(self.expected))
        sides = zip(self.expected[first], got[first], self.labels, strict=bool(self.labels))
        right = [(int(ref.argmax()) == want, int(found.argmax()) == want) for ref, found, want in sides]
        return accuracy.summary(self.case, tallies, right)

    @cached_property
    def prepared(self) -> Path:
        """With BatchNorms folded by ONNX Runtime, for the peer that does not fold them."""
        from onnxruntime.quantization.shape_inference import quant_pre_process

        path = self.scratch / "prepared.onnx"
        quant_pre_process(str(self.path), str(path))
        return path


@dataclass
class Bench:
    """What is wanted, and what has been found."""

    wanted: argparse.Namespace
    found: dict[str, Any] = field(default_factory=lambda: {"skipped": {}, "rows": []})

    @cached_property
    def known(self) -> Known:
        return known_options(_run([sys.executable, "-m", "qconv", "quantize", "--help"]).stdout)

    def jobs(self, case: Case) -> Iterator[Job]:
        """Those of one model, in the table's order; ways that cannot be tried are noted as skipped."""
        most = self.wanted.calibration
        ways = [way for way in (*VARIANTS, *PEERS) if not self.wanted.variant or way.name in self.wanted.variant]
        for granularity in self.wanted.granularity or GRANULARITIES:
            for bits in self.wanted.setting or SETTINGS:
                for way in ways:
                    if _is_for(way, bits, granularity, case) and self._offered(way):
                        more = "" if isinstance(way, Peer) else self.wanted.qconv
                        yield Job(way, bits, granularity, _pictures(way, case, most), more)

    def _offered(self, way: Variant | Peer) -> bool:
        if isinstance(way, Peer):
            why = "--nncf PYTHON is not given" if way.nncf and not self.wanted.nncf else None
        else:
            lacks = unknown(way.options, self.known)
            why = None if lacks is None else f"`quantize --help` does not know {lacks}"
        if why is not None and way.name not in self.found["skipped"]:
            self.found["skipped"][way.name] = why
            print(f"{way.name} is skipped: {why}", file=sys.stderr, flush=True)
        return why is None

    def measure(self, model: Model, job: Job) -> Row:
        """A row, with "error" where there is nothing to score."""
        out = model.scratch / "out.onnx"
        row = job.key(model.case, len(model.tests))
        convert = self._by_peer if isinstance(job.way, Peer) else self._by_qconv
        row |= convert(model, job, out)
        if row["error"] is None:
            try:
                start = time.perf_counter()
                row |= {"bytes": out.stat().st_size, "ratio": out.stat().st_size / model.path.stat().st_size}
                row |= model.score(out)
                row["scored_in"] = time.perf_counter() - start
            except Exception as error:  # whatever the runtime says of a file that it does not like
                row["error"] = f"{type(error).__name__}: {str(error).strip()}"[:300]
        out.unlink(missing_ok=True)
        return row

    def _by_qconv(self, model: Model, job: Job, out: Path) -> Row:
        assert isinstance(job.way, Variant)
        command = [sys.executable, "-m", "qconv", "quantize", str(model.path), "--calib"]
        command += [str(model.folder(job.pictures)), "--samples", str(job.pictures), "-o", str(out), "--json", "-q"]
        command += ["--weight-bits", str(job.setting.weight), "--activation-bits", str(job.setting.activation)]
        command += ["--weight-granularity", job.granularity, *model.case.options, *given(job.way, self.known)]
        command += job.more.split()
        start = time.perf_counter()
        done = _run(command)
        seconds = time.perf_counter() - start
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
            return {"command": command[1:], "seconds": seconds, "error": " ".join(lines[-2:])[:300]}
        report = json.loads(done.stdout)
        return {
            "command": command[1:],
            "seconds": seconds,
            "solve_seconds": solve_seconds(report["time"]),
            "time": report["time"],
            "peak_rss_mb": report["peak_rss_mb"],
            "warnings": report["warnings"],
            "error": None,
        }

    def _by_peer(self, model: Model, job: Job, out: Path) -> Row:
        assert isinstance(job.way, Peer)
        folder = model.folder(job.pictures)
        if job.way.nncf:
            command = [self.wanted.nncf, "-m", "tests.bench.nncf_peer", model.case.name, str(model.prepared)]
            command += [str(folder), str(out), job.way.how]
        else:
            command = [*peer.command(model.case, model.path, folder, out), job.way.how, job.granularity]
        done = cost.spawn(command)
        said = " ".join(done["stderr"][-2:]) or f"status {done['status']}"
        return {
            "command": command[1:],
            "seconds": done["seconds"],
            "peak_rss_mb": done["rss_mb"],
            "error": said[:300] if done["status"] else None,
        }


def solve_seconds(times: dict[str, float]) -> float | None:
    """Of what `quantize` took, the part that looks for better weights; None where it does none of that."""
    stages = [times[name] for name in SOLVE if name in times]
    return sum(stages) if stages else None


def _is_for(way: Variant | Peer, bits: Setting, granularity: str, case: Case) -> bool:
    if case.name in TIMED and (granularity != GRANULARITIES[0] or bits not in TIMED[case.name]):
        return False
    if granularity not in way.granularities:
        return False
    return bits == W8A8 if isinstance(way, Peer) else way.settings is None or bits in way.settings


def _pictures(way: Variant | Peer, case: Case, most: int) -> int:
    if isinstance(way, Peer) and way.most is not None and max(case.prep.size) > 64:
        return min(most, way.most)
    return most


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)


def environment(nncf: str | None) -> dict[str, Any]:
    found = {name: importlib.metadata.version(name) for name in ("onnx", "numpy")}
    found |= {"onnxruntime": ort.__version__, "python": platform.python_version(), "cpu": detect_cpu().in_words()}
    if nncf:
        found["nncf"] = _run([nncf, "-c", VERSIONS]).stdout.strip() or "does not start"
    return found


def commit() -> str | None:
    """What is checked out, so that rows of several states are not taken for those of one."""
    if shutil.which("git") is None:
        return None
    done = _run(["git", "describe", "--always", "--dirty", "--exclude=*"])
    return done.stdout.strip() or None


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.bits", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", action="append", choices=MODELS, metavar="MODEL", help="of " + " ".join(MODELS))
    parser.add_argument("--setting", action="append", type=setting, metavar="W4A8", help="any, W4 is weights only")
    parser.add_argument("--variant", action="append", choices=NAMES, metavar="NAME", help="of " + " ".join(NAMES))
    parser.add_argument("--granularity", action="append", choices=GRANULARITIES, help="both by default")
    parser.add_argument("--tests", type=int, metavar="N", help="pictures to score on, at most")
    parser.add_argument(
        "--calibration", type=int, metavar="N", default=128, help="pictures to calibrate with, 128 by default"
    )
    parser.add_argument("--reference", action="store_true", help="score again without graph optimizations")
    parser.add_argument("--nncf", metavar="PYTHON", help="the interpreter of an environment with nncf and pillow")
    parser.add_argument("--qconv", default="", metavar="OPTIONS", help="more options for qconv, as one text")
    parser.add_argument("--data", type=Path, default=default_data(), help="folder with models/ and images/")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all that was measured, written after each row")
    parser.add_argument("--resume", action="store_true", help="keep the rows that FILE has already")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="print what is in FILE, measure nothing")
    wanted = parser.parse_args(argv)
    if wanted.resume and wanted.json is None:
        parser.error("--resume needs --json FILE")
    if wanted.nncf:  # as it is called: a link in an environment must not be followed
        wanted.nncf = os.path.abspath(wanted.nncf)
    return wanted


def main(argv: Sequence[str] | None = None) -> None:
    wanted = arguments(argv)
    if wanted.markdown:
        print(bits_table.text(json.loads(wanted.markdown.read_text())))
        return
    require_data(wanted.data)
    bench = Bench(wanted)
    if wanted.resume and wanted.json.exists():
        bench.found["rows"] = json.loads(wanted.json.read_text())["rows"]
    bench.found["environment"] = environment(wanted.nncf)
    for name in wanted.only or MODELS:
        with tempfile.TemporaryDirectory(prefix="qconv-bits-") as scratch:
            model = Model(BY_NAME[name], wanted.data.resolve(), Path(scratch), wanted.tests, wanted.reference)
            for job in bench.jobs(model.case):
                measured(bench, model, job)
    print(bits_table.text(bench.found))


def measured(bench: Bench, model: Model, job: Job) -> None:
    """One row more, unless it is there without an error already."""
    key = job.key(model.case, len(model.tests))
    same = [row for row in bench.found["rows"] if {name: row[name] for name in KEY} == key]
    if any(row["error"] is None for row in same):
        return
    row = {**bench.measure(model, job), "commit": commit()}
    bench.found["rows"] = [*(other for other in bench.found["rows"] if other not in same), row]
    save(bench.found, bench.wanted.json)
    print(bits_table.line(row), file=sys.stderr, flush=True)


def save(found: dict[str, Any], path: Path | None) -> None:
    """Whole or not at all: a run of hours may be stopped at any time."""
    if path is not None:
        part = path.with_name(f"{path.name}.part")
        part.write_text(json.dumps(found, indent=1))
        part.replace(path)


if __name__ == "__main__":
    main()
