"""Reads boxes of Pascal VOC, an XML file a picture (Everingham et al. 2010, IJCV 88, and its development kit).

Pixels are counted from 1 and the last one is inside, so that a box covers xmin - 1 to xmax. Objects that are
`difficult` do not count. The name of the picture inside the file is not looked at: tools leave a wrong one there.
"""

from __future__ import annotations

import math
from pathlib import Path
from xml.etree import ElementTree

from qconv.data.box_labels import WrittenBoxes, WrittenLabels, take_stated_size
from qconv.data.label_files import SCHEMA_HINT, Key, LabelledPictures
from qconv.errors import QconvError

EDGES = ("xmin", "ymin", "xmax", "ymax")


def read_voc_labels(folder: Path, pictures: LabelledPictures) -> WrittenLabels:
    """What the files of a folder say of pictures. Raises QconvError for a file that is none of this form."""
    files = pictures.files_in(folder, ".xml")
    labels = {path: _read_file(file) for path, file in files.items()}
    names: dict[Key, str] = {name: str(name) for found in labels.values() for name in found.keys}
    strangers = len({*folder.rglob("*.xml")} - {*files.values()})
    return WrittenLabels(labels, names, strangers=strangers)


def _read_file(file: Path) -> WrittenBoxes:
    try:
        root = ElementTree.parse(file).getroot()
    except OSError as error:
        raise QconvError(f"{file} cannot be read: {error.strerror}.", "check its permissions.") from None
    except (ElementTree.ParseError, ValueError, LookupError) as error:  # the latter of encodings
        raise QconvError(f"{file} is no XML: {error}.", SCHEMA_HINT) from None
    if root.tag != "annotation":
        raise QconvError(f"{file} holds <{root.tag}>, where Pascal VOC has <annotation>.", SCHEMA_HINT)
    width, height = (_as_number(root.findtext(f"size/{side}") or "") for side in ("width", "height"))
    found = WrittenBoxes(size=take_stated_size(width, height))
    for number, entry in enumerate(root.iter("object"), 1):
        name = (entry.findtext("name") or "").strip()
        texts = [entry.findtext(f"bndbox/{edge}") or "" for edge in EDGES]
        left, top, right, bottom = (_as_number(text) for text in texts)
        if not name or not all(map(math.isfinite, (left, top, right, bottom))) or right < left - 1 or bottom < top - 1:
            said = f"the name {name!r} and the box {', '.join(text.strip() or 'nothing' for text in texts)}"
            raise QconvError(f"{file}: object {number} has {said}.", SCHEMA_HINT)
        ignored = (entry.findtext("difficult") or "0").strip() not in ("", "0")
        found.add((left - 1, top - 1, right, bottom), name, ignored=ignored)
    return found


def _as_number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
