"""This module rounds the weights of single layers by second order, from the moments of what they read.

Weights are solved anew for the inputs that the quantized network gives, rounded (`gptq`), and the bias keeps the mean
of every output:

    b' = b + W m_f - Q m_q                      b' = b + (W - Q) m with means m that BatchNormalization gives

A layer keeps its nearest codes where the new ones do not err less on held-out rows, inside its effective range; an
output's weights are not solved anew where that is worse by the same measure. With nearest rounding, biases alone are
corrected like this.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod

import numpy as np
from numpy.typing import NDArray

from qconv.config.recipe import Recipe
from qconv.config.targets import Target
from qconv.errors import Change, Finding, Skipped
from qconv.ir.layers import weight_rows_of, weights_from_rows
from qconv.ir.model import Node
from qconv.planning.plan import LayerPlan, Plan
from qconv.quantization import gptq, weight_ranges
from qconv.quantization.effective_range import EffectiveRange
from qconv.quantization.gptq import LayerRounder, arrange_stored, dequantize_rows, read_weight_shape
from qconv.quantization.input_moments import InputMoments, Ints, PatchExtractor
from qconv.quantization.layer import (
    LayerInput,
    LayerParams,
    WeightReader,
    analytic_bias_shift,
    attach_bias,
    find_least_scale,
    find_pair_limits,
    fit_scales,
    is_depthwise,
    read_float_weight,
    shift_bias,
)
from qconv.quantization.weight_ranges import estimate_mse_range
from qconv.quantizer import PerChannel, QuantParams
from qconv.storage import StoredArrays

Float32 = NDArray[np.float32]

TOO_LARGE = "what it reads is too large for squares in float32"

Float64 = NDArray[np.float64]

RIDGES = (64.0, 16.0, 4.0, 1.0, 0.3)

RIDGES_AT_8 = (16.0, 1.0)

ENOUGH_HELD_OUT_ROWS = 64
"""Held-out rows from which on each output chooses for itself; with fewer, all outputs of a layer choose together."""

LEAST_ROWS = 1024
"""Least number of rows that are drawn for a layer, where there are so many."""

FEWEST_HELD_OUT_ROWS = 4
"""Held-out rows from which on they decide anything."""

MOST_NUMBERS = 2**27
"""Numbers in all rows of a layer, at most; one row in eight stays in memory."""


@dataclass(frozen=True, slots=True)
class RoundingEffort:
    """How much time second-order rounding takes.

    pictures: images to run, at most.
    rows, most_rows: rows for each input of a layer, and of any layer at most.
    most_weights, most_inputs: of layers of 8 bits; larger ones keep their nearest codes.
    factors: multiples of the scales to try for each output.
    refits: how often scales are fitted to codes and these rounded anew; like factors not at 8 bits, where ranges are as
        good.
    sweeps: of `descend_coordinates`.
    depthwise: whether depthwise layers of 8 bits with a scale a channel are solved; they lose little.
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

    def for_bits(self, bits: Iterable[int]) -> RoundingEffort:
        """The effort for weights of these bits: a quarter of the images, half the rows where none has fewer than 8."""
        if min(bits, default=8) < 8:
            return self
        return replace(self, pictures=self.pictures // 4, rows=self.rows // 2, most_rows=self.most_rows // 2)

    def rows_for(self, inputs: int) -> int:
        """Rows to draw for a layer whose outputs read so many inputs each."""
        return min(max(self.rows * inputs, LEAST_ROWS), self.most_rows)


@dataclass(frozen=True, slots=True)
class LayerSolver:
    """Rounds single layers from the moments of their inputs. seed: of the rows that are drawn."""

    recipe: Recipe
    target: Target
    effort: RoundingEffort
    seed: int = 0

    def refusal(self, nearest: LayerParams) -> str | None:
        """Why a layer must keep its nearest codes; None where it need not."""
        if nearest.layer.weight.bits > 8:
            return "weights of 16 bits lose nothing by rounding to the nearest code"
        if self.recipe.rounding == "nearest":  # the bias alone is looked for
            return None if self.corrects_means(nearest.layer) else "a MatMul has no bias"
        if nearest.layer.weight.bits < 8:
            return None
        too_many = nearest.codes.size > self.effort.most_weights
        if too_many or rows_shape(nearest.layer.node)[2] > self.effort.most_inputs:
            return "with 8 bits it loses little, and is too large for this effort"
        apart = isinstance(nearest.layer.weight.granularity, PerChannel)
        if apart and not self.effort.depthwise and is_depthwise(nearest.layer):
            return "with 8 bits a depthwise layer loses little"
        return None

    def sample_rows(
        self, layer: LayerPlan, index: int, inputs: StoredArrays, readers: int = 1
    ) -> Iterator[tuple[int, PatchExtractor, Ints]]:
        """Draw the positions of rows in each batch of a layer's input that has any, with the batch's index.

        index: of the layer, for the seed. readers: layers that share its weights and are looked at together.
        """
        shape = read_weight_shape(layer.node)
        groups, _, columns = rows_shape(layer.node)
        wanted = min(self.effort.rows_for(columns), max(1, MOST_NUMBERS // (groups * columns)))
        wanted = -(-wanted // readers)
        cuts = [(PatchExtractor.of(layer.node, shape, x.shape), x.shape) for x in inputs.held]
        most = -(-wanted // max(1, sum(patches.entries(size) for patches, size in cuts)))
        rng = np.random.default_rng([self.seed, index])
        for batch, (patches, size) in enumerate(cuts):
            if prod(size):
                count = patches.positions(size)
                at = np.arange(count) if count <= most else np.sort(rng.choice(count, most, replace=False))
                yield batch, patches, at

    def solve(
        self,
        nearest: LayerParams,
        source: LayerInput | None,
        seen: InputMoments,
        effective_range: EffectiveRange,
        *,
        anew: bool = True,
    ) -> tuple[LayerParams, Finding]:
        """Round the layer by second order, and keep its nearest codes where these err less or are asked for.

        Args:
            nearest: the layer with its nearest codes.
            source: its quantized input; None where that stays float.
            seen: moments of its inputs.
            effective_range: effective range of its outputs.
            anew: whether the network before it is quantized; else C = H, and W' is W.
        """
        layer = nearest.layer
        if not seen.is_finite:
            return nearest, Skipped("round", layer.node.name or "", TOO_LARGE)
        if self.recipe.rounding == "nearest":
            what = "bias keeps the means of its outputs, whatever the layers before do to them"
            return self.settle_bias(nearest, source, seen), Change("bias", layer.node.name or "", what, what)
        if layer.node.op_type == "MatMul":
            seen = seen.with_means()
        readers = [WeightReader(layer, source)]
        weight, codes, finding = self.choose_codes(nearest, readers, seen, effective_range, anew=anew)
        return self.settle_bias(replace(nearest, weight=weight, codes=codes), source, seen), finding

    def choose_codes(
        self,
        nearest: LayerParams,
        readers: Sequence[WeightReader],
        seen: InputMoments,
        effective_range: EffectiveRange,
        *,
        anew: bool,
    ) -> tuple[QuantParams, NDArray[np.integer], Finding]:
        """Round weights by second order, or keep their nearest codes where these err less.

        Args:
            nearest: the first layer that reads the weights, with its nearest codes.
            readers: all layers that do.
            seen: moments of all that they read, finite.
            effective_range: effective range of their outputs.
            anew: as in `solve`.
        """
        layer, node = nearest.layer, nearest.layer.node
        rows = weight_rows_of(node, read_float_weight(layer).reshape(read_weight_shape(node)))
        effective_range = effective_range.around(node, rows, seen)
        wanted = self._solve_weights(rows, seen, effective_range, layer.weight.bits) if anew else rows
        weight, codes = self._rounded(self._choose_scales(readers, wanted, seen), wanted, seen, readers)
        return _choose_better(nearest, weight, codes, rows, seen, effective_range)

    def corrects_means(self, layer: LayerPlan) -> bool:
        """Whether the bias of a layer is to keep the means of its outputs, as they are measured."""
        return self.recipe.bias_correction not in ("analytic", "none") and layer.node.op_type != "MatMul"

    def settle_bias(self, chosen: LayerParams, source: LayerInput | None, seen: InputMoments | None) -> LayerParams:
        """Give a layer of these codes its bias. seen: None where there are no moments, or none are asked for."""
        layer = chosen.layer
        bias = shift_bias(layer, self._shift(layer, chosen.weight.dequantize(chosen.codes), seen))
        return attach_bias(layer, chosen.weight, chosen.codes, bias, source, self.target)

    def _shift(self, layer: LayerPlan, rounded: Float32, seen: InputMoments | None) -> Float64 | None:
        """The shift of the bias that keeps the means of the outputs, (O,); None where none is possible or wanted."""
        weight = read_float_weight(layer)
        if self.recipe.bias_correction == "analytic":
            known = analytic_bias_shift(layer, weight, rounded)
            return None if isinstance(known, str) else known
        if not self.corrects_means(layer) or seen is None:
            return None
        shape = read_weight_shape(layer.node)
        rows, rounded_rows = (weight_rows_of(layer.node, numbers.reshape(shape)) for numbers in (weight, rounded))
        shift = np.einsum("gok,gk->go", rows, seen.float_mean) - np.einsum("gok,gk->go", rounded_rows, seen.mean)
        return np.asarray(shift.reshape(-1), np.float64)

    def _choose_scales(self, readers: Sequence[WeightReader], wanted: Float32, seen: InputMoments) -> QuantParams:
        """Choose scales for weights (G, O, K) by least error, with inputs taken to be independent."""
        layer = readers[0].layer
        node, shape = layer.node, read_weight_shape(layer.node)
        weight = arrange_stored(layer, weights_from_rows(node, wanted, shape))
        if layer.own_bits:
            params = weight_ranges.make_weight_channel_params(weight, layer.weight, self.recipe.weight_calibrator)
        else:
            importance = np.concatenate([np.diagonal(b.hessian, axis1=1, axis2=2) for b in seen.blocks], axis=1)
            spread = np.broadcast_to(importance[:, None].astype(np.float32), wanted.shape)
            counts = arrange_stored(layer, weights_from_rows(node, spread, shape))
            params = layer.weight.from_range(*estimate_mse_range(weight, layer.weight, counts))
        return fit_scales(readers, params, weight, self.target, saturation_safe=self.recipe.saturation_safe)[0]

    def _solve_weights(self, rows: Float32, seen: InputMoments, effective_range: EffectiveRange, bits: int) -> Float32:
        """Solve W' of each output with the ridge that errs least on held-out rows.

        W itself is one of the candidates, and stays where the seen part of the output errs more with another.
        """
        float_rows, kept = seen.kept
        best, before = rows, np.inf
        if kept.shape[1] < FEWEST_HELD_OUT_ROWS:
            return best
        wanted = float_rows @ np.swapaxes(rows, 1, 2)  # (G, n, O)
        seen_outputs = effective_range.of_float(wanted)

        def errors(weight: Float32) -> tuple[Float32, Float32]:
            """Mean square error of outputs, and of their seen part, (G, O) both."""
            outputs = kept @ np.swapaxes(weight, 1, 2)
            lost = np.square(wanted - outputs).mean(axis=1)
            return lost, np.square(seen_outputs - effective_range.of_rounded(outputs)).mean(axis=1)

        least, most_seen = errors(rows)
        for ridge in RIDGES if bits < 8 else RIDGES_AT_8:
            tried = self._ridged(rows, seen, ridge)
            lost, lost_seen = errors(tried)
            if not lost.sum() < before:
                break
            before = float(lost.sum())
            better = (lost < least) & (lost_seen <= most_seen)
            if kept.shape[1] < ENOUGH_HELD_OUT_ROWS:
                better = np.full_like(better, lost.sum() < least.sum() and lost_seen.sum() <= most_seen.sum())
            least = np.where(better, lost, least)
            best = np.where(better[:, :, None], tried, best)
        return best

    def _ridged(self, rows: Float32, seen: InputMoments, ridge: float) -> Float32:
        found = np.empty_like(rows)
        for block in seen.blocks:
            found[:, :, block.part] = gptq.solve_weights(rows[:, :, block.part], block.hessian, block.cross, ridge)
        return found

    def _rounded(
        self, params: QuantParams, wanted: Float32, seen: InputMoments, readers: Sequence[WeightReader]
    ) -> tuple[QuantParams, NDArray[np.integer]]:
        layer = readers[0].layer
        least = find_least_scale(readers, self.target, params)
        rounder = LayerRounder.of(layer, wanted, seen, least)
        narrow = layer.weight.bits < 8
        free = narrow and not layer.blocked
        params, codes = rounder.scaled(params, self.effort.factors if free else ())
        for _ in range(self.effort.refits if free else 0):
            params, codes = rounder.refitted(params, codes)
        if self.effort.sweeps and narrow:
            codes = rounder.descended(params, codes, self.effort.sweeps)
        safe = self.recipe.saturation_safe
        limits = find_pair_limits(readers, self.target, widest=params.widest, saturation_safe=safe)
        return (params, codes) if limits is None else rounder.unsaturated(params, codes, limits)


def _choose_better(
    nearest: LayerParams,
    params: QuantParams,
    codes: NDArray[np.integer],
    rows: Float32,
    seen: InputMoments,
    effective_range: EffectiveRange,
) -> tuple[QuantParams, NDArray[np.integer], Finding]:
    """The new codes or the nearest ones, whichever err less, and the finding for the report."""
    name = nearest.layer.node.name or ""
    before, after = (
        _output_loss(rows, dequantize_rows(nearest.layer, p, c), seen, effective_range)
        for p, c in ((nearest.weight, nearest.codes), (params, codes))
    )
    if not after <= before:
        return nearest.weight, nearest.codes, Skipped("round", name, "its nearest codes err less")
    apart = f", in {len(seen.blocks)} blocks of inputs, as if independent" if len(seen.blocks) > 1 else ""
    what = f"rounded by second order{apart}"
    gained = f": {10 * np.log10(before / after):.1f} dB less error than nearest codes" if after > 0 else ""
    return params, codes, Change("round", name, what + gained, what)


def _output_loss(weight: Float32, rounded: Float32, seen: InputMoments, effective_range: EffectiveRange) -> float:
    """Mean square of the seen part of W x_f - Q x_q over held-out rows, means removed.

    With few such rows: the part of the error that depends on Q, by the moments, which can be below zero.
    """
    float_rows, rows = seen.kept
    if rows.shape[1] >= FEWEST_HELD_OUT_ROWS:
        wanted = effective_range.of_float(float_rows @ np.swapaxes(weight, 1, 2))
        lost = wanted - effective_range.of_rounded(rows @ np.swapaxes(rounded, 1, 2))
        return float(np.square(lost, dtype=np.float64).mean())
    total = 0.0
    for block in seen.blocks:
        w, q = (x[:, :, block.part].astype(np.float64) for x in (weight, rounded))
        total += float(np.einsum("gok,gok->", q @ block.hessian, q) - 2 * np.einsum("gok,gok->", w @ block.cross, q))
    return total


def rows_shape(node: Node) -> tuple[int, int, int]:
    """The shape of the layer's weights as rows, (G, O, K)."""
    groups, outputs, inputs = weight_rows_of(node, np.empty(read_weight_shape(node), bool)).shape
    return groups, outputs, inputs


ROUNDING_EFFORTS = {
    # chosen with --rounding second-order
    "fast": RoundingEffort(pictures=32, rows=4, most_rows=2048, most_weights=2**20, most_inputs=1280),
    "balanced": RoundingEffort(pictures=96, rows=16, most_rows=8192, most_weights=2**20, most_inputs=1280),
    "best": RoundingEffort(
        pictures=512,
        rows=32,
        most_rows=30000,
        most_weights=2**27,
        most_inputs=2**15,
        factors=(0.7, 0.8, 0.9, 1.1, 1.2),
        refits=3,
        sweeps=4,
        depthwise=True,
    ),
}


def choose_rounding_effort(plan: Plan, recipe: Recipe) -> RoundingEffort:
    """The effort for the layers of a plan."""
    return ROUNDING_EFFORTS[recipe.effort].for_bits(layer.weight.bits for layer in plan.layers)
