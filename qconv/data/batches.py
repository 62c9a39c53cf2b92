"""Reads images and samples ahead of their use, and joins them into batches as a network takes them.

A `PixelCache` keeps what decoding has made, in bytes, so that further passes only normalize.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconv.config.choices import SAMPLE_SUFFIXES
from qconv.config.data_options import Preprocessing
from qconv.data.dataset import Listing, suffix_of
from qconv.data.images import UnreadableImage, import_decoders, load_pixels
from qconv.data.preprocessing import WHOLE_PIXEL_TYPES, InputSpec, cast_pixels, normalize_pixels
from qconv.data.samples import describe_npz, load_sample
from qconv.errors import QconvError, format_count, format_shape
from qconv.reporter import Reporter
from qconv.storage import ArrayStore, StoredArray, prefetch

CACHED_BYTES = 2**24
"""Bytes of pixels that a cache holds in memory; more go to temporary files."""

_Sample = dict[str, NDArray[Any]]

_SampleIterator = Generator[_Sample, None, None]

_SampleFutures = Generator[Future[_Sample], None, None]


class PixelCache:
    """The pixels of images that were decoded and brought to size, by their files and how that was done.

    Threads may share it. Its temporary files go when it does.
    """

    def __init__(self, limit: int = CACHED_BYTES) -> None:
        self._store, self._turn = ArrayStore(limit), threading.Lock()
        self._held: dict[tuple[Path, Preprocessing], StoredArray] = {}
        weakref.finalize(self, self._store.close)

    def load(self, path: Path, prep: Preprocessing) -> NDArray[np.uint8]:
        """Same as `load_pixels`, decoded once."""
        key = path, replace(prep, preset="", source="", scale=1.0, mean=(0.0,), std=(1.0,))
        if key not in self._held:
            pixels = load_pixels(path, prep)
            with self._turn:
                self._held[key] = self._store.put(pixels)
            return pixels
        return self._held[key].get()


def iter_batches(
    listing: Listing,
    inputs: Sequence[InputSpec],
    prep: Preprocessing | None,
    *,
    batch: int,
    workers: int,
    reporter: Reporter,
    progress: Callable[[int], None] | None = None,
    lost: Callable[[Path], None] = lambda path: None,
    cache: PixelCache | None = None,
) -> Generator[dict[str, NDArray[Any]], None, None]:
    """Yield {input name: (n, ...) array of the wanted type} in the listing's order; n is `batch`, the last may be less.

    Up to 2 * workers + batch files are decoded ahead, so that reading overlaps the caller's work. progress receives
    how many files are done so far. `reporter` and `lost` hear of an undecodable file, which is left out; more than a
    tenth of them, and a sample of the wrong shape, raise QconvError. prep may be None where all files are .npy or .npz.
    Closing the generator stops the threads. cache: where decoded pixels are kept for further passes.
    """
    first = next((path for path in listing.paths if suffix_of(path) not in SAMPLE_SUFFIXES), None)
    if first is not None and len(inputs) != 1:
        raise QconvError(f"{first} is one picture but the network has {len(inputs)} inputs.", describe_npz(inputs))
    if first is not None and prep is None:
        raise QconvError(f"{first} is a picture but the network takes none.", "pass .npy or .npz samples.")
    decode = load_pixels if cache is None else cache.load
    load = partial(_load_inputs, inputs=inputs, prep=prep, listing=listing, decode=decode)
    import_decoders()
    pending = prefetch(load, listing.paths, workers=workers, depth=2 * workers + batch)
    return _batch_inputs(
        _skip_unreadable(pending, max(len(listing.paths), listing.whole), reporter, progress, lost), inputs, batch
    )


def _load_inputs(
    path: Path,
    inputs: Sequence[InputSpec],
    prep: Preprocessing | None,
    listing: Listing,
    decode: Callable[[Path, Preprocessing], NDArray[np.uint8]],
) -> dict[str, NDArray[Any]]:
    if prep is None or suffix_of(path) in SAMPLE_SUFFIXES:
        return load_sample(path, inputs, listing)
    pixels = decode(path, prep)
    if prep.keeps_pixels and inputs[0].dtype in WHOLE_PIXEL_TYPES:
        return {inputs[0].name: pixels.astype(inputs[0].dtype, copy=False)}
    return {inputs[0].name: cast_pixels(normalize_pixels(pixels, prep), inputs[0].dtype)}


def _skip_unreadable(
    pending: _SampleFutures,
    total: int,
    reporter: Reporter,
    progress: Callable[[int], None] | None,
    lost: Callable[[Path], None],
) -> _SampleIterator:
    """Yield what could be decoded; raise QconvError as soon as more than a tenth of all files could not."""
    bad: list[UnreadableImage] = []
    with closing(pending):
        for done, future in enumerate(pending, 1):
            row = None
            try:
                row = future.result()
            except UnreadableImage as error:
                bad.append(error)
                lost(error.path)
                reporter.warn(f"skipped {error.path}: cannot be decoded ({error.reason})")
                if 10 * len(bad) > total:
                    raise _too_many_unreadable_error(bad, done, total) from error
            if progress is not None:
                progress(done)
            if row is not None:
                yield row


def _too_many_unreadable_error(bad: Sequence[UnreadableImage], done: int, total: int) -> QconvError:
    so_far = "" if done == total else f" among the first {done}"
    fact = f"{len(bad)} of {format_count(total, 'picture')} cannot be decoded{so_far}, which is more than a tenth"
    hint = "remove what is broken, or leave it out with --glob."
    return QconvError(f"{fact}; the first is {bad[0].path} ({bad[0].reason}).", hint)


def _batch_inputs(rows: _SampleIterator, inputs: Sequence[InputSpec], batch: int) -> _SampleIterator:
    """Join rows into batches along a new axis 0."""
    waiting: list[_Sample] = []
    with closing(rows):
        for row in rows:
            waiting.append(row)
            if len(waiting) == batch:
                yield _stack_inputs(waiting, inputs)
    if waiting:
        yield _stack_inputs(waiting, inputs)


def _stack_inputs(rows: list[_Sample], inputs: Sequence[InputSpec]) -> _Sample:
    """Stack the rows and empty the list, so that they are not held while the caller works on the batch."""
    for spec in inputs:
        shapes = sorted({row[spec.name].shape for row in rows})
        if len(shapes) > 1:
            fact = (
                f"samples for input '{spec.name}' differ in shape: {format_shape(shapes[0])} and "
                f"{format_shape(shapes[1])}."
            )
            raise QconvError(fact, "pass --batch 1, or bring them to one shape.")
    joined = {spec.name: np.stack([row[spec.name] for row in rows]) for spec in inputs}
    rows.clear()
    return joined
