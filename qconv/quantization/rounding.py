"""Which way each weight rounds: to the nearest code, or so that the layer's output errs least (second order).

With rows x of what a layer reads, in the float network (x_f) and in the network quantized so far (x_q), means removed,

    H = E[x_q x_q^T]      C = E[x_f x_q^T]
    error(Q) = E[(W x_f - Q x_q)^2] = (Q - W*) H (Q - W*)^T + what no Q can mend

for W* = W C H^-1, the float weights solved anew for the inputs that the layer will really get. `resolved` finds W*,
drawn towards W where the pictures say little:

    W' = (W C + r W) (H + r I)^-1,      r = ridge * mean(diag H)

`second_order` rounds W' column by column, the ones with the largest H_jj first. With H = R R^T, R upper triangular, the
error splits into one square a column,

    error(Q) = sum over m of (sum over i <= m of e_i R_im)^2,      e = Q - W'

so that the best code of column m, given all before it, is W'_m - (sum over i < m of e_i R_im) / R_mm, rounded. That is
the recursion of OBQ and GPTQ without an inverse. `descended` then changes single codes as long as that lowers the
error.

Sources: Frantar et al. 2022, arXiv 2208.11580 (OBQ), 2210.17323 (GPTQ); Li et al. 2025, arXiv 2504.02692 (GPTAQ: x_f
and x_q apart); Chen et al. 2025, arXiv 2507.18553 (GPTQ is Babai's nearest plane); Nair and Suggala 2024,
arXiv 2406.17542 (coordinate descent).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]
DAMPING = 0.02
"""Share of the mean of H's diagonal that is added to it at least."""
BLOCK = 64
"""Columns that are rounded before their errors are carried on to all others at once."""


@dataclass(frozen=True, slots=True)
class Grid:
    """The codes that each weight may take and what they stand for: (code - zero) * scale.

    scale, zero: (G, O, K), or (G, O, 1) where they are those of an output. low, high: the least and the largest code;
    numbers, or (G, O) where outputs have bits of their own.
    """

    scale: Float64
    zero: Float64
    low: Float64 | float
    high: Float64 | float

    def codes(self, weight: Float64) -> Float64:
        """The nearest codes of weights (G, O, K)."""
        low, high = (end[:, :, None] if isinstance(end, np.ndarray) else end for end in (self.low, self.high))
        return np.clip(np.rint(weight / self.scale) + self.zero, low, high)

    def column(self, m: int) -> tuple[Float64, Float64]:
        """Scale and zero of one column, (G, O) both."""
        at = m if self.scale.shape[2] > 1 else 0
        return self.scale[:, :, at], self.zero[:, :, at]

    def part(self, columns: slice) -> Grid:
        """That of some columns."""
        if self.scale.shape[2] == 1:
            return self
        return Grid(self.scale[:, :, columns], self.zero[:, :, columns], self.low, self.high)

    def outputs(self, chosen: slice | NDArray[np.intp]) -> Grid:
        """That of some outputs of each group."""
        low, high = (end[:, chosen] if isinstance(end, np.ndarray) else end for end in (self.low, self.high))
        return Grid(self.scale[:, chosen], self.zero[:, chosen], low, high)

    def real(self, codes: Float64) -> Float64:
        """What codes stand for."""
        return np.asarray((codes - self.zero) * self.scale)

    def take(self, order: NDArray[np.int64]) -> Grid:
        """The columns in another order, (G, K)."""
        if self.scale.shape[2] == 1:
            return self
        scale, zero = (np.take_along_axis(x, order[:, None], axis=2) for x in (self.scale, self.zero))
        return Grid(scale, zero, self.low, self.high)


def resolved(weight: Float64, hessian: Float64, cross: Float64, ridge: float) -> Float64:
    """W' (G, O, K) of weights (G, O, K) with H and C, (G, K, K) both; C[i, j] = E[x_f,i x_q,j]."""
    extra = ridge * _level(hessian)  # (G, 1, 1)
    right = weight @ cross + extra * weight
    found = np.linalg.solve(_with_diagonal(hessian, extra), np.swapaxes(right, 1, 2))  # H is symmetric
    return np.ascontiguousarray(np.swapaxes(found, 1, 2), np.float64)


@dataclass(frozen=True, slots=True)
class Ordered:
    """H (G, K, K) made ready. order: of its columns, (G, K), the largest H_jj first. factor: R, in that order."""

    order: NDArray[np.int64]
    factor: Float64


def ordered(hessian: Float64, *, damping: float = DAMPING) -> Ordered:
    """H with a share of the mean of its diagonal added to that."""
    order = np.argsort(-np.diagonal(hessian, axis1=1, axis2=2), axis=1, kind="stable")
    by_size = np.take_along_axis(np.take_along_axis(hessian, order[:, :, None], 1), order[:, None], 2)
    return Ordered(order, upper_factor(_with_diagonal(by_size, damping * _level(hessian))))


