"""Saves, loads and merges calibration statistics, and spools the sketches of single images to a temporary file.

A statistics file is a .npz (a zip of .npy arrays): `header.json`, and for each tensor what its sketch holds. It names
the model, by the hash of its bytes, and the preprocessing, and is refused for others. It has no date and no path: the
same images give the same bytes, in one run or in shards. With it another recipe needs no image, and shards add up.

`SketchSpool` keeps memory flat: the arrays of one image lie in one compressed block of a nameless file, so that even
a kill leaves nothing behind. Opening hundreds of small arrays would take longer than the network takes for the image.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from math import prod
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

import qconv
from qconv import storage
from qconv.calibration.sketch import LIMB_BITS, LIMBS, ExactSum, Sketch
from qconv.config.data_options import LETTERBOX_GREY, Color, Layout, LetterboxAlign, Preprocessing, ResizeFilter
from qconv.errors import QconvError, format_count
from qconv.reporter import Reporter

SCHEMA = 1

ZIP_DATE = (1980, 1, 1, 0, 0, 0)

PLAIN_ARRAYS = ("lows", "highs", "codes", "counts", "keys", "pictures", "column_keys", "columns")
"""Arrays of a sketch that are stored as they are."""

SKETCH_ARRAYS = (*PLAIN_ARRAYS, "sums", "count")

MOST_UNPACKED_BYTES = 1 << 31
"""Of a file: a megabyte can unpack to a gigabyte. Those of 10,000 pictures and a large network are a tenth of it."""

COMPRESSION_LEVEL = 1
"""zlib's level: more hardly makes columns smaller, and the rest is small."""


@dataclass(frozen=True, slots=True)
class Statistics:
    """The content of a statistics file.

    model: hash of the model's bytes.
    name: name of the model's file.
    preprocessing: JSON-ready; None for ready-made samples.
    pixels: layout of the pixels, where the network took pixels and normalised them itself.
    sketches: by the names of the tensors.
    """

    model: str
    name: str
    preprocessing: Mapping[str, Any] | None
    pixels: str | None
    sketches: Mapping[str, Sketch]

    @property
    def pictures(self) -> int:
        """How many images the statistics are of."""
        return max((len(sketch.keys) for sketch in self.sketches.values()), default=0)

    def merge(self, other: Statistics) -> Statistics:
        """The statistics of both sets of images, which must be of one model and the same tensors."""
        sketches = {name: sketch.merge(other.sketches[name]) for name, sketch in self.sketches.items()}
        return Statistics(self.model, min(self.name, other.name), self.preprocessing, self.pixels, sketches)


def preprocessing_to_dict(preprocessing: Preprocessing | None) -> dict[str, Any] | None:
    """The preprocessing as the file stores it."""
    if preprocessing is None:
        return None
    return {name: value for name, value in preprocessing.as_dict().items() if name not in ("source", "embedded")}


def preprocessing_from_dict(words: Mapping[str, Any]) -> Preprocessing:
    """The reverse of `preprocessing_to_dict`."""
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
        letterbox_align=LetterboxAlign(words.get("letterbox_align", LetterboxAlign.CENTER)),
        letterbox_fill=int(words.get("letterbox_fill", LETTERBOX_GREY)),
    )


# -- to bytes and back -------------------------------------------------------------------------------------------------


