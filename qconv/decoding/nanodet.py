"""Decodes NanoDet (RangiLyu/nanodet) and PicoDet (Yu et al. 2021, arXiv 2111.00902): edges as distributions over bins.

    distance = stride * sum k * softmax(bins)[k]        edge = middle of the cell -/+ distance

(Li et al. 2020, arXiv 2006.04388.) Scores, behind a sigmoid, are joined with the bins of left, top, right and bottom in
one output (N, A, C + 4 * B), or each stride has an output of scores (N, A, C) and one of bins (N, A, 4 * B).

NanoDet-Plus, which joins four strides, measures from the top left of a cell, and not from its middle.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconv.decoding.boxes import Detections, Float64, cell_grid, find_boxes, softmax
from qconv.decoding.head import Head, NetworkFacts, OutputPart, read_class_names
from qconv.decoding.priors import Size, cells_by_stride

STRIDES = ((8, 16, 32), (8, 16, 32, 64))

BINS = (8, 11, 16, 17)
"""Bins of an edge, as published networks have them."""

MOST_SHARES = 0.5
"""Part of the columns of bins that may hold numbers from 0 to 1 alone, by chance."""

MIDDLE = 0.5

NMS_IOU = 0.6

USUAL_SCORE = 0.4


def match(facts: NetworkFacts) -> Head | None:
    """The head of a network of either family; None for others."""
    if not facts.outputs:
        return None
    for name in facts.outputs:
        if not facts.is_float(name) or len(facts.shape_of(name)) != 3 or not facts.outputs[name].size:
            return None
    return _match_joined(facts) if len(facts.outputs) == 1 else _match_split(facts)


def _match_joined(facts: NetworkFacts) -> Head | None:
    ((name, array),) = facts.outputs.items()
    strides = next((s for s in STRIDES if array.shape[1] == len(cell_grid(facts.size, s)[0])), None)
    if strides is None:
        return None
    shares = _find_shares(array)
    bins = next((b for b in BINS if len(shares) > 4 * b and shares[: -4 * b].all()), None)
    if bins is None or not _can_be_bins(shares[-4 * bins :]):
        return None
    classes = len(shares) - 4 * bins
    plus = len(strides) == 4
    origin = 0.0 if plus else MIDDLE
    decode = partial(_decode_joined, classes=classes, strides=strides, size=facts.size, origin=origin)
    scores = OutputPart("scores", 2, 0, classes)
    parts = {name: (scores, OutputPart("distances", 2, classes, sure=scores))}
    why = f"{array.shape[1]} rows are the cells of {_describe(strides)}, with {classes} classes and 4 x {bins} bins"
    family = "NanoDet-Plus" if plus else "NanoDet"
    return Head(family, why, (name,), decode, facts.size, USUAL_SCORE, read_class_names(facts.metadata), parts)


def _match_split(facts: NetworkFacts) -> Head | None:
    strides = next((s for s in STRIDES if len(facts.outputs) == 2 * len(s)), None)
    if strides is None:
        return None
    scores, bins = [], []
    for stride in strides:
        rows = int(np.prod(cells_by_stride(facts.size, stride)))
        level = [name for name in facts.outputs if facts.shape_of(name)[1] == rows]
        level.sort(key=lambda name: not _find_shares(facts.outputs[name]).all())
        if len(level) != 2 or not _find_shares(facts.outputs[level[0]]).all():
            return None
        if not _can_be_bins(_find_shares(facts.outputs[level[1]])):
            return None
        scores.append(level[0])
        bins.append(level[1])
    widths = [{facts.shape_of(name)[2] for name in names} for names in (scores, bins)]
    if any(len(width) != 1 for width in widths):
        return None
    ((classes,), (edges,)) = widths
    why = f"each of {_describe(strides)} has an output of {classes} classes and one of 4 x {edges // 4} bins"
    decode = partial(_decode_split, strides=strides, size=facts.size)
    names = read_class_names(facts.metadata) or dict(enumerate(facts.metadata.get("character", "").split("\n")))
    names = names if len(names) == classes else {}
    pairs = zip(scores, bins, strict=True)
    parts = {edge: (OutputPart("distances", 2, sure=OutputPart("scores", 2, tensor=score)),) for score, edge in pairs}
    return Head("PicoDet", why, (*scores, *bins), decode, facts.size, USUAL_SCORE, names, parts)


def _describe(strides: Sequence[int]) -> str:
    return f"strides {', '.join(map(str, strides))}"


def _find_shares(array: NDArray[Any]) -> NDArray[np.bool_]:
    """Which columns of (N, A, D) hold numbers from 0 to 1 alone, (D,)."""
    found: NDArray[np.bool_] = (array.min(axis=(0, 1)) >= 0) & (array.max(axis=(0, 1)) <= 1)
    return found


def _can_be_bins(shares: NDArray[np.bool_]) -> bool:
    """Whether columns can be logits of bins, by those that hold numbers from 0 to 1 alone."""
    return len(shares) % 4 == 0 and len(shares) // 4 in BINS and bool(shares.mean() < MOST_SHARES)


def _decode_joined(
    arrays: Sequence[NDArray[Any]],
    least: float,
    *,
    classes: int,
    strides: Sequence[int],
    size: Size,
    origin: float,
) -> list[Detections]:
    rows = arrays[0]
    return _decode(rows[..., :classes], rows[..., classes:], least, strides, size, origin)


def _decode_split(
    arrays: Sequence[NDArray[Any]], least: float, *, strides: Sequence[int], size: Size
) -> list[Detections]:
    scores, bins = arrays[: len(strides)], arrays[len(strides) :]
    return _decode(np.concatenate(scores, axis=1), np.concatenate(bins, axis=1), least, strides, size, MIDDLE)


def _decode(
    scores: NDArray[Any], bins: NDArray[Any], least: float, strides: Sequence[int], size: Size, origin: float
) -> list[Detections]:
    cells, steps = cell_grid(size, strides)
    places = np.tile((cells + origin) * steps, 2)
    found = []
    for values, logits in zip(scores.astype(np.float64), bins, strict=True):
        distances = expect_bins(logits) * steps
        boxes = places + distances * np.array([-1, -1, 1, 1])
        found.append(find_boxes(boxes, values, least, NMS_IOU)[1].clipped(size[1], size[0]))
    return found


def expect_bins(logits: NDArray[Any]) -> Float64:
    """The mean bin of each of four distributions, (A, 4), of their logits (A, 4 * B)."""
    shares = softmax(logits.reshape(len(logits), 4, -1), axis=2)
    found: Float64 = shares @ np.arange(shares.shape[2])
    return found
