"""This module rounds the weights of a layer by second order (GPTQ with coordinate descent), with scales fitted to them.

With rows x_f of a layer's input in the float network and x_q in the network quantized so far, means removed,

    H = E[x_q x_q^T]      C = E[x_f x_q^T]
    error(Q) = E[(W x_f - Q x_q)^2] = (Q - W*) H (Q - W*)^T + what no Q can mend,      W* = W C H^-1
    W' = (W C + r W) (H + r I)^-1,      r = ridge * mean(diag H)                        (`solve_weights`)
    error(Q) = sum over m of (sum over i <= m of e_i R_im)^2,      e = Q - W', H = R R^T   (`round_second_order`)

W* is the float weight solved anew for the inputs that the layer will get; the ridge draws it towards W where the images
say little. R is upper triangular, so that the error splits into one square a column: given the codes before it, the
best code of column m is W'_m - (sum over i < m of e_i R_im) / R_mm, rounded. This is the recursion of OBQ and GPTQ
without an inverse. Columns are rounded by falling H_jj; `descend_coordinates` then changes single codes while the error
falls. `LayerRounder` tries scales, fits them to the codes, and widens them where pairs of products would overflow.

Sources: Frantar et al. 2022, arXiv 2208.11580 (OBQ), 2210.17323 (GPTQ); Li et al. 2025, arXiv 2504.02692 (GPTAQ: x_f
and x_q apart); Chen et al. 2025, arXiv 2507.18553 (Babai's nearest plane); Nair and Suggala 2024, arXiv 2406.17542
(coordinate descent).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconv.ir.layers import weight_rows_of, weights_from_rows
from qconv.ir.model import Node, constant_array
from qconv.planning.plan import LayerPlan
from qconv.quantization import saturation
from qconv.quantization.input_moments import InputMoments
from qconv.quantizer import PerBlock, PerTensor, QuantParams

Float64 = NDArray[np.float64]

Float32 = NDArray[np.float32]

DAMPING = 0.02
"""The least share of the mean of H's diagonal that is added to the diagonal."""

COLUMN_BLOCK = 64
"""Columns that are rounded before their errors are carried over to all later columns at once."""


