"""This module finds what can cost a quantized network its accuracy: each cause by a rule, with the evidence for it.

    channel-imbalance   typical magnitude of a tensor's largest channel over the median channel's: IMBALANCE or more.
                        One scale for all leaves the others log2 of that fewer bits (Nagel 2019, arXiv 1906.04721)
    weight-imbalance    the same of a layer's output channels, where they share a scale
    range-outlier       largest magnitude over what 99.9 % of the values stay below: OUTLIER or more
                        (Zhao et al. 2019, arXiv 1901.09504)
    dead-channels       zero on all images, so that their range on others is unknown
    bias-overflow       |b| / (s_x s_w) beyond 2^30: an int32 bias would leave no room for the sum
    saturation          pairs of products beyond 16 bits on x86 without VNNI (quantization.saturation)
    gate                x * sigmoid(x) and its kin: two tensors are rounded, and small products of large values matter
    wide-concat         tensors on one scale whose ranges differ by CONCAT or more: those of a Concat, or of a head
    preprocessing       what training has stored speaks against the preprocessing (data.autodetect)
    few-pictures        fewer than FEW, or other images lose GAP dB more than those of the calibration
    low-bits            weights or activations of fewer than 8 bits
    bodies              layers in bodies of If, Loop and Scan, which stay float
    layer               one layer makes LARGE_SHARE or more of the error at the outputs

A cause comes with its layers' share of the error at the outputs, as `compare` measures it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qconv.calibration.sketch import Sketch
from qconv.config.choices import WeightGranularity
from qconv.config.recipe import Recipe
from qconv.errors import Change, format_count
from qconv.ir.layers import layers_inside
from qconv.ir.metadata import EqualizationRecord
from qconv.ir.model import Model, Node, Value, clip_bounds, constant_array
from qconv.ir.operators import QUANTIZATION_RULES, ConcatRule, operator
from qconv.ir.rewriting import standard_op_type, title
from qconv.planning.plan import LayerPlan, Plan
from qconv.quantization.layer import WIDENED_FOR_BIAS
from qconv.results.comparison import Cause, Comparison, LayerComparison
from qconv.results.quantize import Report

LARGE_IMBALANCE = 24.0
LARGE_OUTLIER = 10.0
WIDE_CONCAT_RATIO = 8.0
FEW_IMAGES, GENERALIZATION_GAP_DB = 8, 3.0
MANY_IMAGES = 64
"""Images from which on a gap to other images is not for want of images."""
LARGE_SHARE = 0.2
REMARKABLE_SHARE = 0.02
"""Share of the error from which on a tensor is worth a word, where something takes care of it."""
MOST_NAMED = 3


@dataclass(frozen=True, slots=True)
class DiagnosisEvidence:
    """What is known of a run.

    Attributes:
        model: The folded float model.
        plan, recipe, report: Of the run.
        sketches: Statistics of its tensors.
        equalization: What equalization did to tensors.
        saturates: Whether this machine's CPU adds products in 16 bits.
    """

    model: Model
    plan: Plan
    recipe: Recipe
    report: Report
    sketches: Mapping[str, Sketch]
    equalization: EqualizationRecord
    compared: Comparison
    saturates: bool

    def share(self, tensors: Collection[str]) -> float | None:
        """Return the share of these tensors' layers in the error at the outputs; None where not measured."""
        return _sum_known_shares(row for row in self.compared.layers if row.tensor in tensors)

    def share_of_nodes(self, names: Collection[str]) -> float | None:
        """Return the share of nodes, by name, in the error at the outputs; None where not measured."""
        return _sum_known_shares(row for row in self.compared.layers if row.name in names)

    def row(self, tensor: str) -> LayerComparison | None:
        """Return the compared layer that writes a tensor; the first where it has several."""
        return next((row for row in self.compared.layers if row.tensor == tensor), None)


def _sum_known_shares(rows: Iterable[LayerComparison]) -> float | None:
    shares = [row.output_share for row in rows if row.output_share is not None]
    return sum(shares) if shares else None


CauseFinder = Callable[[DiagnosisEvidence], Iterator[Cause]]


def find_causes(evidence: DiagnosisEvidence) -> list[Cause]:
    """Find all causes, those first that nothing takes care of and that cost most."""
    found = [cause for finder in CAUSE_FINDERS for cause in finder(evidence)]
    return sorted(found, key=lambda cause: (bool(cause.handled), -(cause.share or 0.0)))


# -- tensors -----------------------------------------------------------------------------------------------------------


