"""ONNX operators that move values about, in PyTorch: shapes, slices, joining, padding, Resize."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from qconv.training.torchop import Given, Op, Run, every, first, numbers, optional, torch_pads

Places = NDArray[np.float64]
Indices = NDArray[np.int64]

# -- shapes and places -------------------------------------------------------------------------------------------------


def _axes(given: Given) -> list[int] | None:
    """Of Squeeze and its kind."""
    wanted = optional(given, 1)
    return None if wanted is None else list(map(int, numbers(wanted)))


def _squeeze(op: Op, given: Given) -> Tensor:
    x, axes = first(given), _axes(given)
    return x.squeeze() if axes is None else x.squeeze(tuple(axes))


def _unsqueeze(op: Op, given: Given) -> Tensor:
    x, axes = first(given), _axes(given) or []
    rank = x.ndim + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = x.unsqueeze(axis)
    return x


def _reshape(op: Op, given: Given) -> Tensor:
    x, wanted = every(given)
    shape = numbers(wanted)
    if not op.get("allowzero", 0):
        shape = [x.shape[i] if side == 0 else side for i, side in enumerate(shape)]
    return x.reshape(shape)


def _flatten(op: Op, given: Given) -> Tensor:
    x, axis = first(given), op.get("axis", 1)
    axis = axis + x.ndim if axis < 0 else axis
    return x.reshape(math.prod(x.shape[:axis]), -1)


def _transpose(op: Op, given: Given) -> Tensor:
    x = first(given)
    return x.permute(*op.get("perm", list(reversed(range(x.ndim)))))


def _slice(op: Op, given: Given) -> Tensor:
    x, *parts = given
    assert x is not None
    starts, ends, axes, steps = (numbers(p) if p is not None else None for p in [*parts, None, None][:4])
    assert starts is not None
    assert ends is not None
    for axis, start, end, step in zip(
        axes or range(len(starts)), starts, ends, steps or [1] * len(starts), strict=True
    ):
        side, step = x.shape[axis], int(step)
        start = max(int(start), -side) if step < 0 else int(start)  # before the first is the first, also backwards
        places = range(side)[slice(start, int(end), step)]
        if step == 1:
            x = x.narrow(axis, places.start, len(places))
        else:
            x = x.index_select(axis, torch.tensor(list(places), dtype=torch.int64, device=x.device))
    return x


def _split(op: Op, given: Given) -> tuple[Tensor, ...]:
    x, wanted = first(given), optional(given, 1)
    axis = op.get("axis", 0)
    if wanted is not None:
        return tuple(torch.split(x, numbers(wanted), dim=axis))
    return tuple(torch.split(x, -(-x.shape[axis] // op.outputs), dim=axis))


def _concat(op: Op, given: Given) -> Tensor:
    return torch.cat(every(given), dim=op.get("axis"))


def _reflected(places: Indices, side: int) -> Indices:
    period = max(2 * (side - 1), 1)
    return np.minimum(places % period, period - places % period)


PADDED: dict[str, Callable[[Indices, int], Indices]] = {
    "edge": lambda places, side: np.clip(places, 0, side - 1),
    "reflect": _reflected,
    "wrap": lambda places, side: places % side,
}
"""What is repeated at places before and behind an axis of `side` numbers, by Pad's mode."""


def _pad(op: Op, given: Given) -> Tensor:
    x, value = first(given), optional(given, 2)
    ends = numbers(every(given)[1])
    axes = optional(given, 3)
    if axes is not None:
        named = [int(axis) % x.ndim for axis in numbers(axes)]
        whole = [0] * (2 * x.ndim)
        for i, axis in enumerate(named):
            whole[axis], whole[axis + x.ndim] = ends[i], ends[i + len(named)]
        ends = whole
    mode = op.get("mode", "constant")
    if mode == "constant":
        return F.pad(x, torch_pads(ends), value=0.0 if value is None else float(value))
    if mode not in PADDED:
        raise op.refuse(f"pads by {mode!r}")
    x = F.pad(x, torch_pads([min(end, 0) for end in ends]))  # cropped first: what is cut off is not repeated
    for axis, (before, behind) in enumerate(zip(ends[: x.ndim], ends[x.ndim :], strict=True)):
        if before > 0 or behind > 0:
            side = x.shape[axis]
            places = PADDED[mode](np.arange(-max(before, 0), side + max(behind, 0)), side)
            x = x.index_select(axis, torch.as_tensor(places, device=x.device))
    return x


def _gather(op: Op, given: Given) -> Tensor:
    x, at = every(given)
    axis = op.get("axis", 0) % x.ndim
    places = torch.where(at < 0, at + x.shape[axis], at).to(x.device)
    found = x.index_select(axis, places.reshape(-1))
    return found.reshape([*x.shape[:axis], *at.shape, *x.shape[axis + 1 :]])


