"""Statistics in a file: another recipe needs no picture then, and shards of a large set of pictures add up.

The file is a .npz (a zip of .npy arrays, which `numpy.load` opens): `header.json`, and for each tensor what its sketch
holds. It names the model, by the hash of its bytes, and how pictures became inputs, and is refused for others. It has
no date and no path: the same pictures give the same bytes, in one run or in shards.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconv import storage
from qconv.calibration.exact import LIMBS, ExactSum
from qconv.calibration.sketch import Sketch
from qconv.config.preprocessing import Color, Layout, Preprocessing, ResizeFilter
from qconv.errors import QconvError, format_count
from qconv.ir.files import Source

SCHEMA = 1
NO_DATE = (1980, 1, 1, 0, 0, 0)
WHOLE = ("lows", "highs", "codes", "counts", "keys", "pictures", "column_keys", "columns")
"""Arrays of a sketch that are stored as they are."""
PARTS = (*WHOLE, "sums", "count")
FAST = 1
"""Of zlib's levels: columns hardly get smaller, and the rest is small."""


@dataclass(frozen=True, slots=True)
class Statistics:
    """What a file holds.

    model: hash of the model's bytes; name: of its file. preprocessing: JSON-ready, None for ready-made samples; pixels:
    the layout of the pixels where the network took those, and its own normalisation was inside. sketches: by the names
    of the tensors.
    """

    model: str
    name: str
    preprocessing: Mapping[str, Any] | None
    pixels: str | None
    sketches: Mapping[str, Sketch]

    @property
    def pictures(self) -> int:
        """How many were seen."""
        return max((len(sketch.keys) for sketch in self.sketches.values()), default=0)

    def merge(self, other: Statistics) -> Statistics:
        """The statistics of both sets of pictures. Raises QconvError where they are not of one kind."""
        sketches = {name: sketch.merge(other.sketches[name]) for name, sketch in self.sketches.items()}
        return Statistics(self.model, min(self.name, other.name), self.preprocessing, self.pixels, sketches)


def digest(source: Source, data: Iterable[Path]) -> str:
    """The hash of a model's bytes, those of its data files included."""
    found = hashlib.sha256((source.data or b"") if source.path is None else source.path.read_bytes())
    for path in sorted(data):
        with path.open("rb") as file:
            found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()


def done_to_pictures(preprocessing: Preprocessing | None) -> dict[str, Any] | None:
    """The preprocessing as the file names it."""
    if preprocessing is None:
        return None
    return {name: value for name, value in preprocessing.as_dict().items() if name not in ("source", "embedded")}


def as_preprocessing(words: Mapping[str, Any]) -> Preprocessing:
    """What `done_to_pictures` made its dictionary of."""
    height, width = map(int, words["size"])
    return Preprocessing(
        preset=str(words["preset"]),
        source="as the statistics were made",
        color=Color(words["color"]),
        layout=Layout(words["layout"]),
        filter=ResizeFilter(words["filter"]),
        scale=float(words["scale"]),
        size=(height, width),
        mean=tuple(map(float, words["mean"])),
        std=tuple(map(float, words["std"])),
        resize=words["resize"],
        class_vector=bool(words["class_vector"]),
    )


# -- to bytes and back -------------------------------------------------------------------------------------------------


