"""Codes and scales for the weights of one layer, with the least error on what is known of its inputs.

The recursion of rounding.py works on rows, one an output; here are the scales that it goes with: tried out, fitted to
the codes, widened where pairs of products would overflow.
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
from qconv.quantization import rounding, saturation
from qconv.quantization.moments import Moments
from qconv.quantizer import PerBlock, PerTensor, QuantParams

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Codes = NDArray[np.integer]
MOST_WIDENINGS = 8
NO_LEAST = np.zeros((), np.float32)


@dataclass(frozen=True, slots=True)
class Rounder:
    """A layer whose weights shall be `wanted`, (G, O, K). ready: H of each block of inputs. least: of scales."""

    layer: LayerPlan
    wanted: Float32
    seen: Moments
    ready: tuple[rounding.Ordered, ...]
    least: NDArray[np.float32]

    @classmethod
    def of(cls, layer: LayerPlan, wanted: Float32, seen: Moments, least: NDArray[np.float32] = NO_LEAST) -> Rounder:
        """With what is computed once."""
        blocks = ((b, rounding.damping_of(b.hessian.shape[1], seen.count)) for b in seen.blocks)
        ready = tuple(rounding.ordered(b.hessian, damping=damping) for b, damping in blocks)
        return cls(layer, wanted, seen, ready, least)

    def codes(self, params: QuantParams) -> tuple[Codes, Float64]:
        """Codes in the shape of the weights, and the error of each output, (O,)."""
        found, errors = self._row_codes(params, slice(None))
        return self._stored(found), errors.reshape(-1)

    def _row_codes(self, params: QuantParams, outputs: slice | NDArray[np.intp]) -> tuple[Codes, Float64]:
        """Codes of some outputs of each group, as rows (G, O, K), and their errors (G, O)."""
        grid, wanted = grid_of(self.layer, params).outputs(outputs), self.wanted[:, outputs]
        found, errors = np.empty(wanted.shape, params.spec.dtype), np.zeros(wanted.shape[:2])
        for block, ready in zip(self.seen.blocks, self.ready, strict=True):
            weight = wanted[:, :, block.part].astype(np.float64)
            found[:, :, block.part], error = rounding.second_order(weight, ready, grid.part(block.part))
            errors += error
        return found, errors

    def scaled(self, params: QuantParams, factors: Sequence[float]) -> tuple[QuantParams, Codes]:
        """Codes on the scale, among these multiples of the given one, with which each output errs least."""
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
        """The scale of each output fitted to its codes, and codes rounded anew on it."""
        grid, rows = grid_of(self.layer, params), self._rows(codes)
        along, own = np.zeros((2, *rows.shape[:2]))
        for block in self.seen.blocks:
            weight = self.wanted[:, :, block.part].astype(np.float64)
            numerator, denominator = rounding.fit_of(
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
        """Codes with single ones changed as long as that helps."""
        grid, found = grid_of(self.layer, params), self._rows(codes)
        for block in self.seen.blocks:
            weight = self.wanted[:, :, block.part].astype(np.float64)
            found[:, :, block.part] = rounding.descended(
                found[:, :, block.part], weight, block.hessian, grid.part(block.part), sweeps=sweeps
            )
        return self._stored(found.astype(codes.dtype))

    def unsaturated(
        self, params: QuantParams, codes: Codes, limits: tuple[NDArray[np.int64], NDArray[np.int64]]
    ) -> tuple[QuantParams, Codes]:
        """Scales widened until no pair of products leaves 16 bits; codes rounded anew are other codes.

        limits: the least and the largest code of each input channel.
        """
        axis = self.layer.rule.output_axis
        for _ in range(MOST_WIDENINGS):
            over = saturation.excess(codes, *limits, output_axis=axis)
            if np.all(over <= 1):
                return params, codes
            over = np.maximum(over, np.where(over > 1, saturation.SMALLEST_STEP, 1.0))
            gain = over.max() if params.scale.ndim == 0 else over
            params = params.with_scale((params.scale * gain).astype(np.float32))
            rows = self._rows(codes).astype(codes.dtype)
            # outputs of several groups lie side by side: all of them, then
            changed = np.flatnonzero(over > 1) if params.scale.ndim and len(rows) == 1 else slice(None)
            rows[:, changed], _ = self._row_codes(params, changed)
            codes = self._stored(rows)
        weight = self._stored(self.wanted)
        params = saturation.widen(params, weight, *limits, output_axis=axis)
        return params, params.quantize(weight)

    def _rows(self, codes: Codes) -> Float64:
        """(G, O, K)"""
        return np.asarray(weight_rows_of(self.layer.node, codes.reshape(stored_shape(self.layer.node))), np.float64)

    def _stored(self, rows: NDArray[Any]) -> NDArray[Any]:
        node = self.layer.node
        return arranged(self.layer, weights_from_rows(node, rows, stored_shape(node)))


def real(layer: LayerPlan, params: QuantParams, codes: Codes) -> Float32:
    """What codes stand for, as rows (G, O, K)."""
    found: Float32 = weight_rows_of(layer.node, params.dequantize(codes).reshape(stored_shape(layer.node)))
    return found


def arranged(layer: LayerPlan, stored: NDArray[Any]) -> NDArray[Any]:
    """What is stored in the shape of the weights, as the layer's spec sees them."""
    whole = np.ascontiguousarray(stored)
    return whole.reshape(len(whole), -1) if layer.blocked else whole


def grid_of(layer: LayerPlan, params: QuantParams) -> rounding.Grid:
    """The codes that the weights may take, for each row."""
    shape = stored_shape(layer.node)
    arranged = (shape[0], int(np.prod(shape[1:]))) if layer.blocked else shape
    found = []
    for numbers in params.spread(arranged):
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
    return rounding.Grid(found[0], found[1], low, high)


def stored_shape(node: Node) -> tuple[int, ...]:
    """Of the layer's weights."""
    stored = constant_array(node.inputs[1])
    assert stored is not None
    return stored.shape
