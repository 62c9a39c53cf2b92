"""Summarizes a tensor over any number of images in a few hundred kilobytes, with no range needed beforehand.

    exactly     extremes of every channel, extremes of every image, sum of every channel
    histogram   of the upper 16 bits of float32 numbers: sign, exponent and 7 binary digits, so that a bin's width is
                1/128 to 1/256 of its place. Of about SAMPLED_ELEMENTS elements of an image, on a fixed grid.
    columns     of the MOST_COLUMNS images whose keys are least: all channels at a few places, side by side

Sketches add up bit for bit, whatever the batches, the order or the shards: images are ordered by keys, and sums are
exact:

    x = integer * 2^(32 k - 149 + offset),  offset in 0..31;  limb k collects integer * 2^offset

Sources: Agarwal et al. 2012, Mergeable Summaries; Cohen 1997 (a sample of fixed size by least hash); Kulisch and
Miranker 1981, Computer Arithmetic in Theory and Practice (the long accumulator).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Hashable
from dataclasses import dataclass, field
from enum import Flag, auto
from functools import cache, cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

LIMBS, LIMB_BITS = 10, 32

LEAST_EXPONENT = -149

MANTISSA_BITS = 24

MOST_ADDED_AT_ONCE = 128
"""Numbers of 55 bits that one int64 adds up before it must carry."""


@dataclass(slots=True)
class ExactSum:
    """Sums of C series of numbers. limbs: (LIMBS, C) int64, all but the last in 0 .. 2^32 - 1."""

    limbs: NDArray[np.int64]

    @classmethod
    def zeros(cls, count: int) -> ExactSum:
        """Nothing added yet to `count` series."""
        return cls(np.zeros((LIMBS, count), np.int64))

    def add(self, rows: ArrayLike) -> None:
        """Add float32 numbers (n, C), row by row. Raises ValueError where one is not finite."""
        numbers = np.asarray(rows, np.float32)
        if not np.isfinite(numbers).all():
            raise ValueError("only finite numbers have an exact sum")
        for start in range(0, len(numbers), MOST_ADDED_AT_ONCE):
            self._add(numbers[start : start + MOST_ADDED_AT_ONCE])
            self._carry()

    def _add(self, numbers: NDArray[np.float32]) -> None:
        _, exponents = np.frexp(numbers)
        places = np.maximum(exponents - MANTISSA_BITS, LEAST_EXPONENT) - LEAST_EXPONENT  # (n, C), of the last digit
        limb, offset = places >> 5, places & 31
        # float64, in which neither the digits nor the shift lose anything
        shifted = np.ldexp(numbers.astype(np.float64), offset - places - LEAST_EXPONENT).astype(np.int64)
        for k in range(int(limb.min(initial=LIMBS)), int(limb.max(initial=-1)) + 1):
            self.limbs[k] += np.where(limb == k, shifted, 0).sum(axis=0)

    def _carry(self) -> None:
        for k in range(LIMBS - 1):
            over = self.limbs[k] >> LIMB_BITS
            self.limbs[k] -= over << LIMB_BITS
            self.limbs[k + 1] += over

    def merge(self, other: ExactSum) -> ExactSum:
        """The sums of both together."""
        both = ExactSum(self.limbs + other.limbs)
        both._carry()
        return both

    def overall(self) -> ExactSum:
        """One sum of all series."""
        total = ExactSum(np.zeros((LIMBS, 1), np.int64))
        for column in range(self.limbs.shape[1]):
            total = total.merge(ExactSum(self.limbs[:, column : column + 1]))
        return total

    @property
    def values(self) -> NDArray[np.float64]:
        """The sums, (C,)."""
        weights = np.ldexp(1.0, LIMB_BITS * np.arange(LIMBS) + LEAST_EXPONENT)  # (LIMBS,)
        total = np.zeros(self.limbs.shape[1])
        # from the top, where a negative sum has its sign: the rest only adds to it
        for weight, limb in zip(weights[::-1], self.limbs[::-1], strict=True):
            total += weight * limb
        return total


SAMPLED_ELEMENTS = 4096
"""About how many elements of a tensor one image adds to the histogram."""

MOST_COLUMNS = 32

COLUMN_ELEMENTS = 2**14
"""About how many elements the columns of all images have together."""

PENDING_PICTURES = 16

BinCounts = tuple[NDArray[np.uint16], NDArray[np.int64]]

NO_COLUMNS = np.zeros((0, 0), np.float32)


class SketchContents(Flag):
    """What a sketch keeps beyond the extremes. Only what is asked for is computed."""

    EXTREMES = 0
    CHANNELS = auto()
    BINS = auto()
    COLUMNS = auto()
    ALL = CHANNELS | BINS | COLUMNS


@dataclass(frozen=True, slots=True)
class TensorView:
    """What a sketch takes of a tensor on one image.

    lows, highs: extremes of every channel (C,), or of all (1,).
    sums: (C,) float32, each of `count` numbers; empty where channels are not wanted.
    sample: (C, X) or (1, X), a part of the elements on a fixed grid.
    """

    lows: NDArray[np.float32]
    highs: NDArray[np.float32]
    sums: NDArray[np.float32]
    count: int
    sample: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Histogram:
    """A histogram without its empty bins.

    edges: (2, B) float64, lower and upper end of each bin, ascending and within the extremes.
    counts: (B,) int64.
    """

    edges: NDArray[np.float64]
    counts: NDArray[np.int64]

    @property
    def centres(self) -> NDArray[np.float64]:
        """The middle of each bin, (B,)."""
        return np.asarray(self.edges.mean(axis=0))

    @property
    def shares(self) -> NDArray[np.float64]:
        """The share of all elements that lies in each bin, (B,)."""
        return np.asarray(self.counts / self.counts.sum())

    def coarse(self, step: float) -> Histogram:
        """Join neighbouring bins that lie in one interval between multiples of `step`.

        Next to zero, where numbers crowd, only bins of one power of two are joined, and the bin of zero stays alone.
        """
        centres = self.centres
        interval = np.floor(centres / step)
        octave = np.frexp(centres)[1]
        near, zero = np.abs(centres) < step, np.abs(centres) < np.finfo(np.float32).tiny
        # a break wherever one of the three names of a bin's place changes
        names = np.stack(
            [np.where(near, 0, interval), np.where(near & ~zero, octave, 0), np.sign(centres) * near + zero]
        )
        starts = np.flatnonzero(np.concatenate([[True], (np.diff(names, axis=1) != 0).any(axis=0)]))
        ends = np.append(starts[1:], len(centres)) - 1
        edges = np.stack([self.edges[0][starts], self.edges[1][ends]])
        return Histogram(edges, np.add.reduceat(self.counts, starts))


@dataclass(slots=True)
class Sketch:
    """The statistics of one tensor over any number of images, mergeable bit for bit.

    lows, highs: (C,) float32, extremes of each channel.
    sums, count: sum of each channel, and of how many numbers; 0 where channels were not wanted.
    codes, counts: (B,) uint16 and int64: the bins that hold something, ascending, with how many elements each.
    keys, pictures: (P,) uint64, ascending, one an image; (P, 2) float32, lowest and highest value of each image.
    column_keys, columns: (K,) ascending, and (K, places, C).
    ranges: those that were found, by what they were asked for.
    """

    lows: NDArray[np.float32]
    highs: NDArray[np.float32]
    sums: ExactSum
    count: int
    codes: NDArray[np.uint16]
    counts: NDArray[np.int64]
    keys: NDArray[np.uint64]
    pictures: NDArray[np.float32]
    column_keys: NDArray[np.uint64]
    columns: NDArray[np.float32]
    ranges: dict[Hashable, tuple[float, float]] = field(default_factory=dict, init=False, compare=False, repr=False)

    @property
    def low(self) -> float:
        """The least value of the tensor."""
        return float(self.lows.min())

    @property
    def high(self) -> float:
        """The largest value of the tensor."""
        return float(self.highs.max())

    @property
    def means(self) -> NDArray[np.float64]:
        """The mean of each channel, (C,)."""
        return self.sums.values / max(self.count, 1)

    def histogram(self) -> Histogram:
        """The histogram of the tensor. Raises ValueError where no bins were wanted."""
        if not self.codes.size:
            raise ValueError("this sketch has no histogram")
        return _decode_histogram(self.codes, self.counts, self.low, self.high)

    def merge(self, other: Sketch) -> Sketch:
        """The sketch of both sets of images."""
        if self.lows.shape != other.lows.shape:
            # axis 1 grows with the picture: then there are no channels to speak of
            return self._overall().merge(other._overall())
        return Sketch(
            np.minimum(self.lows, other.lows),
            np.maximum(self.highs, other.highs),
            self.sums.merge(other.sums),
            self.count + other.count,
            *_add_counts(self.codes, self.counts, other.codes, other.counts),
            *_sort_by_key(np.concatenate([self.keys, other.keys]), np.concatenate([self.pictures, other.pictures])),
            *_keep_least_keys(
                np.concatenate([self.column_keys, other.column_keys]), np.concatenate([self.columns, other.columns])
            ),
        )

    def join(self, other: Sketch) -> Sketch:
        """The sketch of a tensor that holds what both hold on the same images, without its channels."""
        both = self._overall().merge(other._overall())
        both.keys, first = np.unique(both.keys, return_index=True)
        both.pictures = np.stack(
            [np.minimum.reduceat(both.pictures[:, 0], first), np.maximum.reduceat(both.pictures[:, 1], first)], axis=1
        )
        return both

    def _overall(self) -> Sketch:
        channels = len(self.lows)
        low, high = self.lows.min(keepdims=True), self.highs.max(keepdims=True)
        columns = np.zeros((0, columns_per_image(1), 1), np.float32)
        none = np.zeros(0, np.uint64)
        sums, count = self.sums.overall(), self.count * channels
        return Sketch(low, high, sums, count, self.codes, self.counts, self.keys, self.pictures, none, columns)


@dataclass
class SketchBuilder:
    """Collects the views of one tensor, and merges them into a sketch some at a time: much faster than one by one."""

    want: SketchContents
    _done: Sketch | None = None
    _views: list[TensorView] = field(default_factory=list)
    _halves: list[NDArray[np.uint16]] = field(default_factory=list)
    _columns: list[NDArray[np.float32]] = field(default_factory=list)
    _column_keys: list[int] = field(default_factory=list)
    _keys: list[int] = field(default_factory=list)

    def add(self, view: TensorView, key: int, halves: NDArray[np.uint16] | None = None) -> None:
        """Add one image's view, whose sample may be overwritten afterwards. halves: upper 16 bits of it, if known."""
        if self._views and self._views[-1].lows.shape != view.lows.shape:
            self._flush()
        self._keys.append(key)
        if self._bins:
            self._halves.append(upper_halves(view.sample) if halves is None else halves)
        if self._wants_columns and self._is_among_the_least(key):
            self._columns.append(pick_columns(view.sample))
            self._column_keys.append(key)
        self._views.append(TensorView(view.lows, view.highs, view.sums, view.count, NO_COLUMNS))
        if len(self._views) >= PENDING_PICTURES:
            self._flush()

    def sketch(self) -> Sketch:
        """The sketch of all views so far, at least one. Raises ValueError where a sum is no finite number."""
        self._flush()
        assert self._done is not None
        return self._done

    @cached_property
    def _bins(self) -> bool:
        return SketchContents.BINS in self.want

    @cached_property
    def _wants_columns(self) -> bool:
        return SketchContents.COLUMNS in self.want

    def _is_among_the_least(self, key: int) -> bool:
        if self._done is None or len(self._done.column_keys) < MOST_COLUMNS:
            return True
        return key <= int(self._done.column_keys[-1])

    def _flush(self) -> None:
        if self._views:
            found = self._worked_in()
            self._done = found if self._done is None else self._done.merge(found)
            for pending in (self._views, self._halves, self._columns, self._column_keys, self._keys):
                pending.clear()

    def _worked_in(self) -> Sketch:
        lows, highs = (np.stack(ends) for ends in zip(*((v.lows, v.highs) for v in self._views), strict=True))
        channels = lows.shape[1]
        sums, count = ExactSum.zeros(channels), 0
        if SketchContents.CHANNELS in self.want:
            sums.add(np.stack([view.sums for view in self._views]))
            count = sum(view.count for view in self._views)
        columns = (
            np.stack(self._columns)
            if self._columns
            else np.zeros((0, columns_per_image(channels), channels), np.float32)
        )
        keys = np.array(self._keys, np.uint64)
        return Sketch(
            lows.min(axis=0),
            highs.max(axis=0),
            sums,
            count,
            *_count_codes(np.concatenate(self._halves or [np.zeros(0, np.uint16)])),
            *_sort_by_key(keys, np.stack([lows.min(axis=1), highs.max(axis=1)], axis=1)),
            *_keep_least_keys(np.array(self._column_keys, np.uint64), columns),
        )


