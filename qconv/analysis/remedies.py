"""This module finds what may mend a cause: changes of the given options, each to be carried out and measured by itself.

A remedy is a change of what the user said and not of the whole Recipe, as much of a Recipe follows from other parts.
One that is in effect already is not tried; where something takes care of a cause by default, it is taken away once, so
that the trials show what it is worth.
"""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qconv.analysis.causes import REMARKABLE_SHARE, DiagnosisEvidence
from qconv.config.choices import FEW_BITS_CALIBRATOR, WeightGranularity
from qconv.config.data_options import DataOptions
from qconv.config.recipe import Recipe, make_request
from qconv.config.serialization import format_option
from qconv.errors import QconvError
from qconv.ir.model import Node
from qconv.results.comparison import Cause

FEW_FLOAT_NODES, FEW_FLOAT_GATES = 3, 2
LONG_NAME = 20
PERCENTILES = (99.99, 99.9)
"""Percentiles of the values that a range is tried at."""
REPEATABLE_FIELDS = frozenset({"keep_float", "keep_float_op"})
"""Options that are repeated instead of replaced."""
ENOUGH, POOR = (30.0, 0.02), (20.0, 0.05)
"""SQNR from which on no more effort is tried, and below which more bits are, whatever they cost; and what may be lost
of the measure that the task is judged by."""


def format_options(changes: Mapping[str, Any]) -> tuple[str, ...]:
    """Format these changes as command-line options."""
    return tuple(word for name, value in changes.items() if value is not None for word in format_option(name, value))


@dataclass(frozen=True, slots=True)
class Remedy:
    """A change of the options that may mend a cause.

    Attributes:
        name: In words.
        changes: Fields of Recipe; None for what is left to its default.
        causes: The kinds of causes that it is for.
        undoes: Whether it takes away what mends a cause, to show what that is worth.
    """

    name: str
    changes: Mapping[str, Any]
    causes: tuple[str, ...]
    undoes: bool = False


