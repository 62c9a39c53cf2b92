"""Sketches of single pictures, put aside in a nameless file, so that memory stays flat however many pictures come.

A picture's arrays, those of all tensors, lie in one compressed block: opening hundreds of small ones would take longer
than the network takes for the picture. The file has no name from its start on, so that even a kill leaves nothing.
"""

from __future__ import annotations

import contextlib
import errno
import json
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from qconv.calibration.sketch import Sketch
from qconv.calibration.stats import FAST, arrays_of, sketch_of
from qconv.errors import QconvError

LENGTH_BYTES = 8


@dataclass(slots=True)
class Shelf:
    """Sketches by tensor for each of several pictures, in the order in which they were put."""

    file: IO[bytes]
    _places: list[tuple[int, int]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self._places)

    def put(self, sketches: Mapping[str, Sketch]) -> None:
        """Put one picture's sketches at the end. Raises QconvError where the disk is full."""
        block = zlib.compress(_packed(sketches), FAST)
        with _explained():
            self._places.append((self.file.seek(0, 2), len(block)))
            self.file.write(block)

    def get(self, index: int) -> dict[str, Sketch]:
        """The sketches of picture `index`."""
        place, length = self._places[index]
        with _explained():
            self.file.seek(place)
            return _unpacked(zlib.decompress(self.file.read(length)))


@contextlib.contextmanager
def shelf() -> Iterator[Shelf]:
    """An empty shelf among the system's temporary files, gone at the end."""
    with contextlib.ExitStack() as stack:
        with _explained():
            file = stack.enter_context(tempfile.TemporaryFile(prefix="qconv-"))
        yield Shelf(file)


def _packed(sketches: Mapping[str, Sketch]) -> bytes:
    """A list of names, types and shapes as JSON, and all numbers behind it."""
    parts = [(name, part, a) for name, sketch in sketches.items() for part, a in arrays_of(sketch).items()]
    content = json.dumps([(name, part, a.dtype.str, a.shape) for name, part, a in parts]).encode()
    return b"".join([len(content).to_bytes(LENGTH_BYTES), content, *(a.tobytes() for _, _, a in parts)])


def _unpacked(data: bytes) -> dict[str, Sketch]:
    start = LENGTH_BYTES + int.from_bytes(data[:LENGTH_BYTES])
    found: dict[str, dict[str, NDArray[Any]]] = {}
    for name, part, kind, shape in json.loads(data[LENGTH_BYTES:start]):
        array = np.frombuffer(data, kind, prod(shape), start).reshape(shape)
        found.setdefault(name, {})[part] = array
        start += array.nbytes
    return {name: sketch_of(arrays) for name, arrays in found.items()}


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        why = "is full" if full else f"cannot be written to: {error.strerror}"
        raise QconvError(
            f"The folder for temporary files, {tempfile.gettempdir()}, {why}.", "free some space, or set TMPDIR."
        ) from None
