"""Do the files run in older ONNX Runtimes, in integers, and with the same results? Prints a matrix.

    make compat             or    python -m tests.bench.compat [--data DIR] [--versions 1.17.3,1.19.2]

Each version gets an environment of its own in .compat; one that has no wheel for this Python is left out with the
reason. The files are made by this environment's own version with default options, unless the row says otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from qconv.auditing.audit import PlannedReasons, audit
from qconv.config.recipe import Recipe
from qconv.config.serialization import recipe_from_dict
from qconv.ir.files import Source, read_proto
from qconv.ir.load import load_unchanged
from qconv.ir.metadata import read_recipe
from qconv.ir.model import Model
from qconv.ir.packed_codes import unpack_codes
from qconv.ir.requirements import needed_runtime
from tests.bench.cases import CASES, REPOSITORY, Array, Case, default_data, light_file, pictures

VERSIONS = ("1.17.3", "1.19.2", "1.22.1", "1.23.2", "1.24.1", "1.25.1", "1.26.0", ort.__version__)
NUMPY = {"1.17": "numpy<2", "1.18": "numpy<2"}
HOME = REPOSITORY / ".compat"
OWN = REPOSITORY / "tests" / "models" / "cifar_mobilenet.onnx"
PHOTOS = REPOSITORY / "calib_samples"
SAMPLES = 16
VARIANTS = {
    "": (),
    "W4A8": ("--weight-bits", "4"),
    "W4A8 packed": ("--weight-bits", "4", "--pack"),
    "W4A8 packed for 1.22": ("--weight-bits", "4", "--pack", "--needs", "1.22"),
    "W4A8 packed for 1.19": ("--weight-bits", "4", "--pack", "--needs", "1.19"),
    "W3A8 packed": ("--weight-bits", "3", "--pack"),
    "W2A8 packed": ("--weight-bits", "2", "--pack"),
    "W4 packed": ("--weight-bits", "4", "--activation-bits", "32", "--pack"),
    "weights only": ("--activation-bits", "32"),
    "symmetric": ("--activation-scheme", "symmetric"),
    "pixels": ("--embed-preprocessing", "nchw"),
    "generic": ("--target", "generic"),
    "openvino": ("--target", "openvino"),
    "tensorrt": ("--target", "tensorrt"),
}


@dataclass
class Row:
    """One file. feeds: what it is fed with, the pictures side by side; float: what the float model makes of them."""

    name: str
    model: Path
    feeds: dict[str, Array]
    float: dict[str, Array]
    class_scores: bool
    cells: dict[str, str] = field(default_factory=dict)
    failed: bool = False


def environment(version: str) -> Path | str:
    """The Python of an environment with this version, or why there is none."""
    home = HOME / version
    python = home / "bin" / "python"
    if (home / ".done").exists():
        return python
    numpy = NUMPY.get(".".join(version.split(".")[:2]), "numpy")
    for command in (
        [sys.executable, "-m", "venv", "--clear", str(home)],
        [
            str(python),
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            f"onnxruntime=={version}",
            numpy,
        ],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
            return lines[-1] if lines else f"{command[-2]} ended with status {done.returncode}"
    (home / ".done").touch()
    return python


def quantized(model: Path, calib: Path, out: Path, options: Sequence[str]) -> None:
    command = [sys.executable, "-m", "qconv", "quantize", str(model), "--calib", str(calib), "-o", str(out)]
    subprocess.run([*command, "--quiet", "--samples", "32", *options], cwd=REPOSITORY, check=True)


def own_rows(work: Path) -> Iterator[Row]:
    """The network that this repository carries, in every variant."""
    from tests.bench.cases import imagenet

    prep = imagenet((32, 32))
    paths = sorted(PHOTOS.glob("*.jpg"))[:SAMPLES]
    x = np.concatenate([prep(path) for path in paths])
    pixels = np.concatenate([raw(path) for path in paths])
    want = reference(OWN, {"input": x})
    for name, options in VARIANTS.items():
        out = work / f"own{len(list(work.iterdir()))}.onnx"
        quantized(OWN, PHOTOS, out, ("--preprocess", "imagenet", "--resize", "exact", *options))
        feeds = {"input": pixels if "--embed-preprocessing" in options else x}
        yield Row(f"own network {name}".strip(), out, feeds, want, class_scores=True)


def raw(path: Path) -> Array:
    from PIL import Image

    picture = Image.open(path).convert("RGB").resize((32, 32), Image.Resampling.BILINEAR)
    return np.asarray(picture).transpose(2, 0, 1)[None]


def shared_rows(data: Path, work: Path, cases: Sequence[Case]) -> Iterator[Row]:
    """Real models, and the topologies of the onnx package, with default options."""
    for case in cases:
        model = light_file(case) if case.light else data / "models" / case.model
        out = work / f"{case.name}.onnx"
        quantized(model, data / case.calibration_folder, out, case.options)
        x = np.concatenate(
            [case.prep(path) for path in pictures(data / case.test_folder, 2 if case.light else SAMPLES)]
        )
        constants = {tensor.name for tensor in onnx.load(model, load_external_data=False).graph.initializer}
        (name,) = (v.name for v in onnx.load(out, load_external_data=False).graph.input if v.name not in constants)
        yield Row(case.name, out, {name: x}, reference(model, {name: x}), case.class_scores and not case.light)


def reference(model: Path, feeds: dict[str, Array]) -> dict[str, Array]:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    count = len(next(iter(feeds.values())))
    rows = [session.run(None, {name: array[i : i + 1] for name, array in feeds.items()}) for i in range(count)]
    names = [output.name for output in session.get_outputs()]
    return {name: np.concatenate(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}


def tried(python: Path, version: str, rows: list[Row], work: Path) -> None:
    """Fill in the column of one version."""
    jobs = []
    for index, row in enumerate(rows):
        feeds = work / f"feeds{index}.npz"
        np.savez(feeds, allow_pickle=False, **row.feeds)
        place = {"out": str(work / f"{version}_{index}.npz"), "optimized": str(work / f"{version}_{index}.onnx")}
        jobs.append({"model": str(row.model), "feeds": str(feeds), **place})
    worker = Path(__file__).with_name("compat_worker.py")
    done = subprocess.run(
        [str(python), str(worker)], input=json.dumps(jobs), capture_output=True, text=True, check=True
    )
    for row, job, error in zip(rows, jobs, json.loads(done.stdout), strict=True):
        model = opened(row)
        if error is not None:
            promised = numbers(version) >= oldest_runtime(model)
            row.cells[version], row.failed = f"FAILS: {error}" if promised else "needs a newer one", promised
            continue
        unpack_codes(model)
        audited = audit(Path(job["optimized"]), model, PlannedReasons())
        got = dict(np.load(job["out"]))
        row.cells[version] = f"{audited.integer}/{audited.float} {compared(row, got)}"
        os.unlink(job["optimized"])


def opened(row: Row) -> Model:
    source = Source(str(row.model), row.model)
    return load_unchanged(read_proto(source), source)


def oldest_runtime(model: Model) -> tuple[int, ...]:
    """What the summary of a file said that it needs."""
    recipe = recipe_from_dict(read_recipe(model.inner.metadata_props)) or Recipe()
    return numbers(needed_runtime(model, recipe).split()[-1])


def compared(row: Row, got: dict[str, Array]) -> str:
    """Agreement with the float model where outputs are class scores, and the lowest SQNR."""
    decibel = min(sqnr(want, got[name]) for name, want in row.float.items())
    if not row.class_scores:
        return f"{decibel:.1f} dB"
    same = np.concatenate([(want.argmax(1) == got[name].argmax(1)).reshape(-1) for name, want in row.float.items()])
    return f"{100 * same.mean():.1f} % {decibel:.1f} dB"


def sqnr(want: Array, got: Array) -> float:
    noise = float(np.sum((want.astype(np.float64) - got) ** 2))
    return 10 * float(np.log10(np.sum(want.astype(np.float64) ** 2) / noise)) if noise else np.inf


def opset_rows(work: Path) -> list[Row]:
    """A network of every opset that results are written in, and of some that need not be."""
    from qconv.config.targets import OPSETS

    x = np.random.default_rng(0).normal(size=(1, 3, 8, 8)).astype(np.float32)
    np.save(work / "sample.npy", x)
    rows = []
    for opset in OPSETS:
        model, out = work / f"float{opset}.onnx", work / f"opset{opset}.onnx"
        onnx.save(small_network(), model)
        quantized(model, work / "sample.npy", out, ("--opset", str(opset)))
        rows.append(Row(f"opset {opset}", out, {"x": x}, reference(model, {"x": x}), class_scores=False))
    return rows


def small_network() -> onnx.ModelProto:
    """Layers, and operators that move codes, of opset 13."""
    from tests.support.models import network

    body = """c = Conv(x, w) r = Relu(c) m = MaxPool<kernel_shape=[2,2]>(r) f = Flatten(m) s = Reshape(f, shape)
              y = Gemm<transB=1>(s, g)"""
    return network(body, (1, 3, 8, 8), opset=13, w=(4, 3, 3, 3), shape=np.array([1, 100]), g=(5, 100))


def check_opsets(rows: Sequence[Row], versions: Sequence[str]) -> list[str]:
    """Where the table of opsets is wrong: it promises too much, or too little."""
    from qconv.config.targets import OPSETS

    wrong = []
    for row in rows:
        oldest = OPSETS[int(row.name.split()[-1])].runtime
        for version in versions:
            promised = numbers(version) >= numbers(oldest)
            runs = not row.cells[version].startswith("FAILS")
            if promised and not runs:
                wrong.append(f"{row.name} does not run in {version}, though the table says {oldest}.")
            elif runs and not promised:
                print(f"{row.name} runs in {version}, and the table says {oldest}: other operators may need that.")
    return wrong


def numbers(version: str) -> tuple[int, ...]:
    """1.24 and 1.24.1 as numbers to be compared."""
    return tuple(int(part) for part in version.split(".")[:2])


def matrix(rows: list[Row], versions: Sequence[str]) -> str:
    """As Markdown, which `qconv manual targets` takes."""
    lines = [f"| file | {' | '.join(versions)} |", f"|---{'|---' * len(versions)}|"]
    lines += [f"| {row.name} | {' | '.join(row.cells.get(v, '') for v in versions)} |" for row in rows]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.compat", description=__doc__)
    parser.add_argument("--data", type=Path, default=default_data(), help="folder with models/ and images/, if any")
    parser.add_argument("--versions", default=",".join(dict.fromkeys(VERSIONS)))
    parser.add_argument("--light", action="store_true", help="also the topologies of the onnx package")
    wanted: Any = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="qconv-compat-") as scratch:
        work = Path(scratch)
        rows = list(own_rows(work))
        if (wanted.data / "models").is_dir():
            rows += shared_rows(
                wanted.data, work, [case for case in CASES if case.trained or (case.light and wanted.light)]
            )
        else:
            print(f"{wanted.data} does not exist: only the network of this repository is tried.")
        there, wrong = [], []
        for version in wanted.versions.split(","):
            python = environment(version)
            if isinstance(python, str):
                print(f"{version} is left out: {python}")
                continue
            there.append(version)
            tried(python, version, rows, work)
        print("integer/float nodes, agreement with the float model, SQNR against it:")
        print(matrix(rows, there))
        opsets = opset_rows(work)
        for version in there:
            tried(HOME / version / "bin" / "python", version, opsets, work)
        print("by opset:")
        print(matrix(opsets, there))
        wrong = check_opsets(opsets, there)
    if wrong or any(row.failed for row in rows):
        sys.exit("\n".join([*wrong, "Some files do not run everywhere."]))


if __name__ == "__main__":
    main()
