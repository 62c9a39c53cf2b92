"""Layer after layer, weights are rounded for the inputs that the layers before, quantized already, will really hand on.

Two networks are walked side by side over the same pictures: the folded float one, and a copy with all quantizers in
place, whose weights are replaced as they are found. At each layer rows of both are drawn (patches.py), their moments
summed (moments.py), and weights and bias are found by these (solve.py).

Activations of 8 bits and more are not rounded on the way. Their noise is no function of what a layer reads: weights
that were solved anew for it could only shrink, layer after layer, and outputs with them. Fewer bits lose so much that
to shrink is right.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconv.emit import emit
from qconv.findings import Finding, Skipped
from qconv.graph import Model, Node
from qconv.held import Store
from qconv.moments import moments
from qconv.params import Params, carried_over
from qconv.plan import Layer, Plan
from qconv.planner import make_plan
from qconv.recipe import Recipe
from qconv.rounder import stored_shape
from qconv.solve import Effort, Solver, first_input
from qconv.targets import TARGETS
from qconv.walk import Walk
from qconv.weights import LayerParams

Float32 = NDArray[np.float32]
HELD = 2**27
"""Bytes of tensors between two layers that each of both networks holds in memory; more go to temporary files."""
EFFORTS = {
    # chosen with --rounding second-order
    "fast": Effort(pictures=32, rows=4, most_rows=2048, most_weights=2**22),
    "balanced": Effort(pictures=96, rows=16, most_rows=8192, most_weights=2**22),
    "best": Effort(
        512, rows=32, most_rows=30000, most_weights=2**27, factors=(0.7, 0.8, 0.9, 1.1, 1.2), refits=3, sweeps=4
    ),
}


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
    return _Refiner(model, params, Solver(recipe, plan.target, effort)).run(feeds, floats, progress)


@dataclass(slots=True)
class _Refiner:
    model: Model
    params: Params
    solver: Solver
    findings: list[Finding] = field(default_factory=list)

    def run(
        self,
        feeds: Sequence[Mapping[str, NDArray[Any]]],
        floats: Mapping[str, str],
        progress: Callable[[str, int, int], None],
    ) -> list[Finding]:
        simulated, nodes = self._with_quantizers(floats)
        with contextlib.closing(Store(HELD)) as first, contextlib.closing(Store(HELD)) as second:
            real = Walk(self.model, feeds, first, threads=self.solver.recipe.threads)
            other = Walk(simulated, feeds, second, threads=self.solver.recipe.threads)
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
            why = self.solver.refusal(self.model, chosen)
            if why is None:
                seen = moments(self._rows(chosen.layer, index, real, other, twin))
                chosen, finding = self.solver.solved(chosen, self.params.sources.get(node), seen)
                self.params.layers[index] = chosen
                self.findings.append(finding)
            else:
                self.findings.append(Skipped("round", node.name or "", why))
            _replace(simulated, twin, chosen)
        progress("round", len(self.params.layers), len(self.params.layers))

    def _with_quantizers(self, floats: Mapping[str, str]) -> tuple[Model, dict[str, Node]]:
        """A copy with float weights and, where any has fewer than 8 bits, every quantizer of activations; its nodes by
        name.
        """
        copy = self.model.copy()
        recipe = self.solver.recipe
        plan = make_plan(copy, recipe, TARGETS[recipe.target], floats)
        chosen = carried_over(replace(self.params, layers=[]), plan)
        nodes = {layer.node.name or "": layer.node for layer in plan.layers}
        if min((found.spec.bits for found in chosen.activations.values()), default=8) < 8:
            emit(copy, plan, chosen, pack=False)
        return copy, nodes

    def _rows(self, layer: Layer, index: int, real: Walk, other: Walk, twin: Node) -> Iterator[tuple[Float32, Float32]]:
        """The same rows of both networks, batch by batch."""
        floats = real.at(first_input(layer.node))
        codes, grid = other.codes_at(first_input(twin))
        drawn = self.solver.drawn(layer, index, floats)
        for x_f, x_q, (patches, at) in zip(floats, codes, drawn, strict=True):
            if grid is None:
                yield patches.rows(x_f, at), patches.rows(x_q, at)
                continue
            found = patches.rows(x_q, at, zero=int(grid.zero_point))
            found -= np.float32(grid.zero_point)
            found *= grid.scale
            yield patches.rows(x_f, at), found


def _replace(model: Model, node: Node, chosen: LayerParams) -> None:
    """Give the layer the weights and the bias that its codes stand for."""
    weight = chosen.weight.dequantize(chosen.codes).reshape(stored_shape(node))
    model.set_input(node, 1, model.constant(f"{node.name}_rounded", weight))
    if chosen.bias is not None:
        model.set_input(node, 2, model.constant(f"{node.name}_corrected", chosen.bias.astype(np.float32)))
