"""The weights of one layer, solved and rounded for what is known of its inputs, and its bias.

The float weights are solved anew for the inputs that the layer really gets, a range is found for them, every weight
takes the code that rounding.py gives it, scales are fitted to the codes, and the bias keeps the mean of every output:

    b' = b + W m_f - Q m_q

With means m that BatchNormalization tells (see expected.py) it is b' = b + (W - Q) m, and b where it tells none.

A layer keeps its nearest codes where the new ones do not err less on rows that were kept apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconv import channel_bits, rounding, saturation
from qconv.findings import Change, Finding, Skipped
from qconv.graph import Model, Node, Value, array
from qconv.held import Arrays
from qconv.layers import rows_of, stored_of
from qconv.moments import Moments
from qconv.patches import Ints, Patches
from qconv.plan import Layer
from qconv.quant import PerBlock, PerTensor, QuantParams
from qconv.recipe import Recipe
from qconv.targets import Target
from qconv.weight_ranges import least_squares
from qconv.weights import (
    LayerParams,
    Source,
    analytic_shift,
    fitted,
    float_weight,
    pair_limits,
    shifted_bias,
    with_bias,
)

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
MOST_WIDENINGS = 8
RIDGES = (64.0, 16.0, 4.0, 1.0, 0.3)
ENOUGH_ROWS = 64
"""Rows kept apart from which on they choose for each output alone; fewer for all of a layer together."""
LEAST_ROWS = 2048
"""Rows that are drawn for a layer, where there are so many."""
FEWEST_ROWS = 4
"""Rows kept apart from which on they decide anything."""


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is spent on it.

    pictures: at most; half as many where no weights have fewer than 8 bits. rows: for each input of a layer; most_rows:
    of any.
    most_weights: of layers of 8 bits; larger ones keep their nearest codes.
    factors: on scales, tried out for each output. refits: how often scales are fitted to the codes and these rounded
    anew; neither is for 8 bits, where ranges are as good. sweeps: of `rounding.descended`.
    """

    pictures: int
    rows: int
    most_rows: int
    most_weights: int
    factors: tuple[float, ...] = (0.85, 1.15)
    refits: int = 1
    sweeps: int = 0

    def pictures_for(self, bits: Iterable[int]) -> int:
        """Pictures for weights of these bits."""
        return self.pictures if min(bits, default=8) < 8 else self.pictures // 2

    def rows_for(self, inputs: int) -> int:
        """Rows that are drawn for a layer whose outputs read so many inputs each."""
        return min(max(self.rows * inputs, LEAST_ROWS), self.most_rows)


