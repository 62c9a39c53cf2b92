"""Folders as results: they appear whole or not at all, as files do (save.py), and none but earlier results give way."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from qconv.errors import QconvError
from qconv.save import ASIDE, explained, locked_folder, remove_stale, sync, sync_folder

Foreign = Callable[[Path], str | None]
"""Of a folder: a name in it that is not of an earlier result, None where all are."""


@contextlib.contextmanager
def whole_folder(out: Path, foreign: Foreign) -> Iterator[Path]:
    """A folder to be filled, which takes the place of `out` and all that is in it at the end, or never.

    Raises QconvError where what is there by then is no earlier result.
    """
    place = Path(os.path.realpath(out))
    with locked_folder(place) as hidden, explained(out):
        new, old = hidden / place.name, hidden / f"{place.name}{ASIDE}"
        new.mkdir()
        yield new
        for path in new.iterdir():
            sync(path)
        _refuse_foreign(out, place, foreign)
        try:
            if place.is_dir():
                new.chmod(place.stat().st_mode & 0o7777)
                os.rename(place, old)
            os.rename(new, place)
        except BaseException:
            if old.exists() and not place.exists():
                os.rename(old, place)
            raise
        sync_folder(place.parent)


def check_folder(out: Path, foreign: Foreign) -> None:
    """Raise QconvError where no folder can be written at `out`; remove what killed runs left there."""
    place = Path(os.path.realpath(out))
    with explained(out):
        if place.exists() and not place.is_dir():
            raise QconvError(f"{out} is a file.", "name a folder as the output.")
        if not place.parent.is_dir():
            raise QconvError(f"The folder {out.parent} does not exist.", "create it, or choose another output.")
        if not os.access(place.parent, os.W_OK | os.X_OK):
            raise QconvError(f"The folder {place.parent} cannot be written to.", "choose another output.")
        if Path.cwd().is_relative_to(place):
            raise QconvError(f"{out} is the current folder, or holds it, and would be replaced.", "name a new folder.")
        remove_stale(place)
        _refuse_foreign(out, place, foreign)


def refuse_inside(out: Path, path: Path | None, what: str) -> None:
    """Raise QconvError where a file lies in the folder `out`, which is to hold one result alone."""
    if path is not None and Path(os.path.realpath(path)).is_relative_to(os.path.realpath(out)):
        raise QconvError(f"{what} {path} lies in the output {out}.", "choose another output.")


def _refuse_foreign(out: Path, place: Path, foreign: Foreign) -> None:
    name = foreign(place) if place.is_dir() else None
    if name is not None:
        fact = f"{out} holds files that are no earlier result, such as {name}."
        raise QconvError(fact, "name a new folder: files of two kinds are not mixed.")
