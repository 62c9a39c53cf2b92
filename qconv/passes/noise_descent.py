"""This module finds the log scales u of channels with the least noise by `noise_model`, between bounds.

All terms are posynomials, convex in u, so that there is one minimum (Boyd et al. 2007, A Tutorial on Geometric
Programming). Maxima are smoothed to norms of order p, and p grows: a small one leaves a wide bowl and leads near the
minimum, a large one comes close to the maximum.

    |x|_p = (sum over i of x_i^p)^(1/p)         share_i = x_i^p / sum x^p = d log |x|_p / d log x_i
    curvature_i = 4 * what grows with u_i + (4 + 2 p (1 - share_i)) * what falls with u_i

Each order is descended by L-BFGS (Nocedal 1980, Updating Quasi-Newton Matrices with Limited Storage), projected on the
bounds, where a class at a bound that its slope points out of stands still (Bertsekas 1982, Projected Newton Methods for
Optimization Problems with Simple Constraints). It starts from the inverse of the curvatures, the diagonal of the
Hessian but for mixed terms: noise of a component may be a thousandth of that of another. What is descended is the
logarithm of the sum. The result is judged with the maxima.

Powers of weights are kept in float32, relative to the scales that an order starts from; LEAST_LOG_POWER bounds how far
it may go from there, so that of each sum something is left.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from qconv.ir.layers import Float64
from qconv.passes.noise_model import TINY, ActivationNoise, NoiseTerm, WeightNoise, total_noise

ORDERS = (4, 16, 64)

EVALUATIONS = 12
"""Of the noise of all terms, at each order."""

THINNED, FEWEST_OUTPUTS = 4, 32
"""Before the last order one output in so many stands for all of a layer, as long as it keeps so many in each group."""

REMEMBERED = 6
"""Steps that L-BFGS keeps."""

LARGEST_STEP = 1.5
"""How far a step may move a log scale."""

SETTLED = 1e-5
"""Least relative gain of a step; below it an order ends."""

FLAT_CURVATURE = 1e-3
"""Share of the noise that is added to curvatures: by less no class is told where to go."""

SUFFICIENT_GAIN, SHORTER = 1e-4, 0.4
"""Share of the gain by the slope that a step must bring, and what it shrinks by else (Armijo 1966)."""

LEAST_LOG_POWER = 70.0
"""Down to exp(-this) float32 keeps powers and what is divided by them."""

Index = NDArray[np.int64]
Real = TypeVar("Real", bound=np.floating)


def minimize_noise(
    terms: Sequence[NoiseTerm], lowest: Float64, highest: Float64, evaluations: int = EVALUATIONS
) -> Float64:
    """Search log s (classes,) between the bounds with about the least noise; zeros where no scale gains.

    lowest <= 0 <= highest: equal where a class is fixed. evaluations: at each order.
    """
    u = np.zeros_like(lowest)
    free = lowest < highest
    # what cannot be scaled: a dense layer behind an operator that stops scales has most of all weights
    moving = [term for term in terms if np.any(free[term.classes()])]
    if not moving:
        return u
    held = sum(term.noise(u) for term in terms if not np.any(free[term.classes()]))
    for order in ORDERS:
        noise = _SmoothNoise.of(moving if order == ORDERS[-1] else [_thin(term) for term in moving], held, order, u)
        reach = LEAST_LOG_POWER / (2 * order)
        u = _descend(noise, u, np.maximum(lowest, u - reach), np.minimum(highest, u + reach), evaluations)
    return u if total_noise(moving, u) < total_noise(moving, np.zeros_like(u)) else np.zeros_like(u)


def _thin(term: NoiseTerm) -> NoiseTerm:
    if isinstance(term, ActivationNoise):
        return term
    return term.thinned(max(1, min(THINNED, term.largest.shape[1] // FEWEST_OUTPUTS)))


# -- projected L-BFGS --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class _Point:
    """A place u with the logarithm of the noise there, its slope and its curvatures, (classes,) each."""

    u: Float64
    log_noise: float
    slope: Float64
    curvature: Float64


@dataclass(frozen=True, slots=True, eq=False)
class _Pair:
    """How far a step went, and how much the slope changed by it, (classes,) each."""

    moved: Float64
    changed: Float64


def _descend(noise: _SmoothNoise, u: Float64, lowest: Float64, highest: Float64, evaluations: int) -> Float64:
    """Descend from u within the bounds, with so many evaluations at most."""
    here, left = noise.at(u), evaluations - 1
    pairs: deque[_Pair] = deque(maxlen=REMEMBERED)
    while left > 0:
        stuck = ((here.u <= lowest) & (here.slope >= 0)) | ((here.u >= highest) & (here.slope <= 0))
        direction = _choose_direction(here, pairs, ~stuck)
        length = min(1.0, LARGEST_STEP / max(float(np.abs(direction).max(initial=0.0)), TINY))
        there = None
        while there is None and left > 0:
            tried = noise.at(np.clip(here.u + length * direction, lowest, highest))
            left -= 1
            if tried.log_noise <= here.log_noise + SUFFICIENT_GAIN * float(here.slope @ (tried.u - here.u)):
                there = tried
            length *= SHORTER
        if there is None:
            break
        pairs.append(_Pair(there.u - here.u, there.slope - here.slope))
        gained, here = here.log_noise - there.log_noise, there
        if gained < SETTLED:
            break
    return here.u


def _choose_direction(here: _Point, pairs: Sequence[_Pair], free: NDArray[np.bool_]) -> Float64:
    """Minus the inverse Hessian times the slope, over the free classes alone, (classes,)."""
    by_slope = -here.slope * free / here.curvature
    direction, used = -here.slope * free, []
    for pair in reversed(pairs):
        moved, changed = pair.moved * free, pair.changed * free
        product = float(moved @ changed)
        if product > TINY:
            along = float(moved @ direction) / product
            direction = direction - along * changed
            used.append((moved, changed, product, along))
    direction = direction / here.curvature
    for moved, changed, product, along in reversed(used):
        direction = direction + (along - float(changed @ direction) / product) * moved
    return direction if float(direction @ here.slope) < 0 else by_slope


# -- the noise of all terms, smoothed ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class _Segments:
    """Parts of an array, none of them empty. starts: (S,). of: the part of each element, (n,)."""

    starts: Index
    of: Index

    @classmethod
    def sized(cls, sizes: Sequence[int]) -> _Segments:
        """Parts of these sizes, side by side."""
        starts = np.cumsum([0, *sizes])[:-1]
        return cls(starts, np.repeat(np.arange(len(sizes)), sizes))

    def sum(self, x: Float64) -> Float64:
        """The sum of each part, (S,)."""
        return np.asarray(np.add.reduceat(x, self.starts))

    def maximum(self, x: Float64) -> Float64:
        """The maximum of each part, (S,)."""
        return np.asarray(np.maximum.reduceat(x, self.starts))

    def norm(self, x: Float64, order: int) -> tuple[Float64, Float64]:
        """The norm of each part of numbers x >= 0, (S,), and the share of each number in its, (n,)."""
        most = np.maximum(self.maximum(x), TINY)
        raised = _raise(x / most[self.of], order)
        total = np.maximum(self.sum(raised), TINY)
        return most * total ** (1 / order), raised / total[self.of]


def _raise(x: NDArray[Real], order: int) -> NDArray[Real]:
    """x to a power of two, which squaring is much faster at. x: overwritten."""
    for _ in range(order.bit_length() - 1):
        np.square(x, out=x)
    return x


@dataclass(frozen=True, slots=True, eq=False)
class _Slopes:
    """What noise changes by when log scales do: slope and curvature, (n,) each, by class."""

    classes: Index
    slope: Float64
    curvature: Float64


@dataclass(frozen=True, slots=True, eq=False)
class _SmoothNoise:
    """The noise of all terms with norms in place of maxima. held: of terms that no scale changes."""

    held: float
    order: int
    parts: tuple[_SmoothActivations | _SmoothWeights, ...]

    @classmethod
    def of(cls, terms: Sequence[NoiseTerm], held: float, order: int, u: Float64) -> _SmoothNoise:
        """The noise near u, with norms of this order."""
        tensors = [term for term in terms if isinstance(term, ActivationNoise) and term.channels.size]
        layers = [term for term in terms if isinstance(term, WeightNoise) and term.largest.size]
        parts: list[_SmoothActivations | _SmoothWeights] = [_SmoothActivations.of(tensors, order)] if tensors else []
        for whole in (False, True):
            alike = [term for term in layers if term.whole is whole]
            parts += [_SmoothWeights.of(alike, order, u)] if alike else []
        return cls(held, order, tuple(parts))

    def at(self, u: Float64) -> _Point:
        """The logarithm of the noise, with its derivatives."""
        noise, found = self.held, []
        for part in self.parts:
            own, slopes = part.at(u)
            noise += own
            found.append(slopes)
        classes, slope, curvature = (
            np.concatenate([getattr(one, name) for one in found]) for name in ("classes", "slope", "curvature")
        )
        slope, curvature = (np.bincount(classes, of, u.size) for of in (slope, curvature))
        noise = max(noise, TINY)
        return _Point(u, float(np.log(noise)), slope / noise, curvature / noise + FLAT_CURVATURE)


@dataclass(frozen=True, slots=True, eq=False)
class _SmoothActivations:
    """ActivationNoise of T tensors, whose n channels stand side by side.

    sides: magnitudes of highs and lows, (n,) each, where there are any. scales: (T,), 1 / (12 levels^2).
    """

    channels: Index
    sides: tuple[Float64, ...]
    gains: Float64
    scales: Float64
    tensors: _Segments
    order: int

    @classmethod
    def of(cls, terms: Sequence[ActivationNoise], order: int) -> _SmoothActivations:
        channels, highs, lows, gains = (
            np.concatenate([getattr(term, name) for term in terms]) for name in ("channels", "highs", "lows", "gains")
        )
        sides = tuple(side for side in (highs, -lows) if side.any())
        scales = np.array([1 / (12 * term.levels**2) for term in terms])
        return cls(channels, sides, gains, scales, _Segments.sized([t.channels.size for t in terms]), order)

    def at(self, u: Float64) -> tuple[float, _Slopes]:
        """The noise, and what it changes by."""
        s = np.exp(u[self.channels])
        worth = self.gains * s**2
        total, of = self.tensors.sum(worth), self.tensors.of
        norms = [self.tensors.norm(side / s, self.order) for side in self.sides]
        width = sum((norm for norm, _ in norms), np.zeros_like(total))
        slope = (2 * self.scales * width**2)[of] * worth
        curvature = 2 * slope
        for norm, share in norms:
            own = (2 * self.scales * width * total * norm)[of] * share
            slope = slope - own
            curvature += (4 + 2 * self.order * (1 - share)) * own
        return float(self.scales @ (width**2 * total)), _Slopes(self.channels, slope, curvature)


@dataclass(frozen=True, slots=True, eq=False)
class _SmoothWeights:
    """WeightNoise of layers that all have one scale, or one for each output (`whole`), by groups side by side.

    inputs, outputs: classes (I,), (O,). powers, gains: (I,), (O,).
    into, out: the group of each input and output; layers: the layer of each output.
    scales: (groups,), 1 / (12 levels^2).
    near: u of the inputs, (I,), that `raised` and `rows` are of.
    raised: of each layer (G, O/G, I/G) float32, (weight / largest of its output)^order. rows: (O,), that largest.
    """

    inputs: Index
    outputs: Index
    powers: Float64
    gains: Float64
    into: _Segments
    out: _Segments
    layers: _Segments
    scales: Float64
    near: Float64
    raised: tuple[NDArray[np.float32], ...]
    rows: Float64
    order: int
    whole: bool

    @classmethod
    def of(cls, terms: Sequence[WeightNoise], order: int, u: Float64) -> _SmoothWeights:
        inputs, outputs, powers, gains = (
            np.concatenate([getattr(term, name) for term in terms]) for name in ("inputs", "outputs", "powers", "gains")
        )
        shapes = [term.largest.shape for term in terms]
        into, out = (_Segments.sized([shape[axis] for shape in shapes for _ in range(shape[0])]) for axis in (2, 1))
        layers = _Segments.sized([term.gains.size for term in terms])
        scales = np.concatenate([np.full(len(term.largest), 1 / (12 * term.levels**2)) for term in terms])
        raised, rows = [], []
        for term in terms:
            own = term.largest * np.exp(u[term.inputs]).reshape(len(term.largest), 1, -1)
            most = own.max(axis=2, keepdims=True)
            raised.append(_raise((own / np.maximum(most, TINY)).astype(np.float32), order))
            rows.append(most.reshape(-1))
        near, whole = u[inputs], terms[0].whole
        return cls(
            inputs, outputs, powers, gains, into, out, layers, scales, near, tuple(raised), np.concatenate(rows),
            order, whole,
        )  # fmt: skip

    def at(self, u: Float64) -> tuple[float, _Slopes]:
        """The noise, and what it changes by."""
        here = u[self.inputs]
        moved = here - self.near
        most = self.into.maximum(moved)
        raised = _raise(np.exp(moved - most[self.into.of]), self.order)  # (I,), at most 1
        sums = np.maximum(_multiply(self.raised, raised), TINY)
        rows = self.rows * np.exp(most)[self.out.of] * sums ** (1 / self.order)
        powers = self.powers * np.exp(-2 * here)
        power = self.scales * self.into.sum(powers)  # (groups,)
        met, shares = self.gains * rows**2, None
        if self.whole:
            out = np.exp(u[self.outputs])
            step, shares = self.layers.norm(rows / out, self.order)
            met = step[self.layers.of] ** 2 * self.gains * out**2
        noise = met * power[self.out.of]  # (O,)
        of_rows = noise if shares is None else self.layers.sum(noise)[self.layers.of] * shares
        pulled = _multiply((matrix.transpose(0, 2, 1) for matrix in self.raised), of_rows / sums) * raised
        faced = (self.scales * self.out.sum(met))[self.into.of] * powers
        slope, curvature = 2 * (pulled - faced), 4 * faced + 4 * self.order * pulled
        if shares is None:
            return float(noise.sum()), _Slopes(self.inputs, slope, curvature)
        classes = np.concatenate([self.inputs, self.outputs])
        slope = np.concatenate([slope, 2 * (noise - of_rows)])
        bent = 4 * noise + (8 + 4 * self.order * (1 - shares)) * of_rows
        return float(noise.sum()), _Slopes(classes, slope, np.concatenate([curvature, bent]))


def _multiply(matrices: Iterable[NDArray[np.float32]], x: Float64) -> Float64:
    """The products of matrices (G, n, m) with their parts of x >= 0, which lie side by side, (G * m,) each."""
    found, start = [], 0
    for matrix in matrices:
        own = x[start : start + len(matrix) * matrix.shape[2]]
        start += own.size
        largest = max(float(own.max()), TINY)
        scaled = (own / largest).astype(np.float32)
        # a plain product of a matrix and a vector is the faster one
        product = matrix[0] @ scaled if len(matrix) == 1 else matrix @ scaled.reshape(len(matrix), -1, 1)
        found.append(largest * product.reshape(-1).astype(np.float64))
    return np.concatenate(found)