@dataclass(frozen=True, slots=True)
class Solver:
    """What all layers are solved with."""

    recipe: Recipe
    target: Target
    effort: Effort

    def refusal(self, model: Model, nearest: LayerParams) -> str | None:
        """Why a layer keeps its nearest codes; None where it need not."""
        weight = nearest.layer.node.inputs[1]
        assert weight is not None
        if nearest.layer.weight.bits > 8:
            return "weights of 16 bits lose nothing by rounding to the nearest code"
        if len(model.readers(weight)) > 1:
            return "several layers share its weights"
        if nearest.layer.weight.bits == 8 and nearest.codes.size > self.effort.most_weights:
            return "with 8 bits it loses little, and has too many weights for this effort"
        return None

    def drawn(self, layer: Layer, index: int, inputs: Arrays) -> Iterator[tuple[Patches, Ints]]:
        """How, and at which positions, rows are cut out of each batch of what a layer reads. index: of the layer."""
        shape = stored_shape(layer.node)
        wanted = self.effort.rows_for(rows_of(layer.node, np.empty(shape, bool)).shape[2])
        pictures = sum(x.shape[0] if x.shape else 1 for x in inputs.held)
        rng = np.random.default_rng([self.recipe.seed, index])
        for x in inputs.held:
            patches = Patches.of(layer.node, shape, x.shape)
            count, most = patches.positions(x.shape), -(-wanted // pictures)
            yield patches, np.arange(count) if count <= most else np.sort(rng.choice(count, most, replace=False))

    def solved(
        self, nearest: LayerParams, source: Source | None, seen: Moments, *, anew: bool = True
    ) -> tuple[LayerParams, Finding]:
        """The layer with codes of second order, or the nearest ones where these err less.

        source: what the layer reads, None where that stays float. anew: whether the network before it is quantized;
        else C = H, and W' is W.
        """
        layer, node = nearest.layer, nearest.layer.node
        rows = rows_of(node, float_weight(layer).reshape(stored_shape(node)))
        wanted = self._resolved(rows, seen) if anew else rows
        params, codes = self._rounded(layer, self._ranged(layer, wanted, source, seen), wanted, seen, source)
        params, codes, finding = _better(nearest, params, codes, rows, seen)
        bias = shifted_bias(layer, self._shift(layer, params.dequantize(codes), seen))
        return with_bias(layer, params, codes, bias, source, self.target), finding

    def _shift(self, layer: Layer, rounded: Float32, seen: Moments) -> Float64 | None:
        """What the bias takes back, (O,)."""
        weight = float_weight(layer)
        if self.recipe.bias_correction == "analytic":
            known = analytic_shift(layer, weight, rounded)
            return None if isinstance(known, str) else known
        if self.recipe.bias_correction == "none" or layer.node.op_type == "MatMul":  # which adds nothing
            return None
        shape = stored_shape(layer.node)
        rows, real = (rows_of(layer.node, numbers.reshape(shape)) for numbers in (weight, rounded))
        shift = np.einsum("gok,gk->go", rows, seen.float_mean) - np.einsum("gok,gk->go", real, seen.mean)
        return np.asarray(shift.reshape(-1), np.float64)

    def _ranged(self, layer: Layer, wanted: Float32, source: Source | None, seen: Moments) -> QuantParams:
        """Scales for weights (G, O, K): those with the least error, inputs taken to be independent."""
        node, shape = layer.node, stored_shape(layer.node)
        arranged = _arranged(layer, stored_of(node, wanted, shape))
        if layer.own_bits:
            params = channel_bits.of_weights(arranged, layer.weight, self.recipe.weight_calibrator)
        else:
            importance = np.concatenate([np.diagonal(b.hessian, axis1=1, axis2=2) for b in seen.blocks], axis=1)
            spread = np.broadcast_to(importance[:, None].astype(np.float32), wanted.shape)
            counts = _arranged(layer, stored_of(node, spread, shape))
            params = layer.weight.from_range(*least_squares(arranged, layer.weight, counts))
        return fitted(layer, params, arranged, source, self.target, saturation_safe=self.recipe.saturation_safe)[0]

    def _resolved(self, rows: Float32, seen: Moments) -> Float32:
        """W' of each output with the ridge that errs least on rows kept apart; W itself is one of the candidates."""
        float_rows, kept = seen.kept
        best = rows
        if kept.shape[1] < FEWEST_ROWS:
            return best
        wanted = float_rows @ np.swapaxes(rows, 1, 2)  # (G, n, O)
        least = np.square(wanted - kept @ np.swapaxes(rows, 1, 2)).mean(axis=1)  # (G, O)
        for ridge in RIDGES:
            tried = self._ridged(rows, seen, ridge)
            lost = np.square(wanted - kept @ np.swapaxes(tried, 1, 2)).mean(axis=1)
            better = lost < least
            if kept.shape[1] < ENOUGH_ROWS:
                better = np.full_like(better, lost.sum() < least.sum())
            least = np.where(better, lost, least)
            best = np.where(better[:, :, None], tried, best)
        return best

    def _ridged(self, rows: Float32, seen: Moments, ridge: float) -> Float32:
        found = np.empty_like(rows)
        for block in seen.blocks:
            part = rows[:, :, block.part].astype(np.float64)
            found[:, :, block.part] = rounding.resolved(part, block.hessian, block.cross, ridge)
        return found

    def _rounded(
        self, layer: Layer, params: QuantParams, wanted: Float32, seen: Moments, source: Source | None
    ) -> tuple[QuantParams, NDArray[np.integer]]:
        limits = (
            None
            if source is None
            else pair_limits(
                layer, source, self.target, widest=params.widest, saturation_safe=self.recipe.saturation_safe
            )
        )
        whole = isinstance(params.spec.granularity, PerTensor)
        free = params.widest < 8 and not layer.blocked
        params, codes = self._scaled(layer, params, wanted, seen, self.effort.factors if free else ())
        for _ in range(self.effort.refits if free else 0):
            factor = self._factor(layer, params, codes, wanted, seen)
            params = params.with_scale((params.scale * (factor.mean() if whole else factor)).astype(np.float32))
            codes = self._codes(layer, params, wanted, seen)
        return (params, codes) if limits is None else self._unsaturated(layer, params, codes, wanted, seen, limits)

    def _scaled(
        self, layer: Layer, params: QuantParams, wanted: Float32, seen: Moments, factors: Sequence[float]
    ) -> tuple[QuantParams, NDArray[np.integer]]:
        """Codes on the scale, among these multiples of the given one, with which each output errs least."""
        whole = isinstance(params.spec.granularity, PerTensor)
        best, codes = params, self._codes(layer, params, wanted, seen)
        if not factors:
            return best, codes
        least = self._error(layer, params, codes, wanted, seen)
        for factor in factors:
            tried = params.with_scale((params.scale * factor).astype(np.float32))
            found = self._codes(layer, tried, wanted, seen)
            error = self._error(layer, tried, found, wanted, seen)
            better = np.asarray(error.sum() < least.sum() if whole else error < least)
            least = np.where(better, error, least)
            best = best.with_scale(np.where(better, tried.scale, best.scale))
            spread = better.reshape(
                [-1 if axis == layer.rule.output_axis and not whole else 1 for axis in range(codes.ndim)]
            )
            codes = np.where(spread, found, codes)
        return best, codes

    def _error(
        self, layer: Layer, params: QuantParams, codes: NDArray[np.integer], wanted: Float32, seen: Moments
    ) -> Float64:
        """Of each output, by the moments, (O,)."""
        real = _real(layer, params, codes).astype(np.float64)
        parts = (
            rounding.error_of(real[:, :, block.part], wanted[:, :, block.part].astype(np.float64), block.hessian)
            for block in seen.blocks
        )
        return np.asarray(sum(parts)).reshape(-1)

    def _unsaturated(
        self,
        layer: Layer,
        params: QuantParams,
        codes: NDArray[np.integer],
        wanted: Float32,
        seen: Moments,
        limits: tuple[NDArray[np.int64], NDArray[np.int64]],
    ) -> tuple[QuantParams, NDArray[np.integer]]:
        """Scales widened until no pair of products leaves 16 bits; codes rounded anew are other codes."""
        axis = layer.rule.output_axis
        for _ in range(MOST_WIDENINGS):
            over = saturation.excess(codes, *limits, output_axis=axis)
            if np.all(over <= 1):
                return params, codes
            over = np.maximum(over, np.where(over > 1, saturation.SMALLEST_STEP, 1.0))
            gain = over.max() if params.scale.ndim == 0 else over
            params = params.with_scale((params.scale * gain).astype(np.float32))
            codes = self._codes(layer, params, wanted, seen)
        arranged = _arranged(layer, stored_of(layer.node, wanted, stored_shape(layer.node)))
        params = saturation.widen(params, arranged, *limits, output_axis=axis)
        return params, params.quantize(arranged)

    def _codes(self, layer: Layer, params: QuantParams, wanted: Float32, seen: Moments) -> NDArray[np.integer]:
        node, shape = layer.node, stored_shape(layer.node)
        grid = _grid(layer, params)
        found = np.empty(wanted.shape, params.spec.dtype)
        for block in seen.blocks:
            weight, columns = wanted[:, :, block.part].astype(np.float64), grid.part(block.part)
            damping = rounding.damping_of(weight.shape[2], seen.count)
            codes = rounding.second_order(weight, block.hessian, columns, damping=damping)
            if self.effort.sweeps:
                codes = rounding.descended(codes, weight, block.hessian, columns, sweeps=self.effort.sweeps)
            found[:, :, block.part] = codes
        return _arranged(layer, stored_of(node, found, shape))

    def _factor(
        self, layer: Layer, params: QuantParams, codes: NDArray[np.integer], wanted: Float32, seen: Moments
    ) -> Float64:
        """By what the scale of each output is to be multiplied, (O,)."""
        grid = _grid(layer, params)
        rows = rows_of(layer.node, codes.reshape(stored_shape(layer.node))).astype(np.float64)
        along, own = np.zeros((2, *rows.shape[:2]))
        for block in seen.blocks:
            weight = wanted[:, :, block.part].astype(np.float64)
            numerator, denominator = rounding.fit_of(
                rows[:, :, block.part], weight, block.hessian, grid.part(block.part)
            )
            along += numerator
            own += denominator
        if isinstance(params.spec.granularity, PerTensor):
            along[:], own[:] = along.sum(), own.sum()
        factor = np.divide(along, own, out=np.ones_like(own), where=(own > 0) & (along > 0))
        return np.asarray(factor.reshape(-1))


def _better(
    nearest: LayerParams, params: QuantParams, codes: NDArray[np.integer], rows: Float32, seen: Moments
) -> tuple[QuantParams, NDArray[np.integer], Finding]:
    """The new codes or the nearest ones, whichever err less, and what is to be told of it."""
    name = nearest.layer.node.name or ""
    before, after = (
        _lost(rows, _real(nearest.layer, p, c), seen) for p, c in ((nearest.weight, nearest.codes), (params, codes))
    )
    if after > before:
        return nearest.weight, nearest.codes, Skipped("round", name, "its nearest codes err less")
    apart = f", in {len(seen.blocks)} blocks of inputs, as if independent" if len(seen.blocks) > 1 else ""
    what = f"rounded by second order{apart}"
    gained = f": {10 * np.log10(before / after):.1f} dB less error than nearest codes" if after > 0 else ""
    return params, codes, Change("round", name, what + gained, what)


def _real(layer: Layer, params: QuantParams, codes: NDArray[np.integer]) -> Float32:
    """What codes stand for, as rows (G, O, K)."""
    found: Float32 = rows_of(layer.node, params.dequantize(codes).reshape(stored_shape(layer.node)))
    return found


def _arranged(layer: Layer, stored: NDArray[Any]) -> NDArray[Any]:
    """What is stored in the shape of the weights, as the layer's spec sees them."""
    whole = np.ascontiguousarray(stored)
    return whole.reshape(len(whole), -1) if layer.blocked else whole


def _grid(layer: Layer, params: QuantParams) -> rounding.Grid:
    shape = stored_shape(layer.node)
    arranged = (shape[0], int(np.prod(shape[1:]))) if layer.blocked else shape
    found = []
    for numbers in params.spread(arranged):
        if isinstance(params.spec.granularity, PerBlock):
            rows = rows_of(layer.node, np.broadcast_to(numbers, arranged).reshape(shape))
        else:
            whole = np.broadcast_to(numbers, shape)
            rows = rows_of(layer.node, whole)[:, :, :1]
        found.append(np.asarray(rows, np.float64))
    low, high = (
        np.asarray(limit, np.float64).reshape(found[0].shape[:2]) if limit.ndim else float(limit)
        for limit in params.limits
    )
    return rounding.Grid(found[0], found[1], low, high)


def _lost(weight: Float32, rounded: Float32, seen: Moments) -> float:
    """Mean square of W x_f - Q x_q over the rows kept apart, means removed.

    Where these are few, what depends on Q of it by the moments, which can be below zero.
    """
    float_rows, rows = seen.kept
    if rows.shape[1] >= FEWEST_ROWS:
        lost = float_rows @ np.swapaxes(weight, 1, 2) - rows @ np.swapaxes(rounded, 1, 2)
        return float(np.square(lost, dtype=np.float64).mean())
    total = 0.0
    for block in seen.blocks:
        w, q = (x[:, :, block.part].astype(np.float64) for x in (weight, rounded))
        total += float(np.einsum("gok,gok->", q @ block.hessian, q) - 2 * np.einsum("gok,gok->", w @ block.cross, q))
    return total


def stored_shape(node: Node) -> tuple[int, ...]:
    """Of the layer's weights."""
    stored = array(node.inputs[1])
    assert stored is not None
    return stored.shape


def first_input(node: Node) -> Value:
    """What the layer reads."""
    value = node.inputs[0]
    assert value is not None
    return value
