"""This module rounds weights layer after layer for the inputs that the quantized layers before will hand on.

The float network and a copy with all quantizers run side by side; at each layer the moments of both are accumulated,
and the layer is rounded for them (`layer_rounding`).

Activations of 8 bits and more are not rounded on the way: their noise is no function of the layer's input, and weights
solved for it could only shrink, layer after layer, and outputs with them. Fewer bits lose so much that to shrink is
right.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconv.config.recipe import Recipe
from qconv.errors import Finding, Skipped
from qconv.ir.model import Model, Node
from qconv.ir.rewriting import data_input
from qconv.ir.stepwise import StepwiseRun
from qconv.planning.plan import LayerPlan, Plan
from qconv.planning.planner import replan
from qconv.planning.work import ROUNDING_SHARE, SOLVE_WORK, count_rows, quantization_work
from qconv.quantization.effective_range import EffectiveRange
from qconv.quantization.emit import emit
from qconv.quantization.gptq import read_weight_shape
from qconv.quantization.input_moments import (
    HELD_OUT_INTERVAL,
    InputMoments,
    Ints,
    PatchExtractor,
    accumulate_moments,
    choose_held_out_interval,
    split_by_image,
)
from qconv.quantization.layer import LayerParams
from qconv.quantization.layer_rounding import LayerSolver, choose_rounding_effort, rows_shape
from qconv.quantization.parameters import Params, carry_over_params
from qconv.quantization.shared_rounding import round_shared_weights
from qconv.quantizer import QuantParams
from qconv.reporter import Reporter
from qconv.storage import ArrayStore, StoredArrays, prefetch

Float32 = NDArray[np.float32]

BYTES_IN_MEMORY = 2**27
"""Bytes of tensors that each of the two networks holds in memory; more go to temporary files."""


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
    counts = [_count_images(feed) for feed in feeds]
    pieces = [1] * len(feeds) if len(feeds) >= HELD_OUT_INTERVAL else counts
    return _SequentialRounder(model, plan, params, solver, pieces, sum(counts)).run(feeds, reporter)


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

    def run(
        self,
        feeds: Sequence[Mapping[str, NDArray[Any]]],
        reporter: Reporter,
    ) -> list[Finding]:
        self.shared = round_shared_weights(
            self.model, self.plan, self.params, self.solver, feeds, self.pieces, BYTES_IN_MEMORY
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
        inputs = prefetch(float_run.values_of, map(data_input, to_watch), workers=1, depth=1)
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
                replace_weights(simulated, quantized_node, chosen)
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
                groups, outputs, inputs = rows_shape(chosen.layer.node)
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
        fewest = min((found.spec.bits for found in self.params.activations.values()), default=8)
        rounds = fewest < 8 and self.solver.recipe.rounding != "nearest"
        return copy_with_float_weights(self.model, self.plan, self.params, quantizers=rounds)

    def _moments(
        self, layer: LayerPlan, index: int, floats: StoredArrays, quantized_run: StepwiseRun, quantized_node: Node
    ) -> InputMoments | str:
        """The moments of what a layer reads in both networks, or why there are none."""
        codes, grid = quantized_run.codes_of(data_input(quantized_node))
        pairs = [(x.shape, q.shape) for x, q in zip(floats.held, codes.held, strict=True)]
        apart = sum(count for count, (x, q) in zip(self.pieces, pairs, strict=True) if x != q)
        if apart:  # rows of one place are no pairs then, where there are as many by chance, either
            many = f"{apart} of {sum(self.pieces)} pictures"
            return f"on {many} the data select other rows for it than in the float network"
        if floats.is_empty:
            return "no picture gives it any rows"
        rows = self._rows(layer, index, floats, codes, grid)
        pieces = sum(count for count, (x, _) in zip(self.pieces, pairs, strict=True) if math.prod(x))
        means_alone = layer.node in self.shared or self.solver.recipe.rounding == "nearest"
        return accumulate_moments(rows, choose_held_out_interval(pieces), means_alone=means_alone)

    def _rows(
        self, layer: LayerPlan, index: int, floats: StoredArrays, codes: StoredArrays, grid: QuantParams | None
    ) -> Iterator[tuple[Float32, Float32]]:
        """Yield the same rows of both networks, piece by piece, cut ahead in threads."""

        def cut(item: tuple[int, PatchExtractor, Ints]) -> tuple[int, Float32, Float32]:
            batch, patches, at = item
            places = patches.places(at)
            found = patches.rows(codes[batch], places, zero=0 if grid is None else int(grid.zero_point))
            if grid is not None:
                found -= np.float32(grid.zero_point)
                found *= grid.scale
            return self.pieces[batch], patches.rows(floats[batch], places), found

        samples = self.solver.sample_rows(layer, index, floats)
        with contextlib.closing(prefetch(cut, samples, workers=1, depth=4)) as futures:
            for future in futures:
                count, float_rows, found = future.result()
                yield from split_by_image(float_rows, found, count)


def _count_images(feed: Mapping[str, NDArray[Any]]) -> int:
    return max(1, min((len(x) for x in feed.values() if x.ndim), default=1))


def copy_with_float_weights(
    model: Model, plan: Plan, params: Params, *, quantizers: bool
) -> tuple[Model, dict[str, Node]]:
    """A copy whose layers take weights by `replace_weights`, with all quantizers of activations, and layers by name."""
    copy = model.copy()
    own = replan(plan, copy)
    nodes = {layer.node.name or "": layer.node for layer in own.layers}
    if quantizers:
        emit(copy, own, carry_over_params(replace(params, layers=[]), own))
    return copy, nodes


def replace_weights(model: Model, node: Node, chosen: LayerParams) -> None:
    """Give the layer the weights and the bias that its codes stand for."""
    weight = chosen.weight.dequantize(chosen.codes).reshape(read_weight_shape(node))
    model.set_input(node, 1, model.constant(f"{node.name}_rounded", weight))
    if chosen.bias is not None:
        model.set_input(node, 2, model.constant(f"{node.name}_corrected", chosen.bias.astype(np.float32)))
