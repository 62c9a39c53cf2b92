"""This module rounds each weight that several layers read once, for what all of them read.

A recurrent network applies one layer at every step, so that the input of a later step depends on the codes of an
earlier one. So these weights are rounded before the network is walked, for inputs of the float network: C = H in the
terms of `gptq`, and the float weights are not solved anew. Every layer has a bias of its own, so that H is the mean
over layers of the moments about each layer's own means; all layers together give as many rows as one would.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

from numpy.typing import NDArray

from qconv.errors import Finding, Skipped
from qconv.ir.model import Model, Node
from qconv.ir.rewriting import data_input
from qconv.ir.stepwise import StepwiseRun
from qconv.planning.plan import Plan
from qconv.quantization.effective_range import EffectiveRange
from qconv.quantization.input_moments import (
    Float32,
    InputMoments,
    Ints,
    PatchExtractor,
    accumulate_moments,
    choose_held_out_interval,
    split_by_image,
)
from qconv.quantization.layer import WeightReader
from qconv.quantization.layer_rounding import TOO_LARGE, LayerSolver
from qconv.quantization.parameters import Params
from qconv.storage import ArrayStore, StoredArrays


def round_shared_weights(
    model: Model,
    plan: Plan,
    params: Params,
    solver: LayerSolver,
    feeds: Sequence[Mapping[str, NDArray[Any]]],
    pieces: Sequence[int],
    most_bytes: int,
) -> dict[Node, Finding]:
    """Round the weights that several layers read, in place of those in `params`, whose biases stay as they are.

    Args:
        model: the folded float network.
        plan: the decisions.
        params: parameters of all tensors, with nearest codes.
        solver: rounds single layers.
        feeds: the images, batch by batch.
        pieces: into how many each batch is cut, of which one in some is held out.
        most_bytes: of tensors that are held in memory.

    Returns:
        What was done, for each of these layers.
    """
    known = {chosen.layer.node: index for index, chosen in enumerate(params.layers)}
    groups: list[list[Node]] = []
    for alike in plan.layers_by_weight():
        nodes = [layer.node for layer in alike]
        if len(nodes) > 1 and solver.refusal(params.layers[known[nodes[0]]]) is None:
            groups.append(nodes)
    if not groups or solver.recipe.rounding == "nearest":
        return {}
    findings: dict[Node, Finding] = {}
    for nodes, seen in zip(groups, _watch(model, params, solver, feeds, groups, pieces, most_bytes), strict=True):
        if seen is None or not seen.is_finite:
            why = "no picture gives it any rows" if seen is None else TOO_LARGE
            findings |= {node: Skipped("round", node.name or "", why) for node in nodes}
            continue
        first = params.layers[known[nodes[0]]]
        readers = [WeightReader(params.layers[known[node]].layer, params.sources.get(node)) for node in nodes]
        weight, codes, finding = solver.choose_codes(first, readers, seen, EffectiveRange(), anew=False)
        for node in nodes:
            params.layers[known[node]] = replace(params.layers[known[node]], weight=weight, codes=codes)
            findings[node] = replace(finding, where=node.name or "")
    return findings


def _watch(
    model: Model,
    params: Params,
    solver: LayerSolver,
    feeds: Sequence[Mapping[str, NDArray[Any]]],
    groups: Sequence[Sequence[Node]],
    pieces: Sequence[int],
    most_bytes: int,
) -> list[InputMoments | None]:
    """The moments of each group of layers in the float network; None where no picture gives it any rows."""
    group_of = {node: index for index, nodes in enumerate(groups) for node in nodes}
    found: dict[int, InputMoments] = {}
    with contextlib.closing(ArrayStore(most_bytes)) as store:
        run = StepwiseRun(model, feeds, store, threads=solver.recipe.threads)
        for index, chosen in enumerate(params.layers):
            group = group_of.get(chosen.layer.node)
            if group is None:
                continue
            floats = run.values_of(data_input(chosen.layer.node))
            if floats.is_empty:
                continue
            samples = solver.sample_rows(chosen.layer, index, floats, readers=len(groups[group]))
            filled = sum(count for count, x in zip(pieces, floats.held, strict=True) if prod(x.shape))
            seen = accumulate_moments(_iter_pieces(samples, floats, pieces), choose_held_out_interval(filled))
            if chosen.layer.node.op_type == "MatMul":
                seen = seen.with_means()
            found[group] = found[group].joined(seen) if group in found else seen
    return [found.get(index) for index in range(len(groups))]


def _iter_pieces(
    samples: Iterable[tuple[int, PatchExtractor, Ints]], floats: StoredArrays, pieces: Sequence[int]
) -> Iterator[tuple[Float32, Float32]]:
    """Yield the rows that are drawn, piece by piece, as those of two networks that are the same."""
    for batch, patches, at in samples:
        rows = patches.rows(floats[batch], patches.places(at))
        yield from split_by_image(rows, rows, pieces[batch])
