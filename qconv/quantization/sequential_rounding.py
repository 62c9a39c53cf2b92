"""This module rounds weights layer after layer for the inputs that the quantized layers before will hand on.

The float network and a copy with all quantizers run side by side; at each layer the moments of both are accumulated,
weights are solved anew, rounded (`gptq`), and the bias keeps the mean of every output:

    b' = b + W m_f - Q m_q                      b' = b + (W - Q) m with means m that BatchNormalization gives
    seen(y) = min(max(y, low), high)            the effective output range: Relu or Clip bounds, ends of the codes

Errors are measured inside that range: both networks may differ a lot below a Relu without any effect, and least squares
would see nothing else. A layer keeps its nearest codes where the new ones do not err less on held-out rows; an output's
weights are not solved anew where that is worse by the same measure. With nearest rounding, biases alone are corrected
like this.

Activations of 8 bits and more are not rounded on the way: their noise is no function of the layer's input, and weights
solved for it could only shrink, layer after layer, and outputs with them. Fewer bits lose so much that to shrink is
right.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconv.config.recipe import Recipe
from qconv.config.targets import Target
from qconv.errors import Change, Finding, Skipped
from qconv.ir.layers import weight_rows_of, weights_from_rows
from qconv.ir.model import Model, Node, Value, clip_bounds, constant_array, input_of
from qconv.ir.stepwise import StepwiseRun
from qconv.planning.plan import LayerPlan, Plan
from qconv.planning.planner import replan
from qconv.planning.work import ROUNDING_SHARE, SOLVE_WORK, count_rows, quantization_work
from qconv.quantization import gptq, weight_ranges
from qconv.quantization.emit import emit
from qconv.quantization.gptq import LayerRounder, arrange_stored, dequantize_rows, read_weight_shape
from qconv.quantization.input_moments import (
    HELD_OUT_INTERVAL,
    InputMoments,
    Ints,
    PatchExtractor,
    accumulate_moments,
    choose_held_out_interval,
)
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
from qconv.quantization.parameters import Params, carry_over_params
from qconv.quantization.shared_rounding import round_shared_weights
from qconv.quantization.weight_ranges import estimate_mse_range
from qconv.quantizer import PerChannel, QuantParams
from qconv.reporter import Reporter
from qconv.storage import ArrayStore, StoredArrays, prefetch

Float32 = NDArray[np.float32]

UNBOUNDED = (-math.inf, math.inf)

TOO_LARGE = "what it reads is too large for squares in float32"


@dataclass(frozen=True, slots=True)
class EffectiveRange:
    """The part of a layer's output range that its readers see.

    bounds: of the activation behind the layer.
    codes: least and largest number that the codes of the output stand for.
    centre: mean output to add to outputs of centred rows, (G, 1, O).
    """

    bounds: tuple[float, float] = UNBOUNDED
    codes: tuple[float, float] = UNBOUNDED
    centre: NDArray[np.floating[Any]] | float = 0.0

    @classmethod
    def of_consumers(cls, node: Node, activations: Mapping[Value, QuantParams]) -> EffectiveRange:
        """The range that the consumers of a layer's output see, in a network whose tensors have these parameters."""
        value = node.outputs[0]
        bounds = UNBOUNDED
        readers = {use.node for use in value.uses()}
        if value not in activations and len(readers) == 1 and not value.is_graph_output():
            (reader,) = readers
            found = clip_bounds(reader)
            if found is not None:
                bounds, value = found, reader.outputs[0]
        params = activations.get(value)
        if params is None or params.scale.ndim:
            return cls(bounds)
        low, high = (float(end) for end in params.code_range())
        return cls(bounds, (low, high))

    def around(self, node: Node, rows: Float32, seen: InputMoments) -> EffectiveRange:
        """The range for outputs of centred rows. rows: the float weights (G, O, K)."""
        centre = np.einsum("gok,gk->go", rows, seen.float_mean)
        bias = constant_array(input_of(node, 2)) if node.op_type != "MatMul" else None
        if bias is not None:
            centre = centre + np.broadcast_to(bias.reshape(-1), (centre.size,)).reshape(centre.shape)
        return replace(self, centre=centre[:, None].astype(np.float32))

    def of_float(self, outputs: Float32) -> Float32:
        """Clip outputs (G, n, O) of the float network to what readers see."""
        return np.clip(outputs + self.centre, *self.bounds)

    def of_rounded(self, outputs: Float32) -> Float32:
        """Clip outputs (G, n, O) of the quantized network to what readers see: bounds and codes."""
        low, high = (end(pair) for end, pair in zip((max, min), zip(self.bounds, self.codes, strict=True), strict=True))
        return np.clip(outputs + self.centre, low, high)