def channel_rms(sketch: Sketch) -> NDArray[np.float64] | None:
    """Return the root mean square of every channel, (C,); None where no columns were kept."""
    channels = sketch.lows.size
    if not sketch.columns.size or sketch.columns.shape[-1] != channels or channels < 2:
        return None
    rows = sketch.columns.reshape(-1, channels).astype(np.float64)
    found: NDArray[np.float64] = np.sqrt(np.mean(rows**2, axis=0))
    return found


def imbalance_ratio(sizes: NDArray[np.float64]) -> float:
    """Return the largest size over the median of those that are not zero."""
    alive = sizes[sizes > 0]
    return float(alive.max() / np.median(alive)) if alive.size > 1 else 1.0


def find_channel_imbalance(evidence: DiagnosisEvidence) -> Iterator[Cause]:
    """Find quantized tensors whose channels differ much in size, in float and as equalization left them."""
    found: dict[str, tuple[float, float]] = {}
    for value in evidence.plan.activations:
        sketch = evidence.sketches.get(value.name or "")
        sizes = None if sketch is None else channel_rms(sketch)
        if sizes is None or evidence.plan.has_channel_scales(value):
            continue
        before = imbalance_ratio(sizes)
        if before >= LARGE_IMBALANCE:
            scale = evidence.equalization.scale_of(value.name or "", sizes.size)
            found[value.name or ""] = before, before if scale is None else imbalance_ratio(sizes / scale)
    for handled, names in _split_by_handled(found, lambda pair: pair[1] < LARGE_IMBALANCE).items():
        if names:
            first = found[names[0]]
            told = f"the largest channel of {names[0]!r} is {first[0]:.3g} times the median one"
            left = f", {first[1]:.3g} times after equalization" if first[0] != first[1] else ""
            more = f"; so are {len(names) - 1} more tensors" if len(names) > 1 else ""
            lost = f", which leaves that about {np.log2(first[1]):.0f} bits fewer" if not handled else ""
            how = "equalization scales its channels" if handled else ""
            yield Cause("channel-imbalance", tuple(names), told + left + lost + more, evidence.share(names), how)


def _split_by_handled(
    found: Mapping[str, tuple[float, float]], handled: Callable[[tuple[float, float]], bool]
) -> dict[bool, list[str]]:
    """Split names, the worst first, into those left to do and those taken care of."""
    return {
        flag: sorted((name for name, pair in found.items() if handled(pair) is flag), key=lambda n: -found[n][0])
        for flag in (False, True)
    }


def outlier_ratio(sketch: Sketch) -> float:
    """Return the largest magnitude over what 99.9 % of the values stay below; 1 where most are zero."""
    if not sketch.codes.size:
        return 1.0
    bins = sketch.histogram()
    sizes, order = np.abs(bins.centres), np.argsort(np.abs(bins.centres))
    below = np.cumsum(bins.counts[order]) / bins.counts.sum()
    usual = float(sizes[order][np.searchsorted(below, 0.999)])
    return max(abs(sketch.low), abs(sketch.high)) / usual if usual > 0 else 1.0


def find_range_outliers(evidence: DiagnosisEvidence) -> Iterator[Cause]:
    """Find tensors with few values far from the rest, and whether the range follows them."""
    found: dict[str, tuple[float, float]] = {}
    for value in evidence.plan.activations:
        name = value.name or ""
        sketch, row = evidence.sketches.get(name), evidence.row(name)
        size = 1.0 if sketch is None else outlier_ratio(sketch)
        if sketch is None or size < LARGE_OUTLIER or row is None or row.values is None:
            continue
        largest = max(abs(sketch.low), abs(sketch.high))
        reached = max(abs(row.values.low), abs(row.values.high)) * _undo_equalization(evidence, name, sketch)
        found[name] = size, size * min(1.0, reached / largest)
    for handled, names in _split_by_handled(found, lambda pair: pair[1] < LARGE_OUTLIER / 2).items():
        if names:
            first = found[names[0]]
            told = f"the largest number in {names[0]!r} is {first[0]:.3g} times what 99.9 % of the others stay below"
            more = f"; {len(names) - 1} more tensors are alike" if len(names) > 1 else ""
            lost = "" if handled else f", and its range reaches {first[1]:.3g} times that far"
            how = "its range was cut" if handled else ""
            yield Cause("range-outlier", tuple(names), told + lost + more, evidence.share(names), how)


def _undo_equalization(evidence: DiagnosisEvidence, name: str, sketch: Sketch) -> float:
    """Convert a size from the quantized network's units to the float one's, for the channel that goes furthest."""
    scale = evidence.equalization.scale_of(name, sketch.lows.size)
    if scale is None:
        return 1.0
    return float(scale[np.argmax(np.maximum(np.abs(sketch.lows), np.abs(sketch.highs)))])


