"""These passes merge two layers without an activation between them into one that takes fewer multiplications, exactly.

    V (W x + b) + c  =  (V W) x + (V b + c)

One of two Convs has a single tap: 1x1 behind 1x1, 1x1 behind a larger kernel, or a larger one behind 1x1. Of two Gemms
every pair will do. Whether multiplications are saved is counted, groups included: a pair that is wide in the middle
becomes one, a pair that is narrow there stays, and so do a depthwise Conv and the 1x1 behind it. A kernel that pads
with zeros cannot take in a bias b in front: its border reads zeros, and not b. The second layer keeps its name.

An AveragePool, which is linear, too, moves in front of the 1x1 Conv before it where less is computed there:

    average of (W x + b)  =  W (average of x) + b

That holds exactly where the numbers that are averaged have weights that add up to one: where zeros that the pool pads
with are not counted. DenseNet's transitions multiply a quarter as often behind the pool. The other way round nothing is
moved: a Conv in front of a pool has a range that is wide beside the averages, so that its codes lose more.

Layers whose weights are equal read one constant, so that these are scaled, rounded and stored once. Networks apply a
layer several times: a siamese network to two images, a detector's head to every level, a recurrent one at every step.
Exporters write such a weight once or once a reader, and to fold the same BatchNormalization into each reader makes
copies of it. Weights of a single number stay apart: those are filled in, and equal by chance.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from math import gcd, prod

import numpy as np

from qconv.errors import Change
from qconv.ir.layers import (
    INPUTS_FIRST,
    channel_stats_of,
    forget_input_means,
    input_means_of,
    set_channel_stats,
    set_input_means,
    weight_of,
)
from qconv.ir.model import Model, Node, Value, attribute, constant_array, dims, set_dims
from qconv.ir.rewriting import (
    EditRefused,
    data_input,
    describe_node,
    each_node,
    explicit_pads,
    reads_as_data,
    standard_op_type,
    title,
)
from qconv.passes.kernels import Kernel, read_kernel, widen_groups, write_kernel
from qconv.planning.work import count_rows, multiplications

MULTIPLICATIONS_A_NUMBER = 70
"""What a number that a pool writes takes, beside multiplications of a 1x1 Conv: 1 ns on codes, which take 0.014."""


@each_node("merge", "Conv", "Gemm")
def merge_layers(model: Model, node: Node) -> list[Change]:
    """Merge a layer with the one before it, where that saves multiplications."""
    data = data_input(node)
    before = data.producer()
    if before is None or model.sole_reader(data) is not node or not reads_as_data(node, data, model):
        return []
    if standard_op_type(before) != standard_op_type(node) or not _saves_work(before, node):
        return []
    first, second = read_kernel(before), read_kernel(node)
    if not _is_pointwise(second) and not (_is_pointwise(first) and set(first.strides) == {1}):
        return []
    if first.bias.any() and any(second.pads):
        if first.groups == first.outputs:  # a scale and shift: folding has given the reason
            return []
        raise EditRefused(f"it pads with zeros what {describe_node(before)} adds a bias to")
    source, means, seen = data_input(before), input_means_of(before), channel_stats_of(data)
    if seen is not None and _is_pointwise(second) and second.groups == second.outputs == second.inputs:
        set_channel_stats(node.outputs[0], seen.scaled(second.weight.reshape(-1), second.bias))
    write_kernel(model, node, source, _chain(first, second))
    if isinstance(means, str):
        forget_input_means(node)
    else:
        set_input_means(node, means)
    model.remove(before)
    kind = f"{before.op_type} merged into the {node.op_type} behind it"
    return [Change("merge", title(node), f"{describe_node(before)} before it merged into it", kind)]


def _saves_work(before: Node, node: Node) -> bool:
    """Whether one layer takes fewer multiplications than both, by the shapes of weights and the sizes of maps.

    Sizes that are open count as one: a stride then tells nothing.
    """
    sizes = []
    for layer in (before, node):
        numbers = constant_array(layer.inputs[1])
        if numbers is None or not numbers.size or (standard_op_type(layer) == "Gemm" and numbers.ndim != 2):
            return False
        turned = standard_op_type(layer) == "Gemm" and not attribute(layer, "transB", 0)
        outputs, inputs = numbers.shape[:2][:: -1 if turned else 1]
        sizes.append((outputs, inputs * attribute(layer, "group", 1), prod(numbers.shape[2:])))
    (_, inputs, taps), (outputs, _, more_taps) = sizes
    groups = gcd(attribute(before, "group", 1), attribute(node, "group", 1))
    one: int = outputs * (inputs // groups) * taps * more_taps
    return one * count_rows(node) < multiplications([before, node])


def _is_pointwise(kernel: Kernel) -> bool:
    """Whether it has a single tap, on what it reads: no padding."""
    return prod(kernel.sizes) == 1 and not any(kernel.pads)


def _chain(first: Kernel, second: Kernel) -> Kernel:
    """The kernel of both, one of which has a single tap, in as many groups as hold those of both."""
    groups = gcd(first.groups, second.groups)
    own = widen_groups(first.weight, first.groups, groups)  # (M, I/G, *sizes)
    other = widen_groups(second.weight, second.groups, groups)  # (O, M/G, *sizes)
    inner = own.reshape(groups, first.outputs // groups, own.shape[1], -1)  # (G, M/G, I/G, K)
    outer = other.reshape(groups, second.outputs // groups, other.shape[1], -1)  # (G, O/G, M/G, L)
    taps = outer.transpose(0, 3, 1, 2)[:, :, None] @ inner.transpose(0, 3, 1, 2)[:, None]  # (G, L, K, O/G, I/G)
    host = first if _is_pointwise(second) else second
    weight = taps.transpose(0, 3, 4, 1, 2).reshape(second.outputs, own.shape[1], *host.sizes)
    bias = outer.sum(axis=3) @ first.bias.reshape(groups, -1, 1)  # (G, O/G, 1)
    strides = tuple(a * b for a, b in zip(first.strides, second.strides, strict=True))
    bias = bias.reshape(-1) + second.bias
    return replace(host, weight=weight, bias=bias, groups=groups, strides=strides, work=weight.size)


@each_node("merge", "AveragePool")
def average_first(model: Model, node: Node) -> list[Change]:
    """Move an AveragePool in front of the 1x1 Conv that it alone reads."""
    value = data_input(node)
    conv = value.producer()
    if conv is None or standard_op_type(conv) != "Conv" or model.sole_reader(value) is not node:
        return []
    if not (_has_single_tap(conv) and _is_average(node) and _gains(conv, node)):
        return []
    if channel_stats_of(value) is not None:  # of the whole map, which spreads wider than its averages
        return []
    source, result, sizes = data_input(conv), node.outputs[0], dims(node.outputs[0])
    read = dims(source)
    if read is None or sizes is None or not model.take_over(result, value):
        return []
    model.set_input(node, 0, source)
    model.insert_before(conv, node)
    model.set_input(conv, 0, result)
    set_dims(value, sizes)
    set_dims(result, [*read[:2], *sizes[2:]])
    what = f"{describe_node(node)} moved in front of it"
    return [Change("merge", title(conv), what, "AveragePool moved in front of a Conv")]


def _has_single_tap(conv: Node) -> bool:
    weights = constant_array(conv.inputs[1])
    if weights is None or weights.ndim != 4 or prod(weights.shape[2:]) != 1:
        return False
    return set(attribute(conv, "strides", [1])) == {1} and not any(explicit_pads(conv, 2) or [1])


def _is_average(pool: Node) -> bool:
    """Whether the weights of all windows add up to one."""
    if not attribute(pool, "count_include_pad", 0):
        return True
    pads = explicit_pads(pool, len(attribute(pool, "kernel_shape")))
    return pads is not None and not any(pads) and not attribute(pool, "ceil_mode", 0)


def _gains(conv: Node, pool: Node) -> bool:
    """Whether the other order takes less, by the sizes of maps; False where they are not known."""
    before, after = dims(data_input(conv)), dims(pool.outputs[0])
    if before is None or after is None or len(before) != 4 or None in before[1:] or None in after[1:]:
        return False
    inputs, *places = (size or 0 for size in before[1:])
    outputs, *fewer = (size or 0 for size in after[1:])
    each = outputs * inputs // attribute(conv, "group", 1)
    saved = (prod(places) - prod(fewer)) * each
    return bool(saved > prod(fewer) * (inputs - outputs) * MULTIPLICATIONS_A_NUMBER)


def share_equal_weights(model: Model) -> None:
    """Let layers with equal weights read the first of these."""
    layers = [node for node in model.nodes() if standard_op_type(node) in INPUTS_FIRST]
    weights = dict.fromkeys(weight_of(node) for node in layers)
    alike: dict[tuple[object, ...], list[Value]] = {}
    for value in weights:
        if value.const_value is not None and not value.is_graph_input() and not value.is_graph_output():
            alike.setdefault((value.dtype, *value.const_value.shape.numpy()), []).append(value)
    kept: dict[bytes, Value] = {}
    for values in alike.values():
        for value in values if len(values) > 1 else []:
            numbers = constant_array(value)
            if numbers is None or not numbers.size or np.all(numbers == numbers.flat[0]):
                continue
            first = kept.setdefault(_digest(numbers), value)
            if first is not value:
                model.redirect(value, first, readers=layers)


def _digest(numbers: np.ndarray) -> bytes:
    head = f"{numbers.dtype.str} {numbers.shape}".encode()
    return hashlib.blake2b(head + np.ascontiguousarray(numbers).tobytes()).digest()
