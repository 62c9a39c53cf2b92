"""Channel shuffles become one Gather of channels each, and go into the weights of the layers beside them.

    Reshape(N, g, C/g, H, W), Transpose, Reshape(N, C, H, W)  =  x[:, order]         (ShuffleNet)
    W x[order]  =  W' x,  W'[:, order] = W        D x[order] = (D' x)[order]          (dense, depthwise layers)
    (W x)[order]  =  W[order] x

What moves numbers is followed with their places instead of them. A tensor that holds whole channels of another one,
for every size that the model leaves open, is one Gather of these; what moves anything else stays. Nothing is rounded.

Sources: Zhang et al. 2017, arXiv 1707.01083; Ma et al. 2018, arXiv 1807.11164.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod

import numpy as np
from numpy.typing import NDArray

from qconv.errors import Change, Finding
from qconv.ir.layers import (
    Layer,
    channel_stats_of,
    forget_channel_stats,
    forget_input_means,
    read_layer,
    set_channel_stats,
    weight_of,
    write_layer,
)
from qconv.ir.model import Model, Node, Value, attribute, constant_array, dims, input_of, rank, set_attribute, set_dims
from qconv.ir.operators import ChannelEffect, with_
from qconv.ir.rewriting import (
    EditRefused,
    data_input,
    describe_node,
    each_node,
    reads_as_data,
    sliced_places,
    slices_of,
    standard_op_type,
    title,
    uses_only_first_output,
)

Places = NDArray[np.int32]

OPEN_SIZES = (2, 3)
"""What stands for a size that is left open: what holds for both holds for all."""

MOST_PLACES = 1 << 24
"""Numbers of a tensor up to which it is followed: larger ones would need more than 64 MB."""


# -- following numbers through what moves them -------------------------------------------------------------------------


def _numbers(node: Node, index: int) -> list[int]:
    """A constant input as whole numbers. Raises EditRefused where it is computed."""
    found = constant_array(input_of(node, index))
    if found is None:
        raise EditRefused(f"input {index} of {describe_node(node)} is computed")
    return [int(number) for number in found.reshape(-1)]


def _axes(node: Node) -> list[int] | None:
    return None if input_of(node, 1) is None else _numbers(node, 1)


def _reshaped(node: Node, x: Places) -> Places:
    keeps_zeros = attribute(node, "allowzero", 0)
    sizes = [x.shape[i] if size == 0 and not keeps_zeros else size for i, size in enumerate(_numbers(node, 1))]
    return x.reshape(sizes)


def _flattened(node: Node, x: Places) -> Places:
    axis = attribute(node, "axis", 1)
    return x.reshape(prod(x.shape[: axis if axis >= 0 else x.ndim + axis]), -1)


def _squeezed(node: Node, x: Places) -> Places:
    axes = _axes(node)
    return np.squeeze(x, None if axes is None else tuple(axes))


def _gathered(node: Node, x: Places) -> Places:
    index = constant_array(input_of(node, 1))
    if index is None:
        raise EditRefused(f"the places of {describe_node(node)} are computed")
    return np.take(x, index, axis=attribute(node, "axis", 0))


def _sliced(node: Node, x: Places) -> Places:
    for axis, part in slices_of(node, x.ndim).items():
        x = np.take(x, sliced_places(part, x.shape[axis]), axis)
    return x


def _split(node: Node, x: Places) -> list[Places]:
    axis, count = attribute(node, "axis", 0), len(node.outputs)
    if input_of(node, 1) is not None:
        sizes = _numbers(node, 1)
    else:
        size = -(-x.shape[axis] // count)
        sizes = [min(size, x.shape[axis] - size * i) for i in range(count)]
    if sum(sizes) != x.shape[axis] or min(sizes) <= 0:
        raise EditRefused(f"{describe_node(node)} does not part what it reads")
    return np.split(x, np.cumsum(sizes)[:-1], axis=axis)


MOVES: Mapping[str, Callable[[Node, Places], Places | list[Places]]] = {
    "Reshape": _reshaped,
    "Flatten": _flattened,
    "Transpose": lambda node, x: np.transpose(x, attribute(node, "perm")),
    "Squeeze": _squeezed,
    "Unsqueeze": lambda node, x: np.expand_dims(x, tuple(_numbers(node, 1))),
    "Gather": _gathered,
    "Slice": _sliced,
    "Split": _split,
    "Identity": lambda node, x: x,
}
"""Operators that move numbers, each with what it does to an array."""


def _is_move(model: Model, node: Node, value: Value) -> bool:
    """Whether a node moves the numbers of `value` and reads it nowhere else."""
    return standard_op_type(node) in MOVES and reads_as_data(node, value, model)


@dataclass(frozen=True, slots=True, eq=False)
class _Moved:
    """A tensor that holds numbers of another one. places: of them, for each stand-in of open sizes; path: how."""

    value: Value
    places: tuple[Places, ...]
    path: tuple[Node, ...]


def _follow(model: Model, value: Value, places: tuple[Places, ...], path: tuple[Node, ...]) -> Iterator[_Moved]:
    """What becomes of a tensor through operators that move numbers, each step of it."""
    for node in model.readers(value):
        if not _is_move(model, node, value):
            continue
        try:
            made = [MOVES[node.op_type](node, x) for x in places]
        except (EditRefused, ValueError, IndexError):  # not for these sizes
            continue
        for index, result in enumerate(node.outputs):
            own = tuple(x[index] if isinstance(x, list) else x for x in made)
            found = _Moved(result, own, (*path, node))
            yield found
            yield from _follow(model, result, own, found.path)


def _read_channels(start: tuple[Places, ...], moved: _Moved) -> NDArray[np.int64] | None:
    """The channels of the first tensor that a moved one holds; None where it holds anything else."""
    found: NDArray[np.int64] | None = None
    for whole, part in zip(start, moved.places, strict=True):
        if part.ndim != whole.ndim or part.shape[:1] + part.shape[2:] != whole.shape[:1] + whole.shape[2:]:
            return None
        if part.size == 0:
            return None
        area = prod(whole.shape[2:])
        order = part[0].reshape(part.shape[1], -1)[:, 0].astype(np.int64) // area
        if (found is not None and not np.array_equal(found, order)) or order.max() >= whole.shape[1]:
            return None
        if not np.array_equal(whole[:, order], part):
            return None
        found = order
    return found


# -- one Gather in place of many moves ---------------------------------------------------------------------------------


def gather_channels(model: Model) -> list[Finding]:
    """Write whatever moves whole channels alone as one Gather or Slice of them."""
    found: list[Finding] = []
    sources = [*model.graph.inputs, *(value for node in model.nodes() for value in node.outputs)]
    for value in sources:
        producer = value.producer()
        if producer is not None and (producer.graph is None or standard_op_type(producer) in MOVES):
            continue
        start = _number_places(value)
        if start is not None and any(_is_move(model, node, value) for node in model.readers(value)):
            found += _gather_from(model, value, start)
    return found


def _number_places(value: Value) -> tuple[Places, ...] | None:
    """Arrays of a tensor's shape that number its places, for all stand-ins; None for what is no map of channels."""
    sizes = dims(value)
    if sizes is None or not 3 <= len(sizes) <= 5 or sizes[1] is None or value.dtype is None or value.dtype.is_integer():
        return None
    shapes = [[stand_in if size is None else size for size in sizes] for stand_in in OPEN_SIZES]
    if not all(0 < prod(shape) <= MOST_PLACES for shape in shapes):
        return None
    kinds = shapes if None in sizes else shapes[:1]
    return tuple(np.arange(prod(shape), dtype=np.int32).reshape(shape) for shape in kinds)


