"""What rounding must know of the inputs of a layer: means and second moments, in the float network and in the other.

    H = E[x_q x_q^T]      C = E[x_f x_q^T]      means m_f, m_q removed

x_f, x_q: the same rows (see patches.py) of the float network and of the network quantized so far. Sums are of rows less
a first guess of their mean: products of numbers far from zero would leave nothing of the difference in float32. The
rows of some pictures are kept apart, unsummed, to judge by what was found: rows of one picture are alike, so that those
of a picture that was summed would flatter. Layers that read very much are taken apart into blocks of inputs, as if
these were independent: a matrix of K x K would need gigabytes. The more they read, the smaller are the blocks, so that
all of them together stay below MOST_IN_BLOCKS numbers.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]
Float32 = NDArray[np.float32]
LARGEST_BLOCK = 2304
"""Inputs of a block, at most: 42 MB a matrix in float64. A Conv of 3 x 3 on 256 channels is just whole."""
MOST_IN_BLOCKS = 2 * LARGEST_BLOCK**2
"""Numbers in all blocks of H, and of C."""
AT_ONCE = 2**21
"""Numbers that are summed in one product."""
KEPT_SHARE = 8
"""One piece of so many is kept apart, or one where there are fewer."""


@dataclass(frozen=True, slots=True)
class Block:
    """A run of a layer's inputs. part: which. hessian: H, cross: C; (G, K, K) both."""

    part: slice
    hessian: Float64
    cross: Float64


@dataclass(frozen=True, slots=True)
class Moments:
    """means: m_f and m_q, (G, K). kept: rows of both networks (G, n, K), means of all others removed.

    count: how many these others are.
    """

    blocks: list[Block]
    float_mean: Float64
    mean: Float64
    kept: tuple[Float32, Float32]
    count: int

    @property
    def is_finite(self) -> bool:
        """Whether all squares fit into float32."""
        return all(bool(np.isfinite(x).all()) for block in self.blocks for x in (block.hessian, block.cross))


def moments(pairs: Iterable[tuple[Float32, Float32]], share: int = KEPT_SHARE) -> Moments:
    """Of rows that come piece by piece: (x_f, x_q), (G, n, K) both. There must be at least one row.

    A picture must not be in several pieces: one piece of so many (share) is kept apart.
    """
    kept: list[tuple[Float32, Float32]] = []

    def summed() -> Iterator[tuple[Float32, Float32]]:
        for index, (float_rows, rows) in enumerate(pairs):
            if is_kept(index, share):
                kept.append((float_rows, rows))
            else:
                yield float_rows, rows

    sums: _Sums | None = None
    for float_rows, rows in _in_batches(summed()):
        if sums is None:
            sums = _Sums(float_rows, rows)
        sums.add(float_rows, rows)
    assert sums is not None
    return sums.finished(kept)


def block_of(inputs: int) -> int:
    """Inputs of a block of a layer that reads so many, at most."""
    return LARGEST_BLOCK if inputs <= LARGEST_BLOCK else min(LARGEST_BLOCK, max(1, MOST_IN_BLOCKS // inputs))


def is_kept(index: int, share: int = KEPT_SHARE) -> bool:
    """Whether the rows of this piece are kept apart."""
    return index % share == share - 1


def share_for(pieces: int) -> int:
    """One piece of how many can be kept apart: none of one."""
    return max(2, min(KEPT_SHARE, pieces))


def _in_batches(pairs: Iterable[tuple[Float32, Float32]]) -> Iterator[tuple[Float32, Float32]]:
    """Pieces joined until they have about AT_ONCE numbers."""
    waiting: list[tuple[Float32, Float32]] = []
    for pair in pairs:
        waiting.append(pair)
        if sum(rows.size for _, rows in waiting) >= AT_ONCE:
            yield _joined(waiting)
            waiting = []
    if waiting:
        yield _joined(waiting)


def _joined(pieces: list[tuple[Float32, Float32]]) -> tuple[Float32, Float32]:
    first, second = (np.concatenate(side, axis=1) for side in zip(*pieces, strict=True))
    return first, second


class _Sums:
    def __init__(self, float_rows: Float32, rows: Float32) -> None:
        groups, _, inputs = rows.shape
        self._guess = rows.mean(axis=1, keepdims=True)  # of both: they are alike
        count = -(-inputs // block_of(inputs))
        ends = np.linspace(0, inputs, count + 1).astype(int)
        self._parts = [slice(int(a), int(b)) for a, b in itertools.pairwise(ends)]
        sizes = [part.stop - part.start for part in self._parts]
        self._own = [np.zeros((groups, k, k)) for k in sizes]
        self._cross = [np.zeros((groups, k, k)) for k in sizes]
        self._sums = np.zeros((2, groups, inputs))
        self._rows = 0

    def add(self, float_rows: Float32, rows: Float32) -> None:
        x_f, x_q = float_rows - self._guess, rows - self._guess
        self._rows += rows.shape[1]
        self._sums += [x.sum(axis=1, dtype=np.float64) for x in (x_f, x_q)]
        with np.errstate(over="ignore", invalid="ignore"):  # see Moments.is_finite
            for part, own, cross in zip(self._parts, self._own, self._cross, strict=True):
                q = x_q[:, :, part]
                own += np.swapaxes(q, 1, 2) @ q
                cross += np.swapaxes(x_f[:, :, part], 1, 2) @ q

    def finished(self, kept: list[tuple[Float32, Float32]]) -> Moments:
        mean_f, mean_q = self._sums / self._rows  # of what is left over the guess
        blocks = []
        with np.errstate(over="ignore", invalid="ignore"):
            for part, own, cross in zip(self._parts, self._own, self._cross, strict=True):
                own /= self._rows
                own -= mean_q[:, part, None] * mean_q[:, None, part]
                cross /= self._rows
                cross -= mean_f[:, part, None] * mean_q[:, None, part]
                blocks.append(Block(part, own, cross))
        guess = self._guess[:, 0].astype(np.float64)
        float_mean, mean = guess + mean_f, guess + mean_q
        empty = np.zeros((*mean.shape[:1], 0, mean.shape[1]), np.float32)
        apart = [
            np.concatenate([pieces[side] for pieces in kept] or [empty], axis=1) - centre[:, None].astype(np.float32)
            for side, centre in enumerate((float_mean, mean))
        ]
        return Moments(blocks, float_mean, mean, (apart[0], apart[1]), self._rows)
