"""Reads boxes of YOLO: a text file a picture, a line an object, numbers as shares of the picture's sides.

    class x y width height          the centre and the size
    class x1 y1 x2 y2 x3 y3 ...     a polygon, of which the box around it counts

data.yaml tells the names of the classes. It is read by PyYAML, of the extra qconv[detect], with all values as texts:
YAML of its own makes False of a class called `no`. A picture without a file shows nothing, as in training.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from qconv.data.box_labels import WrittenBoxes, WrittenLabels
from qconv.data.fitting import Size
from qconv.data.label_files import SCHEMA_HINT, Key, LabelledPictures
from qconv.errors import QconvError

SLACK = 0.01
"""By which shares may lie outside of 0 to 1: as much as Ultralytics allows."""


def read_yolo_labels(path: Path, pictures: LabelledPictures, sizes: Mapping[Path, Size]) -> WrittenLabels:
    """What a folder, or the files that belong to a data.yaml, say of pictures.

    sizes: width and height of pictures; others are left out.

    Raises:
        QconvError: A file is none of this form, or none is there.
    """
    described = _read_yaml(path) if path.is_file() else {}
    files = pictures.files_in(path, ".txt") if path.is_dir() else _find_files(path, pictures)
    posed = "kpt_shape" in described
    labels = {p: _read_file(files[p], size, posed) if p in files else WrittenBoxes() for p, size in sizes.items()}
    strangers = 0
    if path.is_dir():
        strangers = len({*path.rglob("*.txt")} - {*files.values(), path / "classes.txt"})
    return WrittenLabels(labels, _read_names(path, described), numbered=True, strangers=strangers)


def _find_files(yaml: Path, pictures: LabelledPictures) -> dict[Path, Path]:
    """The files of pictures, in the first of the usual places that holds some."""
    found: dict[Path, Path] = {}
    for place in _PLACES:
        found = {path: file for path in pictures.paths if (file := place(path)) is not None and file.is_file()}
        if found:
            return found
    first = pictures.paths[0]
    looked = ", ".join(str(file) for place in _PLACES if (file := place(first)) is not None)
    fact = f"{yaml}: no picture has labels; {first} has none of {looked}."
    raise QconvError(fact, "name the folder of text files with --labels.")


def _in_labels_folder(path: Path) -> Path | None:
    """In `labels` in place of the last folder `images`, as Ultralytics looks."""
    folders = [index for index, part in enumerate(path.parts[:-1]) if part == "images"]
    if not folders:
        return None
    last = folders[-1]
    return Path(*path.parts[:last], "labels", *path.parts[last + 1 :]).with_suffix(".txt")


_PLACES: tuple[Callable[[Path], Path | None], ...] = (
    _in_labels_folder,
    lambda path: path.with_suffix(".txt"),
    lambda path: path.parent.with_name(f"{path.parent.name}_labels") / f"{path.stem}.txt" if path.parent.name else None,
)


def _read_file(file: Path, size: Size, posed: bool) -> WrittenBoxes:
    """posed: whether keypoints follow the box of each line."""
    found = WrittenBoxes()
    try:
        lines = file.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise QconvError(f"{file} cannot be read: {reason}.", SCHEMA_HINT) from None
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words:
            continue
        where = f"{file}, line {number}"
        try:
            label, *values = map(float, words)
        except ValueError:
            raise QconvError(f"{where}: {line.strip()[:60]!r} are not all numbers.", SCHEMA_HINT) from None
        if not label.is_integer() or label < 0:
            raise QconvError(f"{where}: {words[0]} is no number of a class.", SCHEMA_HINT)
        box = _box_of(where, values[:4] if posed else values)
        found.add(tuple(side * size[axis % 2] for axis, side in enumerate(box)), int(label))
    return found


def _box_of(where: str, values: list[float]) -> tuple[float, float, float, float]:
    """The edges of a box, as shares."""
    if not (len(values) == 4 or (len(values) >= 6 and len(values) % 2 == 0)):
        what = f"{len(values)} numbers behind the class are neither a box (4) nor a polygon (an even number from 6 on)"
        raise QconvError(f"{where}: {what}.", SCHEMA_HINT)
    if not all(-SLACK <= value <= 1 + SLACK for value in values):
        odd = next(value for value in values if not -SLACK <= value <= 1 + SLACK)
        what = "is no share of the picture's side, which is from 0 to 1"
        raise QconvError(f"{where}: {odd:g} {what}.", "divide pixels by the picture's width and height.")
    if len(values) == 4:
        x, y, width, height = values
        if min(width, height) < 0:
            raise QconvError(f"{where}: the box has a negative side.", SCHEMA_HINT)
        return x - width / 2, y - height / 2, x + width / 2, y + height / 2
    return min(values[::2]), min(values[1::2]), max(values[::2]), max(values[1::2])


def require_yaml(file: Path) -> None:
    """Raise QconvError where PyYAML is missing."""
    try:
        importlib.import_module("yaml")
    except ImportError:
        fix = "install the extra: pip install 'qconv[detect]'; or name the folder of text files instead."
        raise QconvError(f"{file} needs PyYAML, which is not installed.", fix) from None


def _read_yaml(file: Path) -> dict[str, Any]:
    require_yaml(file)
    import yaml

    try:
        content = yaml.load(file.read_text("utf-8-sig"), yaml.BaseLoader)
    except OSError as error:
        raise QconvError(f"{file} cannot be read: {error.strerror}.", "check the path of --labels.") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise QconvError(f"{file} is no YAML: {' '.join(str(error).split())}.", SCHEMA_HINT) from None
    if not isinstance(content, dict) or "names" not in content:
        raise QconvError(f"{file} has no names of classes, as data.yaml of YOLO has.", SCHEMA_HINT)
    return content


def _read_names(file: Path, described: Mapping[str, Any]) -> dict[Key, str]:
    names = described.get("names", [])
    named = dict(enumerate(names)) if isinstance(names, list) else names if isinstance(names, dict) else {}
    found: dict[Key, str] = {}
    for key, name in named.items():
        if not str(key).isdecimal() or not isinstance(name, str):
            raise QconvError(f"{file} gives the class {key!r} the name {name!r}.", SCHEMA_HINT)
        found[int(key)] = name
    if described and not found:
        raise QconvError(f"{file} has names that are neither a list nor numbers with names.", SCHEMA_HINT)
    return found
