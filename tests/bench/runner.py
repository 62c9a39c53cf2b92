"""One model after the other: convert it with both tools, and measure both results in the same way."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from tests.bench import accuracy, cost, latency, light, peer, yolo
from tests.bench.cases import REPOSITORY, Case, label, light_file, linked, pictures
from tests.bench.coverage import coverage

LATENCY_ROUNDS = 24
COST_ROUNDS = 5


@dataclass(frozen=True)
class Setup:
    """Where things are and what is wanted."""

    data: Path
    work: Path
    reference: bool = False
    refresh_peer: bool = False
    options: tuple[str, ...] = ()  # given to qconv on top


@dataclass
class Bench:
    """One case and its files."""

    case: Case
    setup: Setup
    found: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def shipped(self) -> Path:
        if self.case.made:
            path = self._place("models", "onnx")
            yolo.write(path)
            return path
        return light_file(self.case) if self.case.light else self.setup.data / "models" / self.case.model

    @cached_property
    def float_model(self) -> Path:
        """What is converted and scored: the file itself, or the light model's copy with He weights."""
        if not self.case.light:
            return self.shipped
        copy = self._place("models", "he.onnx")
        if not copy.exists():
            part = copy.with_suffix(".part")
            light.he_copy(self.shipped, part, [self.case.prep(path) for path in self.calibration])
            part.rename(copy)
        return copy

    @cached_property
    def calibration(self) -> list[Path]:
        return pictures(self.setup.data / self.case.calibration_folder, self.case.calibration)

    @cached_property
    def tests(self) -> list[Path]:
        return pictures(self.setup.data / self.case.test_folder, self.case.tests)

    @cached_property
    def labels(self) -> list[int] | None:
        folder = self.setup.data / self.case.test_folder
        return [label(path, folder) for path in self.tests] if self.case.labels else None

    def folder(self, count: int | None = None) -> Path:
        """The first `count` calibration pictures."""
        chosen = self.calibration[:count]
        return linked(chosen, self.setup.work / "pictures" / f"{self.case.pictures}_{len(chosen)}")

    def _place(self, kind: str, suffix: str) -> Path:
        folder = self.setup.work / kind
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{self.case.name}.{suffix}"

    # ---- the peer

    @property
    def peer_file(self) -> Path:
        return self._place("peer", "onnx")

    def measure_peer(self) -> None:
        """From the cache, where it has the same settings."""
        cache = self._place("peer", "json")
        key = {"onnxruntime": ort.__version__, "settings": peer.SETTINGS}
        key |= {"pictures": len(self.calibration), "tests": len(self.tests)}
        found = json.loads(cache.read_text()) if cache.exists() and not self.setup.refresh_peer else {}
        if found.get("key") != key:
            found = {"key": key, **self._convert_with_peer()}
            if found["input"]:
                found |= self._measured(self.peer_file)
        if self.setup.reference and found["input"] and "reference" not in found:
            found["reference"] = self._score(self.peer_file, reference=True)
        cache.write_text(json.dumps(found, indent=1))
        self.found["peer"] = found

    def _convert_with_peer(self) -> dict[str, Any]:
        sample = self.calibration[0]
        found = peer.convert(self.case, self.float_model, self.folder(), self.peer_file, sample)
        if self.case.light:
            out = self._place("peer", "shipped.onnx")
            found["shipped_error"] = peer.attempt(self.case, self.shipped, self.folder(2), out, sample)
            out.unlink(missing_ok=True)
        return found

    # ---- qconv

    @property
    def own_file(self) -> Path:
        return self._place("qconv", "onnx")

    def command(self, model: Path, folder: Path, out: Path) -> list[str]:
        own = [sys.executable, "-m", "qconv", "quantize", str(model), "--calib", str(folder), "-o", str(out)]
        return [*own, "--json", "--quiet", *self.case.options, *self.setup.options]

    def measure_own(self) -> None:
        found = self._convert(self.float_model, self.own_file)
        if found["status"] == 0:
            found |= self._measured(self.own_file)
            if self.setup.reference:
                found["reference"] = self._score(self.own_file, reference=True)
        self.found["qconv"] = found
        if self.case.light:
            self.found["shipped"] = self._shipped()

    def _convert(self, model: Path, out: Path) -> dict[str, Any]:
        out.unlink(missing_ok=True)
        done = run(self.command(model, self.folder(), out))
        report = json.loads(done.stdout) if done.returncode == 0 else {}
        kept = ("size", "opset", "ir_version", "needs", "verify", "audit", "warnings", "time", "peak_rss_mb")
        errors = done.stderr.strip().splitlines()[-3:]
        return {"status": done.returncode, "stderr": errors, "report": {key: report.get(key) for key in kept}}

    def _shipped(self) -> dict[str, Any]:
        """The light model as it is: does it convert, load, run, and in integers?"""
        out = self._place("qconv", "shipped.onnx")
        found = self._convert(self.shipped, out)
        if found["status"] == 0:
            x = self.case.prep(self.calibration[0])
            ref, got = (
                made.run(None, {made.get_inputs()[0].name: x})[0]
                for made in (accuracy.session(self.shipped), accuracy.session(out))
            )
            found["largest_difference"] = float(np.abs(ref - got).max())
            found["coverage"] = coverage(out)
        return found

    # ---- either

    def _measured(self, quantized: Path) -> dict[str, Any]:
        ratio = quantized.stat().st_size / self.float_model.stat().st_size
        sizes = {"bytes": quantized.stat().st_size, "size_ratio": ratio}
        return {**sizes, "coverage": coverage(quantized), "accuracy": self._score(quantized)}

    def _score(self, quantized: Path, *, reference: bool = False) -> dict[str, Any]:
        return accuracy.score(self.case, self.float_model, quantized, self.tests, self.labels, reference=reference)

    # ---- time

    def measure_latency(self) -> None:
        models = {"float": self.float_model}
        models |= {"peer": self.peer_file} if self.found["peer"]["input"] else {}
        models |= {"qconv": self.own_file} if self.found["qconv"]["status"] == 0 else {}
        size = self.case.prep.size
        self.found["latency"] = latency.measure(models, size, threads=1, rounds=LATENCY_ROUNDS)
        self.found["latency of 2 threads"] = latency.measure(models, size, threads=2, rounds=LATENCY_ROUNDS)

    def measure_cost(self) -> None:
        scratch = self.setup.work / "cost"
        scratch.mkdir(exist_ok=True)
        model = self.float_model
        found = {}
        for count in self.case.cost:
            folder = self.folder(count)
            commands = {
                "qconv": [*self.command(model, folder, scratch / "qconv.onnx"), "--samples", str(count)],
                "bare": [sys.executable, "-m", "tests.bench.bare", self.case.name, str(model), str(folder)],
                "peer": peer.command(self.case, model, folder, scratch / "peer.onnx"),
            }
            found[str(count)] = cost.measure(commands, COST_ROUNDS)
        shutil.rmtree(scratch)
        self.found["cost"] = found


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)


def refusals(setup: Setup, quantized: Path) -> list[dict[str, Any]]:
    """Files that must end in one Error and one Hint, status 1, and no file."""
    wrong = {"custom operators": setup.data / "models" / "superres_ppp_op18.onnx", "already quantized": quantized}
    calibration = linked(pictures(setup.data / "images/cifar10/calib", 4), setup.work / "pictures" / "few")
    out = setup.work / "refused" / "out.onnx"
    shutil.rmtree(out.parent, ignore_errors=True)
    out.parent.mkdir()
    rows = []
    for what, model in wrong.items():
        done = run([sys.executable, "-m", "qconv", "quantize", str(model), "--calib", str(calibration), "-o", str(out)])
        lines = done.stderr.splitlines()
        held = (
            done.returncode == 1
            and [line[:6] for line in lines] == ["Error:", "Hint: "]
            and not done.stdout
            and not any(out.parent.iterdir())
        )
        rows.append({"what": what, "status": done.returncode, "stderr": lines[-4:], "held": held})
    return rows
