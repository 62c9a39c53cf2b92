"""Post-training quantization against quantization-aware training, on real networks and pictures without labels.

    make bench-qat     or    python -m tests.bench.qat [--only resnet20] [--setting W4A4] [--epochs 12] [--cache DIR]

Each row is three commands: `quantize --effort best`, `finetune` on what it wrote, and `evaluate` of both on labelled
test pictures that neither has seen. ResNet-20 and the repository's own MobileNet learn from the 50,000 training
pictures of CIFAR-10, which are fetched (cifar.py), MobileNetV2 from its 128 calibration pictures alone. Networks whose
files are not there are left out. What was measured stays in the folder of --cache: --resume goes on from there.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.bench.cases import REPOSITORY, default_data, require_data
from tests.bench.cifar import folders

Row = dict[str, Any]
COLUMNS = ("network", "setting", "float", "PTQ", "QAT", "drop", "agree PTQ", "agree QAT", "PTQ s", "QAT s", "epochs")
PUBLISHED = (
    ("MobileNetV2, ImageNet", "W8A8", 71.9, 69.8, 71.1, "Krishnamoorthi 2018, arXiv 1806.08342, tables 3 and 4"),
    ("MobileNetV1, ImageNet", "W8A8", 70.9, 59.1, 70.7, "the same"),
    ("ResNet-50, ImageNet", "W8A8", 75.2, 75.1, 75.0, "the same"),
)
"""Network, setting, float top-1, PTQ (per channel, symmetric), QAT, source."""
FED = ("--preprocess", "imagenet")


@dataclass(frozen=True)
class Job:
    """A network at one setting. train: "cifar", or a folder of pictures; epochs: of training, unless the user says."""

    network: str
    model: Path
    setting: str
    calib: Path
    train: str
    test: str
    epochs: int
    options: tuple[str, ...] = FED
    finetune: tuple[str, ...] = ()

    @property
    def bits(self) -> tuple[str, str]:
        """Of weights and of activations."""
        weights, activations = self.setting.removeprefix("W").split("A")
        return weights, activations


def jobs(data: Path) -> list[Job]:
    """All of them, those of files that are not there left out."""
    cifar, imagenet = data / "images" / "cifar10" / "calib", data / "images" / "imagenet"
    resnet, own = data / "models" / "resnet20_cifar10.onnx", REPOSITORY / "tests" / "models" / "cifar_mobilenet.onnx"
    found = [
        Job(name, model, setting, cifar, "cifar", "cifar", epochs, (*FED, "--resize", "exact"))
        for name, model in (("ResNet-20, CIFAR-10", resnet), ("MobileNet, CIFAR-10", own))
        for setting, epochs in (("W4A4", 3), ("W3A3", 4), ("W2A4", 8))
    ]
    mobile, test = data / "models" / "mobilenetv2_imagenet.onnx", str(imagenet / "test")
    few = ("--batch", "16")
    found.append(
        Job("MobileNetV2, ImageNet", mobile, "W4A8", imagenet / "calib", str(imagenet / "calib"), test, 30, FED, few)
    )
    return [job for job in found if job.model.is_file() and job.calib.is_dir()]


def measure(job: Job, cache: Path, epochs: int | None) -> Row:
    """One row."""
    weights, activations = job.bits
    stem = f"{job.model.stem}.w{weights}a{activations}"
    quant, trained = cache / f"{stem}.onnx", cache / f"{stem}.qat.onnx"
    split = folders(cache / "cifar10") if "cifar" in (job.train, job.test) else {}
    train = str(split["train"]) if job.train == "cifar" else job.train
    test = str(split["test"]) if job.test == "cifar" else job.test
    bits = ("--weight-bits", weights, "--activation-bits", activations, "--effort", "best", "--samples", "300")
    start = time.perf_counter()
    qconv("quantize", str(job.model), "--calib", str(job.calib), *bits, *job.options, "-o", str(quant))
    ptq = time.perf_counter() - start
    passes = str(epochs or job.epochs)
    learned = qconv(
        *("finetune", str(quant), "--teacher", str(job.model), "--images", train, "--epochs", passes),
        *(*job.finetune, "-o", str(trained)),
    )
    scores = [score(path, job.model, test, job.options) for path in (quant, trained)]
    return {
        "network": job.network,
        "setting": job.setting,
        "float": scores[0]["against"]["top1"],
        "ptq": scores[0]["top1"],
        "qat": scores[1]["top1"],
        "ptq_agreement": scores[0]["against"]["agreement"],
        "qat_agreement": scores[1]["against"]["agreement"],
        "ptq_seconds": ptq,
        "qat_seconds": learned["seconds"],
        "epochs": int(passes),
        "trained": learned["trained"],
        "images": scores[0]["images"],
    }


def score(model: Path, against: Path, test: str, options: tuple[str, ...]) -> Row:
    """Of a file on labelled pictures."""
    return qconv("evaluate", str(model), "--images", test, "--against", str(against), "--batch", "50", *options)


def qconv(*words: str) -> Row:
    """What a command prints with --json; its errors are ours."""
    done = subprocess.run(
        [sys.executable, "-m", "qconv", *words, "--json"], stdout=subprocess.PIPE, text=True, cwd=REPOSITORY
    )
    if done.returncode:
        sys.exit(f"qconv {words[0]} ended with status {done.returncode}")
    return dict(json.loads(done.stdout))


def text(rows: list[Row]) -> str:
    """The table, and published rows below it."""
    cells = [COLUMNS]
    for row in rows:
        cells.append(
            (
                row["network"],
                row["setting"],
                *(f"{100 * row[name]:.2f}" for name in ("float", "ptq", "qat")),
                f"{100 * (row['qat'] - row['float']):+.2f}",
                *(f"{100 * row[name]:.2f}" for name in ("ptq_agreement", "qat_agreement")),
                *(f"{row[name]:.0f}" for name in ("ptq_seconds", "qat_seconds")),
                str(row["epochs"]) + ("" if row["trained"] else " (returned unchanged)"),
            )
        )
    for network, setting, before, ptq, qat, source in PUBLISHED:
        told = (f"{before:.1f}", f"{ptq:.1f}", f"{qat:.1f}", f"{qat - before:+.1f}", "", "", "", "", source)
        cells.append((network, setting, *told))
    widths = [max(len(line[index]) for line in cells) for index in range(len(COLUMNS))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells)


def main() -> None:
    """Measure what is asked for, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="networks whose name contains this")
    parser.add_argument("--setting", help="for example W4A4")
    parser.add_argument("--epochs", type=int, help="of training, for all")
    parser.add_argument(
        "--cache", type=Path, default=Path.home() / ".cache" / "qconv-bench", help="pictures, files, rows"
    )
    parser.add_argument("--resume", action="store_true", help="measure only rows that are not there yet")
    args = parser.parse_args()
    require_data(default_data())
    args.cache.mkdir(parents=True, exist_ok=True)
    kept = args.cache / "qat.json"
    rows: list[Row] = json.loads(kept.read_text()) if args.resume and kept.is_file() else []
    for job in jobs(default_data()):
        asked = args.only.lower() in job.network.lower() and args.setting in (None, job.setting)
        known = any((row["network"], row["setting"]) == (job.network, job.setting) for row in rows)
        if asked and not known:
            rows.append(measure(job, args.cache, args.epochs))
            kept.write_text(json.dumps(rows, indent=1))
            print(text(rows), flush=True)
    print(text(rows))


if __name__ == "__main__":
    main()
