"""Networks quantized by two trees of qconv: noise, time, and what choosing costs, as a table.

    python -m tests.bench.precision --work DIR [--models DIR] [--base TREE] [--reuse DIR] [NAME ...]

Sides: `base` is the tree at TREE, `zero` the same with `--float-budget 0`, `new` this one. Where base leaves nothing
in float for accuracy, zero is its file. All run with default options but for preprocessing, on one thread. Each side
leaves SIDE_NAME.onnx in DIR with what was measured in SIDE_NAME.json; --reuse takes both from a folder of an earlier
run. --models names a folder with networks by `tests.bench.seeded_networks` and `tests.bench.ultralytics_models`.

    dB        lowest SQNR of an output on pictures that no side has seen, by this tree's `evaluate`; of networks of
              Ultralytics the lowest part, in front of a TopK that picks rows
    parts     dB of boxes, scores and their kind, each by its own power
    of float  CPU time over the float model's: medians of turns, least and largest round in brackets
    CPU s     of the whole run of `quantize`
    left      nodes in float as the outputs lose most to them
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qconv.ir.files import Source
from qconv.ir.original import open_original
from qconv.metrics.comparison import verify
from qconv.runtime.session import Session
from tests.bench import tasks, turns
from tests.bench.cases import (
    BRANCHED,
    BY_NAME,
    REPOSITORY,
    SEEDED,
    Case,
    default_data,
    linked,
    pictures,
    require_data,
)

REAL = (
    *("yolox_nano", "efficientnet_b0", "resnet20", "kerascnn", "mobilenetv2", "efficientnet_lite0", "fastestdet"),
    *("ultraface", "deeplabv3", "rapidocr_cls"),
)
NAMES = (*REAL, *tasks.MADE, *SEEDED)
SIDES = ("base", "zero", "new")
LABELS = {"yolox_nano": tasks.BOX_LABELS, "deeplabv3": tasks.MASK_LABELS}
LEFT = "left in float"
WORSE_DB, LOW_DB = 0.3, 20.0
SCORES = ("map", "miou", "top1")

Found = dict[str, Any]


@dataclass(frozen=True)
class Places:
    """data: with models/ and images/. work: where files are kept. reuse: of an earlier run. models: networks made."""

    data: Path
    work: Path
    reuse: Path | None
    models: Path | None

    def model(self, case: Case) -> Path:
        made = case.name in (*SEEDED, *BRANCHED, *tasks.MADE)
        if made and self.models is None:
            sys.exit(f"Error: {case.name} is made, not shipped.\nHint:  pass --models DIR.")
        return ((self.models if made and self.models else self.data / "models") / case.model).resolve()

    def calibration(self, case: Case) -> Path:
        if case.name in tasks.NETWORKS:
            return self.data / tasks.CALIBRATION
        return self.data / case.calibration_folder

    def tests(self, case: Case) -> Path:
        """Pictures with labels as they lie, others as many as the case takes."""
        if case.name in tasks.NETWORKS:
            return self.data / tasks.TESTS
        folder = self.data / case.test_folder
        if case.labels:
            return folder
        return linked(pictures(folder, case.tests), self.work / "pictures" / f"{case.pictures}_{case.tests}")


@dataclass(frozen=True)
class Side:
    """One way to quantize. tree: a checkout of qconv. options: besides preprocessing."""

    name: str
    tree: Path
    options: tuple[str, ...] = ()


def main() -> None:
    wanted = arguments()
    require_data(wanted.data)
    sides = chosen_sides(wanted)
    places = Places(wanted.data.resolve(), wanted.work.resolve(), wanted.reuse, wanted.models)
    places.work.mkdir(parents=True, exist_ok=True)
    results: dict[str, Found] = {}
    for name in wanted.names or NAMES:
        results[name] = measured(BY_NAME[name], sides, places, wanted.rounds)
        told = table(results, [side.name for side in sides])
        print(told.splitlines()[1 + len(results)], file=sys.stderr, flush=True)
        if wanted.json:
            wanted.json.write_text(json.dumps(results, indent=1))
        if wanted.markdown:
            wanted.markdown.write_text(told)
    print(table(results, [side.name for side in sides]))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.precision", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}; all by default")
    parser.add_argument("--data", type=Path, default=default_data(), help="folder with models/ and images/")
    parser.add_argument("--work", type=Path, required=True, help="files are kept here")
    parser.add_argument("--models", type=Path, help="folder with networks that are made")
    parser.add_argument("--base", type=Path, metavar="TREE", help="another checkout; without it, --reuse has its files")
    parser.add_argument("--reuse", type=Path, metavar="DIR", help="the work of an earlier run: of base and zero")
    parser.add_argument("--sides", default="base,new", help="of base,zero,new")
    parser.add_argument("--base-options", default="", metavar="OPTIONS", help="more for qconv, as one text")
    parser.add_argument("--new-options", default="", metavar="OPTIONS")
    parser.add_argument("--rounds", type=int, default=9, help="turns that each file is timed")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    wanted = parser.parse_args()
    if unknown := [name for name in wanted.names if name not in NAMES]:
        parser.error(f"no network is called {unknown[0]}")
    return wanted


def chosen_sides(wanted: argparse.Namespace) -> list[Side]:
    base = (wanted.base or REPOSITORY).resolve()
    ours, theirs = (tuple(shlex.split(text)) for text in (wanted.new_options, wanted.base_options))
    known = {
        "base": Side("base", base, theirs),
        "zero": Side("zero", base, (*theirs, "--float-budget", "0")),
        "new": Side("new", REPOSITORY, ours),
    }
    names = wanted.sides.split(",")
    if unknown := [name for name in names if name not in known]:
        sys.exit(f"Error: {unknown[0]} is no side.\nHint:  choose of {', '.join(SIDES)}.")
    if names[0] != "new" and wanted.base is None and wanted.reuse is None:
        sys.exit("Error: no tree is named for base.\nHint:  pass --base TREE, or --reuse DIR.")
    return [known[name] for name in names]


# -- one network -------------------------------------------------------------------------------------------------------


def measured(case: Case, sides: Sequence[Side], places: Places, rounds: int) -> Found:
    """What each side's file is worth, and all files' times in turns."""
    model = places.model(case)
    files = {"float": model}
    found: Found = {"sides": {}}
    for side in sides:
        kept = places.reuse if side.name != "new" and places.reuse else places.work
        files[side.name], found["sides"][side.name] = one_side(case, side, places, kept)
    feeds = places.work / f"{case.name}.npz"
    picture = pictures(places.tests(case), 1)[0]
    np.savez(feeds, **{input_of(model): case.prep(picture)})
    found["ms"] = turns.take_turns(files, feeds, rounds)
    return found


def one_side(case: Case, side: Side, places: Places, kept: Path) -> tuple[Path, Found]:
    """The file and what is known of it; measured where `kept` does not have it. That of this tree is never taken."""
    file = kept.resolve() / f"{side.name}_{case.name}.onnx"
    record = file.with_suffix(".json")
    if side.name != "new" and record.exists() and file.exists():
        return file, json.loads(record.read_text())
    base = kept.resolve() / f"base_{case.name}.onnx"
    if side.name == "zero" and base.exists() and not json.loads(base.with_suffix(".json").read_text())["left"]:
        return base, json.loads(base.with_suffix(".json").read_text())
    model, calibration = places.model(case), places.calibration(case)
    options = [*case.options, *side.options]
    told, seconds = qconv(side.tree, "quantize", model, "--calib", calibration, "-o", file, *options)
    found: Found = {"options": options, "cpu_seconds": seconds, **of_report(told)}
    found |= quality(case, model, file, places)
    record.write_text(json.dumps(found, indent=1))
    return file, found


def qconv(tree: Path, command: str, *options: object) -> tuple[Found, float]:
    """What a command of a tree prints with --json, and its CPU seconds."""
    words = [sys.executable, "-m", "qconv", command, *options, "--json", "--quiet", "--threads", "1"]
    told = os.environ | {"PYTHONPATH": str(tree), "OPENBLAS_NUM_THREADS": "1"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([*map(str, words)], cwd=tree, env=told, capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode not in (0, 3):
        sys.exit(done.stderr)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return dict(json.loads(done.stdout)), spent


def of_report(told: Found) -> Found:
    """What is kept of the report of `quantize`."""
    audit = told["audit"]
    floats = [*audit["islands"], *audit.get("placed", [])]
    left = [change["where"] for change in told["changes"] if change["what"].startswith(LEFT)]
    kept = {key: told.get(key) for key in ("verify", "time", "peak_rss_mb", "warnings", "precision")}
    return {**kept, "integer": audit["integer"], "float": audit["float"], "float_nodes": floats, "left": left}


def quality(case: Case, model: Path, file: Path, places: Places) -> Found:
    """dB and scores on pictures that are no calibration."""
    labels = LABELS.get(case.name)
    options = [*case.options, *(("--labels", places.data / labels) if labels else ())]
    told, _ = qconv(REPOSITORY, "evaluate", file, "--against", model, "--images", places.tests(case), *options)
    against = told["against"]
    kept = {key: against.get(key) for key in ("sqnr_db", "agreement", "boxes")}
    scores = {name: [against[name], told[name]] for name in SCORES if told.get(name) is not None}
    parts = parts_of(case, model, file, places)
    if case.name in tasks.MADE:
        kept["sqnr_db"] = min(parts.values())
    return {**kept, "scores": scores, "parts": parts}


def parts_of(case: Case, model: Path, file: Path, places: Places) -> dict[str, float]:
    """dB of each part of the outputs, fed by the benchmark's own preprocessing; nothing where they have none."""
    if case.name in tasks.MADE:
        place = tasks.Place(places.data, places.work, places.models)
        _, boxes, scores = tasks.compare_parts(case, model, file, place)
        return {name: part.sqnr_db or np.inf for name, part in (("boxes", boxes), ("scores", scores))}
    if case.class_scores:
        return {}
    feeds = ({input_of(model): case.prep(path)} for path in pictures(places.tests(case), case.tests))
    found = verify(open_original(Source(str(model), model), 1), Session(str(file), threads=1), feeds)
    return {part.name: part.sqnr_db for output in found.outputs for part in output.parts if part.sqnr_db is not None}


