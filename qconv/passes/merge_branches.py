"""This pass merges parallel branches, layers of one tensor whose results are added up, into one layer, exactly.

    sum over b of  gain_b (W_b * x + c_b) + shift_b  =  (sum of gain_b W_b) * x + sum of (gain_b c_b + shift_b)

A branch is a Conv or Gemm, a BatchNormalization or another scale and shift by channel, x itself, or one behind another;
Add, Sub and Sum add them up. RepVGG, MobileOne, RepViT, FastViT, ACNet and diverse branch blocks are trained so.
Kernels of other sizes and groups are one where that takes no more multiplications (`kernels`): a 1x1 into a 3x3, a
scale or x itself into any. The largest kernel keeps its name. Its statistics are those that were noted of the sum, or
follow for it.

x + f(x) stays where f has an activation. And x, or a scale of it, is no tap of a dense kernel whose other weights are
so many and so small that 8 bits a channel could not hold them beside it (`kernels.LEAST_WEIGHT_DB`): RepVGG loses 6 dB
so. Into depthwise kernels it goes: RepViT-M0.9 has 17.2 dB with such taps and 14.4 without, FastViT-T8 28.0 and 27.3.

Sources: Ding et al. 2021, arXiv 2101.03697 (RepVGG); Vasu et al. 2022, arXiv 2206.04040 (MobileOne); Ding et al. 2019,
arXiv 1908.03930 (ACNet); Ding et al. 2021, arXiv 2103.13425 (diverse branch block).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from qconv.data_free.propagation import propagate_stats
from qconv.errors import Change, Finding, format_some
from qconv.ir.channel_stats import ChannelDistribution
from qconv.ir.layers import (
    Float64,
    affine_data_input,
    channel_stats_of,
    forget_channel_stats,
    input_means_of,
    read_affine,
    set_channel_stats,
    set_input_means,
)
from qconv.ir.model import Model, Node, Value, dims, rank, set_dims
from qconv.ir.rewriting import EditRefused, data_input, describe_node, each_node, reads_as_data, standard_op_type, title
from qconv.passes.kernels import (
    Kernel,
    add_kernels,
    identity_like,
    read_kernel,
    why_apart,
    write_kernel,
)
from qconv.planning.work import count_kernel, count_weights

SUMS = frozenset({"Add", "Sub", "Sum"})
AFFINE = frozenset({"BatchNormalization", "Mul", "Div", "Add", "Sub", "Neg"})
LAYERS = frozenset({"Conv", "Gemm"})

Known = dict[Value, ChannelDistribution | str]
"""The distributions of tensors, or why they are not known."""


@dataclass(frozen=True, slots=True, eq=False)
class _Branch:
    """A term of a sum, `sign` times `value`: gain * y + shift, where y is what `layer` makes of source, or the source.

    gain, shift: (C,) or (1,), the sign is in them. scales: the nodes that they come from. shared: the tensor that a
    layer reads whose result this is, but not for this sum alone; why says so.
    """

    value: Value
    sign: float
    source: Value
    layer: Node | None
    gain: Float64
    shift: Float64
    scales: tuple[Node, ...] = ()
    shared: Value | None = None
    why: str = ""

    @property
    def named(self) -> str:
        """The branch as messages speak of it."""
        nodes = [*self.scales[:1], *([self.layer] if self.layer else [])]
        return " of ".join(map(describe_node, nodes)) if nodes else f"tensor {self.source.name}"


@dataclass(frozen=True, slots=True, eq=False)
class _Cluster:
    """Branches that are one kernel."""

    kernel: Kernel
    branches: tuple[_Branch, ...]


def merge_branches(model: Model) -> list[Finding]:
    """Merge parallel branches into one layer each."""
    known = cache(lambda: propagate_stats(model, {}))  # of the sums, as they are before the first is merged

    @each_node("merge", "Add", "Sub", "Sum")
    def edit(model: Model, node: Node) -> list[Change]:
        return _merge_sum(model, node, known)

    return edit(model)


def _merge_sum(model: Model, node: Node, known: Callable[[], Known]) -> list[Change]:
    if not _is_sum(node) or _is_inside(model, node):
        return []
    terms = list(_find_terms(model, node, 1.0))
    sources: dict[Value, list[_Branch]] = {}
    for term in terms:
        sources.setdefault(term.source, []).append(term)
    clusters: list[_Cluster] = []
    reasons: list[str] = []
    for source, branches in sources.items():
        reasons += [b.why for b in terms if b.shared is source]
        if len(branches) > 1 and any(branch.layer for branch in branches):
            found, why = _make_clusters(branches)
            clusters += [cluster for cluster in found if len(cluster.branches) > 1]
            reasons += why
    if clusters:  # the next run merges the others: an edit does nothing before all of it is known to be possible
        return _write_cluster(model, node, terms, clusters[0], known())
    if reasons:
        raise EditRefused("; ".join(dict.fromkeys(reasons)))
    return []


# -- the branches of a sum ---------------------------------------------------------------------------------------------


def _is_sum(node: Node) -> bool:
    """Whether a node adds up tensors, and no constants."""
    return standard_op_type(node) in SUMS and all(v is not None and v.const_value is None for v in node.inputs)


def _is_inside(model: Model, node: Node) -> bool:
    """Whether a node is a part of a larger sum."""
    reader = model.sole_reader(node.outputs[0])
    return reader is not None and _is_sum(reader)


def _find_terms(model: Model, node: Node, sign: float) -> Iterator[_Branch]:
    for index, value in enumerate(node.inputs):
        assert value is not None
        own = -sign if standard_op_type(node) == "Sub" and index == 1 else sign
        below = value.producer()
        if below is not None and _is_sum(below) and model.sole_reader(value) is node:
            yield from _find_terms(model, below, own)
        else:
            yield _read_branch(model, node, value, own)


def _read_branch(model: Model, reader: Node, value: Value, sign: float) -> _Branch:
    gain, shift, scales = np.full(1, sign), np.zeros(1), []
    source = value
    while model.sole_reader(source) is reader:
        node = source.producer()
        if node is None or standard_op_type(node) not in AFFINE:
            break
        step = _read_scale(node)
        if step is None:
            break
        source, more_gain, more_shift = step
        gain, shift, reader = gain * more_gain, shift + gain * more_shift, node
        scales.append(node)
    found = _Branch(value, sign, source, None, gain, shift, tuple(scales))
    node = source.producer()
    if node is None or standard_op_type(node) not in LAYERS or not reads_as_data(node, data_input(node), model):
        return found
    if model.sole_reader(source) is not reader:
        returned = source.is_graph_output()
        whose = f"the output of {describe_node(node)}"
        why = f"the model returns {whose}" if returned else f"something else reads {whose}"
        return replace(found, shared=data_input(node), why=why)
    return replace(found, source=data_input(node), layer=node)


def _read_scale(node: Node) -> tuple[Value, Float64, Float64] | None:
    """What a node scales and shifts by channel, and by how much; None where it does not."""
    if standard_op_type(node) == "Neg":
        return data_input(node), np.full(1, -1.0), np.zeros(1)
    data = affine_data_input(node)
    if data is None:
        return None
    try:
        affine = read_affine(node, rank(data))
    except EditRefused:
        return None
    return data, affine.gain, affine.shift


# -- branches of one tensor --------------------------------------------------------------------------------------------


def _make_clusters(branches: Sequence[_Branch]) -> tuple[list[_Cluster], list[str]]:
    """The kernels that branches of one tensor can be, and why they are not one."""
    reasons: list[str] = []
    kernels: dict[_Branch, Kernel] = {}
    for branch in branches:
        if branch.layer is not None:
            try:
                kernels[branch] = read_kernel(branch.layer)
            except EditRefused as reason:
                reasons.append(str(reason))
    clusters: list[_Cluster] = []
    if kernels:
        largest = max(kernels.values(), key=lambda kernel: kernel.work)
        kernels |= {branch: identity_like(largest) for branch in branches if branch.layer is None}
    for branch in sorted(kernels, key=lambda branch: -kernels[branch].work):
        kernel = kernels[branch]
        if not {branch.gain.size, branch.shift.size} <= {1, kernel.outputs}:
            reasons.append(f"{branch.named} makes more channels")
            continue
        kernel = kernel.scaled(branch.gain, branch.shift)
        for index, cluster in enumerate(clusters):
            why = why_apart(cluster.kernel, kernel) or _why_sizes_differ(branch, kernel, cluster)
            if not why:
                both = add_kernels(cluster.kernel, kernel)
                clusters[index] = _Cluster(both, (*cluster.branches, branch))
                break
            reasons.append(why.format(branch.named, cluster.branches[0].named))
        else:
            clusters.append(_Cluster(kernel, (branch,)))
    return clusters, reasons


def _why_sizes_differ(branch: _Branch, kernel: Kernel, cluster: _Cluster) -> str:
    """Why the two write maps of other sizes, or may do so; empty where they do not."""
    if kernel.rest == cluster.kernel.rest:
        return ""
    sizes, others = ((dims(_result_of(b)) or [None, None, None])[2:] for b in (branch, cluster.branches[0]))
    return "" if None not in sizes and sizes == others else "{} pads to another size than {}"


def _result_of(branch: _Branch) -> Value:
    return branch.source if branch.layer is None else branch.layer.outputs[0]


# -- writing -----------------------------------------------------------------------------------------------------------


def _write_cluster(model: Model, root: Node, terms: Sequence[_Branch], cluster: _Cluster, known: Known) -> list[Change]:
    """Let one layer stand for the branches of a cluster. Raises EditRefused before it has changed anything."""
    result, branches = root.outputs[0], cluster.branches
    host = max((b.layer for b in branches if b.layer), key=lambda layer: (count_kernel(layer), count_weights(layer)))
    changes = _describe(branches, host)
    means = next((m for b in branches if b.layer and not isinstance(m := input_means_of(b.layer), str)), None)
    seen = _add_distributions(branches, known)
    write_kernel(model, host, branches[0].source, cluster.kernel)
    if means is not None:
        set_input_means(host, means)
    merged, inside = host.outputs[0], [value.producer() for value in root.inputs if value is not None]
    forget_channel_stats(merged)
    if isinstance(seen, ChannelDistribution):
        set_channel_stats(merged, seen)
    rest = [term for term in terms if term not in branches]
    if rest:
        _add_rest(model, root, merged, rest)
    else:
        model.take_over(result, merged)  # with what was measured of the sum, if anything was
        model.remove(root)
    known[merged] = channel_stats_of(merged) or "it is a sum of branches that nothing describes"
    model.remove_unread(inside)
    return changes


def _add_distributions(branches: Sequence[_Branch], known: Known) -> ChannelDistribution | None:
    """What follows of the sum as of any: its mean, and its deviation as if the branches were independent."""
    total: ChannelDistribution | None = None
    for branch in branches:
        found = known.get(branch.value)
        if not isinstance(found, ChannelDistribution) or found.std is None:
            return None
        found = found.scaled(np.full(1, branch.sign), np.zeros(1))
        if total is not None and total.mean.shape != found.mean.shape:
            return None
        total = found if total is None else total.plus(found)
    return total


def _add_rest(model: Model, root: Node, total: Value, rest: Sequence[_Branch]) -> None:
    """Make `root` the last of the nodes that add the other terms to the merged ones."""
    for term in rest[:-1]:
        kind = "Add" if term.sign > 0 else "Sub"
        node = model.build(kind, [total, term.value], name=f"{title(root)}_part", like=root.outputs[0])
        if dims(total) != dims(term.value):
            set_dims(node.outputs[0], None)
        model.insert_before(root, node)
        total = node.outputs[0]
    model.become(root, "Add" if rest[-1].sign > 0 else "Sub", [total, rest[-1].value])


def _describe(branches: Sequence[_Branch], host: Node) -> list[Change]:
    names = [branch.named for branch in branches if branch.layer is not host]
    what = f"{format_some(names)} merged into it"
    changes = [Change("merge", title(host), what, f"parallel branches merged into {host.op_type}")]
    for node in (node for branch in branches for node in branch.scales):
        folded = f"{node.op_type} folded into {host.op_type}"
        changes.append(Change("fold", title(host), f"{describe_node(node)} folded into it", folded))
    return changes
