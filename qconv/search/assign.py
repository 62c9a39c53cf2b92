"""Which layer gets how many bits: the assignments that nothing beats at their size.

    min over b   sum over layers l of N_l(b_l)      such that   sum over l of b_l * count_l <= size

With N_l the noise that layer l alone adds at b_l bits. For a price of a bit the layers part: each takes the b that is
least in N_l(b) + price * b * count_l, a corner of the lower convex hull of its points (size, noise). Falling prices
give a row of assignments, each a step of one layer from the one before, and each the best of all of its size or less.
What lies between two of them may be better by less than one step: `filled` spends what is left of a given size, step by
step, and is no longer exact.

Source: Lagrangian bit allocation on convex hulls, Shoham and Gersho 1988; noise that adds up: Yao et al. 2021 (HAWQ-V3,
arXiv 2011.10680), who have second derivatives in place of a measured N_l.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Bits = int
Noise = Mapping[Bits, float]


@dataclass(frozen=True, slots=True)
class Layer:
    """count: of its weights. noise: by the bits that it can have, one entry at least."""

    count: int
    noise: Noise


@dataclass(frozen=True, slots=True)
class Assignment:
    """bits: of every layer. size: bits of all weights together. noise: by the model, the sum of all layers'."""

    bits: tuple[Bits, ...]
    size: int
    noise: float


def assignment(layers: Sequence[Layer], bits: Sequence[Bits]) -> Assignment:
    """These bits, with what they cost."""
    size = sum(layer.count * b for layer, b in zip(layers, bits, strict=True))
    return Assignment(tuple(bits), size, sum(layer.noise[b] for layer, b in zip(layers, bits, strict=True)))


def hull(layer: Layer) -> list[Bits]:
    """The bits at the corners of the lower convex hull, ascending; noise falls along it, ever more slowly."""
    corners: list[Bits] = []
    for bits in sorted(layer.noise):
        if corners and not layer.noise[bits] < layer.noise[corners[-1]]:
            continue
        while len(corners) > 1 and _slope(layer, corners[-1], bits) >= _slope(layer, corners[-2], corners[-1]):
            corners.pop()
        corners.append(bits)
    return corners


def curve(layers: Sequence[Layer]) -> list[Assignment]:
    """From the smallest assignment to the one with the least noise, ascending in size."""
    hulls = [hull(layer) for layer in layers]
    at = [0] * len(layers)
    found = [assignment(layers, [corners[0] for corners in hulls])]
    # the step of each layer that saves the most noise a bit, which is its next one
    steps = [(-_slope(layers[index], *h[:2]), index) for index, h in enumerate(hulls) if len(h) > 1]
    heapq.heapify(steps)
    while steps:
        _, index = heapq.heappop(steps)
        at[index] += 1
        found.append(assignment(layers, [corners[place] for corners, place in zip(hulls, at, strict=True)]))
        after = hulls[index][at[index] : at[index] + 2]
        if len(after) == 2:
            heapq.heappush(steps, (-_slope(layers[index], *after), index))
    return found


def filled(layers: Sequence[Layer], start: Assignment, size: int) -> Assignment:
    """`start` with more bits for some layers, as far as `size` allows: again and again the step that saves most."""
    best = start
    while True:
        steps = [
            assignment(layers, [*best.bits[:index], bits, *best.bits[index + 1 :]])
            for index, layer in enumerate(layers)
            for bits in layer.noise
            if bits > best.bits[index]
        ]
        better = [step for step in steps if step.size <= size and step.noise < best.noise]
        if not better:
            return best
        best = min(better, key=lambda step: step.noise)


def _slope(layer: Layer, low: Bits, high: Bits) -> float:
    """Noise that is saved by each bit of storage between two choices."""
    return (layer.noise[low] - layer.noise[high]) / ((high - low) * max(layer.count, 1))
