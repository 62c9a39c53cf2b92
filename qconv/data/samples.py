"""Reads ready-made samples, .npy and .npz files or given arrays, as the inputs of a network."""

from __future__ import annotations

import threading
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconv import storage
from qconv.config.choices import SAMPLE_SUFFIXES
from qconv.data.dataset import Listing, suffix_of
from qconv.data.images import UnreadableImage, error_reason
from qconv.data.preprocessing import InputSpec, shape_matches
from qconv.errors import QconvError, format_shape


def load_sample(path: Path, inputs: Sequence[InputSpec], listing: Listing) -> dict[str, NDArray[Any]]:
    """Read one .npy or .npz file: {input name: array without the batch axis, of the wanted type}.

    listing: of which it is; it may give what would be in the file.
    """
    arrays = _read_arrays(path, inputs) if listing.read is None else listing.read(path)
    names = {spec.name for spec in inputs}
    for fact, wrong in (("lacks", names - arrays.keys()), ("holds unknown", arrays.keys() - names)):
        if wrong:
            hint = f"name its arrays after the network's inputs: {', '.join(sorted(names))}."
            raise QconvError(f"{listing.in_words(path)} {fact} {', '.join(sorted(wrong))}.", hint)
    hint = SAMPLE_FILE_HINT if listing.read is None else GIVEN_SAMPLE_HINT
    return {spec.name: _check_array(arrays[spec.name], spec, listing.in_words(path), hint) for spec in inputs}


SAMPLE_FILE_HINT = "store one sample a file, with or without the leading batch axis of 1."

GIVEN_SAMPLE_HINT = "give arrays with the batch as axis 0, or one sample without it."


MOST_SAMPLE_BYTES = 1 << 30
"""Of one .npz sample, unpacked: a picture of 8,000 by 8,000 pixels in float32 takes less."""

_HEADER_LOCK = threading.Lock()
"""Headers are Python literals, and parsing two of them at the same time may fail (CPython issue 106905)."""


def _read_arrays(path: Path, inputs: Sequence[InputSpec]) -> dict[str, NDArray[Any]]:
    if not path.is_file():
        raise UnreadableImage(path, "no such file")
    try:
        with _HEADER_LOCK, path.open("rb") as file:
            magic = file.read(len(storage.ZIP_MAGICS[0]))
            file.seek(0)
            if magic in storage.ZIP_MAGICS:
                with zipfile.ZipFile(file) as archive:
                    storage.check_unpacked_size(archive, MOST_SAMPLE_BYTES)
                    names = archive.namelist()
                    return {name.removesuffix(".npy"): storage.read_member(archive, name) for name in names}
            loaded = storage.read_npy(file, path.stat().st_size)
    except MemoryError:
        raise QconvError(f"{path} needs more memory than there is.", "free some memory.") from None
    except Exception as error:  # a stranger's bytes again: ValueError, EOFError, BadZipFile, zlib.error
        raise UnreadableImage(path, error_reason(error)) from error
    if len(inputs) != 1:
        raise QconvError(f"{path} holds one array but the network has {len(inputs)} inputs.", describe_npz(inputs))
    return {inputs[0].name: loaded}


def split_whole_batches(listing: Listing, inputs: Sequence[InputSpec], most: int | None) -> Listing:
    """List the rows of files that hold a whole batch of a network whose batch is fixed, each as a sample of its own.

    A row is called `FILE/INDEX.npy`. Files of one sample stay as they are. most: samples in all, None for no limit.
    """
    sizes = {spec.shape[0] if spec.shape else None for spec in inputs}
    size = sizes.pop()
    if listing.read is not None or size is None or size == 1 or sizes:
        return listing
    samples = [path for path in listing.paths if suffix_of(path) in SAMPLE_SUFFIXES]
    whole = {path for path in samples if _holds_batch(path, inputs)}
    if not whole:
        return listing
    rows = ([path / f"{row}.npy" for row in range(size)] if path in whole else [path] for path in listing.paths)
    paths = tuple(path for part in rows for path in part)[:most]
    return replace(listing, paths=paths, found=listing.found + (size - 1) * len(whole), read=partial(_read_row, inputs))


def _holds_batch(path: Path, inputs: Sequence[InputSpec]) -> bool:
    """Whether each array has exactly the shape of its input. A file that is none is told of when it is read."""
    try:
        with _HEADER_LOCK, path.open("rb") as file:
            if suffix_of(path) == ".npy":
                shapes = {inputs[0].name: storage.read_npy_shape(file)}
            else:
                with zipfile.ZipFile(file) as archive:
                    shapes = {}
                    for name in archive.namelist():
                        with archive.open(name) as member:
                            shapes[name.removesuffix(".npy")] = storage.read_npy_shape(member)
    except Exception:  # a stranger's bytes
        return False
    return shapes.keys() == {spec.name for spec in inputs} and all(
        shape_matches(shapes[spec.name], spec.shape) for spec in inputs
    )


def _read_row(inputs: Sequence[InputSpec], path: Path) -> dict[str, NDArray[Any]]:
    if not path.parent.is_file():
        return _read_arrays(path, inputs)
    return {name: array[int(path.stem)] for name, array in _read_arrays(path.parent, inputs).items()}


def describe_npz(inputs: Sequence[InputSpec]) -> str:
    """How to write samples of several inputs, as a hint."""
    keywords = ", ".join(f"'{spec.name}': ..." for spec in inputs)
    return f"write one .npz file a sample: np.savez('0.npz', **{{{keywords}}})."


def _check_array(array: NDArray[Any], spec: InputSpec, told: str, hint: str) -> NDArray[Any]:
    """The sample without the batch axis, of the wanted type. told: what an error calls it; hint: of another shape."""
    batched = array.ndim == len(spec.shape) and array.shape[:1] == (1,)
    sample = array[0] if batched else array
    if not spec.shape or not shape_matches((1, *sample.shape), (None, *spec.shape[1:])):
        if spec.shape and array.shape == spec.shape:
            fact = f"{told} is no sample of input '{spec.name}': the inputs have no batch in common."
            raise QconvError(fact, "export the model with the batch as axis 0 of all inputs, or with one input.")
        takes = format_shape(spec.shape) if spec.shape else "a number without a batch axis"
        raise QconvError(
            f"{told} has shape {format_shape(array.shape)} for input '{spec.name}', which takes {takes}.", hint
        )
    # Any float may become the wanted float. Integers into a float network are most likely pixels not yet normalised.
    same_kind = array.dtype.kind == spec.dtype.kind
    floats = same_kind and spec.dtype.kind == "f"
    if not floats and not (same_kind and np.can_cast(array.dtype, spec.dtype)):
        fact = f"{told} holds {array.dtype} for input '{spec.name}', which takes {spec.dtype}."
        raise QconvError(fact, f"store it as {spec.dtype}, preprocessed as the network wants it.")
    with np.errstate(over="ignore"):  # becomes infinite and is told below
        sample = np.ascontiguousarray(sample, dtype=spec.dtype).reshape(sample.shape)
    if floats and not np.isfinite(sample).all():
        raise QconvError(f"{told} holds NaN or infinity for input '{spec.name}'.", "mend the sample, or remove it.")
    return sample
