"""What scripts rely on: the options of every command, and the keys of what `--json` prints.

`tests/cli/contract.json` holds both as they were before the modules moved into packages. What is there must stay, or
go by the rule of `qconv manual changes`; what is added need not be written down.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import click

from tests.support import labelled

ROOT = Path(__file__).resolve().parents[2]
CONTRACT = ROOT / "tests" / "cli" / "contract.json"
IMAGES = 12

TORCH_COMMANDS = ("finetune", "synthesize")
DETECT_COMMANDS = ("quantize --min-map", "quantize --labels", "evaluate --labels")
FEW = ("--samples", "4", "--effort", "fast")
LETTERBOX = (
    *("--preprocess", "unit", "--resize", "letterbox", "--letterbox-align", "top-left", "--letterbox-fill", "0"),
)
COMMANDS: dict[str, tuple[str, ...]] = {
    "quantize": ("quantize", "m.onnx", "--calib", "imgs", *FEW, "--save-stats", "s.npz", "--min-agreement", "0"),
    "quantize --max-drop": (
        "quantize",
        "m.onnx",
        "--calib",
        "imgs",
        *FEW,
        "--max-drop",
        "sqnr:25",
        "--candidate-bits",
        "4,8",
        "-o",
        "d.onnx",
    ),
    "quantize --sweep": ("quantize", "m.onnx", "--calib", "imgs", *FEW, "--sweep", "sweep.toml"),
    "quantize DETECTOR": (
        *("quantize", "det.onnx", "--calib", "noise", *FEW, *LETTERBOX, "--task", "detect", "--tune-ranges"),
        *("--float-budget", "0.1", "--min-boxes", "0", "-o", "det.q.onnx"),
    ),
    "quantize --min-map": (
        *("quantize", "det.onnx", "--calib", "noise", *FEW, *LETTERBOX, "--min-map", "0", "-o", "map.onnx"),
    ),
    "quantize --labels": (
        *("quantize", "det.onnx", "--calib", "noise", *FEW, *LETTERBOX, "--labels", "labels.json"),
        *("--label-map", "map.toml", "--min-map", "0", "-o", "labelled.onnx"),
    ),
    "quantize SEGMENTER": (
        *("quantize", "seg.onnx", "--calib", "noise", *FEW, "--preprocess", "unit", "--task", "segment"),
        *("--min-miou", "0", "-o", "seg.q.onnx"),
    ),
    "quantize --decode": (
        *("quantize", "m.onnx", "--calib", "imgs", *FEW, "--decode", "mine.py:boxes"),
        *("--min-boxes", "0", "-o", "x.onnx"),
    ),
    "inspect FLOAT": ("inspect", "m.onnx"),
    "inspect": ("inspect", "m.w8a8.onnx"),
    "evaluate": ("evaluate", "m.w8a8.onnx", "--images", "imgs", "--against", "m.onnx"),
    "evaluate --labels": (
        *("evaluate", "det.q.onnx", "--images", "noise", "--against", "det.onnx", "--labels", "labels.json"),
        *("--label-map", "map.toml"),
    ),
    "compare": ("compare", "m.onnx", "m.w8a8.onnx", "--images", "imgs", "--samples", "2"),
    "diagnose": ("diagnose", "m.onnx", "--calib", "imgs", *FEW),
    "audit": ("audit", "m.w8a8.onnx"),
    "benchmark": ("benchmark", "m.onnx", "m.w8a8.onnx", "--rounds", "1"),
    "study-samples": ("study-samples", "m.onnx", "--calib", "imgs", "--seeds", "1"),
    "merge-stats": ("merge-stats", "s.npz", "-o", "sum.npz"),
    "finetune": ("finetune", "m.w8a8.onnx", "--images", "imgs", "--epochs", "1", "--min-agreement", "0"),
    "synthesize": ("synthesize", "m.onnx", "-o", "made", "-n", "1", "--iterations", "1", "--preprocess", "imagenet"),
}
"""One run of every command; later ones read what earlier ones wrote."""


def option_lists(group: click.Group) -> dict[str, dict[str, Any]]:
    """What `--help` shows of each command: its arguments, and its options with what they take."""
    context = click.Context(group)
    commands = {name: group.get_command(context, name) for name in group.list_commands(context)}
    return {
        name: {
            "arguments": [part.human_readable_name for part in command.params if isinstance(part, click.Argument)],
            "options": {part.name: _as_row(part) for part in command.params if isinstance(part, click.Option)},
        }
        for name, command in commands.items()
        if command is not None
    }


def _as_row(option: click.Option) -> dict[str, Any]:
    kind = option.type
    choices = list(map(_as_text, kind.choices)) if isinstance(kind, click.Choice) else []
    bounds = [kind.min, kind.max] if isinstance(kind, click.IntRange | click.FloatRange) else []
    return {
        "names": [*option.opts, *option.secondary_opts],
        "flag": bool(option.is_flag),
        "multiple": option.multiple,
        "required": option.required,
        "choices": choices,
        "bounds": bounds,
        "default": _as_plain(option.default),
    }


def _as_text(choice: Any) -> str:
    return str(choice.value if isinstance(choice, Enum) else choice)


def _as_plain(default: Any) -> str | int | float | None:
    """None for what click calls no default, in any version of it."""
    if isinstance(default, Enum) and default.name == "UNSET":
        return None
    return default if isinstance(default, str | int | float) and default is not False else None


def json_keys(group: click.Group, folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Run every command in `folder`. Yields its name in COMMANDS, and the paths of the keys that it prints."""
    prepare(folder)
    for name, words in COMMANDS.items():
        if words[0] in TORCH_COMMANDS and importlib.util.find_spec("torch") is None:
            continue
        if name in DETECT_COMMANDS and importlib.util.find_spec("faster_coco_eval") is None:
            continue
        out = io.StringIO()
        with contextlib.chdir(folder), contextlib.redirect_stdout(out):
            group.main([*words, "--json", "--quiet"], standalone_mode=False)
        yield name, sorted(set(key_paths(json.loads(out.getvalue()))))


