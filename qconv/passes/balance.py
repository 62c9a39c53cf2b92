"""This pass finds channels that are very far apart, and powers of two that bring them near before they are equalized.

A channel 10,000 times as large as the others leaves these nothing of a common scale, and the descent of `noise_model`
does not come so far: its bounds are close, and the ranges that it starts from hold at least a share of the tensor's
mean range, which such a channel makes large. With reach R_c of channel c, and W_c what a unit of it is of the outputs o
of the layers that read it, by what these are of the outputs behind them (V_o, which is W_o of later layers),

    W_c = (sum over o of |W_oc| V_o) / (sum over o, i of |W_oi| V_o R_i)        c counts by its share R_c W_c
    s_c = sqrt(R_c / W_c)

makes both alike (Nagel et al. 2019, arXiv 1906.04721, equation 11). Only channels further than FAR from the median of
their component, by shares, are moved; one that hardly counts only where it widens the scale of the others. Powers of
two change no bit of a float network, as long as nothing overflows or is denormal.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qconv.errors import Change, Skipped
from qconv.ir.layers import Float64, read_layer
from qconv.ir.model import Value
from qconv.passes.absorb_biases import STEP
from qconv.passes.noise_model import TINY, ChannelObservations
from qconv.passes.scale_groups import LayerScaleGroups, ScaleGroups

FAR = math.log(600.0)
"""Least distance of log s from the median for a channel to be moved."""

LEAST_SHARE = 0.01
"""Least share of a channel in outputs, over the largest of its component, for it to count."""

MOST_OCTAVES = 100
"""Octaves that a channel is moved by at most."""

OCTAVE = math.log(2.0)


@dataclass(frozen=True, slots=True, eq=False)
class FarChannels:
    """Channels that are far apart. wish: log s of every class in whole octaves, not bounded yet; zero where near."""

    groups: ScaleGroups
    wish: Float64

    def within(self, lowest: Float64, highest: Float64) -> Float64:
        """log s of every class in whole octaves, as far as these bounds allow."""
        bounded = np.clip(self.wish, lowest, highest)
        return np.asarray(np.trunc(bounded / OCTAVE * (1 + 1e-12)) * OCTAVE)

    def moved(self, u: Float64) -> list[Change]:
        """What scales log s did."""
        found = []
        for value, count, _ in self._each(u != 0):
            own = u[self.groups.of[value]] / OCTAVE
            ends = " to ".join(f"2^{-octaves:.0f}" for octaves in sorted({own.max(), own.min()} - {0.0}, reverse=True))
            what = f"{count} channels far from the others scaled by {ends}"
            found.append(Change(STEP, value.name or "", what, "channels far from the others brought near"))
        return found

    def left(self, u: Float64) -> list[Skipped]:
        """The channels that stay far from the others with scales log s, and why."""
        found = []
        for value, count, component in self._each(np.abs(self.wish - u) > FAR):
            own = self.wish[self.groups.of[value]]
            apart = np.exp(np.abs(own).max())
            why = self.groups.reasons.get(component, "a Clip binds")
            told = f"{count} channels stay apart from the others by about {apart:.0e}, and have few codes: {why}"
            found.append(Skipped(STEP, value.name or "", told))
        return found

    def _each(self, chosen: NDArray[np.bool_]) -> list[tuple[Value, int, int]]:
        """The first tensor of each component with chosen classes, how many it has, and the component."""
        found: dict[int, tuple[Value, int, int]] = {}
        for value, classes in self.groups.of.items():
            count = int(np.count_nonzero(chosen[classes]))
            if count:
                component = int(self.groups.component[classes[0]])
                found.setdefault(component, (value, count, component))
        return list(found.values())


def find_far_channels(seen: ChannelObservations) -> FarChannels:
    """Find the classes that are far from the others of their component, by what was seen of their channels."""
    groups = seen.groups
    reach, farthest = _reach_of_classes(seen)
    worth = np.zeros_like(reach)
    share = np.zeros_like(reach)
    for ends in reversed(groups.layers):
        if not np.all(groups.fixed[ends.inputs] & (reach[ends.inputs] == 0)):
            _take_readers(ends, reach, worth, share)
    wish = np.zeros_like(reach)
    # a component at a time, side by side in memory
    order = np.argsort(groups.component, kind="stable")
    for own in np.split(order, np.flatnonzero(np.diff(groups.component[order])) + 1):
        if own.size > 1 and reach[own].any():
            wish[own] = _wish_of_component(reach[own], farthest[own], worth[own], share[own], groups.fixed[own])
    return FarChannels(groups, wish)


def _reach_of_classes(seen: ChannelObservations) -> tuple[Float64, Float64]:
    """The largest magnitude of each class in any tensor, on all images and to expect on others, (classes,) both."""
    reach, farthest = np.zeros((2, seen.groups.fixed.size))
    for value, classes in seen.groups.of.items():
        found = seen.of(value)
        if found is not None:
            own = np.maximum(found.high, -found.low)
            np.maximum.at(reach, classes, own)
            np.maximum.at(farthest, classes, own if found.reach is None else found.reach)
    return reach, farthest


def _take_readers(ends: LayerScaleGroups, reach: Float64, worth: Float64, share: Float64) -> None:
    """Raise W_c and the share of each class that a layer reads."""
    own = read_layer(ends.node)
    groups = own.weight.shape[0]
    largest = np.abs(own.weight).max(axis=3).astype(np.float64)  # (G, O/G, I/G)
    whole = np.einsum("goi,gi->go", largest, reach[ends.inputs].reshape(groups, -1))
    behind = worth[ends.outputs].reshape(whole.shape)
    if not behind.any():  # the network returns it, or an operator that says nothing reads it
        behind = np.divide(1, whole, out=np.zeros_like(whole), where=whole > 0)
    total = float((whole * behind).sum())
    if total > 0:
        found = np.einsum("goi,go->gi", largest, behind).reshape(-1) / total
        np.maximum.at(worth, ends.inputs, found)
        np.maximum.at(share, ends.inputs, found * reach[ends.inputs])


def _wish_of_component(
    reach: Float64, farthest: Float64, worth: Float64, share: Float64, fixed: NDArray[np.bool_]
) -> Float64:
    """log s in whole octaves, (n,)."""
    counts = (reach > 0) & (worth > 0)
    if not counts.any():
        return np.zeros_like(reach)
    counts &= share >= LEAST_SHARE * share.max()
    kept = counts & fixed if np.any(counts & fixed) else counts
    log_reach, log_farthest, log_worth = (np.log(np.maximum(x, TINY)) for x in (reach, farthest, worth))
    middle_reach, middle_worth = (_weighted_median(x[kept], share[kept]) for x in (log_reach, log_worth))
    wide, strong = log_reach - middle_reach, log_worth - middle_worth
    wish = np.where(counts, (wide - strong) / 2, np.where(wide > FAR, wide, np.where(strong > FAR, -strong, 0.0)))
    # a channel that is small on these images and may wake on others keeps room for it
    wish = np.where(wish < 0, np.clip((log_farthest - middle_reach - strong) / 2, wish, 0.0), wish)
    wish = np.where(np.abs(wish) > FAR, wish, 0.0)
    return np.asarray(np.clip(np.rint(wish / OCTAVE), -MOST_OCTAVES, MOST_OCTAVES) * OCTAVE)


def _weighted_median(x: Float64, weights: Float64) -> float:
    """The number that half of the weight lies below, and half above."""
    order = np.argsort(x, kind="stable")
    below = np.cumsum(weights[order])
    return float(x[order][np.searchsorted(below, below[-1] / 2)])
