"""The float model that a quantized file was made from."""

from __future__ import annotations

import contextlib

from qconv.calibration.stats import digest
from qconv.errors import QconvError
from qconv.ir.fileformat import FLOAT
from qconv.ir.source import Source, data_files, metadata, read

MOST_NEIGHBOURS = 64
"""Files beside the quantized one that are looked at."""


def teacher_beside(source: Source) -> Source:
    """The float model that a file was made from, by its hash, among those beside it."""
    hint = "pass the float model with --teacher FLOAT."
    wanted = metadata(read(source)).get(FLOAT)
    if wanted is None or source.path is None:
        raise QconvError(f"{source.name} does not say which float model it was made from.", hint)
    folder = source.path.resolve().parent
    stem = source.path.name.split(".")[0]
    beside = sorted(folder.glob("*.onnx"), key=lambda path: (not path.name.startswith(stem), path.name))
    for path in beside[:MOST_NEIGHBOURS]:
        own = Source(str(source.path.parent / path.name), source.path.parent / path.name)
        with contextlib.suppress(QconvError):
            if digest(own, data_files(read(own), own)) == wanted:
                return own
    raise QconvError(f"The float model that {source.name} was made from is not beside it.", hint)
