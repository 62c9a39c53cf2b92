"""Reads detections by a function of the user's own: `--decode FILE.py:FUNCTION`. The file's code is run.

The function gets a dictionary with the outputs of one picture, arrays by name as the network gives them for a batch of
one, and returns a row for each box that is left after its own suppression:

    left, top, right, bottom (in pixels of the network's input), score (0 to 1), class (a number)

Whatever is wrong with the file or the function is a QconvError that names both, and the line where there is one.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconv.decoding.boxes import Detections
from qconv.decoding.head import Head, NetworkFacts, read_class_names
from qconv.errors import QconvError, format_shape

COLUMNS = 6

ROW = "x1, y1, x2, y2, score and class"

DecodeFunction = Callable[[Mapping[str, NDArray[Any]]], Any]


def load_decoder(decode: str) -> DecodeFunction:
    """The function that FILE.py:FUNCTION names. Raises QconvError where there is none, or the file does not load."""
    file, _, name = decode.rpartition(":")
    path = Path(file)
    try:
        stat, source = path.stat(), path.read_bytes()
    except OSError as error:
        raise QconvError(f"--decode {decode}: {file} cannot be read: {error.strerror}.", "check its name.") from None
    found = getattr(_run_file(decode, path, source, stat.st_mtime_ns), name, None)
    if not callable(found):
        raise QconvError(f"--decode {decode}: {file} has no function {name!r}.", "check its name.")
    function: DecodeFunction = found
    return function


@functools.lru_cache(maxsize=4)
def _run_file(decode: str, path: Path, source: bytes, changed: int) -> ModuleType:
    """The file as a module, run once for a run that opens it several times. changed: when it was, in ns."""
    module = ModuleType(f"qconv_decoder_{path.stem}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # dataclasses look for themselves there
    sys.path.insert(0, str(path.resolve().parent))
    try:
        with contextlib.redirect_stdout(sys.stderr):
            exec(compile(source, str(path), "exec"), module.__dict__)
    except (Exception, SystemExit) as error:
        raise _make_error(decode, path, "does not load", error) from None
    finally:
        sys.path.remove(str(path.resolve().parent))
    return module


def _make_error(decode: str, path: Path, what: str, error: BaseException) -> QconvError:
    """What an error of the user's code is told as."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
    where = "" if line is None else f" in line {line}"
    said = " ".join(traceback.format_exception_only(error)[-1].split())
    return QconvError(f"--decode {decode} {what}: {said}{where}.", "mend the file: it is run as it is.")


def make_head(decode: str, facts: NetworkFacts, pictures: int) -> Head:
    """The head that such a function reads. pictures: how many the batch has. Raises QconvError as `load_decoder`."""
    names = tuple(facts.outputs)
    decoder = _CustomDecoder(load_decoder(decode), decode, names, pictures == 1)
    return Head("--decode", f"{decode} reads them", names, decoder, facts.size, names=read_class_names(facts.metadata))


@dataclass(frozen=True, slots=True)
class _CustomDecoder:
    """decode: what names the function. names: of the outputs. single: batches have one picture, and outputs may be
    without an axis for it."""

    function: DecodeFunction
    decode: str
    names: tuple[str, ...]
    single: bool

    def __call__(self, arrays: Sequence[NDArray[Any]], least: float) -> list[Detections]:
        """The detections of each picture of a batch. Raises QconvError for whatever goes wrong in the function."""
        if self.single:
            return [self._find(arrays, least)]
        counts = {array.shape[:1] for array in arrays}
        if len(counts) != 1 or counts == {()}:
            fact = f"--decode {self.decode}: not all outputs have a part for each picture of a batch."
            raise QconvError(fact, "pass --batch 1.")
        return [self._find([array[i : i + 1] for array in arrays], least) for i in range(len(arrays[0]))]

    def _find(self, arrays: Sequence[NDArray[Any]], least: float) -> Detections:
        outputs = {name: array.copy() for name, array in zip(self.names, arrays, strict=True)}
        try:
            with contextlib.redirect_stdout(sys.stderr):  # stdout is the result's
                given = self.function(outputs)
        except (Exception, SystemExit) as error:
            raise _make_error(self.decode, Path(self.decode.rpartition(":")[0]), "failed", error) from None
        rows = _as_rows(given)
        if rows is None:
            shape = format_shape(np.shape(given)) if isinstance(given, np.ndarray) else type(given).__name__
            fact = f"--decode {self.decode} returned {shape}, which is not {COLUMNS} numbers for each box."
            raise QconvError(fact, f"return a row for each: {ROW}.")
        return Detections.of(rows[:, :4], rows[:, 4], np.rint(rows[:, 5])).above(least)


def _as_rows(given: Any) -> NDArray[np.float64] | None:
    """What a function returned as rows (N, 6); None where it is none."""
    try:
        rows = np.asarray(given, np.float64)
    except (TypeError, ValueError):
        return None
    if rows.shape in ((0,), (0, COLUMNS)):
        return rows.reshape(0, COLUMNS)
    return rows if rows.ndim == 2 and rows.shape[1] == COLUMNS else None
