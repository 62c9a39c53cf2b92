"""Reads boxes of COCO JSON, the form of instances (Lin et al. 2014, arXiv 1405.0312; cocodataset.org/#format-data).

Annotations of pictures or categories that a file does not list are left out, as pycocotools does: a part of a set often
keeps those of the whole.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from qconv.data.box_labels import WrittenBoxes, WrittenLabels, take_stated_size
from qconv.data.label_files import SCHEMA_HINT, LabelledPictures
from qconv.errors import QconvError, format_count, format_some

LARGEST = 1e9
"""What no edge in pixels reaches."""


def read_coco_labels(file: Path, pictures: LabelledPictures) -> WrittenLabels:
    """What a file says of pictures. Raises QconvError for what is no such file."""
    content = _read_json(file)
    categories = {_id_of(file, entry, "categories"): str(entry.get("name", "")) for entry in content["categories"]}
    listed = {_id_of(file, entry, "images"): entry for entry in content["images"]}
    found = _find_pictures(file, listed, pictures)
    stated = {path: take_stated_size(listed[n].get("width"), listed[n].get("height")) for n, path in found.items()}
    labels = {path: WrittenBoxes(size=size) for path, size in stated.items()}
    kept, remarks = _select_listed(file, content["annotations"], listed, categories)
    for entry, box in _iter_boxes(file, kept):
        if entry["image_id"] in found:
            labels[found[entry["image_id"]]].add(box, entry["category_id"], crowd=bool(entry.get("iscrowd", 0)))
    return WrittenLabels(
        labels,
        {key: name for key, name in categories.items() if name},
        tuple(sorted(categories)),
        picture_ids={path: number for number, path in found.items()},
        strangers=len(listed) - len(found),
        remarks=remarks,
    )


def _select_listed(
    file: Path, entries: list[dict[str, Any]], pictures: Collection[int], categories: Collection[int]
) -> tuple[list[dict[str, Any]], tuple[str, ...]]:
    """The annotations of listed pictures and categories, and sentences on the others.

    Raises QconvError where an annotation names neither by a whole number, or none is left.
    """
    kept, remarks = entries, []
    for key, noun, plural, known in (
        ("image_id", "picture", "pictures", pictures),
        ("category_id", "category", "categories", categories),
    ):
        for entry in kept:
            if not isinstance(entry.get(key), int) or isinstance(entry[key], bool):
                fact = (
                    f"{file}: annotation {entry.get('id')} has the {key} {entry.get(key)!r}, which is no whole number."
                )
                raise QconvError(fact, SCHEMA_HINT)
        odd = Counter(entry[key] for entry in kept if entry[key] not in known)
        listed, which = [entry for entry in kept if entry[key] in known], format_some([*map(str, odd)])
        if odd and not listed:
            fact = f"{file}: no annotation is of a {noun} that is listed, but of {plural} {which}."
            raise QconvError(fact, f"list their {plural}, by the same numbers; {SCHEMA_HINT}")
        if odd:
            some = format_count(odd.total(), "annotation")
            remarks.append(f"{some} in {file} of {plural} that it does not list are left out: {which}.")
        kept = listed
    return kept, tuple(remarks)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text("utf-8-sig"))
    except OSError as error:
        raise QconvError(f"{file} cannot be read: {error.strerror}.", "check the path of --labels.") from None
    except (ValueError, RecursionError) as error:
        raise QconvError(f"{file} is no JSON: {error}.", SCHEMA_HINT) from None
    for part in ("images", "annotations", "categories"):
        entries = content.get(part) if isinstance(content, dict) else None
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise QconvError(f"{file} has no list of {part}, as COCO's instances have.", SCHEMA_HINT)
    found: dict[str, Any] = content
    return found


def _id_of(file: Path, entry: Mapping[str, Any], part: str) -> int:
    number = entry.get("id")
    if not isinstance(number, int) or isinstance(number, bool):
        raise QconvError(f"{file}: an entry of {part} has the id {number!r}, which is no whole number.", SCHEMA_HINT)
    return number


def _find_pictures(file: Path, listed: Mapping[int, Mapping[str, Any]], pictures: LabelledPictures) -> dict[int, Path]:
    """The path of each listed picture that is there: by its whole file name, or else by the last part of it."""
    whole = {inside.as_posix(): own for own, inside in zip(pictures.paths, pictures.insides, strict=True)}
    last: dict[str, list[Path]] = {}
    for own in pictures.paths:
        last.setdefault(own.name, []).append(own)
    found: dict[int, Path] = {}
    for number, entry in listed.items():
        name = PurePosixPath(str(entry.get("file_name", "")).replace("\\", "/"))
        path: Path | None = whole.get(name.as_posix())
        others = last.get(name.name, [])
        if path is None and len(others) > 1:
            fact = f"{file} labels {name}, but {others[0]} and {others[1]} are called so."
            raise QconvError(fact, "pass the folder that its file names begin in.")
        if path is None and others:
            path = others[0]
        if path is not None:
            found[number] = path
    return found


def _iter_boxes(
    file: Path, entries: list[dict[str, Any]]
) -> Iterator[tuple[dict[str, Any], tuple[float, float, float, float]]]:
    """Yield annotations with their boxes by their edges."""
    for entry in entries:
        box: Any = entry.get("bbox")
        sound = isinstance(box, list) and len(box) == 4
        sound = sound and all(isinstance(side, int | float) and abs(side) < LARGEST for side in box)
        if not sound or min(box[2:]) < 0:
            what = f"has the bbox {box}, which is no left, top, width and height"
            raise QconvError(f"{file}: annotation {entry.get('id')} {what}.", SCHEMA_HINT)
        left, top, width, height = map(float, box)
        yield entry, (left, top, left + width, top + height)
