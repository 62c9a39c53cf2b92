"""These passes write Resize and Pad so that ONNX Runtime can compute them in any order of axes, or keep it away.

Its CPU provider computes layers of codes in NHWC and moves the transposes around them to the operators behind. There it
takes numbers of some axes for those of all of them, and has no kernel for some: the quantized file would not load or
not run, though the float one does, see `findings/onnxruntime-layout-optimizer-ignores-axes.sh`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconv.errors import Change
from qconv.ir.model import (
    DataType,
    Model,
    Node,
    Value,
    attribute,
    constant_array,
    dims,
    drop_attribute,
    input_of,
    rank,
)
from qconv.ir.rewriting import EditRefused, data_input, each_node, standard_op_type, title


@each_node("simplify", "Pad")
def pad_every_axis(model: Model, node: Node) -> list[Change]:
    """Write a Pad with axes as one over all axes: ONNX Runtime transposes axes wrongly between integer layers."""
    given = input_of(node, 3)
    widths, axes, axis_count = constant_array(input_of(node, 1)), constant_array(given), rank(data_input(node))
    if given is None or widths is None or axes is None or axis_count is None:
        return []
    full = np.zeros((2, axis_count), np.int64)  # (begin and end, axes)
    full[:, axes] = widths.reshape(2, -1)
    fill = input_of(node, 2)
    widths_of_all = model.constant(f"{title(node)}_widths", full.reshape(-1))
    inputs = [data_input(node), widths_of_all, *([] if fill is None else [fill])]
    model.become(node, "Pad", inputs, {"mode": attribute(node, "mode", "constant")})
    return [Change("simplify", title(node), "axes of Pad written out")]


@each_node("simplify", "Resize")
def resize_every_axis(model: Model, node: Node) -> list[Change]:
    """Write a Resize with axes as one over all axes: ONNX Runtime (1.32) moves transposes past it, but no axes.

    Its optimizer makes a model of it that does not load (sizes), or does not run (scales).
    """
    axes = attribute(node, "axes")
    if axes is None:
        return []
    if attribute(node, "coordinate_transformation_mode", "") == "tf_crop_and_resize":
        raise EditRefused("it crops")
    if attribute(node, "keep_aspect_ratio_policy", "stretch") != "stretch":
        _scale_in_proportion(model, node, axes)
        return [Change("simplify", title(node), "proportion of Resize written out")]
    scales = input_of(node, 2)
    by_scales = scales is not None and dims(scales) != [0]
    given = node.inputs[2 if by_scales else 3]
    assert given is not None
    sizes, numbers = dims(data_input(node)), constant_array(given)
    constant = (
        None if sizes is None or numbers is None else _sides_of_all_axes(sizes, axes, numbers, by_scales=by_scales)
    )
    if constant is None:
        full = _compute_sides_of_all_axes(model, node, given, axes, by_scales=by_scales)
    else:
        full, by_scales = model.constant(f"{title(node)}_sides", constant), constant.dtype == np.float32
    drop_attribute(node, "axes")
    model.set_input(node, 2, full if by_scales else None)
    model.set_input(node, 3, None if by_scales else full)
    return [Change("simplify", title(node), "axes of Resize written out")]


def _scale_in_proportion(model: Model, node: Node, axes: Sequence[int]) -> None:
    """Write a Resize whose sizes are kept in proportion by the one scale that this comes to. Raises EditRefused."""
    sizes, wanted = dims(data_input(node)), constant_array(input_of(node, 3))
    sides = None if sizes is None else [sizes[axis] for axis in axes]
    if sizes is None or wanted is None or sides is None or not all(sides):
        raise EditRefused("its sizes are kept in proportion to what is not known")
    ratios = wanted.astype(np.float32) / np.array(sides, np.float32)
    smaller = attribute(node, "keep_aspect_ratio_policy") == "not_larger"
    scale = np.float32(ratios.min() if smaller else ratios.max())
    lengths = np.array(sides)
    if not _reaches(lengths, scale, np.floor(lengths.astype(np.float32) * scale + np.float32(0.5))):
        raise EditRefused("its sizes are kept in proportion and rounded")
    full = np.ones(len(sizes), np.float32)
    full[list(axes)] = scale
    drop_attribute(node, "axes")
    drop_attribute(node, "keep_aspect_ratio_policy")
    model.set_input(node, 2, model.constant(f"{title(node)}_sides", full))
    model.set_input(node, 3, None)


@each_node("simplify", "Resize", "Pad", "CenterCropPad")
def fence_from_transposes(model: Model, node: Node) -> list[Change]:
    """Put a Reshape that changes nothing in front of a node that ONNX Runtime cannot compute in NHWC, and one behind.

    Its CPU provider (1.32) computes layers of codes in NHWC and moves the transposes around them to the operators
    behind, for some of which it has no kernel then, or mistakes `axes`: the file would not load or run, see
    `findings/onnxruntime-layout-optimizer-ignores-axes.sh`. It moves none past a Reshape.
    """
    data = data_input(node)
    axes = rank(data)
    if axes is None or axes < 3 or not _breaks_in_nhwc(node) or _is_fence(data.producer()):
        return []
    name, readers = f"{title(node)}_fence", model.readers(node.outputs[0])
    shape = model.constant(f"{name}_shape", np.array([0] * (axes - 1) + [-1], np.int64))
    before, behind = (
        model.build("Reshape", [value, shape], name=name, like=value) for value in (data, node.outputs[0])
    )
    model.insert_before(node, before)
    model.set_input(node, 0, before.outputs[0])
    model.insert_after(node, behind)
    model.redirect(node.outputs[0], behind.outputs[0], readers=readers)
    return [Change("simplify", title(node), "kept apart from transposes")]


def _is_fence(node: Node | None) -> bool:
    if node is None or standard_op_type(node) != "Reshape":
        return False
    shape = constant_array(input_of(node, 1))
    return shape is not None and shape[-1:].tolist() == [-1] and not shape[:-1].any()


def _breaks_in_nhwc(node: Node) -> bool:
    """Whether ONNX Runtime, asked for another order of the axes, makes a node that does not load or run."""
    if node.op_type == "Pad":
        return input_of(node, 3) is not None
    if attribute(node, "axes") is not None:
        return True
    cubic = node.op_type == "Resize" and attribute(node, "mode", "nearest") == "cubic"
    return cubic and not attribute(node, "antialias", 0) and not _only_grows(node)


def _only_grows(node: Node) -> bool:
    """Whether a Resize makes no side shorter, as far as is known."""
    scales = constant_array(input_of(node, 2))
    if scales is not None and scales.size:
        return bool((scales >= 1).all())
    before, after = dims(data_input(node)), constant_array(input_of(node, 3))
    if before is None or after is None:
        return False
    return all(size is not None and size <= int(made) for size, made in zip(before[2:], after[2:], strict=True))


def _sides_of_all_axes(
    sizes: Sequence[int | None], axes: Sequence[int], given: NDArray[Any], *, by_scales: bool
) -> NDArray[Any] | None:
    """Scales (float32) or sizes (int64) of all axes of a tensor, of these along some; None where they are not known."""
    chosen = list(axes)
    scales = np.ones(len(sizes), np.float32)
    if by_scales:
        scales[chosen] = given
        return scales
    full = np.array([-1 if size is None else size for size in sizes], np.int64)
    sides = full[chosen]
    full[chosen] = given
    if (full >= 0).all():
        return full
    if (sides <= 0).any():
        return None
    scales[chosen] = given.astype(np.float32) / sides.astype(np.float32)  # what the runtime makes of sizes
    return scales if _reaches(sides, scales[chosen], given) else None


def _reaches(sides: NDArray[np.int64], scales: NDArray[np.float32] | np.float32, wanted: NDArray[Any]) -> bool:
    """Whether sides by scales, cut off, are those wanted however runtimes multiply: in float32 or in float64."""
    products = sides.astype(np.float32) * scales, sides * scales.astype(np.float64)
    return all(bool((np.floor(product) == wanted).all()) for product in products)


def _compute_sides_of_all_axes(
    model: Model, node: Node, given: Value, axes: Sequence[int], *, by_scales: bool
) -> Value:
    """The same, computed from the shape of the tensor at hand."""
    wish = f"{title(node)}_sides"
    made = [model.build("Shape", [data_input(node)], name=f"{wish}_now", dtype=DataType.INT64)]
    if by_scales:
        made.append(model.build("Shape", [made[0].outputs[0]], name=f"{wish}_rank", dtype=DataType.INT64))
        one = model.constant(f"{wish}_one", np.ones(1, np.float32))
        made.append(model.build("Expand", [one, made[1].outputs[0]], name=f"{wish}_ones", dtype=DataType.FLOAT))
    numbers, axis_count = constant_array(given), rank(data_input(node))
    if numbers is not None and axis_count is not None and not by_scales:
        # no data propagation looks through a Where, and onnx's makes nothing of Shape behind an unknown rank
        chosen, full = np.zeros(axis_count, bool), np.ones(axis_count, np.int64)
        chosen[list(axes)], full[list(axes)] = True, numbers
        pick = [model.constant(f"{wish}_chosen", chosen), model.constant(f"{wish}_given", full), made[-1].outputs[0]]
        made.append(model.build("Where", pick, name=wish, dtype=DataType.INT64))
        model.insert_before(node, *made)
        return made[-1].outputs[0]
    places = model.constant(f"{wish}_axes", np.array(axes, np.int64))
    kind = DataType.FLOAT if by_scales else DataType.INT64
    made.append(model.build("ScatterElements", [made[-1].outputs[0], places, given], name=wish, dtype=kind))
    model.insert_before(node, *made)
    return made[-1].outputs[0]