def input_of(model: Path) -> str:
    return open_original(Source(str(model), model), 1).inputs[0][0]


# -- what is said ------------------------------------------------------------------------------------------------------


def table(results: Mapping[str, Found], sides: Sequence[str]) -> str:
    """A row a network in Markdown, and what all together come to."""
    heads = ["network", "float ms"]
    heads += [f"{side} {what}" for side in sides for what in ("dB", "of float", "CPU s", "float nodes")]
    heads += ["new of base", "gain dB"] if {"base", "new"} <= set(sides) else []
    heads += ["parts dB", "scores (float: sides)", "left"]
    rows = [row(name, found, sides) for name, found in results.items()]
    lines = [f"| {' | '.join(cells)} |" for cells in (heads, *rows)]
    lines.insert(1, "|" + "---|" * len(heads))
    return "\n".join([*lines, "", *summary(results, sides)]) + "\n"


def row(name: str, found: Found, sides: Sequence[str]) -> list[str]:
    of, ms = found["sides"], found["ms"]
    cells = [name, f"{np.median(ms['float']):.2f}"]
    for side in sides:
        nodes = f"{of[side]['float']} of {of[side]['float'] + of[side]['integer']}"
        cells += [decibel(of[side]["sqnr_db"]), span(turns.ratio(ms[side], ms["float"]))]
        cells += [f"{of[side]['cpu_seconds']:.1f}", nodes]
    if {"base", "new"} <= set(sides):
        change = gain(found)
        cells += [span(turns.ratio(ms["new"], ms["base"])), "-" if change is None else f"{change:+.1f}"]
    parts = [" ".join(f"{part} {decibel(db)}" for part, db in of[side]["parts"].items()) for side in sides]
    left = [", ".join(of[side]["left"]) or "-" for side in sides]
    return [*cells, " / ".join(parts) if any(parts) else "-", scores(of, sides), " / ".join(left)]