def find_dead_channels(evidence: DiagnosisEvidence) -> Iterator[Cause]:
    """Find channels behind a Relu or Clip that are zero on all images."""
    found: dict[str, int] = {}
    for node in evidence.model.nodes():
        sketch = evidence.sketches.get(node.outputs[0].name or "")
        bounds = clip_bounds(node)
        if sketch is None or bounds is None or bounds[0] != 0 or sketch.lows.size < 2:
            continue
        dead = int(np.count_nonzero((sketch.highs <= 0) & (sketch.lows >= 0)))
        if dead:
            found[node.outputs[0].name or ""] = dead
    if found:
        names = sorted(found, key=lambda name: -found[name])
        what = (
            f"{format_count(sum(found.values()), 'channel')} of {format_count(len(found), 'tensor')} "
            "are zero on all pictures"
        )
        told = (
            "; they cost nothing on these pictures, and what wakes them on others is clipped to the range of the rest"
        )
        yield Cause("dead-channels", tuple(names), what + told, harmless=True)


def find_wide_concats(evidence: DiagnosisEvidence) -> Iterator[Cause]:
    """Find joined tensors that share one scale, which the widest sets."""
    for node in evidence.model.nodes():
        if (
            not isinstance(QUANTIZATION_RULES.get(standard_op_type(node)), ConcatRule)
            or node not in evidence.plan.integer
        ):
            continue
        known = ((value, _largest_magnitude(evidence, value)) for value in node.inputs if value is not None)
        ends = {value.name or "": reach for value, reach in known if reach is not None}
        sizes = [size for size in ends.values() if size > 0]
        if len(sizes) > 1 and max(sizes) >= WIDE_CONCAT_RATIO * min(sizes):
            reach = f"{min(sizes):.3g} and {max(sizes):.3g}"
            told = f"{node.op_type} {node.name} joins tensors that reach {reach} on one scale"
            yield Cause("wide-concat", (node.name or "",), told, evidence.share([*ends, node.outputs[0].name or ""]))


def _largest_magnitude(evidence: DiagnosisEvidence, value: Value | None) -> float | None:
    """Return the largest magnitude of a tensor, or of what it is made of where it was not observed."""
    while value is not None:
        sketch = evidence.sketches.get(value.name or "")
        if sketch is not None:
            return max(abs(sketch.low), abs(sketch.high))
        node = value.producer()
        value = None if node is None or constant_array(value) is not None or not node.inputs else node.inputs[0]
    return None


# -- nodes -------------------------------------------------------------------------------------------------------------


def find_costly_gates(evidence: DiagnosisEvidence) -> Iterator[Cause]:
    """Find quantized gates, by the share of the error that they and the tensors they gate make."""
    places = [node for node in evidence.model.nodes() if _is_gate(evidence, node)]
    if not places:
        return
    tensors = {v.name or "" for node in places for v in (*_gated_values(node), *node.outputs)}
    products = {r.outputs[0].name or "" for node in places for r in evidence.model.readers(node.outputs[0])}
    ops = sorted({node.op_type for node in places})
    what = (
        f"{format_count(len(places), 'gate')} ({', '.join(ops)}): x and its gate are both rounded before their product"
    )
    yield Cause("gate", tuple(node.name or "" for node in places), what, evidence.share(tensors | products))


def _is_gate(evidence: DiagnosisEvidence, node: Node) -> bool:
    """Whether a node squashes what it is multiplied with, beside tensors that are quantized."""
    beside = [*_gated_values(node), *node.outputs]
    if not any(value in evidence.plan.activations for value in beside):
        return False
    row = operator(node.op_type)
    if row.gates_itself or not row.gates:
        return row.gates_itself
    source = node.inputs[0]
    before = None if source is None else source.producer()
    squashed = {source}
    if before is not None and before.op_type == "Softplus":  # Mish in parts
        squashed.add(before.inputs[0])
    products = [reader for reader in evidence.model.readers(node.outputs[0]) if reader.op_type == "Mul"]
    return any(squashed.intersection(product.inputs) for product in products)


def _gated_values(node: Node) -> list[Value]:
    return [value for value in node.inputs[:1] if value is not None]