# -- codes: the upper half of a float32, its sign moved to the end -----------------------------------------------------


def upper_halves(x: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Sign, exponent and 7 binary digits of every number, (n,)."""
    both = np.ascontiguousarray(x, np.float32).reshape(-1).view(np.uint16)
    return both[sys.byteorder == "little" :: 2].copy()


def bin_edges(codes: NDArray[np.integer]) -> NDArray[np.float64]:
    """Lower and upper end of each bin, (2, B)."""
    magnitude, negative = np.asarray(codes, np.uint32) >> 1, np.asarray(codes & 1, bool)
    near, far = (
        (ends << 16).astype(np.uint32).view(np.float32).astype(np.float64) for ends in (magnitude, magnitude + 1)
    )
    return np.stack([np.where(negative, -far, near), np.where(negative, -near, far)])


def count_bins(x: NDArray[np.float32]) -> BinCounts:
    """The bins that the numbers of x lie in, ascending, and how many lie in each."""
    return _count_codes(upper_halves(x))


def make_histogram(x: NDArray[np.floating]) -> Histogram:
    """The histogram of all numbers of x."""
    return _decode_histogram(
        *_count_codes(upper_halves(x.astype(np.float32, copy=False))), float(x.min()), float(x.max())
    )


def _count_codes(halves: NDArray[np.uint16]) -> BinCounts:
    """The distinct codes, ascending, and how often each occurs."""
    bins = np.bincount(halves)
    found = np.flatnonzero(bins)
    codes = (found << 1 | found >> 15).astype(np.uint16)
    order = np.argsort(codes)
    return codes[order], bins[found[order]]


def _add_counts(
    codes: NDArray[np.uint16], counts: NDArray[np.int64], more: NDArray[np.uint16], of: NDArray[np.int64]
) -> BinCounts:
    both = np.concatenate([codes, more])
    order = np.argsort(both, kind="stable")
    both = both[order]
    starts = np.flatnonzero(np.diff(both, prepend=both[:1] + 1))
    return both[starts], np.add.reduceat(np.concatenate([counts, of])[order], starts) if both.size else counts


def _decode_histogram(codes: NDArray[np.uint16], counts: NDArray[np.int64], low: float, high: float) -> Histogram:
    ends = bin_edges(codes)
    order = np.argsort(ends[0], kind="stable")
    return Histogram(np.clip(ends[:, order], low, high), counts[order])


def sampling_stride(elements: int, among: int) -> int:
    """The step along `among` places that keeps about SAMPLED_ELEMENTS of `elements`; coprime to the length of rows."""
    step = max(1, min(among, -(-elements // SAMPLED_ELEMENTS)))
    while step > 1 and math.gcd(step, among) > 1:
        step += 1
    return step


# -- columns -----------------------------------------------------------------------------------------------------------


def columns_per_image(channels: int) -> int:
    """How many columns an image adds."""
    return max(1, COLUMN_ELEMENTS // (MOST_COLUMNS * channels))


def pick_columns(sample: NDArray[np.float32]) -> NDArray[np.float32]:
    """Columns of a sample: (C, X) -> (places, C), evenly spread, repeated where X is smaller."""
    return sample[:, _places_of_columns(*sample.shape)].T.copy()


@cache
def _places_of_columns(channels: int, length: int) -> NDArray[np.int64]:
    count = columns_per_image(channels)
    return (np.arange(count) * 2 + 1) * length // (2 * count)


# -- pictures in the order of their keys -------------------------------------------------------------------------------


def _sort_by_key(
    keys: NDArray[np.uint64], pictures: NDArray[np.float32]
) -> tuple[NDArray[np.uint64], NDArray[np.float32]]:
    # equal keys are equal pictures, but for a freak of hashing
    order = np.lexsort((pictures[:, 1], pictures[:, 0], keys))
    return keys[order], pictures[order]


def _keep_least_keys(
    keys: NDArray[np.uint64], columns: NDArray[np.float32]
) -> tuple[NDArray[np.uint64], NDArray[np.float32]]:
    order = np.argsort(keys, kind="stable")[:MOST_COLUMNS]
    return keys[order], columns[order]