def scores(of: Mapping[str, Found], sides: Sequence[str]) -> str:
    """'map 34.30: 28.80 / 33.80', shares of float's boxes found, and agreement, in percent."""
    told = []
    for name, (reference, _) in of[sides[0]]["scores"].items():
        each = " / ".join(f"{100 * of[side]['scores'][name][1]:.2f}" for side in sides)
        told.append(f"{name} {100 * reference:.2f}: {each}")
    for name in ("boxes", "agreement"):
        if of[sides[0]][name] is not None:
            told.append(f"{name} " + " / ".join(f"{100 * of[side][name]:.1f}" for side in sides))
    return "; ".join(told) or "-"


def decibel(value: float | None) -> str:
    return "equal" if value is None else f"{value:.1f}"


def span(found: tuple[float, float, float]) -> str:
    low, middle, high = found
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"


def gain(found: Found) -> float | None:
    """How many dB new has above base; None where one of them is equal to float."""
    base, new = (found["sides"][side]["sqnr_db"] for side in ("base", "new"))
    return None if base is None or new is None else float(new - base)


def summary(results: Mapping[str, Found], sides: Sequence[str]) -> list[str]:
    """Which networks lose, and the mean gain of those that base leaves below LOW_DB."""
    if not {"base", "new"} <= set(sides):
        return []
    gains = {name: change for name, found in results.items() if (change := gain(found)) is not None}
    worse = [f"{name} {change:+.1f} dB" for name, change in gains.items() if change < -WORSE_DB]
    low = [change for name, change in gains.items() if results[name]["sides"]["base"]["sqnr_db"] < LOW_DB]
    lines = [f"Worse by more than {WORSE_DB} dB: {', '.join(worse) or 'none'}."]
    if low:
        lines.append(f"Mean gain of {len(low)} below {LOW_DB:g} dB in base: {np.mean(low):+.1f} dB.")
    return lines


if __name__ == "__main__":
    main()