def _shape(op: Op, given: Given) -> Tensor:
    shape = list(first(given).shape)
    return torch.tensor(shape[op.get("start", 0) : op.get("end")], dtype=torch.int64)


def _expand(op: Op, given: Given) -> Tensor:
    x, shape = every(given)
    wanted = torch.broadcast_shapes(x.shape, tuple(numbers(shape)))
    return x.expand(wanted)


def _depth_to_space(op: Op, given: Given) -> Tensor:
    x, b = first(given), op.get("blocksize")
    n, c, h, w = x.shape
    if op.get("mode", "DCR") == "DCR":
        x = x.reshape(n, b, b, c // b**2, h, w).permute(0, 3, 4, 1, 5, 2)
    else:
        x = x.reshape(n, c // b**2, b, b, h, w).permute(0, 1, 4, 2, 5, 3)
    return x.reshape(n, c // b**2, h * b, w * b)


def _space_to_depth(op: Op, given: Given) -> Tensor:
    x, b = first(given), op.get("blocksize")
    n, c, h, w = x.shape
    return x.reshape(n, c, h // b, b, w // b, b).permute(0, 3, 5, 1, 2, 4).reshape(n, c * b * b, h // b, w // b)


# -- Resize ------------------------------------------------------------------------------------------------------------


TIE = 1e-5
"""A place so close to the middle of two is in the middle, as far as single precision tells, which the runtime heeds."""
NEAREST: dict[str, Callable[[Places], Places]] = {
    "round_prefer_floor": lambda places: np.ceil(places - 0.5 - TIE),
    "round_prefer_ceil": lambda places: np.floor(places + 0.5 + TIE),
    "floor": lambda places: np.floor(places),
    "ceil": lambda places: np.ceil(places),
}


def _resize(op: Op, given: Given) -> Tensor:
    """One axis after the other, each by a matrix that says of what old places a new one is made.

    Sizes and places are worked out in single precision, which decides ties: so the runtime does it.
    """
    x, scales, sizes = first(given), optional(given, 2), optional(given, 3)
    if op.get("axes") or op.get("coordinate_transformation_mode") == "tf_crop_and_resize":
        raise op.refuse("resizes only some axes, or crops")
    if op.get("antialias", 0) or op.get("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise op.refuse("smooths, or keeps the aspect ratio")
    if sizes is not None and sizes.numel():
        wanted = [int(side) for side in numbers(sizes)]
        factors = [np.float32(side) / np.float32(old) for side, old in zip(wanted, x.shape, strict=True)]
    else:
        assert scales is not None
        factors = [np.float32(s) for s in numbers(scales)]
        wanted = [math.floor(np.float32(side) * f) for side, f in zip(x.shape, factors, strict=True)]
    if wanted == list(x.shape):  # nothing is moved then, not even by a factor that is not 1
        return x
    for axis, (new, factor) in enumerate(zip(wanted, factors, strict=True)):
        if new != x.shape[axis] or factor != 1:
            matrix = torch.as_tensor(_resizing(op, x.shape[axis], new, factor), dtype=x.dtype, device=x.device)
            x = torch.movedim(torch.movedim(x, axis, -1) @ matrix.T, -1, axis)
    return x


def _resizing(op: Op, old: int, new: int, factor: np.float32) -> NDArray[np.float32]:
    """(new, old)"""
    at = np.arange(new, dtype=np.float32)
    match op.get("coordinate_transformation_mode", "half_pixel"):
        case "half_pixel":
            place = (at + 0.5) / factor - 0.5
        case "pytorch_half_pixel":
            place = (at + 0.5) / factor - 0.5 if new > 1 else at
        case "align_corners":
            place = at * (old - 1) / (new - 1) if new > 1 else at
        case "asymmetric":
            place = at / factor
        case other:
            raise op.refuse(f"has places by {other!r}")
    matrix, rows = np.zeros((new, old)), np.arange(new)
    mode = op.get("mode", "nearest")
    if mode == "nearest":
        how = op.get("nearest_mode", "round_prefer_floor")
        near = NEAREST[how](place.astype(np.float64))
        matrix[rows, np.clip(near, 0, old - 1).astype(int)] = 1
    elif mode == "linear":
        place = np.clip(place, 0, old - 1)
        left = np.floor(place).astype(int)
        np.add.at(matrix, (rows, left), 1 - (place - left))
        np.add.at(matrix, (rows, np.minimum(left + 1, old - 1)), place - left)
    else:
        raise op.refuse(f"interpolates by {mode!r}")
    return matrix.astype(np.float32)


MOVING: dict[str, Run] = {
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Transpose": _transpose,
    "Slice": _slice,
    "Split": _split,
    "Concat": _concat,
    "Pad": _pad,
    "Gather": _gather,
    "Shape": _shape,
    "Expand": _expand,
    "DepthToSpace": _depth_to_space,
    "SpaceToDepth": _space_to_depth,
    "Resize": _resize,
}
"""Operators that move values about."""
