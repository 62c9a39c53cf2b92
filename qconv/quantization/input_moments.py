"""This module extracts the inputs of a layer as rows (im2col) and accumulates their first and second moments.

    out[g, n, o] = sum over j of rows[g, n, j] * weight[g, o, j] + bias        j = input channel, then kernel position
    Conv           i = o * stride - pad + k * dilation
    ConvTranspose  i = (o + pad - k * dilation) / stride, where that is whole; zero outside
    Gemm, MatMul   whole rows: all axes but the last are positions
    H = E[x_q x_q^T]      C = E[x_f x_q^T]      means m_f, m_q removed

Sums are of rows less a first guess of their mean, as float32 would lose the difference. The rows of some images are
held out, unsummed, to validate by; rows of an image that was summed would flatter, as rows of one image are alike.
Layers with many inputs are divided into blocks, as if these were independent, so that all of them together stay below
MOST_IN_BLOCKS numbers: a K x K matrix would need gigabytes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconv.ir.model import Node, attribute

Float64 = NDArray[np.float64]

Float32 = NDArray[np.float32]

LARGEST_BLOCK = 2304
"""Inputs of a block, at most: 42 MB a matrix in float64. A Conv of 3 x 3 on 256 channels is just whole."""

MOST_IN_BLOCKS = 2 * LARGEST_BLOCK**2
"""Numbers in all blocks of H, and of C."""

NUMBERS_AT_ONCE = 2**21
"""Numbers that are summed in one product."""

HELD_OUT_INTERVAL = 8
"""One piece in so many is held out; one of all where there are fewer."""


@dataclass(frozen=True, slots=True)
class MomentBlock:
    """The moments of a block of inputs. part: their indices. hessian: H, cross: C; (G, K, K) both."""

    part: slice
    hessian: Float32
    cross: Float32


@dataclass(frozen=True, slots=True)
class InputMoments:
    """The moments of a layer's inputs in both networks.

    float_mean, mean: m_f and m_q, (G, K).
    kept: held-out rows of both networks (G, n, K), with the means of all others removed.
    count: how many these others are.
    """

    blocks: list[MomentBlock]
    float_mean: Float64
    mean: Float64
    kept: tuple[Float32, Float32]
    count: int

    @property
    def is_finite(self) -> bool:
        """Whether all squares fit into float32."""
        return all(bool(np.isfinite(x).all()) for block in self.blocks for x in (block.hessian, block.cross))

    def with_means(self) -> InputMoments:
        """The same with means left in, for a layer without a bias: nothing takes back what rounding does to them."""
        blocks = [
            MomentBlock(
                block.part,
                block.hessian + _outer(self.mean[:, block.part], self.mean[:, block.part]),
                block.cross + _outer(self.float_mean[:, block.part], self.mean[:, block.part]),
            )
            for block in self.blocks
        ]
        float_rows, rows = (
            apart + mean[:, None].astype(np.float32)
            for apart, mean in zip(self.kept, (self.float_mean, self.mean), strict=True)
        )
        nothing = np.zeros_like(self.mean)
        return InputMoments(blocks, nothing, nothing, (float_rows, rows), self.count)

    def joined(self, other: InputMoments) -> InputMoments:
        """The moments of both about the mean of each: of layers that share weights, but have biases of their own."""
        count = self.count + other.count
        share = self.count / count

        def mix(one: Float64, another: Float64) -> Float64:
            return share * one + (1 - share) * another

        def mix_moments(one: Float32, another: Float32) -> Float32:
            return np.float32(share) * one + np.float32(1 - share) * another

        blocks = [
            MomentBlock(a.part, mix_moments(a.hessian, b.hessian), mix_moments(a.cross, b.cross))
            for a, b in zip(self.blocks, other.blocks, strict=True)
        ]
        floats, rows = (np.concatenate(pair, axis=1) for pair in zip(self.kept, other.kept, strict=True))
        means = mix(self.float_mean, other.float_mean), mix(self.mean, other.mean)
        return InputMoments(blocks, *means, (floats, rows), count)


def accumulate_moments(
    pairs: Iterable[tuple[Float32, Float32]], share: int = HELD_OUT_INTERVAL, *, means_alone: bool = False
) -> InputMoments:
    """Accumulate the moments of rows.

    Args:
        pairs: (x_f, x_q), (G, n, K) both, piece by piece; at least one row. An image must not be in several pieces.
        share: one piece in so many is held out.
        means_alone: whether no blocks are wanted, which take by far the most time.
    """
    kept: list[tuple[Float32, Float32]] = []

    def summed() -> Iterator[tuple[Float32, Float32]]:
        for index, (float_rows, rows) in enumerate(pairs):
            if is_held_out(index, share):
                kept.append((float_rows, rows))
            else:
                yield float_rows, rows

    sums: _MomentSums | None = None
    for float_rows, rows in _batch_pieces(summed()):
        if sums is None:
            sums = _MomentSums(float_rows, rows, means_alone=means_alone)
        sums.add(float_rows, rows)
    assert sums is not None
    return sums.finished(kept)


def choose_block_size(inputs: int) -> int:
    """The largest block, in inputs, of a layer that has so many."""
    return LARGEST_BLOCK if inputs <= LARGEST_BLOCK else min(LARGEST_BLOCK, max(1, MOST_IN_BLOCKS // inputs))


def is_held_out(index: int, share: int = HELD_OUT_INTERVAL) -> bool:
    """Whether the rows of this piece are held out."""
    return index % share == share - 1


def choose_held_out_interval(pieces: int) -> int:
    """The share to hold out of so many pieces, as one in N: none of a single one."""
    return max(2, min(HELD_OUT_INTERVAL, pieces))


def split_by_image(floats: Float32, rows: Float32, pieces: int) -> Iterator[tuple[Float32, Float32]]:
    """Split the rows (G, n, K) of a batch in two networks by image, of which there are `pieces`."""
    ends = np.linspace(0, rows.shape[1], pieces + 1).astype(int)
    for start, end in itertools.pairwise(ends.tolist()):
        if end > start:
            yield floats[:, start:end], rows[:, start:end]


def _batch_pieces(pairs: Iterable[tuple[Float32, Float32]]) -> Iterator[tuple[Float32, Float32]]:
    """Join pieces until they have about NUMBERS_AT_ONCE numbers."""
    waiting: list[tuple[Float32, Float32]] = []
    for pair in pairs:
        waiting.append(pair)
        if sum(rows.size for _, rows in waiting) >= NUMBERS_AT_ONCE:
            yield _concatenate_pieces(waiting)
            waiting = []
    if waiting:
        yield _concatenate_pieces(waiting)


def _concatenate_pieces(pieces: list[tuple[Float32, Float32]]) -> tuple[Float32, Float32]:
    first, second = (np.concatenate(side, axis=1) for side in zip(*pieces, strict=True))
    return first, second


def _outer(one: Float64, another: Float64) -> Float32:
    """Products of means (G, K), (G, K, K)."""
    return (one[:, :, None] * another[:, None]).astype(np.float32)


class _MomentSums:
    def __init__(self, float_rows: Float32, rows: Float32, *, means_alone: bool) -> None:
        groups, _, inputs = rows.shape
        self._guess = rows.mean(axis=1, keepdims=True)  # of both: they are alike
        count = -(-inputs // choose_block_size(inputs))
        ends = np.linspace(0, inputs, 1 if means_alone else count + 1).astype(int)
        self._parts = [slice(int(a), int(b)) for a, b in itertools.pairwise(ends)]
        sizes = [part.stop - part.start for part in self._parts]
        self._own = [np.zeros((groups, k, k), np.float32) for k in sizes]
        self._cross = [np.zeros((groups, k, k), np.float32) for k in sizes]
        self._sums = np.zeros((2, groups, inputs))
        self._rows = 0

    def add(self, float_rows: Float32, rows: Float32) -> None:
        x_f, x_q = float_rows - self._guess, rows - self._guess
        self._rows += rows.shape[1]
        self._sums += [x.sum(axis=1, dtype=np.float64) for x in (x_f, x_q)]
        with np.errstate(over="ignore", invalid="ignore"):  # see InputMoments.is_finite
            for part, own, cross in zip(self._parts, self._own, self._cross, strict=True):
                q = x_q[:, :, part]
                own += np.swapaxes(q, 1, 2) @ q
                cross += np.swapaxes(x_f[:, :, part], 1, 2) @ q

    def finished(self, kept: list[tuple[Float32, Float32]]) -> InputMoments:
        mean_f, mean_q = self._sums / self._rows  # of what is left over the guess
        blocks = []
        with np.errstate(over="ignore", invalid="ignore"):
            for part, own, cross in zip(self._parts, self._own, self._cross, strict=True):
                own /= np.float32(self._rows)
                own -= _outer(mean_q[:, part], mean_q[:, part])
                cross /= np.float32(self._rows)
                cross -= _outer(mean_f[:, part], mean_q[:, part])
                blocks.append(MomentBlock(part, own, cross))
        guess = self._guess[:, 0].astype(np.float64)
        float_mean, mean = guess + mean_f, guess + mean_q
        empty = np.zeros((*mean.shape[:1], 0, mean.shape[1]), np.float32)
        apart = [
            np.concatenate([pieces[side] for pieces in kept] or [empty], axis=1) - centre[:, None].astype(np.float32)
            for side, centre in enumerate((float_mean, mean))
        ]
        return InputMoments(blocks, float_mean, mean, (apart[0], apart[1]), self._rows)


Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class _SpatialAxis:
    """One spatial axis of a Conv, or of a ConvTranspose (turned). before: the padding in front."""

    size: int
    kernel: int
    stride: int
    dilation: int
    before: int
    outputs: int
    turned: bool

    def inputs(self, at: Ints) -> Ints:
        """The input positions that the outputs `at` (p,) read, (p, kernel); -1 for padding."""
        taps = np.arange(self.kernel) * self.dilation
        if self.turned:
            reached = at[:, None] + self.before - taps
            found = np.where(reached % self.stride == 0, reached // self.stride, -1)
        else:
            found = at[:, None] * self.stride - self.before + taps
        return np.where((found >= 0) & (found < self.size), found, -1)


@dataclass(frozen=True, slots=True)
class PatchIndices:
    """Indices of some rows. index: flat positions in the input, (p, K). outside: which are padding; None if none."""

    index: Ints
    outside: NDArray[np.bool_] | None


@dataclass(frozen=True, slots=True)
class PatchExtractor:
    """Cuts the rows of one layer out of its input (im2col). axes: spatial ones; none for Gemm and MatMul."""

    groups: int
    axes: tuple[_SpatialAxis, ...]

    @classmethod
    def of(cls, node: Node, weight: Sequence[int], data: Sequence[int]) -> PatchExtractor:
        """The extractor for a layer with weights of this shape on an input of this shape (N, C, ...)."""
        if node.op_type not in ("Conv", "ConvTranspose"):
            return cls(1, ())
        count = len(data) - 2
        ends = zip(data[2:], weight[2:], range(count), strict=True)
        return cls(attribute(node, "group", 1), tuple(_make_axis(node, *end, count) for end in ends))

    def entries(self, data: Sequence[int]) -> int:
        """How many images of an input of this shape are cut at the same positions."""
        return data[0] if self.axes else 1

    def positions(self, data: Sequence[int]) -> int:
        """How many rows each of these images has."""
        return prod(axis.outputs for axis in self.axes) if self.axes else prod(data[:-1])

    def rows(self, x: NDArray[Any], places: PatchIndices, zero: int = 0) -> Float32:
        """Cut rows out of x (N, C, ...) at the same places of each n, or of x (..., C): (G, N * p, I/G * K).

        zero: the value of padding.
        """
        index, outside = places.index, places.outside
        if not self.axes:
            return np.asarray(x.reshape(1, -1, x.shape[-1])[:, index[:, 0]], np.float32)
        flat = x.reshape(*x.shape[:2], -1)[:, :, index]  # (N, C, p, K)
        if outside is not None:
            flat[:, :, outside] = zero
        apart = flat.reshape(len(x), self.groups, -1, *index.shape)
        return np.ascontiguousarray(apart.transpose(1, 0, 3, 2, 4), np.float32).reshape(
            self.groups, len(x) * len(index), -1
        )

    def places(self, at: Ints) -> PatchIndices:
        """The indices of the rows at the output positions (p,)."""
        if not self.axes:
            return PatchIndices(at[:, None], None)
        along = np.unravel_index(at, [axis.outputs for axis in self.axes])
        index, valid = np.zeros((len(at), 1), np.int64), np.ones((len(at), 1), bool)
        for axis, place in zip(self.axes, along, strict=True):
            found = axis.inputs(np.asarray(place))
            index = (index[:, :, None] * axis.size + np.maximum(found, 0)[:, None]).reshape(len(at), -1)
            valid = (valid[:, :, None] & (found >= 0)[:, None]).reshape(len(at), -1)
        return PatchIndices(index, None if valid.all() else ~valid)


def _make_axis(node: Node, size: int, kernel: int, index: int, count: int) -> _SpatialAxis:
    stride = (attribute(node, "strides") or [1] * count)[index]
    dilation = (attribute(node, "dilations") or [1] * count)[index]
    reach = dilation * (kernel - 1) + 1
    auto = attribute(node, "auto_pad", "NOTSET")
    pads = attribute(node, "pads") or [0] * (2 * count)
    before, behind = (0, 0) if auto != "NOTSET" else (pads[index], pads[index + count])
    if node.op_type == "Conv":
        if auto.startswith("SAME"):
            outputs = -(-size // stride)
            before = _padding_before(max((outputs - 1) * stride + reach - size, 0), upper=auto == "SAME_UPPER")
        else:
            outputs = (size + before + behind - reach) // stride + 1
        return _SpatialAxis(size, kernel, stride, dilation, before, outputs, turned=False)
    extra = (attribute(node, "output_padding") or [0] * count)[index]
    whole = stride * (size - 1) + extra + reach
    wanted = attribute(node, "output_shape")
    if wanted or auto.startswith("SAME"):
        outputs = wanted[-count:][index] if wanted else min(size * stride, whole)
        before = _padding_before(max(whole - outputs, 0), upper=auto == "SAME_UPPER")
    else:
        outputs = whole - before - behind
    return _SpatialAxis(size, kernel, stride, dilation, before, outputs, turned=True)


def _padding_before(total: int, *, upper: bool) -> int:
    """The padding in front, out of `total`: an odd pixel goes behind (SAME_UPPER) or in front."""
    return total // 2 if upper else total - total // 2