Float64 = NDArray[np.float64]

RIDGES = (64.0, 16.0, 4.0, 1.0, 0.3)

RIDGES_AT_8 = (16.0, 1.0)

ENOUGH_HELD_OUT_ROWS = 64
"""Held-out rows from which on each output chooses for itself; with fewer, all outputs of a layer choose together."""

LEAST_ROWS = 2048
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
        """The effort for weights of these bits: a third of the images and half the rows where none has fewer than 8."""
        if min(bits, default=8) < 8:
            return self
        return replace(self, pictures=self.pictures // 3, rows=self.rows // 2, most_rows=self.most_rows // 2)

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
            return None
        if nearest.layer.weight.bits < 8:
            return None
        too_many = nearest.codes.size > self.effort.most_weights
        if too_many or _rows_shape(nearest.layer.node)[2] > self.effort.most_inputs:
            return "with 8 bits it loses little, and is too large for this effort"
        apart = isinstance(nearest.layer.weight.granularity, PerChannel)
        if apart and not self.effort.depthwise and is_depthwise(nearest.layer):
            return "with 8 bits a depthwise layer loses little"
        return None

    def sample_rows(
        self, layer: LayerPlan, index: int, inputs: StoredArrays, readers: int = 1
    ) -> Iterator[tuple[PatchExtractor, Ints]]:
        """Draw the positions of rows in each batch of a layer's input.

        index: of the layer, for the seed. readers: layers that share its weights and are looked at together.
        """
        shape = read_weight_shape(layer.node)
        groups, _, columns = _rows_shape(layer.node)
        wanted = min(self.effort.rows_for(columns), max(1, MOST_NUMBERS // (groups * columns)))
        wanted = -(-wanted // readers)
        cuts = [(PatchExtractor.of(layer.node, shape, x.shape), x.shape) for x in inputs.held]
        most = -(-wanted // max(1, sum(patches.entries(size) for patches, size in cuts)))
        rng = np.random.default_rng([self.seed, index])
        for patches, size in cuts:
            count = patches.positions(size)
            yield patches, np.arange(count) if count <= most else np.sort(rng.choice(count, most, replace=False))

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
        layer, node = nearest.layer, nearest.layer.node
        if not seen.is_finite:
            return nearest, Skipped("round", node.name or "", TOO_LARGE)
        if self.recipe.rounding == "nearest":
            return self._corrected(nearest, source, seen)
        if node.op_type == "MatMul":
            seen = seen.with_means()
        rows = weight_rows_of(node, read_float_weight(layer).reshape(read_weight_shape(node)))
        effective_range = effective_range.around(node, rows, seen)
        wanted = self._solve_weights(rows, seen, effective_range, layer.weight.bits) if anew else rows
        readers = [WeightReader(layer, source)]
        params, codes = self._rounded(self._choose_scales(readers, wanted, seen), wanted, seen, readers)
        params, codes, finding = _choose_better(nearest, params, codes, rows, seen, effective_range)
        return self.settle_bias(replace(nearest, weight=params, codes=codes), source, seen), finding

    def choose_codes(
        self, nearest: LayerParams, readers: Sequence[WeightReader], seen: InputMoments
    ) -> tuple[QuantParams, NDArray[np.integer], Finding]:
        """Round weights that several layers share by second order, or keep their nearest codes where these err less.

        nearest: the first of the layers. seen: moments of all their inputs in the float network.
        """
        node = nearest.layer.node
        if not seen.is_finite:
            return nearest.weight, nearest.codes, Skipped("round", node.name or "", TOO_LARGE)
        rows = weight_rows_of(node, read_float_weight(nearest.layer).reshape(read_weight_shape(node)))
        params, codes = self._rounded(self._choose_scales(readers, rows, seen), rows, seen, readers)
        return _choose_better(nearest, params, codes, rows, seen, EffectiveRange())

    def corrects_means(self, layer: LayerPlan) -> bool:
        """Whether the bias of a layer is to keep the means of its outputs, as they are measured."""
        return self.recipe.bias_correction not in ("analytic", "none") and layer.node.op_type != "MatMul"

    def settle_bias(self, chosen: LayerParams, source: LayerInput | None, seen: InputMoments | None) -> LayerParams:
        """Give a layer of these codes its bias. seen: None where `corrects_means` says that it is not asked for."""
        layer = chosen.layer
        bias = shift_bias(layer, self._shift(layer, chosen.weight.dequantize(chosen.codes), seen))
        return attach_bias(layer, chosen.weight, chosen.codes, bias, source, self.target)

    def _corrected(
        self, nearest: LayerParams, source: LayerInput | None, seen: InputMoments
    ) -> tuple[LayerParams, Finding]:
        """Keep the nearest codes, with a bias that keeps the means of the outputs."""
        layer, name = nearest.layer, nearest.layer.node.name or ""
        shift = self._shift(layer, nearest.weight.dequantize(nearest.codes), seen)
        if shift is None:
            return nearest, Skipped("bias", name, "a MatMul has no bias")
        chosen = attach_bias(layer, nearest.weight, nearest.codes, shift_bias(layer, shift), source, self.target)
        what = "bias keeps the means of its outputs, whatever the layers before do to them"
        return chosen, Change("bias", name, what, what)

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
            part = rows[:, :, block.part].astype(np.float64)
            found[:, :, block.part] = gptq.solve_weights(part, block.hessian, block.cross, ridge)
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


def _rows_shape(node: Node) -> tuple[int, int, int]:
    """The shape of the layer's weights as rows, (G, O, K)."""
    groups, outputs, inputs = weight_rows_of(node, np.empty(read_weight_shape(node), bool)).shape
    return groups, outputs, inputs


def first_input(node: Node) -> Value:
    """The data input of a layer."""
    value = node.inputs[0]
    assert value is not None
    return value


BYTES_IN_MEMORY = 2**27
"""Bytes of tensors that each of the two networks holds in memory; more go to temporary files."""

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


def round_layers_sequentially(
    model: Model,
    plan: Plan,
    params: Params,
    feeds: Sequence[Mapping[str, NDArray[Any]]],
    recipe: Recipe,
    reporter: Reporter,
    seed: int = 0,
) -> list[Finding]:
    """Replace the layers of `params` by rounded ones, in place.

    Args:
        model: the folded float network, which stays as it is.
        plan: the decisions.
        params: parameters of all tensors, with nearest codes.
        feeds: the images, batch by batch.
        recipe: bits, rounding and effort.
        reporter: hears of progress.
        seed: of the rows that are drawn from the images.
    """
    solver = LayerSolver(recipe, plan.target, choose_rounding_effort(plan, recipe), seed)
    # `CandidateScorer` scores on batches that weights were not rounded on: these must be held out whole
    pieces = [1 if len(feeds) >= HELD_OUT_INTERVAL else _count_images(feed) for feed in feeds]
    images = sum(_count_images(feed) for feed in feeds)
    return _SequentialRounder(model, plan, params, solver, pieces, images).run(feeds, reporter)


@dataclass(slots=True)
class _SequentialRounder:
    model: Model
    plan: Plan
    params: Params
    solver: LayerSolver
    pieces: list[int]  # of each batch, one of so many is held out
    images: int
    shared: dict[Node, Finding] = field(default_factory=dict)  # layers whose codes are settled before
    findings: list[Finding] = field(default_factory=list)

    @property
    def interval(self) -> int:
        return choose_held_out_interval(sum(self.pieces))

    def run(
        self,
        feeds: Sequence[Mapping[str, NDArray[Any]]],
        reporter: Reporter,
    ) -> list[Finding]:
        self.shared = round_shared_weights(
            self.model, self.plan, self.params, self.solver, feeds, self.interval, BYTES_IN_MEMORY
        )
        simulated, nodes = self._with_quantizers()
        with (
            contextlib.closing(ArrayStore(BYTES_IN_MEMORY)) as first,
            contextlib.closing(ArrayStore(BYTES_IN_MEMORY)) as second,
        ):
            float_run = StepwiseRun(self.model, feeds, first, threads=self.solver.recipe.threads)
            quantized_run = StepwiseRun(simulated, feeds, second, threads=self.solver.recipe.threads)
            self._go(float_run, quantized_run, simulated, nodes, reporter)
        return self.findings

    def _go(
        self,
        float_run: StepwiseRun,
        quantized_run: StepwiseRun,
        simulated: Model,
        nodes: Mapping[str, Node],
        reporter: Reporter,
    ) -> None:
        """Run both networks. While a layer is solved, the float network, which does not depend on it, runs ahead."""
        refusals = self._refusals()
        to_watch = dict.fromkeys(
            chosen.layer.node
            for chosen, why in zip(self.params.layers, refusals, strict=True)
            if why is None and (chosen.layer.node not in self.shared or self.solver.corrects_means(chosen.layer))
        )
        inputs = prefetch(float_run.values_of, map(first_input, to_watch), workers=1, depth=1)
        with contextlib.closing(inputs):
            upcoming = next(inputs, None)
            for index, (chosen, why) in enumerate(zip(list(self.params.layers), refusals, strict=True)):
                reporter.progress("round", index, len(refusals))
                quantized_node = nodes[chosen.layer.node.name or ""]
                if why is None:
                    seen: InputMoments | str | None = None
                    if chosen.layer.node in to_watch:
                        assert upcoming is not None
                        seen = self._moments(chosen.layer, index, upcoming.result(), quantized_run, quantized_node)
                        upcoming = next(inputs, None)
                    if isinstance(seen, str) and chosen.layer.node not in self.shared:
                        why = seen
                    else:
                        chosen = self._round(chosen, None if isinstance(seen, str) else seen)
                        self.params.layers[index] = chosen
                if why is not None:
                    self.findings.append(Skipped("round", chosen.layer.node.name or "", why))
                _replace_weights(simulated, quantized_node, chosen)
        reporter.progress("round", len(refusals), len(refusals))

    def _refusals(self) -> list[str | None]:
        """Why each layer keeps its nearest codes: also those that second order takes longest for, if all take too long.

        A layer of K inputs takes work in K^3 and K^2 times its outputs, however few rows it has.
        """
        found = [self.solver.refusal(chosen) for chosen in self.params.layers]
        if self.solver.recipe.rounding == "nearest" or self.solver.recipe.effort == "best":
            return found
        work = quantization_work((chosen.layer.node for chosen in self.params.layers), self.images)
        left = ROUNDING_SHARE * work
        costs: dict[int, float] = {}
        for index, chosen in enumerate(self.params.layers):
            if found[index] is None and chosen.layer.weight.bits == 8 and chosen.layer.node not in self.shared:
                groups, outputs, inputs = _rows_shape(chosen.layer.node)
                costs[index] = SOLVE_WORK * groups * (5 / 3 * inputs**3 + 5 * inputs**2 * outputs)
        rows = {index: count_rows(self.params.layers[index].layer.node) for index in costs}
        for index in sorted(costs, key=lambda index: (costs[index] / rows[index], index)):
            left -= costs[index]
            if left < 0:
                found[index] = "with 8 bits it loses little, and to round all layers by second order takes too long"
        return found

    def _round(self, chosen: LayerParams, seen: InputMoments | None) -> LayerParams:
        """Round a layer, or settle the bias of one that has its codes from all layers that share them."""
        node = chosen.layer.node
        source = self.params.sources.get(node)
        if node in self.shared:
            self.findings.append(self.shared[node])
            return self.solver.settle_bias(chosen, source, seen)
        assert seen is not None
        effective_range = EffectiveRange.of_consumers(node, self.params.activations)
        rounded, finding = self.solver.solve(chosen, source, seen, effective_range)
        self.findings.append(finding)
        return rounded

    def _with_quantizers(self) -> tuple[Model, dict[str, Node]]:
        """A copy with float weights, and its nodes by name.

        It has all quantizers of activations where these have fewer than 8 bits and weights are to be solved.
        """
        copy = self.model.copy()
        plan = replan(self.plan, copy)
        chosen = carry_over_params(replace(self.params, layers=[]), plan)
        nodes = {layer.node.name or "": layer.node for layer in plan.layers}
        fewest = min((found.spec.bits for found in chosen.activations.values()), default=8)
        if fewest < 8 and self.solver.recipe.rounding != "nearest":
            emit(copy, plan, chosen, pack=False)
        return copy, nodes

    def _moments(
        self, layer: LayerPlan, index: int, floats: StoredArrays, quantized_run: StepwiseRun, quantized_node: Node
    ) -> InputMoments | str:
        """The moments of what a layer reads in both networks, or why there are none."""
        codes, grid = quantized_run.codes_of(first_input(quantized_node))
        pairs = [(x.shape, q.shape) for x, q in zip(floats.held, codes.held, strict=True)]
        apart = sum(count for count, (x, q) in zip(self.pieces, pairs, strict=True) if x != q)
        if apart:  # rows of one place are no pairs then, where there are as many by chance, either
            many = f"{apart} of {sum(self.pieces)} pictures"
            return f"on {many} the data select other rows for it than in the float network"
        if not any(math.prod(x) for x, _ in pairs):
            return "no picture gives it any rows"
        pieces = [count if math.prod(x) else 0 for count, (x, _) in zip(self.pieces, pairs, strict=True)]
        rows = self._rows(layer, index, floats, codes, grid, pieces)
        means_alone = layer.node in self.shared or self.solver.recipe.rounding == "nearest"
        return accumulate_moments(rows, choose_held_out_interval(sum(pieces)), means_alone=means_alone)

    def _rows(
        self,
        layer: LayerPlan,
        index: int,
        floats: StoredArrays,
        codes: StoredArrays,
        grid: QuantParams | None,
        pieces: Sequence[int],
    ) -> Iterator[tuple[Float32, Float32]]:
        """Yield the same rows of both networks, piece by piece, cut ahead in threads; none of batches of 0 pieces."""
        samples = (
            (number, count, *sample)
            for number, (count, sample) in enumerate(
                zip(pieces, self.solver.sample_rows(layer, index, floats), strict=True)
            )
            if count
        )

        def cut(item: tuple[int, int, PatchExtractor, Ints]) -> tuple[int, Float32, Float32]:
            number, count, patches, at = item
            places = patches.places(at)
            found = patches.rows(codes[number], places, zero=0 if grid is None else int(grid.zero_point))
            if grid is not None:
                found -= np.float32(grid.zero_point)
                found *= grid.scale
            return count, patches.rows(floats[number], places), found

        with contextlib.closing(prefetch(cut, samples, workers=1, depth=4)) as futures:
            for future in futures:
                count, float_rows, found = future.result()
                yield from _split_by_image(float_rows, found, count)


def _count_images(feed: Mapping[str, NDArray[Any]]) -> int:
    return max(1, min((len(x) for x in feed.values() if x.ndim), default=1))


def _split_by_image(floats: Float32, rows: Float32, pieces: int) -> Iterator[tuple[Float32, Float32]]:
    """Split the rows (G, n, K) of a batch by image."""
    ends = np.linspace(0, rows.shape[1], pieces + 1).astype(int)
    for start, end in itertools.pairwise(ends.tolist()):
        if end > start:
            yield floats[:, start:end], rows[:, start:end]


def _replace_weights(model: Model, node: Node, chosen: LayerParams) -> None:
    """Give the layer the weights and the bias that its codes stand for."""
    weight = chosen.weight.dequantize(chosen.codes).reshape(read_weight_shape(node))
    model.set_input(node, 1, model.constant(f"{node.name}_rounded", weight))
    if chosen.bias is not None:
        model.set_input(node, 2, model.constant(f"{node.name}_corrected", chosen.bias.astype(np.float32)))