def _gather_from(model: Model, source: Value, start: tuple[Places, ...]) -> list[Finding]:
    found: list[Finding] = []
    made: dict[bytes, Value] = {}
    for moved in list(_follow(model, source, start, ())):
        end = moved.value
        last = moved.path[-1]
        if last.graph is None or not _is_read_outside(model, end):
            continue
        order = _read_channels(start, moved)
        if order is None or not _is_shorter(moved.path, order):
            continue
        key = order.tobytes()
        if key not in made:
            made[key] = _select(model, source, order, moved)
        if not model.take_over(end, made[key]):
            continue
        count = len(moved.path)
        text = f"channels are moved by one operator in place of {count}" if count > 1 else "channels are gathered"
        found.append(Change("shuffle", title(last), text))
        model.remove_unread([last])
    return found


def _is_read_outside(model: Model, value: Value) -> bool:
    """Whether a tensor is read by anything but operators that only move it on."""
    return value.is_graph_output() or any(not _is_move(model, node, value) for node in model.readers(value))


def _is_shorter(path: tuple[Node, ...], order: NDArray[np.int64]) -> bool:
    """Whether one operator is better than those on the way: a lone Gather, or cuts in one piece, are left alone."""
    in_one_piece = bool(np.all(np.diff(order) == 1))
    kinds = {node.op_type for node in path}
    if len(path) == 1:
        return kinds == {"Slice"} and not in_one_piece
    return not (kinds <= {"Slice", "Split"} and in_one_piece)