@dataclass(frozen=True, slots=True)
class WeightGrid:
    """The codes that each weight may take, which stand for (code - zero) * scale.

    scale, zero: (G, O, K), or (G, O, 1) with one scale an output.
    low, high: the least and the largest code; numbers, or (G, O) where outputs have bits of their own.
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

    def part(self, columns: slice) -> WeightGrid:
        """The grid of some columns."""
        if self.scale.shape[2] == 1:
            return self
        return WeightGrid(self.scale[:, :, columns], self.zero[:, :, columns], self.low, self.high)

    def outputs(self, chosen: slice | NDArray[np.intp]) -> WeightGrid:
        """The grid of some outputs of each group."""
        low, high = (end[:, chosen] if isinstance(end, np.ndarray) else end for end in (self.low, self.high))
        return WeightGrid(self.scale[:, chosen], self.zero[:, chosen], low, high)

    def real(self, codes: Float64) -> Float64:
        """The numbers that codes (G, O, K) stand for."""
        return np.asarray((codes - self.zero) * self.scale)

    def take(self, order: NDArray[np.int64]) -> WeightGrid:
        """The grid with its columns in another order, (G, K)."""
        if self.scale.shape[2] == 1:
            return self
        scale, zero = (np.take_along_axis(x, order[:, None], axis=2) for x in (self.scale, self.zero))
        return WeightGrid(scale, zero, self.low, self.high)


def solve_weights(weight: Float32, hessian: Float32, cross: Float32, ridge: float) -> Float32:
    """Solve weights (G, O, K) anew: W' (G, O, K). hessian, cross: H and C, (G, K, K); C[i, j] = E[x_f,i x_q,j].

    W' = W + W (C - H) (H + r I)^-1, in float32: with ridges like those that are tried that is enough.
    """
    ridged = _add_to_diagonal(hessian, ridge * _mean_diagonal(hessian))
    right = weight @ (cross - hessian)
    found = np.linalg.solve(ridged, np.swapaxes(right, 1, 2))  # H is symmetric
    return np.asarray(weight + np.swapaxes(found, 1, 2), np.float32)


@dataclass(frozen=True, slots=True)
class OrderedHessian:
    """H (G, K, K), factored. order: of its columns, (G, K), the largest H_jj first. factor: R, in that order."""

    order: NDArray[np.int64]
    factor: Float64


def order_hessian(hessian: Float32, *, damping: float = DAMPING) -> OrderedHessian:
    """Order and factor H, with `damping` times the mean of its diagonal added to the diagonal."""
    order = np.argsort(-np.diagonal(hessian, axis1=1, axis2=2), axis=1, kind="stable")
    by_size = np.take_along_axis(np.take_along_axis(hessian, order[:, :, None], 1), order[:, None], 2)
    return OrderedHessian(order, factor_upper(_add_to_diagonal(by_size, damping * _mean_diagonal(hessian))))


def round_second_order(weight: Float64, ready: OrderedHessian, grid: WeightGrid) -> tuple[Float64, Float64]:
    """Codes (G, O, K) of weights (G, O, K), and the error of each output, (G, O)."""
    order = ready.order[:, None]
    found, errors = _round_columns(np.take_along_axis(weight, order, 2), ready.factor, grid.take(ready.order))
    codes = np.empty_like(found)
    np.put_along_axis(codes, np.broadcast_to(order, found.shape), found, axis=2)
    return codes, errors


def choose_damping(inputs: int, rows: int) -> float:
    """The share of the mean of H's diagonal to add to the diagonal, where H was estimated from n rows.

    n rows of K inputs underestimate the directions that hardly vary by about K / n, and rows of one image are alike.
    """
    return DAMPING + 2 * inputs / max(1, rows)


def factor_upper(matrix: NDArray[Any]) -> Float64:
    """R, upper triangular, with matrix = R R^T; (G, K, K)."""
    return np.asarray(np.linalg.cholesky(matrix[:, ::-1, ::-1].astype(np.float64))[:, ::-1, ::-1])


def _round_columns(weight: Float64, factor: Float64, grid: WeightGrid) -> tuple[Float64, Float64]:
    """Codes (G, O, K) and errors (G, O) of weights in the order of their columns. factor: R.

    Errors e of a block of columns go to all later ones in one product; within it, column after column, in float32,
    whose digits are far below a step. Columns lie first, so that each is one piece of memory.
    """
    groups, outputs, count = weight.shape
    pivots = np.diagonal(factor, axis1=1, axis2=2)  # (G, K)
    share = (factor / pivots[:, None]).astype(np.float32)  # of an error that a later column takes over
    exact = np.ascontiguousarray(np.moveaxis(weight, 2, 0), np.float32)  # (K, G, O)
    wanted, codes, errors = exact.copy(), np.empty_like(exact), np.empty_like(exact)
    columns = [np.ascontiguousarray(np.moveaxis(x, 2, 0), np.float32) for x in (grid.scale, grid.zero)]
    low, high = (np.asarray(end, np.float32) for end in (grid.low, grid.high))
    power = np.square(pivots).astype(np.float32).T[:, :, None]  # (K, G, 1)
    total, lost = np.zeros((groups, outputs), np.float32), np.empty((groups, outputs), np.float32)
    for start in range(0, count, COLUMN_BLOCK):
        end = min(start + COLUMN_BLOCK, count)
        for m in range(start, end):
            scale, zero = (numbers[m if len(numbers) > 1 else 0] for numbers in columns)
            code, error = codes[m], errors[m]
            np.divide(wanted[m], scale, out=code)
            np.rint(code, out=code)
            code += zero
            np.clip(code, low, high, out=code)
            np.subtract(code, zero, out=error)
            error *= scale
            np.subtract(error, wanted[m], out=lost)
            np.square(lost, out=lost)
            lost *= power[m]
            total += lost
            error -= exact[m]
            if m + 1 < end:
                wanted[m + 1 : end] -= share[:, m, m + 1 : end].T[:, :, None] * error
        if end < count:
            for group in range(groups):
                wanted[end:, group] -= share[group, start:end, end:].T @ errors[start:end, group]
    return np.moveaxis(codes, 0, 2).astype(np.float64), total.astype(np.float64)


def descend_coordinates(codes: Float64, weight: Float64, hessian: Float32, grid: WeightGrid, *, sweeps: int) -> Float64:
    """Improve codes (G, O, K) by coordinate descent: each in turn takes its best value given all others."""
    codes = codes.copy()
    gradient = (grid.real(codes) - weight) @ hessian  # (G, O, K)
    diagonal = np.diagonal(hessian, axis1=1, axis2=2)
    diagonal = np.where(diagonal > 0, diagonal, np.inf)  # what is never read stays as it is
    count = weight.shape[2]
    for _ in range(sweeps):
        changed = False
        for start in range(0, count, COLUMN_BLOCK):
            end = min(start + COLUMN_BLOCK, count)
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


def fit_scale_factors(codes: Float64, weight: Float64, hessian: Float32, grid: WeightGrid) -> tuple[Float64, Float64]:
    """Numerator and denominator of the factor on the scales that minimizes each output's error, (G, O) both.

    factor = (W' H d^T) / (d H d^T),      d = the numbers that the codes stand for
    """
    real = grid.real(codes)
    turned = real @ hessian
    along, own = (np.asarray(np.einsum("gok,gok->go", x, turned)) for x in (weight, real))
    return along, own


def _mean_diagonal(hessian: Float32) -> Float64:
    """Mean of the diagonal, (G, 1, 1); 1 where nothing is read but zeros."""
    found = np.diagonal(hessian, axis1=1, axis2=2).mean(axis=1, dtype=np.float64)[:, None, None]
    return np.asarray(np.where(found > 0, found, 1.0))


def _add_to_diagonal(matrix: Float32, extra: Float64) -> Float32:
    found = matrix.copy()
    index = np.arange(matrix.shape[1])
    found[:, index, index] += extra[:, :, 0].astype(matrix.dtype)
    return found


Codes = NDArray[np.integer]

MOST_WIDENINGS = 8

NO_LEAST_SCALE = np.zeros((), np.float32)


@dataclass(frozen=True, slots=True)
class LayerRounder:
    """Rounds the weights of one layer.

    wanted: the weights to come near to, (G, O, K).
    ready: factored H of each block of inputs.
    least: the least scales allowed.
    """

    layer: LayerPlan
    wanted: Float32
    seen: InputMoments
    ready: tuple[OrderedHessian, ...]
    least: NDArray[np.float32]

    @classmethod
    def of(
        cls, layer: LayerPlan, wanted: Float32, seen: InputMoments, least: NDArray[np.float32] = NO_LEAST_SCALE
    ) -> LayerRounder:
        """A rounder for weights (G, O, K) on these moments."""
        blocks = ((b, choose_damping(b.hessian.shape[1], seen.count)) for b in seen.blocks)
        ready = tuple(order_hessian(b.hessian, damping=damping) for b, damping in blocks)
        return cls(layer, wanted, seen, ready, least)

    def codes(self, params: QuantParams) -> tuple[Codes, Float64]:
        """Round to codes in the shape of the weights. Returns them and the error of each output, (O,)."""
        found, errors = self._row_codes(params, slice(None))
        return self._stored(found), errors.reshape(-1)

    def _row_codes(self, params: QuantParams, outputs: slice | NDArray[np.intp]) -> tuple[Codes, Float64]:
        """Codes of some outputs of each group, as rows (G, O, K), and their errors (G, O)."""
        grid, wanted = make_weight_grid(self.layer, params).outputs(outputs), self.wanted[:, outputs]
        found, errors = np.empty(wanted.shape, params.spec.dtype), np.zeros(wanted.shape[:2])
        for block, ready in zip(self.seen.blocks, self.ready, strict=True):
            weight = wanted[:, :, block.part].astype(np.float64)
            found[:, :, block.part], error = round_second_order(weight, ready, grid.part(block.part))
            errors += error
        return found, errors

    def scaled(self, params: QuantParams, factors: Sequence[float]) -> tuple[QuantParams, Codes]:
        """Round on several multiples of the given scales, and keep the best for each output."""
        whole = isinstance(params.spec.granularity, PerTensor)
        best, (codes, least) = params, self.codes(params)
        for factor in factors:
            tried = self._rescaled(params, factor)
            found, error = self.codes(tried)
            better = np.asarray(error.sum() < least.sum() if whole else error < least)
            least = np.where(better, error, least)
            best = best.with_scale(np.where(better, tried.scale, best.scale))
            spread = better.reshape(
                [-1 if axis == self.layer.rule.output_axis and not whole else 1 for axis in range(codes.ndim)]
            )
            codes = np.where(spread, found, codes)
        return best, codes

    def refitted(self, params: QuantParams, codes: Codes) -> tuple[QuantParams, Codes]:
        """Fit the scale of each output to its codes, and round anew on it."""
        grid, rows = make_weight_grid(self.layer, params), self._rows(codes)
        along, own = np.zeros((2, *rows.shape[:2]))
        for block in self.seen.blocks:
            weight = self.wanted[:, :, block.part].astype(np.float64)
            numerator, denominator = fit_scale_factors(
                rows[:, :, block.part], weight, block.hessian, grid.part(block.part)
            )
            along += numerator
            own += denominator
        whole = isinstance(params.spec.granularity, PerTensor)
        if whole:
            along[:], own[:] = along.sum(), own.sum()
        factor = np.divide(along, own, out=np.ones_like(own), where=(own > 0) & (along > 0)).reshape(-1)
        params = self._rescaled(params, factor.mean() if whole else factor)
        return params, self.codes(params)[0]

    def _rescaled(self, params: QuantParams, factor: Any) -> QuantParams:
        return params.with_scale(np.maximum(params.scale * factor, self.least).astype(np.float32))

    def descended(self, params: QuantParams, codes: Codes, sweeps: int) -> Codes:
        """Improve codes by coordinate descent. sweeps: passes over all columns."""
        grid, found = make_weight_grid(self.layer, params), self._rows(codes)
        for block in self.seen.blocks:
            weight = self.wanted[:, :, block.part].astype(np.float64)
            found[:, :, block.part] = descend_coordinates(
                found[:, :, block.part], weight, block.hessian, grid.part(block.part), sweeps=sweeps
            )
        return self._stored(found.astype(codes.dtype))

    def unsaturated(
        self, params: QuantParams, codes: Codes, limits: tuple[NDArray[np.int64], NDArray[np.int64]]
    ) -> tuple[QuantParams, Codes]:
        """Widen scales until no pair of products overflows 16 bits, rounding anew each time.

        limits: the least and the largest code of each input channel.
        """
        axis, inputs = self.layer.rule.output_axis, self.layer.padded
        for _ in range(MOST_WIDENINGS):
            over = saturation.pair_excess(codes, *limits, output_axis=axis, inputs=inputs)
            if np.all(over <= 1):
                return params, codes
            over = np.maximum(over, np.where(over > 1, saturation.SMALLEST_WIDENING, 1.0))
            gain = over.max() if params.scale.ndim == 0 else over
            params = params.with_scale((params.scale * gain).astype(np.float32))
            rows = self._rows(codes).astype(codes.dtype)
            # outputs of several groups lie side by side: all of them, then
            changed = np.flatnonzero(over > 1) if params.scale.ndim and len(rows) == 1 else slice(None)
            rows[:, changed], _ = self._row_codes(params, changed)
            codes = self._stored(rows)
        weight = self._stored(self.wanted)
        params = saturation.widen_scales(params, weight, *limits, output_axis=axis, inputs=inputs)
        return params, params.quantize(weight)

    def _rows(self, codes: Codes) -> Float64:
        """(G, O, K)"""
        return np.asarray(
            weight_rows_of(self.layer.node, codes.reshape(read_weight_shape(self.layer.node))), np.float64
        )

    def _stored(self, rows: NDArray[Any]) -> NDArray[Any]:
        node = self.layer.node
        return arrange_stored(self.layer, weights_from_rows(node, rows, read_weight_shape(node)))


def dequantize_rows(layer: LayerPlan, params: QuantParams, codes: Codes) -> Float32:
    """The numbers that codes stand for, as rows (G, O, K)."""
    found: Float32 = weight_rows_of(layer.node, params.dequantize(codes).reshape(read_weight_shape(layer.node)))
    return found


def arrange_stored(layer: LayerPlan, stored: NDArray[Any]) -> NDArray[Any]:
    """Arrange an array in the stored shape of the weights as the layer's spec sees them."""
    whole = np.ascontiguousarray(stored)
    return whole.reshape(len(whole), -1) if layer.blocked else whole


def make_weight_grid(layer: LayerPlan, params: QuantParams) -> WeightGrid:
    """The grid of a layer's weights, as rows."""
    shape = read_weight_shape(layer.node)
    arranged = (shape[0], int(np.prod(shape[1:]))) if layer.blocked else shape
    found = []
    for numbers in params.broadcast(arranged):
        if isinstance(params.spec.granularity, PerBlock):
            rows = weight_rows_of(layer.node, np.broadcast_to(numbers, arranged).reshape(shape))
        else:
            whole = np.broadcast_to(numbers, shape)
            rows = weight_rows_of(layer.node, whole)[:, :, :1]
        found.append(np.asarray(rows, np.float64))
    low, high = (
        np.asarray(limit, np.float64).reshape(found[0].shape[:2]) if limit.ndim else float(limit)
        for limit in params.limits
    )
    return WeightGrid(found[0], found[1], low, high)


def read_weight_shape(node: Node) -> tuple[int, ...]:
    """The stored shape of the layer's weights."""
    stored = constant_array(node.inputs[1])
    assert stored is not None
    return stored.shape
