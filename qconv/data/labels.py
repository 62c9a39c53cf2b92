"""Which class a picture belongs to: the folder that it lies in, and the place of that folder among the outputs.

    label = rank of the class folder + offset

The rank is the folder's place in a list of classes (`--classes`, or classes.txt beside the folders); without a list it
is the folder's name where all names are whole numbers, and else its place in alphabetical order, which is right only if
every class has a folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qconv.errors import QconvError, format_count

LISTED = "classes.txt"


@dataclass(frozen=True, slots=True)
class Classes:
    """rank: of every class folder, by its name. names: by rank. source: where that is from, in words."""

    rank: dict[str, int]
    names: dict[int, str]
    source: str
    complete: bool
    """Whether every output has a folder, if the ranks are right."""

    def labels(self, folders: Sequence[str], *, offset: int, outputs: int) -> list[int]:
        """One a picture. folders: the class folders' names. Raises QconvError where they cannot be the outputs'."""
        unknown = next((name for name in folders if name not in self.rank), None)
        if unknown is not None:
            raise QconvError(
                f"The class folder {unknown} is not in {self.source}.", "add it, or leave it out (--glob)."
            )
        shifted = f", shifted by {offset}," if offset else ""
        if self.complete and len(self.rank) + offset != outputs:
            raise QconvError(
                f"{format_count(len(self.rank), 'class folder')}{shifted} do not fit {outputs} outputs, so that their order "
                "tells no class.",
                "list all class folders in output order in a file: --classes FILE (--label-offset shifts them).",
            )
        found = [self.rank[name] + offset for name in folders]
        odd = next((label for label in found if not 0 <= label < outputs), None)
        if odd is not None:
            raise QconvError(
                f"A picture has the label {odd}, but the model has {outputs} outputs.",
                "check --classes and --label-offset.",
            )
        return found


@dataclass(frozen=True, slots=True)
class Labelling:
    """What the user says of labels. offset: added to the rank. asked: whether it is an error if there are none."""

    offset: int = 0
    asked: bool = False


def labels_of(
    paths: Sequence[Path], root: Path, classes: Classes | None, labelling: Labelling, outputs: int
) -> NDArray[np.int64] | None:
    """One a picture, (N,); None where they lie in no class folders. outputs: how many classes the model knows, 0 where
    no output is one score a class. Raises QconvError where folders do not tell, or labels that are asked for cannot be.
    """
    if not outputs:
        if labelling.asked:
            fact = "No output of the model is one score a class, so labels say nothing of it."
            raise QconvError(fact, "leave the options for labels out.")
        return None
    folders = [folder_of(path, root) for path in paths]
    if classes is None or not any(folders):
        if labelling.asked:
            raise QconvError(f"The pictures in {root} lie in no class folders.", "put each into a folder of its class.")
        return None
    loose = next((path for path, name in zip(paths, folders, strict=True) if name is None), None)
    if loose is not None:
        raise QconvError(f"{loose} lies in no class folder, others do.", "move it into one, or leave it out (--glob).")
    known = classes.labels([name or "" for name in folders], offset=labelling.offset, outputs=outputs)
    return np.array(known, np.int64)


def folder_of(path: Path, root: Path) -> str | None:
    """The class folder's name: the first below `root`, or what holds the picture where it came from a list of paths."""
    if not root.is_dir():
        return path.parent.name
    inside = path.relative_to(root).parts
    return inside[0] if len(inside) > 1 else None


def classes_of(root: Path, listing: Path | None) -> Classes | None:
    """The classes of the folders below `root`. listing: the user's file, None for classes.txt beside them.

    None where there are no class folders. Raises QconvError for a file that is no list of classes.
    """
    beside = root / LISTED
    if listing is not None or beside.is_file():
        return _listed(listing or beside)
    if not root.is_dir():
        return None
    names = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not names:
        return None
    if all(name.isdecimal() for name in names) and len({int(name) for name in names}) == len(names):
        rank = {name: int(name) for name in names}
        return Classes(rank, {n: name for name, n in rank.items()}, "the folders' numbers", complete=False)
    rank = {name: index for index, name in enumerate(names)}
    return Classes(rank, dict(enumerate(names)), "the folders in alphabetical order", complete=True)


def _listed(file: Path) -> Classes:
    """A line a class; the folder's name is the whole line or its first word (`n01440764 tench, Tinca tinca`)."""
    try:
        lines = file.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise QconvError(
            f"{file} cannot be read: {reason}.", "name a text file with one class folder a line."
        ) from None
    while lines and not lines[-1].strip():
        lines.pop()
    names = [line.strip() for line in lines]
    if not names or not all(names):
        fact = "is empty" if not names else f"has an empty line {names.index('') + 1}"
        raise QconvError(f"{file} {fact}.", "write one class folder a line, in the order of the outputs.")
    words = [name.split()[0] for name in names]
    rank = {word: index for index, word in enumerate(words)} if len(set(words)) == len(words) else {}
    rank |= {name: index for index, name in enumerate(names)}
    if len({*names}) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise QconvError(f"{file} lists {twice} twice.", "write one class folder a line, in the order of the outputs.")
    return Classes(rank, dict(enumerate(names)), str(file), complete=False)
