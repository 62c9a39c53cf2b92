"""Finds out which form labels have: boxes in COCO JSON, YOLO or Pascal VOC, or masks; and reads maps of labels.

A file tells its form by its suffix, a folder by which of its files are called like the pictures. A map of labels is
TOML, and says which class of the model a label is:

    "aeroplane" = 4         # a name in the labels, and the number of the class among the model's
    7 = "road"              # an id in the labels, and the name of the class
    0 = "ignore"
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from qconv.config.data_options import DataOptions
from qconv.config.serialization import read_toml
from qconv.data.dataset import class_roots_of, read_class_list, require_listed_classes, suffix_of
from qconv.errors import QconvError, format_count

Key = int | str
"""What labels call a class: an id or a name."""


class LabelForm(StrEnum):
    """How labels are written."""

    COCO = "COCO JSON"
    YOLO = "YOLO"
    VOC = "Pascal VOC"
    MASKS = "masks"


FORM_OF_FILE = {".json": LabelForm.COCO, ".yaml": LabelForm.YOLO, ".yml": LabelForm.YOLO}

FORM_IN_FOLDER = {".txt": LabelForm.YOLO, ".xml": LabelForm.VOC, ".png": LabelForm.MASKS}

NAME_IMAGES = "name the pictures that they are of with --images."
"""What to do where labels are of none of the pictures, and the command has that option."""

USE_EVALUATE = "pass their pictures as --calib, or measure the result on them: `qconv evaluate --images DIR`."
"""What to do where it has not."""

SCHEMA_HINT = "`qconv evaluate --schema` prints what is expected of each form."


@dataclass(frozen=True, slots=True)
class LabelRequest:
    """What the user says of labels. Raises QconvError where it does not exist.

    Attributes:
        path: A file, or a folder of files.
        label_map: Says which class of the model a label is.
        classes: Names of the model's classes, in the order of its outputs.
        offset: Added to the place in that list, and to numbers that labels tell.
    """

    path: Path
    label_map: Path | None = None
    classes: Path | None = None
    offset: int = 0

    def __post_init__(self) -> None:
        if not self.path.exists():
            raise QconvError(f"{self.path} does not exist.", f"name a file or a folder of labels; {SCHEMA_HINT}")


@dataclass(frozen=True, slots=True)
class ModelClasses:
    """What is known of a model's classes. names: by number. count: None where it is not known."""

    names: Mapping[int, str]
    count: int | None = None

    def named_by(self, request: LabelRequest) -> ModelClasses:
        """The same with the names that the user lists, if any.

        Raises QconvError for a file that is no such list, or lists another number of classes than the model has.
        """
        if request.classes is None:
            return self
        listed = read_class_list(request.classes).names
        if self.count is not None:
            require_listed_classes(str(request.classes), len(listed), request.offset, self.count)
        return ModelClasses({rank + request.offset: name for rank, name in listed.items()}, self.count)


@dataclass(frozen=True, slots=True)
class LabelledPictures:
    """Pictures for which labels are looked for. paths: to open. insides: below the given folder, or the name alone."""

    paths: tuple[Path, ...]
    insides: tuple[Path, ...]

    @classmethod
    def of(cls, paths: Sequence[Path], data: DataOptions) -> LabelledPictures:
        """Those of `data` among which these are."""
        roots = class_roots_of(data)
        below = [next((path.relative_to(r) for r in roots if path.is_relative_to(r)), None) for path in paths]
        insides = tuple(inside or Path(path.name) for inside, path in zip(below, paths, strict=True))
        return cls(tuple(paths), insides)

    def files_in(self, folder: Path, suffix: str) -> dict[Path, Path]:
        """The file of each picture that has one: in the same subfolder, or else with its name alone."""
        found = {}
        for path, inside in zip(self.paths, self.insides, strict=True):
            for place in (folder / inside.with_suffix(suffix), folder / f"{path.stem}{suffix}"):
                if place.is_file() and place != path:
                    found[path] = place
                    break
        return found


