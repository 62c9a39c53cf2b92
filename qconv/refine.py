"""Layer after layer, weights are rounded for the inputs that the layers before, quantized already, will really hand on.

Two networks are walked side by side over the same pictures: the folded float one, and a copy with all quantizers in
place, whose weights are replaced as they are found. At each layer rows of both are drawn (patches.py), their moments
summed (moments.py), the weights solved and rounded (rounding.py) and the bias set so that every output keeps its mean:

    b' = b + W m_f - Q m_q

With means m that BatchNormalization tells (see expected.py) it is b' = b + (W - Q) m, and b where it tells none.

A layer keeps its nearest codes where the new ones do not err less on rows that were kept apart.

Activations of 8 bits and more are not rounded on the way. Their noise is no function of what a layer reads: weights
that were solved anew for it could only shrink, layer after layer, and outputs with them. Fewer bits lose so much that
to shrink is right.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconv import channel_bits, rounding, saturation
from qconv.emit import emit
from qconv.findings import Change, Finding, Skipped
from qconv.graph import Model, Node, Value, array
from qconv.held import Store
from qconv.layers import rows_of, stored_of
from qconv.moments import Moments, moments
from qconv.params import Params
from qconv.patches import Patches
from qconv.plan import Layer, Plan
from qconv.planner import make_plan
from qconv.quant import PerBlock, PerTensor, QuantParams
from qconv.recipe import Recipe
from qconv.targets import TARGETS
from qconv.walk import Walk
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
HELD = 2**27
"""Bytes of tensors between two layers that each of both networks holds in memory; more go to temporary files."""
MOST_WIDENINGS = 8
RIDGES = (64.0, 16.0, 4.0, 1.0, 0.3)
ENOUGH_ROWS = 64
"""Rows kept apart from which on they choose for each output alone; fewer for all of a layer together."""
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


EFFORTS = {
    # chosen with --rounding second-order
    "fast": Effort(pictures=32, rows=4, most_rows=2048, most_weights=2**22),
    "balanced": Effort(pictures=96, rows=16, most_rows=8192, most_weights=2**22),
    "best": Effort(
        512, rows=32, most_rows=30000, most_weights=2**27, factors=(0.7, 0.8, 0.9, 1.1, 1.2), refits=3, sweeps=4
    ),
}
LEAST_ROWS = 2048


def refine(
    model: Model,
    plan: Plan,
    params: Params,
    feeds: Sequence[Mapping[str, NDArray[Any]]],
    recipe: Recipe,
    effort: Effort,
    floats: Mapping[str, str],
    progress: Callable[[str, int, int], None],
) -> list[Finding]:
    """Replace the layers of `params` by rounded ones. model: the folded float network, which stays as it is.

    feeds: the pictures, batch by batch.
    """
    return _Refiner(model, plan, params, recipe, effort).run(feeds, floats, progress)


@dataclass(slots=True)
class _Refiner:
    model: Model
    plan: Plan
    params: Params
    recipe: Recipe
    effort: Effort
    findings: list[Finding] = field(default_factory=list)

    def run(
        self,
        feeds: Sequence[Mapping[str, NDArray[Any]]],
        floats: Mapping[str, str],
        progress: Callable[[str, int, int], None],
    ) -> list[Finding]:
        simulated, nodes = self._with_quantizers(floats)
        with contextlib.closing(Store(HELD)) as first, contextlib.closing(Store(HELD)) as second:
            real = Walk(self.model, feeds, first, threads=self.recipe.threads)
            other = Walk(simulated, feeds, second, threads=self.recipe.threads)
            self._go(real, other, simulated, nodes, progress)
        return self.findings

    def _go(
        self,
        real: Walk,
        other: Walk,
        simulated: Model,
        nodes: Mapping[str, Node],
        progress: Callable[[str, int, int], None],
    ) -> None:
        for index, chosen in enumerate(self.params.layers):
            progress("round", index, len(self.params.layers))
            node = chosen.layer.node
            twin = nodes[node.name or ""]
            why = self._refusal(chosen)
            if why is None:
                pairs = self._rows(chosen.layer, index, real, other, twin)
                chosen = self._solved(chosen, moments(pairs))
                self.params.layers[index] = chosen
            else:
                self.findings.append(Skipped("round", node.name or "", why))
            _replace(simulated, twin, chosen)
        progress("round", len(self.params.layers), len(self.params.layers))

    def _with_quantizers(self, floats: Mapping[str, str]) -> tuple[Model, dict[str, Node]]:
        """A copy with float weights and, where any has fewer than 8 bits, every quantizer of activations; its nodes by
        name.
        """
        copy = self.model.copy()
        plan = make_plan(copy, self.recipe, TARGETS[self.recipe.target], floats)
        by_name = {value.name: chosen for value, chosen in self.params.activations.items()}
        constants = {value.name: chosen for value, chosen in self.params.constants.items()}
        chosen = Params(
            {value: by_name[value.name] for value in plan.activations},
            {value: constants[value.name] for value in plan.constants},
        )
        nodes = {layer.node.name or "": layer.node for layer in plan.layers}
        if min((found.spec.bits for found in chosen.activations.values()), default=8) < 8:
            emit(copy, plan, chosen, pack=False)
        return copy, nodes

    def _refusal(self, chosen: LayerParams) -> str | None:
        weight = chosen.layer.node.inputs[1]
        assert weight is not None
        if chosen.layer.weight.bits > 8:
            return "weights of 16 bits lose nothing by rounding to the nearest code"
        if len(self.model.readers(weight)) > 1:
            return "several layers share its weights"
        if chosen.layer.weight.bits == 8 and chosen.codes.size > self.effort.most_weights:
            return "with 8 bits it loses little, and has too many weights for this effort"
        return None

    def _rows(self, layer: Layer, index: int, real: Walk, other: Walk, twin: Node) -> Iterator[tuple[Float32, Float32]]:
        """The same rows of both networks, batch by batch."""
        stored = array(layer.node.inputs[1])
        assert stored is not None
        floats = real.at(_first(layer.node))
        codes, grid = other.codes_at(_first(twin))
        inputs = rows_of(layer.node, stored).shape[2]
        wanted = min(max(self.effort.rows * inputs, LEAST_ROWS), self.effort.most_rows)
        pictures = sum(x.shape[0] if x.shape else 1 for x in floats.held)
        rng = np.random.default_rng([self.recipe.seed, index])
        for x_f, x_q in zip(floats, codes, strict=True):
            patches = Patches.of(layer.node, stored.shape, x_f.shape)
            count = patches.positions(x_f.shape)
            most = -(-wanted // pictures)
            at = np.arange(count) if count <= most else np.sort(rng.choice(count, most, replace=False))
            if grid is None:
                yield patches.rows(x_f, at), patches.rows(x_q, at)
                continue
            found = patches.rows(x_q, at, zero=int(grid.zero_point))
            found -= np.float32(grid.zero_point)
            found *= grid.scale
            yield patches.rows(x_f, at), found

    def _solved(self, nearest: LayerParams, seen: Moments) -> LayerParams:
        layer, node = nearest.layer, nearest.layer.node
        weight = float_weight(layer)
        shape = _stored_shape(node)
        rows = rows_of(node, weight.reshape(shape))
        wanted = self._resolved(rows, seen)
        importance = np.concatenate([np.diagonal(b.hessian, axis1=1, axis2=2) for b in seen.blocks], axis=1)
        spread = np.broadcast_to(importance[:, None].astype(np.float32), rows.shape)
        arranged = _arranged(layer, stored_of(node, wanted, shape))
        if layer.own_bits:
            params = channel_bits.of_weights(arranged, layer.weight, self.recipe.weight_calibrator)
        else:
            counts = _arranged(layer, stored_of(node, spread, shape))
            params = layer.weight.from_range(*least_squares(arranged, layer.weight, counts))
        source = self.params.sources.get(node)
        params, _ = fitted(
            layer, params, arranged, source, self.plan.target, saturation_safe=self.recipe.saturation_safe
        )
        params, codes = self._rounded(layer, params, wanted, seen, source)
        judged = [
            _lost(rows, rows_of(node, p.dequantize(c).reshape(shape)), seen)
            for p, c in ((nearest.weight, nearest.codes), (params, codes))
        ]
        if judged[1] > judged[0]:
            params, codes = nearest.weight, nearest.codes
            self.findings.append(Skipped("round", node.name or "", "its nearest codes err less"))
        else:
            apart = f", in {len(seen.blocks)} blocks of inputs, as if independent" if len(seen.blocks) > 1 else ""
            what = f"rounded by second order{apart}"
            gained = (
                f": {10 * np.log10(judged[0] / judged[1]):.1f} dB less error than nearest codes"
                if judged[1] > 0
                else ""
            )
            self.findings.append(Change("round", node.name or "", what + gained, what))
        bias = shifted_bias(layer, self._shift(layer, weight, params.dequantize(codes), seen))
        return with_bias(layer, params, codes, bias, source, self.plan.target)

    def _shift(self, layer: Layer, weight: Float32, rounded: Float32, seen: Moments) -> Float64 | None:
        """What the bias takes back, (O,)."""
        if self.recipe.bias_correction == "analytic":
            known = analytic_shift(layer, weight, rounded)
            return None if isinstance(known, str) else known
        if self.recipe.bias_correction == "none" or layer.node.op_type == "MatMul":  # which adds nothing
            return None
        shape = _stored_shape(layer.node)
        rows, real = (rows_of(layer.node, numbers.reshape(shape)) for numbers in (weight, rounded))
        shift = np.einsum("gok,gk->go", rows, seen.float_mean) - np.einsum("gok,gk->go", real, seen.mean)
        return np.asarray(shift.reshape(-1), np.float64)

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
                layer, source, self.plan.target, widest=params.widest, saturation_safe=self.recipe.saturation_safe
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
        real = rows_of(layer.node, params.dequantize(codes).reshape(_stored_shape(layer.node))).astype(np.float64)
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
        arranged = _arranged(layer, stored_of(layer.node, wanted, _stored_shape(layer.node)))
        params = saturation.widen(params, arranged, *limits, output_axis=axis)
        return params, params.quantize(arranged)

    def _codes(self, layer: Layer, params: QuantParams, wanted: Float32, seen: Moments) -> NDArray[np.integer]:
        node, shape = layer.node, _stored_shape(layer.node)
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
        rows = rows_of(layer.node, codes.reshape(_stored_shape(layer.node))).astype(np.float64)
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


def _arranged(layer: Layer, stored: NDArray[Any]) -> NDArray[Any]:
    """What is stored in the shape of the weights, as the layer's spec sees them."""
    whole = np.ascontiguousarray(stored)
    return whole.reshape(len(whole), -1) if layer.blocked else whole


def _grid(layer: Layer, params: QuantParams) -> rounding.Grid:
    shape = _stored_shape(layer.node)
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


def _first(node: Node) -> Value:
    value = node.inputs[0]
    assert value is not None
    return value


def _stored_shape(node: Node) -> tuple[int, ...]:
    stored = array(node.inputs[1])
    assert stored is not None
    return stored.shape


def _replace(model: Model, node: Node, chosen: LayerParams) -> None:
    """Give the layer the weights and the bias that its codes stand for."""
    weight = chosen.weight.dequantize(chosen.codes).reshape(_stored_shape(node))
    model.set_input(node, 1, model.constant(f"{node.name}_rounded", weight))
    if chosen.bias is not None:
        model.set_input(node, 2, model.constant(f"{node.name}_corrected", chosen.bias.astype(np.float32)))