def _select(model: Model, source: Value, order: NDArray[np.int64], moved: _Moved) -> Value:
    """The channels of a tensor in this order: itself, a Slice where they lie side by side, or a Gather."""
    channels = (dims(source) or [])[1]
    if np.array_equal(order, np.arange(channels or 0)):
        if not moved.value.is_graph_output():
            return source
        node = model.build("Identity", [source], name=title(moved.path[-1]), like=source)
    elif np.all(np.diff(order) == 1):
        ends = {"start": int(order[0]), "end": int(order[-1]) + 1, "axis": 1}
        name = title(moved.path[-1])
        cut = [model.constant(f"{name}_{what}", np.array([number], np.int64)) for what, number in ends.items()]
        node = model.build("Slice", [source, *cut], name=title(moved.path[-1]), like=source)
    else:
        index = model.constant(f"{title(moved.path[-1])}_order", order)
        node = model.build("Gather", [source, index], name=title(moved.path[-1]), attributes={"axis": 1}, like=source)
    sizes = dims(source) or []
    set_dims(node.outputs[0], [sizes[0], len(order), *sizes[2:]])
    producer = source.producer()  # operators of the path may be gone by now, and all readers stand behind the producer
    if producer is None:
        model.insert_first(node)
    else:
        model.insert_after(producer, node)
    return node.outputs[0]


# -- into the weights of layers ----------------------------------------------------------------------------------------

PER_CHANNEL = frozenset[str]().union(
    *(
        with_(effect=effect)
        for effect in (
            ChannelEffect.SAME,
            ChannelEffect.RECTIFY,
            ChannelEffect.CLIP,
            ChannelEffect.FUNCTION,
            ChannelEffect.MEAN_OF_PLACES,
            ChannelEffect.MAX_OF_PLACES,
        )
    )
)
"""Operators that do the same to every channel, and to each alone."""


@each_node("shuffle", "Gather")
def fold_channel_order(model: Model, node: Node) -> list[Change]:
    """Take the order of channels into the weights of the layers behind a Gather of them or, failing that, in front."""
    data, order = data_input(node), constant_array(input_of(node, 1))
    axes, sizes = rank(data), dims(data)
    if order is None or order.ndim != 1 or axes is None or sizes is None or axes < 3 or sizes[1] is None:
        return []
    if attribute(node, "axis", 0) % axes != 1:
        return []
    order = np.where(order < 0, order + sizes[1], order)
    reasons = []
    for edit in (_fold_into_layers_behind, _fold_into_layer_before):
        try:
            return edit(model, node, order, sizes[1])
        except EditRefused as reason:
            reasons.append(str(reason))
    raise EditRefused("; ".join(dict.fromkeys(reasons)))


def _fold_into_layers_behind(model: Model, node: Node, order: NDArray[np.int64], channels: int) -> list[Change]:
    if not np.array_equal(np.sort(order), np.arange(channels)):
        raise EditRefused("it does not give out every channel once")
    between: list[Node] = []
    value, flat = node.outputs[0], False
    while True:
        readers = model.readers(value)
        if value.is_graph_output() or not readers:
            raise EditRefused("the model returns its channels in this order")
        if all(_is_dense(model, reader, value) for reader in readers):
            break
        reader = readers[0] if len(readers) == 1 else None
        if reader is None or not _keeps_channels(model, reader, value):
            names = ", ".join(describe_node(other) for other in readers[:2])
            raise EditRefused(f"{names} takes its channels as they are")
        between.append(reader)
        value = reader.outputs[0]
        flat = flat or standard_op_type(reader) == "Flatten"
        if flat and standard_op_type(reader) != "Flatten":
            raise EditRefused(f"{describe_node(reader)} stands behind a Flatten")
    back = np.argsort(order)
    layers = [_with_inputs(read_layer(reader), order, channels) for reader in readers]
    for inner in between:
        _reorder_channels(model, inner, back)
    for layer in layers:
        write_layer(model, layer)
    known = channel_stats_of(node.outputs[0])
    if known is not None:
        set_channel_stats(data_input(node), known.of(back))
    model.redirect(node.outputs[0], data_input(node))
    model.remove(node)
    return [Change("shuffle", title(layer.node), f"{describe_node(node)} went into its weights") for layer in layers]