def find_label_form(path: Path, pictures: LabelledPictures, elsewhere: str) -> LabelForm:
    """The form of labels in a file, or in a folder. Raises QconvError for what is none of them.

    elsewhere: what to do where they are of none of the pictures.
    """
    if path.is_file():
        form = FORM_OF_FILE.get(suffix_of(path))
        if form is None:
            known = ", ".join(FORM_OF_FILE)
            raise QconvError(f"{path} is no file of labels ({known}).", f"name one, or a folder; {SCHEMA_HINT}")
        return form
    counts = {suffix: len(pictures.files_in(path, suffix)) for suffix in FORM_IN_FOLDER}
    best = max(counts, key=lambda suffix: counts[suffix])
    if not counts[best]:
        others = Counter(suffix_of(file) or "no suffix" for file in path.iterdir() if file.is_file())
        holds = ", ".join(f"{format_count(n, 'file')} {suffix}" for suffix, n in others.most_common(3))
        fact = f"{path} holds no labels of these pictures: {holds or 'no files'}, and none .txt, .xml or .png"
        raise QconvError(f"{fact} called like a picture, as {pictures.paths[0].stem}.", f"{elsewhere} {SCHEMA_HINT}")
    return FORM_IN_FOLDER[best]


IGNORE = "ignore"


def read_label_map(path: Path, classes: ModelClasses) -> dict[str, int | None]:
    """The number of the class of each label, ids as texts; None for labels that do not count.

    Raises QconvError where it cannot be read, or names a class that the model does not have.
    """
    example = 'write lines as "aeroplane" = 4, 7 = "road" or 0 = "ignore"'
    numbers = {name: number for number, name in classes.names.items()}
    found: dict[str, int | None] = {}
    for label, said in read_toml(path, "--label-map", example).items():
        known = isinstance(said, str | int) and not isinstance(said, bool)
        if known and said == IGNORE:
            found[label] = None
        elif known and isinstance(said, str) and said in numbers:
            found[label] = numbers[said]
        elif known and isinstance(said, int) and said >= 0:
            found[label] = said
        else:
            why = "is no class of the model's" if isinstance(said, str) else "is neither a number nor a name"
            names = "its file names none" if not numbers else f"as {next(iter(numbers))}"
            fact = f"{path} gives {label!r} the class {said!r}, which {why} ({names})."
            raise QconvError(fact, f"{example}, or list names with --classes FILE.")
    return found


SCHEMA = """\
Labels of boxes (detectors), by what --labels names:

FILE.json       COCO. "images": [{"id", "file_name", "width", "height"}], "annotations": [{"image_id", "category_id",
                "bbox": [left, top, width, height] in pixels, "iscrowd"}], "categories": [{"id", "name"}]. Pictures
                are found by file_name, or by its last part. A crowd (iscrowd 1) may be found any number of times.
                Annotations of pictures and categories that are not listed are left out, and told of. Where width and
                height are there and not 0, they must be the picture's, upright as its EXIF turns it.
FILE.yaml       YOLO's data.yaml: "names", a list or {number: name}. The text files lie where Ultralytics looks for
                them (labels/ in place of the last images/ in a picture's path), or beside the pictures, or in a
                folder NAME_labels beside the pictures' folder NAME. Needs the extra qconv[detect].
DIR of .txt     YOLO: NAME.txt for NAME.jpg, a line an object: class x y width height, where x and y are the centre
                and all are shares of the picture's sides; or class x1 y1 x2 y2 ..., a polygon, of which the box
                counts. A picture without a file shows nothing.
DIR of .xml     Pascal VOC: NAME.xml with <object> of <name> and <bndbox> of <xmin> <ymin> <xmax> <ymax>, pixels
                counted from 1, the last one inside. <difficult>1</difficult>: finding it counts neither way.
                <size>, where it is there, must be the picture's, as in COCO.

Labels of masks (segmenters):

DIR of .png     NAME.png for NAME.jpg, of the picture's size: a pixel is the number of its class, as grey level or
                in a palette. 255 does not count.

Which class of the model a label is:

1. --label-map FILE.toml: lines "name" = 4, 7 = "name" or 0 = "ignore"; labels that are not in it do not count.
2. The names in the labels (COCO, data.yaml, VOC), where the model's are known: from --classes FILE, a name a line in
   the order of the outputs, or from the model's metadata, as Ultralytics writes them.
3. Else the order of the categories' ids (COCO: 1, 2, 3, 5 are the classes 0, 1, 2, 3), or the number itself (YOLO,
   masks). `qconv evaluate --label-offset N` is added to all but masks'.

Pictures without labels are left out (but YOLO's), and told of.
"""
"""What `qconv evaluate --schema` prints."""