def find_bias_overflow(evidence: DiagnosisEvidence) -> Iterator[Cause]:
    """Find layers whose weight scales the run widened for an int32 bias."""
    found = [f for f in evidence.report.findings if isinstance(f, Change) and f.kind == WIDENED_FOR_BIAS]
    if found:
        names = tuple(dict.fromkeys(change.where for change in found))
        what = (
            f"biases of {format_count(len(names), 'layer')} are too large for int32 codes of scale s_x "
            f"s_w, as of {names[0]}"
        )
        how = "weight scales of these channels were widened until their biases fit"
        yield Cause("bias-overflow", names, what, evidence.share_of_nodes(names), how)


def find_saturation(evidence: DiagnosisEvidence) -> Iterator[Cause]:
    """Find layers that overflow on a CPU that adds products in 16 bits."""
    layers = evidence.report.audit.saturating
    if not layers or not evidence.recipe.runs_in_integers:
        return
    names = tuple(layer.node for layer in sorted(layers, key=lambda layer: -layer.worst))
    where = "this CPU" if evidence.saturates else "x86 CPUs without VNNI (this one has it)"
    what = f"pairs of products in {format_count(len(names), 'layer')} can leave the 16 bits in which {where} add them"
    handled = {
        None: "weight scales were widened where the calibration pictures would overflow",
        True: "weight scales were widened for any picture",
        False: "" if evidence.saturates else "this CPU does not, but the file is wrong on those that do",
    }[evidence.recipe.saturation_safe]
    yield Cause("saturation", names, what, None, handled)


def find_low_bits(evidence: DiagnosisEvidence) -> Iterator[Cause]:
    """Find weights and activations of fewer than 8 bits."""
    kinds = {"weights": evidence.recipe.bits_of_weights, "activations": evidence.recipe.bits_of_activations}
    told = [f"{kind} of {min(bits)} bits" for kind, bits in kinds.items() if min(bits) < 8]
    if told:
        rows = [row.name for row in evidence.compared.worst_first if row.output_share and not row.input][:MOST_NAMED]
        yield Cause("low-bits", tuple(rows), f"{' and '.join(told)}: most is lost in these layers", None)


def find_costly_layers(evidence: DiagnosisEvidence) -> Iterator[Cause]:
    """Find single layers that make much of the error."""
    for row in evidence.compared.worst_first:
        share = row.output_share or 0.0
        if share < LARGE_SHARE:
            return
        if not row.input:
            what = f"{row.op} {row.name} alone makes {share:.0%} of the error at the outputs"
            yield Cause("layer", (row.name,), what, share)


def find_layers_in_bodies(evidence: DiagnosisEvidence) -> Iterator[Cause]:
    """Find layers in bodies of If, Loop and Scan, which cost no accuracy and gain nothing."""
    inside = tuple(title(layer) for node in evidence.model.nodes() for layer in layers_inside(node))
    if inside:
        many = format_count(len(inside), "layer")
        what = f"{many} in bodies of If, Loop or Scan stay float, neither smaller nor faster"
        yield Cause("bodies", inside, what, harmless=True)


def find_weight_imbalance(evidence: DiagnosisEvidence) -> Iterator[Cause]:
    """Find layers whose output channels share a scale and differ too much for that."""
    if evidence.recipe.weight_granularity is not WeightGranularity.PER_TENSOR:
        return
    found = {layer.node.name or "": _weight_imbalance_ratio(layer) for layer in evidence.plan.layers}
    names = sorted((name for name, ratio in found.items() if ratio >= LARGE_IMBALANCE), key=lambda name: -found[name])
    if names:
        what = f"output channels of {names[0]} differ {found[names[0]]:.3g} times and have one scale"
        more = f"; so do those of {len(names) - 1} more layers" if len(names) > 1 else ""
        yield Cause("weight-imbalance", tuple(names), what + more, evidence.share_of_nodes(names))


def _weight_imbalance_ratio(layer: LayerPlan) -> float:
    """Return the largest output channel's weights over the smallest one's that are not zero."""
    weight = constant_array(layer.node.inputs[1])
    if weight is None:
        return 1.0
    rows = np.moveaxis(weight, layer.rule.output_axis, 0).reshape(weight.shape[layer.rule.output_axis], -1)
    sizes = np.abs(rows).max(axis=1, initial=0.0)
    alive = sizes[sizes > 0]
    return float(alive.max() / alive.min()) if alive.size else 1.0


CAUSE_FINDERS: Sequence[CauseFinder] = (
    find_channel_imbalance,
    find_weight_imbalance,
    find_range_outliers,
    find_costly_gates,
    find_wide_concats,
    find_bias_overflow,
    find_saturation,
    find_low_bits,
    find_costly_layers,
    find_dead_channels,
    find_layers_in_bodies,
)