def _is_dense(model: Model, node: Node, value: Value) -> bool:
    """Whether a node is a layer that reads `value`, and sums over all of its channels."""
    if standard_op_type(node) not in ("Conv", "ConvTranspose", "Gemm") or not reads_as_data(node, value, model):
        return False
    return constant_array(input_of(node, 1)) is not None and attribute(node, "group", 1) == 1


def _keeps_channels(model: Model, node: Node, value: Value) -> bool:
    """Whether a node works on each channel of `value`, its first input, by itself."""
    if not reads_as_data(node, value, model) or not uses_only_first_output(node):
        return False
    kind = standard_op_type(node)
    if kind in PER_CHANNEL or _is_depthwise(node):
        return True
    return kind == "Flatten" and attribute(node, "axis", 1) == 1


def _is_depthwise(node: Node) -> bool:
    weight = constant_array(input_of(node, 1)) if standard_op_type(node) == "Conv" else None
    biased = input_of(node, 2)
    return (
        weight is not None
        and weight.shape[0] == attribute(node, "group", 1)
        and weight.shape[1] == 1
        and (biased is None or constant_array(biased) is not None)
    )


def _reorder_channels(model: Model, node: Node, order: NDArray[np.int64]) -> None:
    """Let a node that works on each channel by itself take and give its channels in this order, or some of them."""
    forget_channel_stats(node.outputs[0])
    sizes = dims(node.outputs[0])
    if sizes is not None and len(sizes) > 2:
        set_dims(node.outputs[0], [sizes[0], len(order), *sizes[2:]])
    if not _is_depthwise(node):
        return
    for index in (1, 2):
        numbers = constant_array(input_of(node, index))
        if numbers is not None:
            model.set_input(node, index, model.constant(f"{title(node)}_{index}", numbers[order]))
    set_attribute(node, "group", len(order))
    forget_input_means(node)


def _with_inputs(layer: Layer, order: NDArray[np.int64], channels: int) -> Layer:
    """The layer reading the channels that `order` was applied to, in their own order."""
    positions, rest = divmod(layer.inputs, channels)
    if rest or layer.weight.shape[0] != 1:
        raise EditRefused(f"{describe_node(layer.node)} has another number of inputs than its data has channels")
    wide = (order[:, None] * positions + np.arange(positions)).reshape(-1)
    weight = np.empty_like(layer.weight)
    weight[:, :, wide] = layer.weight
    means = None
    if layer.means is not None:
        means = np.empty_like(layer.means)
        means[wide] = layer.means
    return replace(layer, weight=weight, means=means)


def _fold_into_layer_before(model: Model, node: Node, order: NDArray[np.int64], channels: int) -> list[Change]:
    between: list[Node] = []
    value, reader = data_input(node), node
    while True:
        maker = value.producer()
        if maker is None or maker.graph is not model.graph or model.sole_reader(value) is not reader:
            raise EditRefused("what it reads has other readers, or no layer writes it")
        if _is_depthwise(maker) or standard_op_type(maker) in PER_CHANNEL:
            if not uses_only_first_output(maker):
                raise EditRefused(f"another output of {describe_node(maker)} is used")
            between.append(maker)
            value, reader = data_input(maker), maker
            continue
        break
    if standard_op_type(maker) != "Conv" or attribute(maker, "group", 1) != 1:
        raise EditRefused(f"{describe_node(maker)} cannot write its channels in another order")
    layer = read_layer(maker)
    if layer.outputs != channels:
        raise EditRefused(f"{describe_node(maker)} has another number of channels")
    weight, bias = constant_array(weight_of(maker)), layer.bias[order]
    assert weight is not None
    forget_channel_stats(maker.outputs[0])
    sizes = dims(maker.outputs[0])
    if sizes is not None:
        set_dims(maker.outputs[0], [sizes[0], len(order), *sizes[2:]])
    model.set_input(maker, 1, model.constant(f"{title(maker)}_weight", weight[order]))
    if input_of(maker, 2) is not None:
        model.set_input(maker, 2, model.constant(f"{title(maker)}_bias", bias.astype(weight.dtype)))
    for inner in between:
        _reorder_channels(model, inner, order)
    model.take_over(node.outputs[0], data_input(node))  # cannot fail: this node alone reads what another one wrote
    model.remove(node)
    return [Change("shuffle", title(maker), f"{describe_node(node)} went into its weights")]
