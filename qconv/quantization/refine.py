"""Layer after layer, weights are rounded for the inputs that the layers before, quantized already, will really hand on.

Two networks are walked side by side over the same pictures: the folded float one, and a copy with all quantizers in
place, whose weights are replaced as they are found. At each layer rows of both are drawn (patches.py), their moments
summed (moments.py), and weights and bias are found by these (solve.py). Nearest codes stay what they are, and their
biases alone are found like that.

Activations of 8 bits and more are not rounded on the way. Their noise is no function of what a layer reads: weights
that were solved anew for it could only shrink, layer after layer, and outputs with them. Fewer bits lose so much that
to shrink is right.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconv.config.recipe import Recipe
from qconv.config.targets import TARGETS
from qconv.errors import Finding, Skipped
from qconv.ir.model import Model, Node
from qconv.ir.stepwise import StepwiseRun
from qconv.planning.plan import LayerPlan, Plan
from qconv.planning.planner import make_plan
from qconv.quantization.emit import emit
from qconv.quantization.moments import KEPT_SHARE, moments, share_for
from qconv.quantization.params import Params, carried_over
from qconv.quantization.patches import Ints, Patches
from qconv.quantization.rounder import stored_shape
from qconv.quantization.sight import Sight
from qconv.quantization.solve import Effort, Solver, first_input
from qconv.quantization.weights import LayerParams
from qconv.storage import ArrayStore, StoredArrays, prefetch

Float32 = NDArray[np.float32]
HELD = 2**27
"""Bytes of tensors between two layers that each of both networks holds in memory; more go to temporary files."""
EFFORTS = {
    # chosen with --rounding second-order
    "fast": Effort(pictures=32, rows=4, most_rows=2048, most_weights=2**20, most_inputs=1280),
    "balanced": Effort(pictures=96, rows=16, most_rows=8192, most_weights=2**20, most_inputs=1280),
    "best": Effort(
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


def effort_for(plan: Plan, recipe: Recipe) -> Effort:
    """What is spent on the layers of a plan."""
    return EFFORTS[recipe.effort].for_bits(layer.weight.bits for layer in plan.layers)


def refine(
    model: Model,
    plan: Plan,
    params: Params,
    feeds: Sequence[Mapping[str, NDArray[Any]]],
    recipe: Recipe,
    floats: Mapping[str, str],
    progress: Callable[[str, int, int], None],
) -> list[Finding]:
    """Replace the layers of `params` by rounded ones. model: the folded float network, which stays as it is.

    feeds: the pictures, batch by batch.
    """
    solver = Solver(recipe, plan.target, effort_for(plan, recipe))
    # whoever judges by batches that weights were not rounded on (judge.py) counts on these being kept apart whole
    pieces = [1 if len(feeds) >= KEPT_SHARE else _pictures_in(feed) for feed in feeds]
    return _Refiner(model, params, solver, pieces).run(feeds, floats, progress)


@dataclass(slots=True)
class _Refiner:
    model: Model
    params: Params
    solver: Solver
    pieces: list[int]  # of each batch, one of so many is kept apart
    findings: list[Finding] = field(default_factory=list)

    def run(
        self,
        feeds: Sequence[Mapping[str, NDArray[Any]]],
        floats: Mapping[str, str],
        progress: Callable[[str, int, int], None],
    ) -> list[Finding]:
        simulated, nodes = self._with_quantizers(floats)
        with contextlib.closing(ArrayStore(HELD)) as first, contextlib.closing(ArrayStore(HELD)) as second:
            real = StepwiseRun(self.model, feeds, first, threads=self.solver.recipe.threads)
            other = StepwiseRun(simulated, feeds, second, threads=self.solver.recipe.threads)
            self._go(real, other, simulated, nodes, progress)
        return self.findings

    def _go(
        self,
        real: StepwiseRun,
        other: StepwiseRun,
        simulated: Model,
        nodes: Mapping[str, Node],
        progress: Callable[[str, int, int], None],
    ) -> None:
        """While a layer is solved the float network, which does not depend on that, runs on to the next one."""
        refusals = [self.solver.refusal(self.model, chosen) for chosen in self.params.layers]
        solved = [chosen.layer.node for chosen, why in zip(self.params.layers, refusals, strict=True) if why is None]
        inputs = prefetch(real.at, map(first_input, solved), workers=1, depth=1)
        with contextlib.closing(inputs):
            upcoming = next(inputs, None)
            for index, (chosen, why) in enumerate(zip(list(self.params.layers), refusals, strict=True)):
                progress("round", index, len(refusals))
                node = chosen.layer.node
                twin = nodes[node.name or ""]
                if why is None:
                    assert upcoming is not None
                    rows = self._rows(chosen.layer, index, upcoming.result(), other, twin)
                    seen = moments(rows, share_for(sum(self.pieces)))
                    upcoming = next(inputs, None)
                    sight = Sight.behind(node, self.params.activations)
                    chosen, finding = self.solver.solved(chosen, self.params.sources.get(node), seen, sight)
                    self.params.layers[index] = chosen
                    self.findings.append(finding)
                else:
                    self.findings.append(Skipped("round", node.name or "", why))
                _replace(simulated, twin, chosen)
        progress("round", len(refusals), len(refusals))

    def _with_quantizers(self, floats: Mapping[str, str]) -> tuple[Model, dict[str, Node]]:
        """A copy with float weights, and its nodes by name.

        Where activations have fewer than 8 bits, with all their quantizers, if weights are to be solved for that.
        """
        copy = self.model.copy()
        recipe = self.solver.recipe
        plan = make_plan(copy, recipe, TARGETS[recipe.target], floats)
        chosen = carried_over(replace(self.params, layers=[]), plan)
        nodes = {layer.node.name or "": layer.node for layer in plan.layers}
        fewest = min((found.spec.bits for found in chosen.activations.values()), default=8)
        if fewest < 8 and recipe.rounding != "nearest":
            emit(copy, plan, chosen, pack=False)
        return copy, nodes

    def _rows(
        self, layer: LayerPlan, index: int, floats: StoredArrays, other: StepwiseRun, twin: Node
    ) -> Iterator[tuple[Float32, Float32]]:
        """The same rows of both networks, piece by piece, cut out ahead of who sums them."""
        codes, grid = other.codes_at(first_input(twin))
        drawn = enumerate(self.solver.drawn(layer, index, floats))

        def cut(item: tuple[int, tuple[Patches, Ints]]) -> tuple[Float32, Float32]:
            number, (patches, at) = item
            places = patches.places(at)
            found = patches.rows(codes[number], places, zero=0 if grid is None else int(grid.zero_point))
            if grid is not None:
                found -= np.float32(grid.zero_point)
                found *= grid.scale
            return patches.rows(floats[number], places), found

        with contextlib.closing(prefetch(cut, drawn, workers=1, depth=4)) as futures:
            for count, future in zip(self.pieces, futures, strict=True):
                yield from _apart(*future.result(), count)


def _pictures_in(feed: Mapping[str, NDArray[Any]]) -> int:
    return max(1, min((len(x) for x in feed.values() if x.ndim), default=1))


def _apart(floats: Float32, rows: Float32, pieces: int) -> Iterator[tuple[Float32, Float32]]:
    """Rows (G, n, K) of a batch, which lie picture after picture."""
    ends = np.linspace(0, rows.shape[1], pieces + 1).astype(int)
    for start, end in itertools.pairwise(ends.tolist()):
        if end > start:
            yield floats[:, start:end], rows[:, start:end]


def _replace(model: Model, node: Node, chosen: LayerParams) -> None:
    """Give the layer the weights and the bias that its codes stand for."""
    weight = chosen.weight.dequantize(chosen.codes).reshape(stored_shape(node))
    model.set_input(node, 1, model.constant(f"{node.name}_rounded", weight))
    if chosen.bias is not None:
        model.set_input(node, 2, model.constant(f"{node.name}_corrected", chosen.bias.astype(np.float32)))
