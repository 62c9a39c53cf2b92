"""A recipe carried out: the numbers of every tensor, and the model that they make of a copy of the folded network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

import qconv
from qconv.calibration.sketch import Sketch
from qconv.config.recipe import Recipe
from qconv.config.targets import TARGETS
from qconv.errors import Finding
from qconv.ir.metadata import write_metadata
from qconv.ir.model import Model
from qconv.passes.compress_constants import compress_constants
from qconv.planning.plan import Plan
from qconv.planning.planner import make_plan
from qconv.quantization.emit import emit
from qconv.quantization.parameters import NO_RANGE_FACTORS, Params, carry_over_params, choose_params
from qconv.quantization.second_order import round_layers_sequentially

Feeds = Sequence[Mapping[str, NDArray[Any]]]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Folded:
    """What recipes are carried out on. model: the float network, which stays as it is. floats: nodes to leave in float,
    as `make_plan` takes them. sketches: of its tensors; factors: on their ranges."""

    model: Model
    floats: Mapping[str, str]
    sketches: Mapping[str, Sketch]
    factors: Mapping[str, float]


@dataclass(slots=True)
class Settled:
    """All that is written, for the folded network itself. findings: what was done on the way."""

    plan: Plan
    params: Params
    findings: list[Finding]


def nearest(folded: Folded, recipe: Recipe) -> Settled:
    """The numbers of a recipe, weights rounded to the nearest code."""
    plan = make_plan(folded.model, recipe, TARGETS[recipe.target], folded.floats)
    return Settled(plan, *choose_params(plan, folded.sketches, recipe, folded.factors))


def round_anew(settled: Settled, folded: Folded, recipe: Recipe, feeds: Feeds, progress: Progress) -> None:
    """Weights rounded for what the layers before hand on."""
    plan, params = settled.plan, settled.params
    settled.findings += round_layers_sequentially(folded.model, plan, params, feeds, recipe, folded.floats, progress)


def written(folded: Folded, recipe: Recipe, params: Params) -> Model:
    """The quantized model with these numbers."""
    model = folded.model.copy()
    plan = make_plan(model, recipe, TARGETS[recipe.target], folded.floats)
    emit(model, plan, carry_over_params(params, plan), pack=recipe.pack)
    compress_constants(model)
    write_metadata(model, qconv.__version__, recipe, None)
    return model


def carried_out(
    model: Model, recipe: Recipe, sketches: Mapping[str, Sketch], floats: Mapping[str, str] | None = None
) -> Model:
    """The quantized model that `pipeline.quantize` makes of these sketches, weights rounded to the nearest code."""
    folded = Folded(model, floats or {}, sketches, NO_RANGE_FACTORS)
    return written(folded, recipe, nearest(folded, recipe).params)
