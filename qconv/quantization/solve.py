"""The weights of one layer, solved and rounded for what is known of its inputs, and its bias.

The float weights are solved anew for the inputs that the layer really gets, a range is found for them, every weight
takes the code that rounding.py gives it, scales are fitted to the codes, and the bias keeps the mean of every output:

    b' = b + W m_f - Q m_q

With means m that BatchNormalization tells (see expected.py) it is b' = b + (W - Q) m, and b where it tells none.

A layer keeps its nearest codes where the new ones do not err less on rows that were kept apart, as far as whoever reads
its outputs can see that (sight.py). Nor are weights of an output solved anew where that is worse by the same measure.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from qconv.config.recipe import Recipe
from qconv.config.targets import Target
from qconv.errors import Change, Finding, Skipped
from qconv.ir.layers import weight_rows_of, weights_from_rows
from qconv.ir.model import Model, Node, Value
from qconv.planning.plan import LayerPlan
from qconv.quantization import channel_bits, rounding
from qconv.quantization.moments import Moments
from qconv.quantization.patches import Ints, Patches
from qconv.quantization.rounder import Rounder, arranged, real, stored_shape
from qconv.quantization.sight import Sight
from qconv.quantization.weight_ranges import least_squares
from qconv.quantization.weights import (
    LayerParams,
    Source,
    analytic_shift,
    fitted,
    float_weight,
    is_depthwise,
    least_scale,
    pair_limits,
    shifted_bias,
    with_bias,
)
from qconv.quantizer import PerChannel, QuantParams
from qconv.storage import StoredArrays

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
RIDGES = (64.0, 16.0, 4.0, 1.0, 0.3)
RIDGES_AT_8 = (16.0, 1.0)
ENOUGH_ROWS = 64
"""Rows kept apart from which on they choose for each output alone; fewer for all of a layer together."""
LEAST_ROWS = 2048
"""Rows that are drawn for a layer, where there are so many."""
FEWEST_ROWS = 4
"""Rows kept apart from which on they decide anything."""
MOST_NUMBERS = 2**27
"""In all rows of a layer: one in eight is kept."""


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is spent on it.

    pictures: at most. rows: for each input of a layer; most_rows: of any.
    most_weights, most_inputs: of layers of 8 bits; larger ones keep their nearest codes. depthwise: whether depthwise
    layers of 8 bits with a scale for each channel are solved: with that few weights to a scale they lose little.
    factors: on scales, tried out for each output. refits: how often scales are fitted to the codes and these rounded
    anew; neither is for 8 bits, where ranges are as good. sweeps: of `rounding.descended`.
    """

    pictures: int
    rows: int
    most_rows: int
    most_weights: int
    most_inputs: int
    factors: tuple[float, ...] = (0.85, 1.15)
    refits: int = 1
    sweeps: int = 0
    depthwise: bool = False

    def for_bits(self, bits: Iterable[int]) -> Effort:
        """That for weights of these bits: a third of the pictures and half the rows where none has fewer than 8."""
        if min(bits, default=8) < 8:
            return self
        return replace(self, pictures=self.pictures // 3, rows=self.rows // 2, most_rows=self.most_rows // 2)

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
        if self.recipe.rounding == "nearest":  # the bias alone is looked for
            return None
        if len(model.readers(weight)) > 1:
            return "several layers share its weights"
        if nearest.layer.weight.bits < 8:
            return None
        too_many = nearest.codes.size > self.effort.most_weights
        if too_many or _rows_shape(nearest.layer.node)[2] > self.effort.most_inputs:
            return "with 8 bits it loses little, and is too large for this effort"
        apart = isinstance(nearest.layer.weight.granularity, PerChannel)
        if apart and not self.effort.depthwise and is_depthwise(nearest.layer):
            return "with 8 bits a depthwise layer loses little"
        return None

    def drawn(self, layer: LayerPlan, index: int, inputs: StoredArrays) -> Iterator[tuple[Patches, Ints]]:
        """How, and at which positions, rows are cut out of each batch of what a layer reads. index: of the layer."""
        shape = stored_shape(layer.node)
        groups, _, columns = _rows_shape(layer.node)
        wanted = min(self.effort.rows_for(columns), max(1, MOST_NUMBERS // (groups * columns)))
        cuts = [(Patches.of(layer.node, shape, x.shape), x.shape) for x in inputs.held]
        most = -(-wanted // sum(patches.entries(size) for patches, size in cuts))
        rng = np.random.default_rng([self.recipe.seed, index])
        for patches, size in cuts:
            count = patches.positions(size)
            yield patches, np.arange(count) if count <= most else np.sort(rng.choice(count, most, replace=False))

    def solved(
        self, nearest: LayerParams, source: Source | None, seen: Moments, sight: Sight, *, anew: bool = True
    ) -> tuple[LayerParams, Finding]:
        """The layer with codes of second order, or the nearest ones where these err less or are asked for.

        source: what the layer reads, None where that stays float. sight: of its outputs. anew: whether the network
        before it is quantized; else C = H, and W' is W.
        """
        layer, node = nearest.layer, nearest.layer.node
        if not seen.is_finite:
            return nearest, Skipped("round", node.name or "", "what it reads is too large for squares in float32")
        if self.recipe.rounding == "nearest":
            return self._corrected(nearest, source, seen)
        rows = weight_rows_of(node, float_weight(layer).reshape(stored_shape(node)))
        sight = sight.around(node, rows, seen)
        wanted = self._resolved(rows, seen, sight, layer.weight.bits) if anew else rows
        params, codes = self._rounded(layer, self._ranged(layer, wanted, source, seen), wanted, seen, source)
        params, codes, finding = _better(nearest, params, codes, rows, seen, sight)
        bias = shifted_bias(layer, self._shift(layer, params.dequantize(codes), seen))
        return with_bias(layer, params, codes, bias, source, self.target), finding

    def _corrected(self, nearest: LayerParams, source: Source | None, seen: Moments) -> tuple[LayerParams, Finding]:
        """Nearest codes, with a bias for what the layers before hand on."""
        layer, name = nearest.layer, nearest.layer.node.name or ""
        shift = self._shift(layer, nearest.weight.dequantize(nearest.codes), seen)
        if shift is None:
            return nearest, Skipped("bias", name, "a MatMul has no bias")
        chosen = with_bias(layer, nearest.weight, nearest.codes, shifted_bias(layer, shift), source, self.target)
        what = "bias keeps the means of its outputs, whatever the layers before do to them"
        return chosen, Change("bias", name, what, what)

    def _shift(self, layer: LayerPlan, rounded: Float32, seen: Moments) -> Float64 | None:
        """What the bias takes back, (O,)."""
        weight = float_weight(layer)
        if self.recipe.bias_correction == "analytic":
            known = analytic_shift(layer, weight, rounded)
            return None if isinstance(known, str) else known
        if self.recipe.bias_correction == "none" or layer.node.op_type == "MatMul":  # which adds nothing
            return None
        shape = stored_shape(layer.node)
        rows, real = (weight_rows_of(layer.node, numbers.reshape(shape)) for numbers in (weight, rounded))
        shift = np.einsum("gok,gk->go", rows, seen.float_mean) - np.einsum("gok,gk->go", real, seen.mean)
        return np.asarray(shift.reshape(-1), np.float64)

    def _ranged(self, layer: LayerPlan, wanted: Float32, source: Source | None, seen: Moments) -> QuantParams:
        """Scales for weights (G, O, K): those with the least error, inputs taken to be independent."""
        node, shape = layer.node, stored_shape(layer.node)
        weight = arranged(layer, weights_from_rows(node, wanted, shape))
        if layer.own_bits:
            params = channel_bits.of_weights(weight, layer.weight, self.recipe.weight_calibrator)
        else:
            importance = np.concatenate([np.diagonal(b.hessian, axis1=1, axis2=2) for b in seen.blocks], axis=1)
            spread = np.broadcast_to(importance[:, None].astype(np.float32), wanted.shape)
            counts = arranged(layer, weights_from_rows(node, spread, shape))
            params = layer.weight.from_range(*least_squares(weight, layer.weight, counts))
        return fitted(layer, params, weight, source, self.target, saturation_safe=self.recipe.saturation_safe)[0]

    def _resolved(self, rows: Float32, seen: Moments, sight: Sight, bits: int) -> Float32:
        """W' of each output with the ridge that errs least on rows kept apart; W itself is one of the candidates, and
        stays where what is seen of the output errs more with another."""
        float_rows, kept = seen.kept
        best, before = rows, np.inf
        if kept.shape[1] < FEWEST_ROWS:
            return best
        wanted = float_rows @ np.swapaxes(rows, 1, 2)  # (G, n, O)
        in_sight = sight.of_float(wanted)

        def errors(weight: Float32) -> tuple[Float32, Float32]:
            """All, and that in sight, (G, O) both."""
            outputs = kept @ np.swapaxes(weight, 1, 2)
            lost = np.square(wanted - outputs).mean(axis=1)
            return lost, np.square(in_sight - sight.of_rounded(outputs)).mean(axis=1)

        least, most_seen = errors(rows)
        for ridge in RIDGES if bits < 8 else RIDGES_AT_8:
            tried = self._ridged(rows, seen, ridge)
            lost, lost_seen = errors(tried)
            if not lost.sum() < before:
                break
            before = float(lost.sum())
            better = (lost < least) & (lost_seen <= most_seen)
            if kept.shape[1] < ENOUGH_ROWS:
                better = np.full_like(better, lost.sum() < least.sum() and lost_seen.sum() <= most_seen.sum())
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
        self, layer: LayerPlan, params: QuantParams, wanted: Float32, seen: Moments, source: Source | None
    ) -> tuple[QuantParams, NDArray[np.integer]]:
        least = least_scale(layer, source, self.target, params)
        rounder = Rounder.of(layer, wanted, seen, least)
        narrow = layer.weight.bits < 8
        free = narrow and not layer.blocked
        params, codes = rounder.scaled(params, self.effort.factors if free else ())
        for _ in range(self.effort.refits if free else 0):
            params, codes = rounder.refitted(params, codes)
        if self.effort.sweeps and narrow:
            codes = rounder.descended(params, codes, self.effort.sweeps)
        safe = self.recipe.saturation_safe
        limits = None
        if source is not None:
            limits = pair_limits(layer, source, self.target, widest=params.widest, saturation_safe=safe)
        return (params, codes) if limits is None else rounder.unsaturated(params, codes, limits)


def _better(
    nearest: LayerParams, params: QuantParams, codes: NDArray[np.integer], rows: Float32, seen: Moments, sight: Sight
) -> tuple[QuantParams, NDArray[np.integer], Finding]:
    """The new codes or the nearest ones, whichever err less, and what is to be told of it."""
    name = nearest.layer.node.name or ""
    before, after = (
        _lost(rows, real(nearest.layer, p, c), seen, sight)
        for p, c in ((nearest.weight, nearest.codes), (params, codes))
    )
    if not after <= before:
        return nearest.weight, nearest.codes, Skipped("round", name, "its nearest codes err less")
    apart = f", in {len(seen.blocks)} blocks of inputs, as if independent" if len(seen.blocks) > 1 else ""
    what = f"rounded by second order{apart}"
    gained = f": {10 * np.log10(before / after):.1f} dB less error than nearest codes" if after > 0 else ""
    return params, codes, Change("round", name, what + gained, what)


def _lost(weight: Float32, rounded: Float32, seen: Moments, sight: Sight) -> float:
    """Mean square of what is seen of W x_f - Q x_q over the rows kept apart, means removed.

    Where these are few, what depends on Q of it by the moments, which can be below zero.
    """
    float_rows, rows = seen.kept
    if rows.shape[1] >= FEWEST_ROWS:
        wanted = sight.of_float(float_rows @ np.swapaxes(weight, 1, 2))
        lost = wanted - sight.of_rounded(rows @ np.swapaxes(rounded, 1, 2))
        return float(np.square(lost, dtype=np.float64).mean())
    total = 0.0
    for block in seen.blocks:
        w, q = (x[:, :, block.part].astype(np.float64) for x in (weight, rounded))
        total += float(np.einsum("gok,gok->", q @ block.hessian, q) - 2 * np.einsum("gok,gok->", w @ block.cross, q))
    return total


def _rows_shape(node: Node) -> tuple[int, int, int]:
    """Of the layer's weights as rows, (G, O, K)."""
    groups, outputs, inputs = weight_rows_of(node, np.empty(stored_shape(node), bool)).shape
    return groups, outputs, inputs


def first_input(node: Node) -> Value:
    """What the layer reads."""
    value = node.inputs[0]
    assert value is not None
    return value