def second_order(weight: Float64, ready: Ordered, grid: Grid) -> tuple[Float64, Float64]:
    """Codes (G, O, K) of weights (G, O, K), and the error of each output, (G, O)."""
    order = ready.order[:, None]
    found, errors = _round_in_order(np.take_along_axis(weight, order, 2), ready.factor, grid.take(ready.order))
    codes = np.empty_like(found)
    np.put_along_axis(codes, np.broadcast_to(order, found.shape), found, axis=2)
    return codes, errors


def damping_of(inputs: int, rows: int) -> float:
    """What is added to H for what n rows leave unsaid of it, as a share of the mean of its diagonal.

    Of K inputs, n rows show those directions that hardly vary as smaller than they are, by about K / n, and rows of one
    picture are alike.
    """
    return DAMPING + 2 * inputs / max(1, rows)


def upper_factor(matrix: Float64) -> Float64:
    """R, upper triangular, with matrix = R R^T; (G, K, K)."""
    return np.asarray(np.linalg.cholesky(matrix[:, ::-1, ::-1])[:, ::-1, ::-1])


def _round_in_order(weight: Float64, factor: Float64, grid: Grid) -> tuple[Float64, Float64]:
    codes, errors = np.empty_like(weight), np.zeros_like(weight)
    total = np.zeros(weight.shape[:2])
    pivots = np.diagonal(factor, axis1=1, axis2=2)  # (G, K)
    count = weight.shape[2]
    for start in range(0, count, BLOCK):
        end = min(start + BLOCK, count)
        carried = errors[:, :, :start] @ factor[:, :start, start:end]  # (G, O, block)
        for m in range(start, end):
            pull = carried[:, :, m - start] + (errors[:, :, start:m] @ factor[:, start:m, m, None])[:, :, 0]
            wanted = weight[:, :, m] - pull / pivots[:, m, None]
            scale, zero = grid.column(m)
            code = np.clip(np.rint(wanted / scale) + zero, grid.low, grid.high)
            real = (code - zero) * scale
            codes[:, :, m] = code
            errors[:, :, m] = real - weight[:, :, m]
            total += np.square((real - wanted) * pivots[:, m, None])
    return codes, total


def descended(codes: Float64, weight: Float64, hessian: Float64, grid: Grid, *, sweeps: int) -> Float64:
    """Codes whose error is no larger than that of `codes`: each in turn takes its best value given all others."""
    codes = codes.copy()
    gradient = (grid.real(codes) - weight) @ hessian  # (G, O, K)
    diagonal = np.diagonal(hessian, axis1=1, axis2=2)
    diagonal = np.where(diagonal > 0, diagonal, np.inf)  # what is never read stays as it is
    count = weight.shape[2]
    for _ in range(sweeps):
        changed = False
        for start in range(0, count, BLOCK):
            end = min(start + BLOCK, count)
            moved = np.zeros((*codes.shape[:2], end - start))
            for m in range(start, end):
                scale, _ = grid.column(m)
                wish = codes[:, :, m] - np.rint(gradient[:, :, m] / (diagonal[:, m, None] * scale))
                wish = np.clip(wish, grid.low, grid.high)
                step = (wish - codes[:, :, m]) * scale
                codes[:, :, m] = wish
                moved[:, :, m - start] = step
                gradient[:, :, start:end] += step[:, :, None] * hessian[:, None, m, start:end]
            if moved.any():
                changed = True
                gradient[:, :, :start] += moved @ hessian[:, start:end, :start]
                gradient[:, :, end:] += moved @ hessian[:, start:end, end:]
        if not changed:
            break
    return codes


def fit_of(codes: Float64, weight: Float64, hessian: Float64, grid: Grid) -> tuple[Float64, Float64]:
    """Numerator and denominator of the factor on its scales with which each output errs least, (G, O) both.

    factor = (W' H d^T) / (d H d^T),      d = what the codes stand for
    """
    real = grid.real(codes)
    turned = real @ hessian
    along, own = (np.asarray(np.einsum("gok,gok->go", x, turned)) for x in (weight, real))
    return along, own


def _level(hessian: Float64) -> Float64:
    """Mean of the diagonal, (G, 1, 1); 1 where nothing is read but zeros."""
    found = np.diagonal(hessian, axis1=1, axis2=2).mean(axis=1)[:, None, None]
    return np.asarray(np.where(found > 0, found, 1.0))


def _with_diagonal(matrix: Float64, extra: Float64) -> Float64:
    found = matrix.copy()
    index = np.arange(matrix.shape[1])
    found[:, index, index] += extra[:, :, 0]
    return found
