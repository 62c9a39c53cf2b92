"""A plan carried out on a copy: what would come of it, while the folded model stays as it is."""

from __future__ import annotations

from collections.abc import Mapping

import qconv
from qconv.emit import emit
from qconv.fileformat import describe
from qconv.graph import Model
from qconv.params import choose_params
from qconv.planner import make_plan
from qconv.recipe import Recipe
from qconv.shrink import shrink
from qconv.sketch import Sketch
from qconv.targets import TARGETS


def carried_out(
    folded: Model, recipe: Recipe, sketches: Mapping[str, Sketch], floats: Mapping[str, str] | None = None
) -> Model:
    """The quantized model that `pipeline.quantize` makes of these sketches. floats: as `make_plan` takes them."""
    model = folded.copy()
    plan = make_plan(model, recipe, TARGETS[recipe.target], floats)
    params, _ = choose_params(plan, sketches, recipe)
    emit(model, plan, params, pack=recipe.pack)
    shrink(model)
    describe(model, qconv.__version__, recipe, None)
    return model
