"""Scales and shifts behind a layer go into its columns through what keeps them together.

    gain * T(x W + b) + shift = T(x (W gain) + b gain + shift)     T: Reshape, Transpose and the like

T must keep the axis of the output channels whole: a Transpose moves it elsewhere, and a Reshape may part or join the
others only, those before it and those behind it by themselves. One number for all goes through all of them. LeViT has
a BatchNormalization behind MatMul and Reshape, ConvNeXt a scale by channel behind MatMul and Add. `fold` does the same
where the layer stands directly in front.

Sources: Graham et al. 2021, arXiv 2104.01136, 3.2; Liu et al. 2022, arXiv 2201.03545.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconv.errors import Change
from qconv.ir.layers import (
    INPUTS_FIRST,
    Affine,
    Float64,
    affine_data_input,
    check_finite,
    forget_channel_stats,
    read_affine,
    read_layer,
    scale_outputs,
    transform_channel_stats,
    write_layer,
)
from qconv.ir.model import Model, Node, Value, attribute, constant_array, dims, rank
from qconv.ir.rewriting import EditRefused, data_input, describe_node, each_node, standard_op_type, title

RESHAPES = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze"})

MANY_AXES = -1

LAYER_AXES: Mapping[str, int] = {"MatMul": -1, "Gemm": 1, "Conv": 1, "ConvTranspose": 1}
"""The axis of the output channels."""


@dataclass(slots=True)
class _Column:
    """The layer that writes the channels along an axis of a tensor, and what stands in between.

    path: the tensors on the way, the last first, each with the axis of the channels there, None for any. adds: the
    constants that are added on it, likewise.
    """

    layer: Node
    path: list[tuple[Value, int | None]]
    adds: list[tuple[Node, int | None]]


@each_node("fold", "BatchNormalization", "Mul", "Div", "Add", "Sub")
def fold_into_columns(model: Model, node: Node) -> list[Change]:
    """Fold a scale and shift into the columns of the layer before, through Reshape, Transpose and constants added."""
    data = affine_data_input(node)
    if data is None or rank(data) is None:
        return []
    axis = _channel_axis(node, data)
    if axis == MANY_AXES:
        return []
    column = _find_column(model, node, data, axis)
    if column is None or not column.path or dims(node.outputs[0]) != dims(data):
        return []
    affine = read_affine(node, rank(data), -1 if axis is None else axis)
    layer = read_layer(column.layer)
    channels = layer.outputs
    if affine.gain.size not in (1, channels) or affine.shift.size not in (1, channels):
        return []
    takes_shift = bool(column.adds) or standard_op_type(column.layer) != "MatMul"
    if not takes_shift and np.all(affine.gain == 1):
        return []
    in_bias = takes_shift and not column.adds
    layer = scale_outputs(layer, affine.gain, affine.shift if in_bias else np.zeros(1))
    check_finite(layer)
    for add, place, numbers in _scaled_adds(column, affine):
        model.set_input(add, place, model.constant(f"{title(add)}_scaled", numbers))
    write_layer(model, layer)
    _transform_stats(column, affine)
    if not takes_shift and affine.shift.any():
        _add_behind(model, column.layer, np.broadcast_to(affine.shift, (channels,)))
    model.take_over(node.outputs[0], data)
    model.remove(node)
    summed_up = f"{node.op_type} folded into {column.layer.op_type}"
    return [Change("fold", title(column.layer), f"{describe_node(node)} folded into its columns", summed_up)]


def _channel_axis(node: Node, data: Value) -> int | None:
    """The one axis along which the constants of a node vary; None for single numbers, MANY_AXES for several."""
    axes = rank(data) or 0
    if standard_op_type(node) == "BatchNormalization":
        return 1 if axes > 1 else MANY_AXES
    numbers = next((n for value in node.inputs if value is not data and (n := constant_array(value)) is not None), None)
    if numbers is None or numbers.ndim > axes:
        return MANY_AXES
    wide = [axes - numbers.ndim + i for i, size in enumerate(numbers.shape) if size != 1]
    return None if not wide else wide[0] if len(wide) == 1 else MANY_AXES


def _find_column(model: Model, reader: Node, value: Value, axis: int | None) -> _Column | None:
    """The layer whose output channels lie along `axis` of `value` (None: any); None where there is none."""
    path: list[tuple[Value, int | None]] = []
    adds: list[tuple[Node, int | None]] = []
    while True:
        node = value.producer()
        if node is None or node.graph is not model.graph or model.sole_reader(value) is not reader:
            return None
        kind = standard_op_type(node)
        if kind in INPUTS_FIRST:
            own = LAYER_AXES[kind] % (rank(value) or 1)
            constant = constant_array(node.inputs[1]) is not None
            return _Column(node, path, adds) if axis in (own, None) and constant else None
        before = _step_up(node, value, axis)
        if before is None:
            return None
        path.append((value, axis))
        if kind == "Add":
            adds.append((node, axis))
        value, axis = before
        reader = node


def _step_up(node: Node, value: Value, axis: int | None) -> tuple[Value, int | None] | None:
    """What a node on the way reads, and the axis of the channels there."""
    kind = standard_op_type(node)
    if kind == "Add":
        data = affine_data_input(node)
        if data is None or dims(data) != dims(value):
            return None
        fits = axis is None or _channel_axis(node, data) in (axis, None)
        return (data, axis) if fits else None
    if kind not in RESHAPES and kind != "Transpose":
        return None
    data = data_input(node)
    if axis is None:
        return data, None
    sizes, after = dims(data), dims(value)
    if not sizes or not after:
        return None
    if kind == "Transpose":
        order = attribute(node, "perm") or list(range(len(sizes)))[::-1]
        return data, order[axis]
    same = _find_same_axis(sizes, after, axis)
    return None if same is None else (data, same)


def _find_same_axis(before: list[int | None], after: list[int | None], axis: int) -> int | None:
    """The axis that a Reshape leaves whole as `axis`: of the same size, with as many numbers behind it."""
    if after[axis] is None or None in after[axis + 1 :]:
        return None
    behind = prod(size or 0 for size in after[axis + 1 :])
    for index in range(len(before) - 1, -1, -1):
        if None in before[index:]:
            return None
        if before[index] == after[axis] and prod(size or 0 for size in before[index + 1 :]) == behind:
            return index
    return None


def _scaled_adds(column: _Column, affine: Affine) -> list[tuple[Node, int, NDArray[np.floating[Any]]]]:
    """The constants that are added on the way, scaled: the node, the input and the numbers of each.

    The one next to the layer takes the shift. Raises EditRefused where float32 does not have the numbers.
    """
    found = []
    for index, (node, axis) in enumerate(column.adds):
        data = affine_data_input(node)
        assert data is not None
        place = next(i for i, value in enumerate(node.inputs) if value is not data)
        numbers = constant_array(node.inputs[place])
        axes = rank(data) or 1
        assert numbers is not None
        across = [-1 if i == axis else 1 for i in range(axes)]  # single numbers are (1,), whatever the axis
        added = numbers.astype(np.float64).reshape([1] * (axes - numbers.ndim) + list(numbers.shape))
        added = added * affine.gain.reshape(across)
        if index == len(column.adds) - 1:
            added = added + affine.shift.reshape(across)
        short = added.reshape(added.shape[axis:]) if axis is not None and added.size == added.shape[axis] else added
        with np.errstate(over="ignore"):
            scaled = short.astype(numbers.dtype)
        if not np.isfinite(scaled).all():
            raise EditRefused(f"{describe_node(node)} would get numbers that float32 does not have")
        found.append((node, place, scaled))
    return found


def _transform_stats(column: _Column, affine: Affine) -> None:
    """Keep what is noted of the tensors on the way true; those in front of all that is added take no shift."""
    shift = affine.shift
    for value, axis in column.path:
        if axis in (None, 1):  # where notes have their channels
            transform_channel_stats(value, affine.gain, shift)
        else:
            forget_channel_stats(value)
        if column.adds and value.producer() is column.adds[-1][0]:
            shift = np.zeros(1)


def _add_behind(model: Model, layer: Node, shift: Float64) -> None:
    """Add a shift to what a MatMul writes, which has no bias: behind it the runtime makes one Gemm of both."""
    result = layer.outputs[0]
    readers = model.readers(result)
    numbers = model.constant(f"{title(layer)}_shift", shift.astype(np.float32))
    node = model.build("Add", [result, numbers], name=f"{title(layer)}_shifted", like=result)
    model.insert_after(layer, node)
    model.redirect(result, node.outputs[0], readers=readers)