def to_bytes(statistics: Statistics) -> bytes:
    """The file's content."""
    header = {
        "schema": SCHEMA,
        "model": statistics.model,
        "name": statistics.name,
        "preprocessing": statistics.preprocessing,
        "pixels": statistics.pixels,
        "tensors": list(statistics.sketches),
    }
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=FAST) as archive:
        _put(archive, "header.json", json.dumps(header, sort_keys=True, indent=1).encode())
        for index, sketch in enumerate(statistics.sketches.values()):
            for part, array in arrays_of(sketch).items():
                content = io.BytesIO()
                np.lib.format.write_array(content, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
                _put(archive, f"{index}/{part}.npy", content.getvalue())
    return buffer.getvalue()


def _put(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    entry = zipfile.ZipInfo(name, NO_DATE)
    entry.compress_type = zipfile.ZIP_DEFLATED
    entry.external_attr = 0o644 << 16
    archive.writestr(entry, content, compresslevel=FAST)


def arrays_of(sketch: Sketch) -> dict[str, NDArray[Any]]:
    """All that a sketch holds, by names."""
    return {
        **{name: getattr(sketch, name) for name in WHOLE},
        "sums": sketch.sums.limbs,
        "count": np.array([sketch.count], np.int64),
    }


def from_bytes(data: bytes, name: str) -> Statistics:
    """What `to_bytes` wrote. Raises QconvError for everything else; name: of the file, for the error."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            header = json.loads(archive.read("header.json"))
            if header["schema"] != SCHEMA:
                raise QconvError(
                    f"{name} was written by another version of qconv (schema {header['schema']}).",
                    "write it again with --save-stats.",
                )
            sketches = {tensor: _read(archive, index) for index, tensor in enumerate(header["tensors"])}
        if header["preprocessing"] is not None:
            as_preprocessing(header["preprocessing"])
        names = str(header["model"]), str(header["name"])
        return Statistics(*names, header["preprocessing"], header["pixels"], sketches)
    except QconvError:
        raise
    except Exception:  # a stranger's bytes: BadZipFile, KeyError, ValueError, zlib.error and more
        raise QconvError(
            f"{name} holds no statistics of qconv, or it is damaged.", "pass a file that --save-stats wrote."
        ) from None


def _read(archive: zipfile.ZipFile, index: int) -> Sketch:
    def array(part: str) -> NDArray[Any]:
        with archive.open(f"{index}/{part}.npy") as file:
            return np.asarray(np.lib.format.read_array(file, allow_pickle=False))

    sketch = sketch_of({part: array(part) for part in PARTS})
    _require_whole(sketch)
    return sketch


def sketch_of(arrays: Mapping[str, NDArray[Any]]) -> Sketch:
    """What `arrays_of` took apart."""
    sums, count = ExactSum(arrays["sums"]), int(arrays["count"][0])
    return Sketch(sums=sums, count=count, **{name: arrays[name] for name in WHOLE})


def _require_whole(sketch: Sketch) -> None:
    """Raise ValueError where types or shapes do not go together."""
    channels = sketch.lows.shape
    floats = (sketch.lows, sketch.highs, sketch.pictures, sketch.columns)
    if any(part.dtype != np.float32 for part in floats) or sketch.sums.limbs.dtype != np.int64:
        raise ValueError("another type")
    if len(channels) != 1 or sketch.highs.shape != channels or sketch.sums.limbs.shape != (LIMBS, *channels):
        raise ValueError("channels")
    if sketch.pictures.shape != (len(sketch.keys), 2) or len(sketch.columns) != len(sketch.column_keys):
        raise ValueError("pictures")
    if sketch.codes.dtype != np.uint16 or sketch.counts.dtype != np.int64 or sketch.codes.shape != sketch.counts.shape:
        raise ValueError("histogram")
    if (np.diff(sketch.codes.astype(np.int64)) <= 0).any() or (sketch.counts <= 0).any():
        raise ValueError("histogram")
    if sketch.columns.ndim != 3 or (sketch.columns.size and sketch.columns.shape[2] != channels[0]):
        raise ValueError("columns")


# -- files -------------------------------------------------------------------------------------------------------------


def read_file(path: str | Path) -> Statistics:
    """The statistics in a file. Raises QconvError."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise QconvError(f"{path} cannot be read: {error.strerror}.", "check the path of the statistics.") from None
    return from_bytes(data, str(path))


def write_file(statistics: Statistics, out: Path) -> None:
    """Write the whole file, or nothing. Raises QconvError."""
    storage.write_atomically(out, to_bytes(statistics))


def merged(paths: Sequence[str]) -> tuple[Statistics, int]:
    """The sum of several files, and how many pictures are in more than one of them.

    Raises QconvError where they are not of one model, one preprocessing and the same tensors.
    """
    parts = [read_file(path) for path in paths]
    for part, path in zip(parts[1:], paths[1:], strict=True):
        why = _difference(parts[0], part)
        if why:
            raise QconvError(f"{path} and {paths[0]} do not add up: {why}.", "merge shards of one run's options only.")
    total = reduce(Statistics.merge, parts)
    keys = next(iter(total.sketches.values())).keys if total.sketches else np.zeros(0)
    return total, len(keys) - len(np.unique(keys))


def _difference(one: Statistics, other: Statistics) -> str:
    if one.model != other.model:
        return f"they are of different models ({one.name} and {other.name})"
    if _changed(one.preprocessing, other.preprocessing):
        return f"the preprocessing differs ({_changed(one.preprocessing, other.preprocessing)})"
    if one.pixels != other.pixels:
        return "--embed-preprocessing differs"
    if one.sketches.keys() != other.sketches.keys():
        return "they watched different tensors"
    return ""


def _changed(one: Mapping[str, Any] | None, other: Mapping[str, Any] | None) -> str:
    """What differs, in words; a preset's name does not count, its numbers do."""
    if one is None or other is None:
        return "" if one is other else "one is of ready-made samples"
    names = [name for name in one if name != "preset" and one.get(name) != other.get(name)]
    return ", ".join(f"{name} {one.get(name)} and {other.get(name)}" for name in names)


def require_model(statistics: Statistics, path: str, *, model: str, name: str) -> None:
    """Raise QconvError unless the statistics are of this model. model: its `digest`."""
    if statistics.model != model:
        raise QconvError(
            f"{path} is of another model ({statistics.name}) than {name}.", "write it again with --save-stats."
        )


def require_preprocessing(statistics: Statistics, path: str, wanted: Mapping[str, Any] | None) -> None:
    """Raise QconvError unless pictures became inputs in this way, which is as `done_to_pictures` gives it."""
    if _changed(statistics.preprocessing, wanted):
        raise QconvError(
            f"{path} was made with another preprocessing ({_changed(statistics.preprocessing, wanted)}).",
            "leave the preprocessing options out, or write it again with --save-stats.",
        )


def require_pixels(statistics: Statistics, path: str, pixels: str | None) -> None:
    """Raise QconvError unless the network took what it takes now: pixels of this layout, or its own float input."""
    if statistics.pixels != pixels:
        was = "without --embed-preprocessing" if statistics.pixels is None else f"of {statistics.pixels} pixels"
        raise QconvError(f"{path} was made {was}.", "write it again with --save-stats and these options.")


def require_tensors(statistics: Statistics, path: str, names: Iterable[str]) -> None:
    """Raise QconvError unless all these tensors were watched."""
    missing = [name for name in names if name not in statistics.sketches]
    if missing:
        raise QconvError(
            f"{path} lacks {format_count(len(missing), 'tensor')} that these options need, such as {missing[0]}.",
            "write it again with --save-stats and these options.",
        )