def serialize_statistics(statistics: Statistics) -> bytes:
    """The bytes of a statistics file."""
    header = {
        "schema": SCHEMA,
        "model": statistics.model,
        "name": statistics.name,
        "preprocessing": statistics.preprocessing,
        "pixels": statistics.pixels,
        "tensors": list(statistics.sketches),
    }
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=COMPRESSION_LEVEL) as archive:
        _write_entry(archive, "header.json", json.dumps(header, sort_keys=True, indent=1).encode())
        for index, sketch in enumerate(statistics.sketches.values()):
            for part, array in sketch_to_arrays(sketch).items():
                content = io.BytesIO()
                np.lib.format.write_array(content, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
                _write_entry(archive, f"{index}/{part}.npy", content.getvalue())
    return buffer.getvalue()


def _write_entry(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    entry = zipfile.ZipInfo(name, ZIP_DATE)
    entry.compress_type = zipfile.ZIP_DEFLATED
    entry.external_attr = 0o644 << 16
    archive.writestr(entry, content, compresslevel=COMPRESSION_LEVEL)


def sketch_to_arrays(sketch: Sketch) -> dict[str, NDArray[Any]]:
    """The arrays that a sketch holds, by name."""
    return {
        **{name: getattr(sketch, name) for name in PLAIN_ARRAYS},
        "sums": sketch.sums.limbs,
        "count": np.array([sketch.count], np.int64),
    }


def parse_statistics(data: bytes, name: str) -> Statistics:
    """The reverse of `serialize_statistics`. Raises QconvError for other bytes. name: the file's, for the error."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            storage.check_unpacked_size(archive, MOST_UNPACKED_BYTES)
            header = json.loads(archive.read("header.json"))
            if header["schema"] != SCHEMA:
                raise QconvError(
                    f"{name} was written by another version of qconv (schema {header['schema']}).",
                    "write it again with --save-stats.",
                )
            sketches = {tensor: _read_sketch(archive, index) for index, tensor in enumerate(header["tensors"])}
        if header["preprocessing"] is not None:
            preprocessing_from_dict(header["preprocessing"])
        names = str(header["model"]), str(header["name"])
        return Statistics(*names, header["preprocessing"], header["pixels"], sketches)
    except QconvError:
        raise
    except storage.UnpackedTooLargeError as error:
        raise QconvError(f"{name} {error}.", "pass a file that --save-stats wrote.") from None
    except MemoryError:
        raise QconvError(f"{name} needs more memory than there is.", "free some memory.") from None
    except Exception:  # a stranger's bytes: BadZipFile, KeyError, ValueError, zlib.error and more
        raise QconvError(
            f"{name} holds no statistics of qconv, or it is damaged.", "pass a file that --save-stats wrote."
        ) from None


def _read_sketch(archive: zipfile.ZipFile, index: int) -> Sketch:
    arrays = {part: storage.read_member(archive, f"{index}/{part}.npy") for part in SKETCH_ARRAYS}
    sketch = sketch_from_arrays(arrays)
    _check_sketch(sketch)
    return sketch


def sketch_from_arrays(arrays: Mapping[str, NDArray[Any]]) -> Sketch:
    """The reverse of `sketch_to_arrays`."""
    sums, count = ExactSum(arrays["sums"]), int(arrays["count"][0])
    return Sketch(sums=sums, count=count, **{name: arrays[name] for name in PLAIN_ARRAYS})


MOST_COUNTED = 2**53
"""Numbers of a tensor: counts beyond would not be exact in float64, and their sums may overflow."""

MEAN_TOLERANCE = 1e-3

ROUNDING_OF_SUMS = 2.0**-24
"""By how much of its largest value a mean may lie beyond the extremes: this for each of the float32 numbers that were
added up one after the other, and MEAN_TOLERANCE."""


def _check_sketch(sketch: Sketch) -> None:
    """Raise ValueError where types or shapes do not go together, or where numbers contradict each other."""
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
    _check_numbers(sketch)


def _check_numbers(sketch: Sketch) -> None:
    """Raise ValueError where no images can have given these numbers."""
    if not 0 <= sketch.count < MOST_COUNTED or sketch.counts.sum(dtype=np.float64) >= MOST_COUNTED:
        raise ValueError("counts")
    if not (np.isfinite([sketch.lows, sketch.highs]).all() and (sketch.lows <= sketch.highs).all()):
        raise ValueError("extremes")
    digits = sketch.sums.limbs[:-1]
    if ((digits < 0) | (digits >> LIMB_BITS > 0)).any():
        raise ValueError("sums")
    share = MEAN_TOLERANCE + ROUNDING_OF_SUMS * sketch.count / max(len(sketch.keys), 1)
    room = share * np.maximum(abs(sketch.lows), abs(sketch.highs)) + np.finfo(np.float32).tiny
    beyond = (sketch.means < sketch.lows - room) | (sketch.means > sketch.highs + room)
    if sketch.count and beyond.any():
        raise ValueError("sums")


# -- files -------------------------------------------------------------------------------------------------------------


def read_statistics(path: str | Path) -> Statistics:
    """The statistics in a file. Raises QconvError."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise QconvError(f"{path} cannot be read: {error.strerror}.", "check the path of the statistics.") from None
    return parse_statistics(data, str(path))


def write_statistics(statistics: Statistics, out: Path) -> None:
    """Write the whole file, or nothing. Raises QconvError."""
    storage.write_atomically(out, serialize_statistics(statistics))


def merge_statistics(paths: Sequence[str]) -> tuple[Statistics, int]:
    """The sum of several files, and how many pictures are in more than one of them.

    Raises QconvError where they are not of one model, one preprocessing and the same tensors.
    """
    parts = [read_statistics(path) for path in paths]
    for part, path in zip(parts[1:], paths[1:], strict=True):
        why = _describe_difference(parts[0], part)
        if why:
            raise QconvError(f"{path} and {paths[0]} do not add up: {why}.", "merge shards of one run's options only.")
    total = reduce(Statistics.merge, parts)
    keys = next(iter(total.sketches.values())).keys if total.sketches else np.zeros(0)
    return total, len(keys) - len(np.unique(keys))


@dataclass(frozen=True, slots=True)
class MergedStatistics:
    """What a sum of files holds.

    Attributes:
        output: Where it lies.
        model: The name of the model that was watched.
        pictures: How many are in it.
        repeated: How many of them are in more than one of the files, and count as often.
        tensors: Names of those that were watched.
    """

    output: str
    model: str
    pictures: int
    repeated: int
    tensors: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """What `--json` prints of it."""
        return {
            "schema": 1,
            "version": qconv.__version__,
            "output": self.output,
            "model": self.model,
            "pictures": self.pictures,
            "repeated": self.repeated,
            "tensors": len(self.tensors),
        }


def merge_files(paths: Sequence[str], out: Path, reporter: Reporter) -> MergedStatistics:
    """Write the sum of several files. Raises QconvError where they do not add up, or it cannot be written."""
    total, twice = merge_statistics(paths)
    if twice:
        reporter.warn(f"{format_count(twice, 'picture')} came more than once, and count as often.")
    write_statistics(total, out)
    return MergedStatistics(str(out), total.name, total.pictures, twice, tuple(total.sketches))


def _describe_difference(one: Statistics, other: Statistics) -> str:
    if one.model != other.model:
        return f"they are of different models ({one.name} and {other.name})"
    if _describe_changed_fields(one.preprocessing, other.preprocessing):
        return f"the preprocessing differs ({_describe_changed_fields(one.preprocessing, other.preprocessing)})"
    if one.pixels != other.pixels:
        return "--embed-preprocessing differs"
    if one.sketches.keys() != other.sketches.keys():
        return "they watched different tensors"
    return ""


def _describe_changed_fields(one: Mapping[str, Any] | None, other: Mapping[str, Any] | None) -> str:
    """The fields that differ, in words. A preset's name does not count, its numbers do."""
    if one is None or other is None:
        return "" if one is other else "one is of ready-made samples"
    names = [name for name in one if name != "preset" and one.get(name) != other.get(name)]
    return ", ".join(f"{name} {one.get(name)} and {other.get(name)}" for name in names)


def require_same_model(statistics: Statistics, path: str, *, model: str, name: str) -> None:
    """Raise QconvError unless the statistics are of this model. model: its hash, see `hash_model`."""
    if statistics.model != model:
        raise QconvError(
            f"{path} is of another model ({statistics.name}) than {name}.", "write it again with --save-stats."
        )


def require_same_preprocessing(statistics: Statistics, path: str, wanted: Mapping[str, Any] | None) -> None:
    """Raise QconvError unless the images had this preprocessing. wanted: as `preprocessing_to_dict` returns it."""
    if _describe_changed_fields(statistics.preprocessing, wanted):
        raise QconvError(
            f"{path} was made with another preprocessing "
            f"({_describe_changed_fields(statistics.preprocessing, wanted)}).",
            "leave the preprocessing options out, or write it again with --save-stats.",
        )


def require_same_pixels(statistics: Statistics, path: str, pixels: str | None) -> None:
    """Raise QconvError unless the network took the same input: pixels of this layout, or floats (None)."""
    if statistics.pixels != pixels:
        was = "without --embed-preprocessing" if statistics.pixels is None else f"of {statistics.pixels} pixels"
        raise QconvError(f"{path} was made {was}.", "write it again with --save-stats and these options.")


def require_observed_tensors(statistics: Statistics, path: str, names: Iterable[str]) -> None:
    """Raise QconvError unless all these tensors were observed."""
    missing = [name for name in names if name not in statistics.sketches]
    if missing:
        raise QconvError(
            f"{path} lacks {format_count(len(missing), 'tensor')} that these options need, such as {missing[0]}.",
            "write it again with --save-stats and these options.",
        )


LENGTH_BYTES = 8


@dataclass(slots=True)
class SketchSpool:
    """The sketches of single images on disk, in the order in which they were put."""

    file: IO[bytes]
    _places: list[tuple[int, int]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self._places)

    def put(self, sketches: Mapping[str, Sketch]) -> None:
        """Append one image's sketches. Raises QconvError where the disk is full."""
        block = zlib.compress(_pack_sketches(sketches), COMPRESSION_LEVEL)
        with _convert_os_errors():
            self._places.append((self.file.seek(0, 2), len(block)))
            self.file.write(block)

    def get(self, index: int) -> dict[str, Sketch]:
        """The sketches of image `index`, by tensor."""
        place, length = self._places[index]
        with _convert_os_errors():
            self.file.seek(place)
            return _unpack_sketches(zlib.decompress(self.file.read(length)))


@contextlib.contextmanager
def open_sketch_spool() -> Iterator[SketchSpool]:
    """An empty spool among the system's temporary files, removed at the end."""
    with contextlib.ExitStack() as stack:
        with _convert_os_errors():
            file = stack.enter_context(tempfile.TemporaryFile(prefix="qconv-"))
        yield SketchSpool(file)


def _pack_sketches(sketches: Mapping[str, Sketch]) -> bytes:
    """One block of bytes: names, types and shapes as JSON, then all numbers."""
    parts = [(name, part, a) for name, sketch in sketches.items() for part, a in sketch_to_arrays(sketch).items()]
    content = json.dumps([(name, part, a.dtype.str, a.shape) for name, part, a in parts]).encode()
    return b"".join([len(content).to_bytes(LENGTH_BYTES), content, *(a.tobytes() for _, _, a in parts)])


def _unpack_sketches(data: bytes) -> dict[str, Sketch]:
    start = LENGTH_BYTES + int.from_bytes(data[:LENGTH_BYTES])
    found: dict[str, dict[str, NDArray[Any]]] = {}
    for name, part, kind, shape in json.loads(data[LENGTH_BYTES:start]):
        array = np.frombuffer(data, kind, prod(shape), start).reshape(shape)
        found.setdefault(name, {})[part] = array
        start += array.nbytes
    return {name: sketch_from_arrays(arrays) for name, arrays in found.items()}


@contextlib.contextmanager
def _convert_os_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        why = "is full" if full else f"cannot be written to: {error.strerror}"
        raise QconvError(
            f"The folder for temporary files, {tempfile.gettempdir()}, {why}.", "free some space, or set TMPDIR."
        ) from None
