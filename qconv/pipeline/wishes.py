"""Wishes that a model cannot meet: said, where they change nothing, and refused where nothing would be left to do."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable

from qconv.config.recipe import Recipe
from qconv.errors import QconvError, Skipped
from qconv.ir.files import Source
from qconv.ir.model import Model
from qconv.planning.plan import Plan
from qconv.planning.planner import KEPT_FLOAT_BY_OPTION, is_quantizable_layer
from qconv.results.quantize import Audit
from qconv.search.candidate import QuantizationSolution


def look_for_wishes(model: Model, recipe: Recipe, warn: Callable[[str], None]) -> None:
    """Warn of wishes that no node meets: a misspelt name or type keeps nothing float."""
    names = [node.name or "" for node in model.nodes()]
    types = {node.op_type for node in model.nodes()}
    for pattern in recipe.keep_float:
        if not fnmatch.filter(names, pattern):
            warn(f"--keep-float {pattern} matches no node of the folded model.")
    layers = [node.name or "" for node in model.nodes() if is_quantizable_layer(node)]
    left = layers
    for pattern, _ in recipe.layer_bits:
        matched = [name for name in left if fnmatch.fnmatchcase(name, pattern)]
        if not any(fnmatch.fnmatchcase(name, pattern) for name in layers):
            warn(f"--layer-bits: {pattern!r} matches no layer of the folded model.")
        elif not matched:
            warn(f"--layer-bits: {pattern!r} matches no layer that a line above it does not: exceptions stand first.")
        left = [name for name in left if name not in matched]
    for op_type in recipe.keep_float_op:
        if op_type not in types:
            warn(f"--keep-float-op {op_type}: the folded model has no such operator.")


def look_for_wishes_in_vain(plan: Plan, audited: Audit, warn: Callable[[str], None]) -> None:
    """Warn of --keep-float in vain: what only moves or cuts values works on whatever its neighbours are."""
    found = {island.node for island in (*audited.islands, *audited.placed)}
    # an activation takes over the wish for the layer that it is fused into
    found |= {name for name, layer in plan.activation_of.items() if layer in plan.kept}
    vain = [name for name, kept in plan.kept.items() if kept.why.startswith(KEPT_FLOAT_BY_OPTION) and name not in found]
    if vain:
        more = f" and {len(vain) - 1} more" if len(vain) > 1 else ""
        warn(f"--keep-float changes nothing for {vain[0]}{more}: it runs as its neighbours do, or not at all.")


def look_for_means_in_vain(settled: QuantizationSolution, recipe: Recipe, warn: Callable[[str], None]) -> None:
    """Warn where no bias is corrected: an exporter may have folded all that BatchNormalization could tell of means."""
    unknown = sum(isinstance(finding, Skipped) and finding.step == "bias" for finding in settled.findings)
    if recipe.bias_correction == "analytic" and unknown == len(settled.plan.layers):
        instead = "" if recipe.data_free else "; the pictures do with --bias-correction measured"
        none = "--bias-correction analytic corrects no layer"
        warn(f"{none}: none reads what a BatchNormalization tells the mean of{instead}.")


def require_layers(plan: Plan, source: Source) -> None:
    """Raise QconvError where nothing would be quantized."""
    if not plan.layers:
        raise QconvError(
            f"{source.name} has nothing to quantize: no Conv, Gemm or MatMul with constant weights is left.",
            "check --keep-float and --keep-float-op, and that the model is a network with weights.",
        )
