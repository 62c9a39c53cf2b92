"""What rounding costs as a function of channel scales, and the scales that make it least.

Scales s divide tensors and multiply what reads them (streams.py). A rounding error of a tensor's codes counts s_c times
as much in the units of the unscaled network, and one of a weight meets a value that is 1/s_c as large; steps follow
ranges, and step^2 / 12 is the square of an error:

    codes      step_x^2 * sum over c of g_c s_c^2                              step_x = max of range_c / s_c, in codes
    weights    sum over o of g_o step_o^2 * sum over i of v_i / s_i^2          step_o = max over i of |W_oi| s_i
               step^2 * sum over o of g_o s_o^2 * sum over i of v_i / s_i^2    step = max over o, i of |W_oi| s_i / s_o

(the last where a layer has one scale for all its weights). g is what a unit of noise in a channel is worth, v_i the
power of what a weight is multiplied with.

Filling the ranges of a tensor takes precision from the weights that read it: there is an optimum between. All terms are
posynomials, whose logarithms are convex in log s, so that there is only one: Boyd et al. 2007, A Tutorial on Geometric
Programming. The maxima are smoothed to norms of order ORDER for the descent of the logarithm of their sum (Adam, Kingma
and Ba 2014, arXiv 1412.6980, projected on the bounds), whose slopes are as large where the noise has become small; what
comes of it is judged with the maxima themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from qconv.ir.layers import Float64

Classes = NDArray[np.int64]
ORDER = 32
STEPS = 150
FIRST_RATE, LAST_RATE = 0.15, 0.003
DECAY, DECAY_OF_SQUARES = 0.9, 0.97
TINY = 1e-300
FLAT = 1e-4
"""Slopes below this share of a term's mean part, which Adam would take for directions, tell of channels that hardly
count: the model of the noise is no better than that, and these stay where they are."""


class Term(Protocol):
    """One source of noise. u: log s of every class."""

    def noise(self, u: Float64) -> float:
        """With the maxima as they are."""

    def slope(self, u: Float64, into: Float64) -> float:
        """The noise with smoothed maxima; its derivative is added to `into`, (classes,)."""

    def classes(self) -> Classes:
        """On whose scales it depends."""


@dataclass(frozen=True, slots=True, eq=False)
class Codes:
    """Tensors that share a step. channels: their classes, (n,); lows, highs: their ranges, lows <= 0 <= highs; gains:
    (n,). levels: steps in the range."""

    channels: Classes
    lows: Float64
    highs: Float64
    gains: Float64
    levels: float

    def classes(self) -> Classes:
        """See Term."""
        return self.channels

    def noise(self, u: Float64) -> float:
        """See Term."""
        s = np.exp(u[self.channels])
        width = float((self.highs / s).max(initial=0.0) - (self.lows / s).min(initial=0.0))
        return float(width**2 / (12 * self.levels**2) * (self.gains @ s**2))

    def slope(self, u: Float64, into: Float64) -> float:
        """See Term."""
        s = np.exp(u[self.channels])
        high, of_high = _norm(self.highs / s)
        low, of_low = _norm(-self.lows / s)
        worth = self.gains * s**2
        width = high + low
        found = 2 * width**2 * worth - 2 * width * worth.sum() * (high * of_high + low * of_low)
        scale = 1 / (12 * self.levels**2)
        np.add.at(into, self.channels, found * scale)
        return float(width**2 * worth.sum() * scale)


@dataclass(frozen=True, slots=True, eq=False)
class Weights:
    """The weights of a layer of G groups.

    inputs, outputs: classes (I,), (O,). largest: (G, O/G, I/G), of each output and input the largest magnitude over
    kernel positions. powers: (I,), of what meets the weights, summed over kernel positions. gains: (O,). levels: codes
    above zero. whole: whether all weights share one scale, else those of each output do.
    """

    inputs: Classes
    outputs: Classes
    largest: Float64
    powers: Float64
    gains: Float64
    levels: float
    whole: bool
    _rows: Float64  # (G, O/G), the largest of each output
    _raised: Float64  # (largest / its output's)^ORDER

    @classmethod
    def of(
        cls,
        inputs: Classes,
        outputs: Classes,
        largest: Float64,
        powers: Float64,
        gains: Float64,
        *,
        levels: float,
        whole: bool,
    ) -> Weights:
        """With what is computed once."""
        rows = largest.max(axis=2)
        raised = largest / np.maximum(rows, TINY)[:, :, None]
        for _ in range(ORDER.bit_length() - 1):
            np.square(raised, out=raised)
        return cls(inputs, outputs, largest, powers, gains, levels, whole, rows, raised)

    def classes(self) -> Classes:
        """See Term: the outputs count only where one scale is for all of them."""
        return np.concatenate([self.inputs, self.outputs]) if self.whole else self.inputs

    def noise(self, u: Float64) -> float:
        """See Term."""
        groups, gains, powers = self._at(u)
        s = np.exp(u[self.inputs]).reshape(groups, 1, -1)
        rows = (self.largest * s).max(axis=2)  # (G, O/G)
        if self.whole:
            out = np.exp(u[self.outputs]).reshape(groups, -1)
            found = float((rows / out).max()) ** 2 * float((gains * out**2).sum(axis=1) @ powers.sum(axis=1))
        else:
            found = float((gains * rows**2).sum(axis=1) @ powers.sum(axis=1))
        return found / (12 * self.levels**2)

    def slope(self, u: Float64, into: Float64) -> float:
        """See Term."""
        groups, gains, powers = self._at(u)
        top = u[self.inputs].reshape(groups, -1)
        most = top.max(axis=1, keepdims=True)
        high = np.exp(ORDER * (top - most))  # (G, I/G), at most 1
        sums = np.matmul(self._raised, high[:, :, None])[:, :, 0]  # (G, O/G)
        np.maximum(sums, TINY, out=sums)
        rows = self._rows * np.exp(most) * sums ** (1 / ORDER)
        power = powers.sum(axis=1, keepdims=True)  # (G, 1)
        scale = 1 / (12 * self.levels**2)
        if self.whole:
            out = np.exp(u[self.outputs]).reshape(groups, -1)
            worth = gains * out**2
            step, shares = _norm(rows / out)
            total = step**2 * float(worth.sum(axis=1) @ power[:, 0])
            of_rows = total * shares  # d(total) / d(log rows), halved
            meet = step**2 * worth.sum(axis=1, keepdims=True)
            np.add.at(into, self.outputs, 2 * scale * (step**2 * worth * power - of_rows).reshape(-1))
        else:
            of_rows = gains * rows**2 * power
            meet = (gains * rows**2).sum(axis=1, keepdims=True)
        pulled = np.matmul((of_rows / sums)[:, None, :], self._raised)[:, 0] * high
        np.add.at(into, self.inputs, 2 * scale * (pulled - meet * powers).reshape(-1))
        return float((meet * powers).sum() * scale)

    def _at(self, u: Float64) -> tuple[int, Float64, Float64]:
        groups = len(self.largest)
        powers = (self.powers * np.exp(-2 * u[self.inputs])).reshape(groups, -1)
        return groups, self.gains.reshape(groups, -1), powers


def _norm(x: Float64) -> tuple[float, Float64]:
    """The norm of order ORDER of numbers that are not negative, and how much of it each is: d log(norm) / d log(x)."""
    most = float(x.max(initial=0.0))
    if most == 0:
        return 0.0, np.zeros_like(x)
    raised = (x / most) ** ORDER
    total = float(raised.sum())
    return most * total ** (1 / ORDER), raised / total


def total(terms: Sequence[Term], u: Float64) -> float:
    """The noise of all terms."""
    return sum(term.noise(u) for term in terms)


def least(terms: Sequence[Term], lowest: Float64, highest: Float64, steps: int = STEPS) -> Float64:
    """log s (classes,) between the bounds with about the least noise; zeros where nothing gains.

    lowest <= 0 <= highest: equal where a class is fixed.
    """
    u = np.zeros_like(lowest)
    floor = FLAT / max(1, len(terms))
    mean, squares = np.zeros_like(u), np.zeros_like(u)
    for step in range(steps):
        slope = np.zeros_like(u)
        noise = sum(term.slope(u, slope) for term in terms)
        slope /= noise + TINY
        mean += (1 - DECAY) * (slope - mean)
        squares += (1 - DECAY_OF_SQUARES) * (slope**2 - squares)
        rate = FIRST_RATE * (LAST_RATE / FIRST_RATE) ** (step / max(1, steps - 1))
        moved = mean / (1 - DECAY ** (step + 1)) / (np.sqrt(squares / (1 - DECAY_OF_SQUARES ** (step + 1))) + floor)
        u = np.clip(u - rate * moved, lowest, highest)
    return u if total(terms, u) < total(terms, np.zeros_like(u)) else np.zeros_like(u)
