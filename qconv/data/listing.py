"""Which files are read: folders and lists of paths become a seeded draw that no file system's order can change."""

from __future__ import annotations

import codecs
import fnmatch
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qconv.errors import QconvError, format_count

PICTURE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif"})
SAMPLE_SUFFIXES = frozenset({".npy", ".npz"})


@dataclass(frozen=True, slots=True)
class Listing:
    """The files to read: `paths` in reading order, already shuffled and cut to the wanted number of samples.

    found: how many candidates there were. ignored: files without a picture's or a sample's suffix, not looked at.
    whole: how many were drawn, where these are a part of them.
    """

    paths: tuple[Path, ...]
    found: int
    ignored: int
    whole: int = 0


def find(sources: Sequence[str], *, pattern: str | None, samples: int, seed: int) -> Listing:
    """Choose the files to read: a seeded draw of `samples` that does not depend on the file system's order.

    A source is a folder (read recursively, hidden files skipped), a text file with one path a line (relative to the
    text file's folder, `#` starts a comment), or one picture. `pattern` is compared with a file's name and with its
    path inside the source. Of a picture and a sample in one folder whose names differ in the suffix alone, both chosen,
    the picture counts: they are the same, and how it is fed is known. Raises QconvError for a source or a listed path
    that does not exist, and if none is left.
    """
    files = sorted((i, inside, path) for i, source in enumerate(sources) for inside, path in _files(source))
    known = [(inside, path) for _, inside, path in files if suffix_of(path) in PICTURE_SUFFIXES | SAMPLE_SUFFIXES]
    matching = [path for inside, path in known if pattern is None or _matches(inside, pattern)]
    pictures = {os.path.splitext(path)[0] for path in matching if suffix_of(path) in PICTURE_SUFFIXES}
    chosen = [p for p in matching if suffix_of(p) not in SAMPLE_SUFFIXES or os.path.splitext(p)[0] not in pictures]
    if not chosen:
        raise _nothing_in(sources, len(files), len(known), pattern)
    order = np.random.default_rng(seed).permutation(len(chosen))[:samples]
    return Listing(tuple(Path(chosen[i]) for i in order), len(chosen), len(files) - len(known))


def suffix_of(path: str | Path) -> str:
    """`.jpg` of `CAT.JPG`."""
    return os.path.splitext(path)[1].lower()


def _matches(inside: str, pattern: str) -> bool:
    return any(fnmatch.fnmatchcase(text, pattern) for text in (inside, inside.rpartition("/")[2]))


def _files(source: str) -> Iterator[tuple[str, str]]:
    """Yield (posix path inside the source, path to open) of each file."""
    if os.path.isdir(source):
        yield from _walk(source)
    elif not os.path.exists(source):
        raise QconvError(f"{source} does not exist.", "pass a folder of pictures, or a text file with one path a line.")
    elif suffix_of(source) in PICTURE_SUFFIXES | SAMPLE_SUFFIXES:
        yield os.path.basename(source), source
    else:
        yield from _listed(Path(source))


def _walk(folder: str) -> Iterator[tuple[str, str]]:
    seen: set[str] = set()
    for here, folders, names in os.walk(folder, followlinks=True, onerror=_cannot_read):
        real = os.path.realpath(here)
        if real in seen:  # a link to a folder further up would go round for ever
            folders.clear()
            continue
        seen.add(real)
        # sorted, so that of two ways to a linked folder the same one counts everywhere
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        inside = os.path.relpath(here, folder).replace(os.sep, "/")
        prefix = "" if inside == "." else f"{inside}/"
        yield from ((prefix + name, os.path.join(here, name)) for name in names if not name.startswith("."))


def _listed(text: Path) -> Iterator[tuple[str, str]]:
    try:
        data = text.read_bytes().removeprefix(codecs.BOM_UTF8)
        if b"\0" in data:
            raise ValueError
        lines = os.fsdecode(data).split("\n")  # names of files may be any bytes
    except ValueError:
        hint = "pass a folder of pictures, or a text file with one path a line."
        raise QconvError(f"{text} is neither a folder, nor a picture, nor a text file of paths.", hint) from None
    except OSError as error:
        _cannot_read(error)
        raise
    for number, line in enumerate(lines, 1):
        entry = line.strip()
        if not entry or entry.startswith("#"):
            continue
        path = os.path.join(text.parent, entry)
        if not os.path.isfile(path):
            fact = "is a folder" if os.path.isdir(path) else "does not exist"
            hint = f"give the path of one file a line, relative to {text.parent}/ or absolute."
            raise QconvError(f"line {number} of {text}: {entry} {fact}.", hint)
        yield Path(entry).as_posix(), path


def _cannot_read(error: OSError) -> None:
    raise QconvError(f"{error.filename} cannot be read ({error.strerror}).", "check its permissions.") from error


def _nothing_in(sources: Sequence[str], files: int, known: int, pattern: str | None) -> QconvError:
    where = " and ".join(sources)
    suffixes = f"put pictures there: {' '.join(sorted(PICTURE_SUFFIXES))}, or .npy and .npz samples."
    if known:
        hint = "the pattern is compared with the file's name and with its path inside the folder, capitals count."
        return QconvError(f"none of the {known} pictures in {where} matches --glob '{pattern}'.", hint)
    if files:
        verb = "holds" if len(sources) == 1 else "hold"
        return QconvError(f"{where} {verb} {format_count(files, 'file')} but none is a picture.", suffixes)
    if len(sources) == 1 and os.path.isdir(sources[0]):
        return QconvError(f"{where} is an empty folder.", f"{suffixes} Hidden files are not looked at.")
    if sources:
        return QconvError(f"no file was found in {where}.", suffixes)
    return QconvError("no pictures were given.", "pass a folder of pictures.")
