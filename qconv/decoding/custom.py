"""Reads detections by a function of the user's own: `--decode FILE.py:FUNCTION`. The file's code is run.

The function gets a dictionary with the outputs of one picture, arrays by name as the network gives them for a batch of
one, and returns a row for each box that is left after its own suppression:

    left, top, right, bottom (in pixels of the network's input), score (0 to 1), class (a number)

Whatever is wrong with the file or the function is a QconvError that names both, and the line where there is one. Rows
are held to the above where the function reads the reference, whose numbers are sound. A file that is compared with it
may say anything: that is its loss and no error, and its rows count as they are, if they are finite.
"""

from __future__ import annotations

import contextlib
import functools
import numbers
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
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

ROUNDING = 1e-3
"""By which a score may lie outside of 0 to 1, and a class beside a whole number: a step of float16 at 1."""

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
    outputs, names = tuple(facts.outputs), read_class_names(facts.metadata)
    decoder = _CustomDecoder(load_decoder(decode), decode, outputs, pictures == 1, names)
    strict = replace(decoder, strict=True)
    return Head("--decode", f"{decode} reads them", outputs, decoder, facts.size, names=names, decode_reference=strict)


@dataclass(frozen=True, slots=True)
class _CustomDecoder:
    """decode: what names the function. names: of the outputs. single: batches have one picture, and outputs may be
    without an axis for it. classes: names of them, where they are known. strict: whether to refuse what no box is."""

    function: DecodeFunction
    decode: str
    names: tuple[str, ...]
    single: bool
    classes: Mapping[int, str]
    strict: bool = False

    def __call__(self, arrays: Sequence[NDArray[Any]], least: float) -> list[Detections]:
        """The detections of each picture of a batch. Raises QconvError for whatever goes wrong in the function."""
        if self.single:
            return [self._find(arrays, least, 0)]
        counts = {array.shape[:1] for array in arrays}
        if len(counts) != 1 or counts == {()}:
            fact = f"--decode {self.decode}: not all outputs have a part for each picture of a batch."
            raise QconvError(fact, "pass --batch 1.")
        return [self._find([array[i : i + 1] for array in arrays], least, i) for i in range(len(arrays[0]))]

    def _find(self, arrays: Sequence[NDArray[Any]], least: float, picture: int) -> Detections:
        """picture: its place in the batch."""
        outputs = {name: array.copy() for name, array in zip(self.names, arrays, strict=True)}
        try:
            with contextlib.redirect_stdout(sys.stderr):  # stdout is the result's
                given = self.function(outputs)
        except (Exception, SystemExit) as error:
            raise _make_error(self.decode, Path(self.decode.rpartition(":")[0]), "failed", error) from None
        rows = _as_rows(given)
        if rows is None:
            what = f"returned {_describe_array(given)}, which is not {COLUMNS} numbers for each box"
            raise QconvError(f"--decode {self.decode} {what}.", f"return a row for each: {ROW}.")
        if self.strict:
            finite = all(np.isfinite(array).all() for array in arrays if array.dtype.kind == "f")
            self._check(rows, least, picture, finite=finite)
        rows = rows[np.isfinite(rows).all(axis=1)]
        return Detections.of(rows[:, :4], rows[:, 4], np.rint(rows[:, 5])).above(least)

    def _check(self, rows: NDArray[np.float64], least: float, picture: int, *, finite: bool) -> None:
        """Raise QconvError for the first row that is no box.

        Of a row that has no higher score than `least`, as padding has, nothing else counts. finite: whether the outputs
        are; else numbers that are not finite come from them.
        """
        left, top, right, bottom, scores, classes = rows.T
        count = max(self.classes) + 1 if self.classes else np.inf
        numbered = "a whole number from 0 on" if count == np.inf else f"one of the model's {count}, counted from 0"
        broken, shown = ~np.isfinite(rows), ~(scores <= least)
        whole, nearest = shown & ~broken.any(axis=1), np.rint(classes)
        faults = (
            (finite & broken[:, 4], SCORE, "a finite number", FINITE_HINT),
            (finite & shown & broken[:, :4].any(axis=1), BOX, "of finite numbers", FINITE_HINT),
            (finite & shown & broken[:, 5], CLASS, "a finite number", FINITE_HINT),
            (~broken[:, 4] & (abs(scores - 0.5) > 0.5 + ROUNDING), SCORE, "from 0 to 1", SCORE_HINT),
            (whole & ((left > right) | (top > bottom)), BOX, "a left, top, right and bottom edge", BOX_HINT),
            (whole & (abs(classes - nearest) > ROUNDING), CLASS, "a whole number", CLASS_HINT),
            (whole & ((nearest < 0) | (nearest >= count)), CLASS, numbered, CLASS_HINT),
        )
        for wrong, (part, columns), wanted, hint in faults:
            if wrong.any():
                row = int(wrong.argmax())
                value = ", ".join(f"{number:.6g}" for number in rows[row, columns])
                what = f"row {row} of picture {picture} of a batch has the {part} {value}, which is not {wanted}"
                raise QconvError(f"--decode {self.decode}: {what}.", hint)


BOX, SCORE, CLASS = ("box", slice(0, 4)), ("score", slice(4, 5)), ("class", slice(5, 6))
"""Columns of a row, with what they are."""

FINITE_HINT = "the network's outputs are finite: look for divisions by 0, logarithms and overflows in the function."

SCORE_HINT = "return probabilities: of logits the sigmoid or softmax, of what the network puts out beyond 0 or 1 these."

BOX_HINT = "return edges in pixels: of a centre and a size, the centre less and plus half of the size."

CLASS_HINT = "return the number of a class as the model counts them, from 0 on and without a background."


def _as_rows(given: Any) -> NDArray[np.float64] | None:
    """What a function returned as rows (N, 6); None where it is none."""
    try:
        found = np.asarray(given)
        if found.shape in ((0,), (0, COLUMNS)):
            return np.zeros((0, COLUMNS))
        if found.ndim != 2 or found.shape[1] != COLUMNS or not _are_numbers(found):
            return None
        return found.astype(np.float64)
    except Exception:  # of whatever the function returned, as tensors of PyTorch raise RuntimeError
        return None


def _are_numbers(array: NDArray[Any]) -> bool:
    """Whether all entries are real numbers, and no truth values: in tables of objects, too."""
    if array.dtype.kind != "O":
        return array.dtype.kind in "fiu"
    return all(isinstance(entry, numbers.Real) and not isinstance(entry, bool) for entry in array.flat)


def _describe_array(given: Any) -> str:
    """The shape and type of an array, the type of all else."""
    return f"{format_shape(given.shape)} of {given.dtype}" if isinstance(given, np.ndarray) else type(given).__name__