def merge_changes(asked: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a request with these changes."""
    found = dict(asked)
    for name, value in changes.items():
        if name in REPEATABLE_FIELDS:
            found[name] = tuple(dict.fromkeys((*found.get(name, ()), *value)))
        elif value is None:
            found.pop(name, None)
        else:
            found[name] = value
    return found


def join_changes(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Join two changes; the second one's fields win."""
    found = {**first, **second}
    for name in REPEATABLE_FIELDS & first.keys() & second.keys():
        found[name] = tuple(dict.fromkeys((*first[name], *second[name])))
    return found


def try_request(asked: Mapping[str, Any], changes: Mapping[str, Any]) -> tuple[Recipe, DataOptions] | None:
    """Build the recipe and the images of the fields with these changes; None where they do not go together."""
    try:
        return make_request(merge_changes(asked, changes))
    except QconvError:
        return None


def find_remedies(causes: Sequence[Cause], evidence: DiagnosisEvidence) -> list[Remedy]:
    """Find all remedies worth a try, each once, in the order of their causes."""
    found: dict[str, Remedy] = {}
    for cause in causes:
        makers = UNDOING_MAKERS if cause.handled else REMEDY_MAKERS
        for remedy in makers[cause.kind](cause, evidence) if cause.kind in makers else ():
            known = found.get(repr(remedy.changes))
            kinds = (*known.causes, cause.kind) if known else (cause.kind,)
            found[repr(remedy.changes)] = Remedy(remedy.name, remedy.changes, kinds, remedy.undoes)
    return list(found.values())


def suggest_more_effort(recipe: Recipe) -> Iterator[Remedy]:
    """Suggest the next effort, for whatever costs accuracy."""
    efforts = {"fast": "balanced", "balanced": "best"}
    if recipe.effort in efforts:
        effort = efforts[recipe.effort]
        yield Remedy(f"more effort: {effort}", {"effort": effort, "rounding": None}, ())


def suggest_more_bits(recipe: Recipe) -> Iterator[Remedy]:
    """Suggest more bits, which cost time and size and help nearly always."""
    if recipe.activation_bits < 16:
        yield Remedy("activations of 16 bits", {"activation_bits": 16}, ())
    if recipe.weight_bits < 8:
        yield Remedy("weights of 8 bits", {"weight_bits": 8}, ())


# -- by cause ----------------------------------------------------------------------------------------------------------

RemedyMaker = Callable[[Cause, DiagnosisEvidence], Iterator[Remedy]]


def _mend_imbalance(cause: Cause, evidence: DiagnosisEvidence) -> Iterator[Remedy]:
    yield Remedy("scale channels", {"equalize": True}, ())
    yield from _keep_in_float("their readers in float", _find_costly_readers(cause, evidence))


def _mend_weight_imbalance(cause: Cause, evidence: DiagnosisEvidence) -> Iterator[Remedy]:
    yield Remedy("a scale a channel", {"weight_granularity": WeightGranularity.PER_CHANNEL}, ())
    yield Remedy("scale channels", {"equalize": True}, ())


def _mend_outlier(cause: Cause, evidence: DiagnosisEvidence) -> Iterator[Remedy]:
    usual = {"calibrator": FEW_BITS_CALIBRATOR, "percentile": None, "tune_ranges": True}
    yield Remedy("ranges by what the outputs lose", usual, ())
    yield Remedy("ranges of least squares", {"calibrator": "mse", "percentile": None}, ())
    for share in PERCENTILES:
        yield Remedy(f"ranges of {share:g} % of numbers", {"calibrator": "percentile", "percentile": share}, ())
    yield from _keep_in_float("their readers in float", _find_costly_readers(cause, evidence))


def _mend_gate(cause: Cause, evidence: DiagnosisEvidence) -> Iterator[Remedy]:
    nodes = {node.name: node for node in evidence.model.nodes()}
    kinds = sorted({nodes[name].op_type for name in cause.where if name in nodes})
    if kinds:
        yield Remedy("gates in float", {"keep_float_op": tuple(kinds)}, ())
    gated = [nodes[name] for name in cause.where if name in nodes]
    worst = sorted(gated, key=lambda gate: -(evidence.share(_gate_tensors(gate, evidence)) or 0.0))
    costly = [
        gate
        for gate in worst[:FEW_FLOAT_GATES]
        if (evidence.share(_gate_tensors(gate, evidence)) or 0.0) >= REMARKABLE_SHARE
    ]
    both = [node for gate in costly for node in _layers_around_gate(gate, evidence)]
    yield from _keep_in_float("layers beside gates in float", both, len(both))


def _gate_tensors(gate: Node, evidence: DiagnosisEvidence) -> list[str]:
    """List the tensors of a gate: what it squashes, its result, and the product."""
    products = [reader.outputs[0] for reader in evidence.model.readers(gate.outputs[0])]
    values = [gate.inputs[0], gate.outputs[0], *products]
    return [value.name or "" for value in values if value is not None]


def _layers_around_gate(gate: Node, evidence: DiagnosisEvidence) -> Iterator[Node]:
    """List the layer before a gate, and those behind its products: no channel scale can pass between them."""
    before = None if gate.inputs[0] is None else gate.inputs[0].producer()
    if before is not None:
        yield before
    for product in evidence.model.readers(gate.outputs[0]):
        yield from evidence.model.readers(product.outputs[0])


def _mend_wide_concat(cause: Cause, evidence: DiagnosisEvidence) -> Iterator[Remedy]:
    nodes = {node.name: node for node in evidence.model.nodes()}
    joined = [nodes[name] for name in cause.where if name in nodes]
    readers = [reader for node in joined for reader in evidence.model.readers(node.outputs[0])]
    yield from _keep_in_float("it and its readers in float", [*joined, *readers])


def _mend_costly_layers(cause: Cause, evidence: DiagnosisEvidence) -> Iterator[Remedy]:
    named = [node for node in evidence.model.nodes() if node.name in cause.where]
    readers = [reader for node in named for reader in evidence.model.readers(node.outputs[0])]
    yield from _keep_in_float(
        f"{_shorten_name(named[0].name or '')} in float" if len(named) == 1 else "these in float", named
    )
    # the codes of its result may be the error, which its readers ask for
    yield from _keep_in_float("with readers in float", [*named, *readers], len(named) + FEW_FLOAT_NODES)


def _mend_saturation(cause: Cause, evidence: DiagnosisEvidence) -> Iterator[Remedy]:
    yield Remedy("7-bit weights where sums may overflow", {"saturation_safe": True}, ())


def _mend_low_bits(cause: Cause, evidence: DiagnosisEvidence) -> Iterator[Remedy]:
    recipe = evidence.recipe
    if recipe.weight_bits < 8:
        # channels of 8 bits have none to give to others
        left = "activations" if recipe.allocates_activations else "none"
        own = {"bit_allocation": left} if recipe.allocates_weights else {}
        yield Remedy("weights of 8 bits", {"weight_bits": 8, **own}, ())
    if recipe.activation_bits < 8:
        yield Remedy("activations of 8 bits", {"activation_bits": 8}, ())


def _without_equalization(cause: Cause, evidence: DiagnosisEvidence) -> Iterator[Remedy]:
    yield Remedy("channels as they are", {"equalize": False}, (), undoes=True)


def _without_clipping(cause: Cause, evidence: DiagnosisEvidence) -> Iterator[Remedy]:
    whole = {"calibrator": "minmax", "percentile": None, "tune_ranges": False}
    yield Remedy("ranges of all numbers", whole, (), undoes=True)


REMEDY_MAKERS: Mapping[str, RemedyMaker] = {
    "channel-imbalance": _mend_imbalance,
    "weight-imbalance": _mend_weight_imbalance,
    "range-outlier": _mend_outlier,
    "gate": _mend_gate,
    "wide-concat": _mend_wide_concat,
    "bias-overflow": _mend_costly_layers,
    "saturation": _mend_saturation,
    "low-bits": _mend_low_bits,
    "layer": _mend_costly_layers,
}
UNDOING_MAKERS: Mapping[str, RemedyMaker] = {
    "channel-imbalance": _without_equalization,
    "range-outlier": _without_clipping,
    "bias-overflow": _mend_costly_layers,
}


def _keep_in_float(name: str, nodes: Sequence[Node], most: int = FEW_FLOAT_NODES) -> Iterator[Remedy]:
    names = tuple(dict.fromkeys(glob.escape(node.name) for node in nodes if node.name))[:most]
    if names:
        yield Remedy(name, {"keep_float": names}, ())


def _shorten_name(name: str) -> str:
    """Return the end of a long name."""
    return name if len(name) <= LONG_NAME else f"...{name[3 - LONG_NAME :].lstrip('.')}"


def _find_costly_readers(cause: Cause, evidence: DiagnosisEvidence) -> list[Node]:
    """Find the tensors of a cause that cost most at the outputs."""
    values = {value.name: value for value in evidence.plan.activations}
    worst = sorted(cause.where, key=lambda name: -(evidence.share([name]) or 0.0))
    return [node for name in worst if name in values for node in evidence.model.readers(values[name])]
