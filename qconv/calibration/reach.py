"""What every channel of a tensor did on the pictures, and how far it may go on others.

Channels that are scaled to fill a range have no room left above what the pictures showed, and there are those that wake
on one picture in a hundred. The largest values of single pictures tell, by Hill's estimate of a Pareto tail:

    reach = x_1 * UNSEEN^xi      xi = mean over i < k of log(x_i / x_k),  x_1 >= x_2 >= ... the k largest of P pictures

for UNSEEN times as many pictures; it is never beyond the largest channel's, and as far where fewer than k pictures wake
the channel. Where too few pictures are there to tell, xi is 1, the tail of what has no mean.

Source: Hill 1975, A Simple General Approach to Inference About the Tail of a Distribution; Weissman 1978.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from qconv.calibration.sketch import Sketch

Float64 = NDArray[np.float64]
UNSEEN, TAIL, FEWEST_IN_TAIL = 10.0, 0.125, 3
LEAST_RANGE = 0.1
"""Share of a tensor's mean range that a channel counts at least."""
OWN_SAMPLES = 8
"""As many samples of a channel's variance weigh as much as what its range tells of it."""


@dataclass(frozen=True, slots=True, eq=False)
class Channels:
    """What every channel of a tensor did, (C,) each.

    low, high: its extremes on all pictures. lowest, highest: what they may become on others, zero inside. floor: how
    low it may go where it always keeps away from zero.
    mean, spread: mean and variance, None where no columns were asked for.
    """

    low: Float64
    high: Float64
    lowest: Float64
    highest: Float64
    floor: Float64
    mean: Float64 | None
    spread: Float64 | None

    def lowered(self, shift: Float64) -> Channels:
        """The same, had the channels been lower by `shift`, (C,)."""
        highest = np.maximum(self.highest - shift, 0.0)
        mean = None if self.mean is None else self.mean - shift
        low, high, floor = self.low - shift, self.high - shift, self.floor - shift
        return replace(self, low=low, high=high, highest=highest, floor=floor, mean=mean)


def seen_by_channel(pictures: Iterable[Mapping[str, Sketch]]) -> dict[str, Channels]:
    """Sketches of single pictures, as one a tensor; tensors whose channels grow with the picture are left out."""
    kept: dict[str, list[Sketch]] = {}
    for sketches in pictures:
        for name, sketch in sketches.items():
            kept.setdefault(name, []).append(sketch)
    return {name: _channels(found) for name, found in kept.items() if len({s.lows.size for s in found}) == 1}


def _channels(found: Sequence[Sketch]) -> Channels:
    lows, highs = (np.stack(ends).astype(np.float64) for ends in zip(*((s.lows, s.highs) for s in found), strict=True))
    low, high = lows.min(axis=0), highs.max(axis=0)
    lowest, highest, floor = -reach_of(-lows), reach_of(highs), high - reach_of(high - lows)
    if not found[0].columns.size:
        return Channels(low, high, lowest, highest, floor, None, None)
    columns = np.concatenate([s.columns.reshape(-1, low.size) for s in found]).astype(np.float64)
    reach, spread = (highest - lowest) ** 2, columns.var(axis=0)
    by_range = reach * (spread.mean() / max(reach.mean(), np.finfo(np.float64).tiny))
    count = len(columns)
    spread = (count * spread + OWN_SAMPLES * by_range) / (count + OWN_SAMPLES)
    return Channels(low, high, lowest, highest, floor, np.mean([s.means for s in found], axis=0), spread)


def reach_of(extremes: Float64) -> Float64:
    """How far up each channel may go, (C,), zero or more. extremes: (P, C), the largest value of each picture."""
    ordered = np.sort(np.maximum(extremes, 0.0), axis=0)[::-1]
    most = ordered[0].max(initial=0.0)
    top = ordered[: max(2, int(TAIL * len(ordered)))]
    if len(top) < FEWEST_IN_TAIL:
        return np.asarray(np.where(ordered[0] > 0, np.minimum(ordered[0] * UNSEEN, most), most))
    if most == 0:
        return np.full(ordered.shape[1], most)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        index = np.log(top[:-1] / top[-1]).mean(axis=0)
        found = np.where(top[-1] > 0, ordered[0] * UNSEEN**index, most)
    return np.asarray(np.minimum(np.maximum(found, LEAST_RANGE * ordered[0].mean()), most))