def prepare(folder: Path) -> None:
    """Lay out what COMMANDS name."""
    (folder / "imgs").mkdir()
    for picture in sorted((ROOT / "calib_samples").glob("*.jpg"))[:IMAGES]:
        shutil.copy(picture, folder / "imgs")
    shutil.copy(ROOT / "tests/models/cifar_mobilenet.onnx", folder / "m.onnx")
    (folder / "sweep.toml").write_text("[a]\n")
    labelled.save(labelled.detector(), folder / "det.onnx")
    labelled.save(labelled.segmenter(), folder / "seg.onnx")
    labelled.write_coco(labelled.some_boxes(labelled.pictures(folder / "noise")), folder / "labels.json")
    rows = (f"{name!r} = {number}\n" for number, name in enumerate(labelled.NAMES))
    (folder / "map.toml").write_text("".join(rows))
    (folder / "mine.py").write_text("def boxes(outputs):\n    return [[0, 0, 4, 4, 0.9, 0]]\n")


def key_paths(found: Any, path: str = "") -> Iterator[str]:
    """Each key with those above it, parted by dots; `[]` stands for the members of a list."""
    if isinstance(found, Mapping):
        for key, value in found.items():
            if not str(key).isdigit():  # numbers of bits, which are not names
                yield f"{path}{key}"
                yield from key_paths(value, f"{path}{key}.")
    elif isinstance(found, list):
        for value in found:
            yield from key_paths(value, f"{path}[].")


def lost_keys(before: Iterable[str], now: Collection[str]) -> list[str]:
    """Keys that are no longer printed, but for members of what is empty or null in this run."""
    filled = {_owner(path) for path in now} | {""}
    return [path for path in before if path not in now and _owner(path) in filled]


def _owner(path: str) -> str:
    return path.rpartition(".")[0]


def missing(before: Any, now: Any, path: str = "") -> Iterator[str]:
    """What was there and is not, or is different: mappings and lists of names may grow, options be taken more often."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key, value in before.items():
            here = f"{path}/{key}"
            yield from missing(value, now[key], here) if key in now else [here]
    elif isinstance(before, list) and isinstance(now, list) and not path.endswith("/bounds"):
        yield from (f"{path}: {item}" for item in before if item not in now)
    elif before != now and not (path.endswith("/multiple") and now):
        yield f"{path}: {before} became {now}"


def write(group: click.Group, folder: Path, place: Path = CONTRACT, note: Callable[[str], None] = print) -> None:
    """Write down what a version promises."""
    keys = {}
    for name, paths in json_keys(group, folder):
        note(name)
        keys[name] = paths
    content = {"options": option_lists(group), "json": keys}
    text = json.dumps(content, indent=1)
    place.write_text(re.sub(r"\s*\n {5,}\s*|\n {4}(?=[}\]])", " ", text) + "\n", "utf-8")  # an option a line
