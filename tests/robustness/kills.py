"""SIGKILL at random moments of every command that writes: the output is whole, absent, or what was there before.

    python -m tests.robustness.kills [--kills 200] [--seed 0]

Each command first runs to its end, which says how long it takes and what whole results are; then it is killed at
moments drawn evenly over that time, half of the times with something at the place of its result. Temporary files may be
left; the next run removes those of the same place, which is looked at at the end.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import io
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnxruntime as ort
from PIL import Image

ROOT = Path(__file__).parents[2]
MODEL, PICTURES = ROOT / "tests/models/cifar_mobilenet.onnx", ROOT / "calib_samples"
BEFORE = b"before"
FED = ("--preprocess", "imagenet", "--resize", "exact", "--threads", "1")
CALIB = ("--calib", PICTURES, *FED)


def is_model(path: Path) -> bool:
    """Whether the runtime loads it, its external data included."""
    try:
        onnx.checker.check_model(str(path))
        options = ort.SessionOptions()
        options.log_severity_level = 4
        ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception:  # of a dozen types
        return False
    return True


def is_archive(path: Path) -> bool:
    """Whether it is an .npz of which every part can be read."""
    try:
        with zipfile.ZipFile(path) as held:
            return held.testzip() is None and bool(held.namelist())
    except (zipfile.BadZipFile, OSError):
        return False


def is_table(path: Path) -> bool:
    """Whether all rows of a CSV are as long as the first, and the last has its end."""
    text = path.read_text("utf-8")
    return text.endswith("\n") and len({len(row) for row in csv.reader(io.StringIO(text))}) == 1


def is_picture(path: Path) -> bool:
    """Whether Pillow reads all of it."""
    try:
        Image.open(path).load()
    except OSError:
        return False
    return True


def are_pictures(folder: Path) -> bool:
    """Whether all pictures in a folder that has one can be read."""
    return all(map(is_picture, folder.glob("*.png")))


def ends_with(*endings: bytes) -> Callable[[Path], bool]:
    """Whether a text file ends as it does when it is whole."""
    return lambda path: path.read_bytes().rstrip().endswith(endings)


@dataclass(frozen=True, slots=True)
class Writer:
    """A command that writes, and how to tell that each of its results is whole.

    Attributes:
        name: Of the command.
        arguments: Of a folder to write to and one with inputs.
        results: The test of each result, by its name in that folder.
    """

    name: str
    arguments: Callable[[Path, Path], tuple[object, ...]]
    results: dict[str, Callable[[Path], bool]]


WRITERS = (
    Writer(
        "quantize",
        lambda out, have: (
            *("quantize", MODEL, *CALIB, "--effort", "fast", "-o", out / "out.onnx"),
            *("--save-stats", out / "seen.npz", "--save-recipe", out / "recipe.toml", "--report", out / "page.html"),
        ),
        {
            "out.onnx": is_model,
            "seen.npz": is_archive,
            "recipe.toml": ends_with(b"\n", b'"', b"]", b"true", b"false", *(str(n).encode() for n in range(10))),
            "page.html": ends_with(b"</html>"),
        },
    ),
    Writer(
        "quantize with external data",
        lambda out, have: ("quantize", have / "external.onnx", *CALIB, "--effort", "fast", "-o", out / "out.onnx"),
        {"out.onnx": is_model},
    ),
    Writer(
        "evaluate",
        lambda out, have: (
            *("evaluate", have / "quantized.onnx", "--against", MODEL, "--images", PICTURES, *FED),
            *("--csv", out / "table.csv", "--save-predictions", out / "said.npz"),
        ),
        {"table.csv": is_table, "said.npz": is_archive},
    ),
    Writer(
        "compare",
        lambda out, have: (
            *("compare", MODEL, have / "quantized.onnx", "--images", PICTURES, *FED),
            *("--csv", out / "table.csv", "--report", out / "page.html"),
        ),
        {"table.csv": is_table, "page.html": ends_with(b"</html>")},
    ),
    Writer(
        "merge-stats",
        lambda out, have: ("merge-stats", have / "seen.npz", have / "seen.npz", "-o", out / "both.npz"),
        {"both.npz": is_archive},
    ),
    Writer(
        "diagnose",
        lambda out, have: (
            *("diagnose", MODEL, *CALIB, "--samples", "8", "--effort", "fast"),
            *("--csv", out / "table.csv", "--report", out / "page.html"),
        ),
        {"table.csv": is_table, "page.html": ends_with(b"</html>")},
    ),
    Writer(
        "study-samples",
        lambda out, have: (
            *("study-samples", MODEL, *CALIB, "--samples", "16"),
            *("--csv", out / "table.csv", "-o", out / "curve.png"),
        ),
        {"table.csv": is_table, "curve.png": is_picture},
    ),
    Writer(
        "finetune",
        lambda out, have: (
            *("finetune", have / "quantized.onnx", "--teacher", MODEL, "--images", PICTURES, "--epochs", "1"),
            *("--threads", "1", "-o", out / "out.onnx"),
        ),
        {"out.onnx": is_model},
    ),
    Writer(
        "synthesize",
        lambda out, have: (
            *("synthesize", MODEL, "--count", "2", "--iterations", "20", *FED),
            *("--csv", out / "table.csv", "-o", out / "made"),
        ),
        {"table.csv": is_table, "made": are_pictures},
    ),
)


def start(arguments: tuple[object, ...]) -> subprocess.Popen[bytes]:
    """Start `qconv`."""
    words = [str(argument) for argument in arguments]
    null = subprocess.DEVNULL
    return subprocess.Popen([sys.executable, "-m", "qconv", *words], cwd=ROOT, stdout=null, stderr=null)


def prepare(have: Path) -> None:
    """Write the files that the commands read."""
    onnx.save(
        onnx.load(MODEL), have / "external.onnx", save_as_external_data=True, location="external.data", size_threshold=0
    )
    arguments = ("quantize", MODEL, *CALIB, "--effort", "fast", "-o", have / "quantized.onnx")
    assert start((*arguments, "--save-stats", have / "seen.npz")).wait() == 0


def kill_at_random(writer: Writer, times: int, rng: random.Random, have: Path) -> Counter[str]:
    """Kill the command as many times. Returns how often a result was whole, absent, as before, or broken."""
    place = Path(tempfile.mkdtemp(prefix="kills_"))
    found: Counter[str] = Counter()
    try:
        out = place / "whole"
        out.mkdir()
        started = time.monotonic()
        status = start(writer.arguments(out, have)).wait()
        lasts = time.monotonic() - started
        assert status == 0, f"{writer.name} ended with {status}"
        assert all(whole(out / name) for name, whole in writer.results.items()), f"{writer.name}: results are broken"
        for index in range(times):
            out = place / str(index)
            out.mkdir()
            if index % 2:
                for name in writer.results:
                    if "." in name:  # no folder
                        (out / name).write_bytes(BEFORE)
            process = start(writer.arguments(out, have))
            time.sleep(rng.uniform(0.1, lasts))
            process.send_signal(signal.SIGKILL)
            process.wait()
            for name, whole in writer.results.items():
                found[_state(out / name, whole)] += 1
        assert start(writer.arguments(out, have)).wait() == 0
        data = list(out.glob("out.onnx.*.data"))[:1]  # the weights of the result, where those of the model are outside
        left = {path.name for path in out.iterdir()} - writer.results.keys() - {path.name for path in data}
        found["left behind for good"] += len(left)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return found


def _state(path: Path, whole: Callable[[Path], bool]) -> str:
    if not path.exists():
        return "absent"
    if path.is_file() and path.read_bytes() == BEFORE:
        return "as before"
    return "whole" if whole(path) else f"broken: {path.name}"


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="of all commands together; default %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the moments; default %(default)s")
    given = parser.parse_args()
    rng, bad = random.Random(given.seed), 0
    have = Path(tempfile.mkdtemp(prefix="kills_have_"))
    try:
        prepare(have)
        torch = importlib.util.find_spec("torch") is not None
        writers = [writer for writer in WRITERS if torch or writer.name not in ("finetune", "synthesize")]
        for index, writer in enumerate(writers):
            times = given.kills // len(writers) + (index < given.kills % len(writers))
            found = kill_at_random(writer, times, rng, have)
            print(f"{writer.name}: {times} kills, results {json.dumps(found)}", flush=True)
            bad += sum(count for state, count in found.items() if state.startswith(("broken", "left")))
    finally:
        shutil.rmtree(have, ignore_errors=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
