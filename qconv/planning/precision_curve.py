"""Divides a network between integers and float by its time and by the noise at its outputs together.

With the times of `planning.placement`, and N_t for what tensor t in 8 bits adds to the noise at the outputs, the
division at a price is

    min over F   time(F) + price * sum over t of N_t        t: each tensor that a node outside of F writes or reads

which is a minimum cut again: t is rounded, and N_t paid once, as soon as one node that touches it runs in integers.
Noises of tensors add up, as their errors hardly correlate. A price walks over the lower convex hull of (time, noise):
between two of its points lies another one if, and only if, the price at which both are worth the same has a better
division (Eisner and Severance 1976, https://doi.org/10.1145/321978.321982).
"""

from __future__ import annotations

import math
from collections.abc import Sequence, Set
from dataclasses import dataclass, field

from qconv.ir.model import Model, Node, Value
from qconv.metrics.similarity import compute_sqnr_db
from qconv.planning.placement import PlacementProblem
from qconv.planning.plan import Plan

LEAST_TIME_STEP = 0.008
"""Share of the all-integer time by which two points differ at least for a third between them to be looked for."""

HIGHEST_PRICE = 1e4
"""Highest price of all noise, in runs of the network in integers."""


@dataclass(frozen=True, slots=True)
class TensorNoise:
    """The noise at the outputs of tensors that share a range, alone, over the power of the outputs."""

    members: tuple[Value, ...]
    noise: float


@dataclass(frozen=True, slots=True)
class Division:
    """A point of the curve.

    integer: the nodes that run in integers. time: predicted, over that of all integers, on the CPU where that is most.
    noise: predicted, at the outputs, over their power.
    """

    integer: frozenset[Node]
    time: float
    noise: float

    @property
    def sqnr_db(self) -> float:
        """The predicted SQNR in dB."""
        found = compute_sqnr_db(1.0, self.noise)
        return math.inf if found is None else found


@dataclass(frozen=True, slots=True)
class PrecisionCurve:
    """Divisions of a network, from the fastest to the one with the least noise.

    points: ascending in time, the first by times alone. float_time: of all in float, over that of all in integers.
    """

    points: tuple[Division, ...]
    float_time: float


@dataclass(slots=True)
class PrecisionProblem:
    """The minimum cut of time and noise.

    problem, cautious: of times, as they are and as they are trusted. cpus: of times on each class of CPU, as they are
    trusted. whole: all nodes that could run in integers. rounded: the nodes that round a tensor, and its noise. rest:
    noise that no division changes.
    """

    problem: PlacementProblem
    cautious: PlacementProblem
    cpus: Sequence[PlacementProblem]
    whole: frozenset[Node]
    rounded: list[tuple[frozenset[Node], float]] = field(default_factory=list)
    rest: float = 0.0

    @classmethod
    def of(
        cls,
        model: Model,
        plan: Plan,
        problem: PlacementProblem,
        noises: Sequence[TensorNoise],
        cpus: Sequence[PlacementProblem] = (),
    ) -> PrecisionProblem:
        """The problem of a folded network.

        plan: with all in integers that can be. problem: of times. noises: at its outputs. cpus: of times on each class
        of CPU; none for those of `problem`.
        """
        rounded = [(frozenset(find_rounding_nodes(model, plan, own.members)), own.noise) for own in noises]
        rounded = [own for own in rounded if own[0]]
        return cls(
            problem, problem.cautious(), [own.cautious() for own in cpus or [problem]], frozenset(plan.integer), rounded
        )

    def noise_of(self, integer: Set[Node]) -> float:
        """The noise at the outputs with these nodes in integers."""
        return self.rest + sum(noise for nodes, noise in self.rounded if nodes & integer)

    def describe(self, integer: Set[Node]) -> Division:
        """The point of the curve with these nodes in integers."""
        return Division(frozenset(integer), self.time_of(integer), self.noise_of(integer))

    def time_of(self, integer: Set[Node]) -> float:
        """The time over that of all integers, on the CPU where that is most."""
        return max(own.time(integer) / max(own.time(self.whole), 1e-9) for own in self.cpus)

    def divide(self, price: float, low: Set[Node] | None = None, high: Set[Node] = frozenset()) -> frozenset[Node]:
        """The nodes that run in integers where noise of 1 costs so many us.

        low, high: those at a lower and at a higher price, where known. The higher the price, the fewer they are, as it
        raises capacities of the source alone (Gallo, Grigoriadis and Tarjan 1989, https://doi.org/10.1137/0218003).
        """
        penalties = ((nodes, price * noise) for nodes, noise in self.rounded if noise > 0)
        return frozenset(self.cautious.cheapest(penalties, set() if low is None else self.whole - low, high))

    def fastest(self, integer: Set[Node]) -> PrecisionCurve:
        """The curve of one point. integer: the nodes of the division by times alone."""
        return PrecisionCurve((self.describe(integer),), self.time_of(frozenset()))

    def find_curve(self, fastest: Set[Node]) -> PrecisionCurve:
        """All divisions that a price leads to.

        fastest: the division by times alone, which is the first point. What is in float there is so in all others.
        """
        most = HIGHEST_PRICE * self.cautious.time(self.whole) / max(self.noise_of(self.whole) - self.rest, 1e-30)
        ends = [self.divide(0.0, fastest), self.divide(most, fastest)]
        found = [ends[0], *self._between(*ends), ends[1]]
        points = {frozenset(fastest): self.describe(fastest)} | {one: self.describe(one) for one in found}
        first = points[frozenset(fastest)]
        better = [point for point in points.values() if point is first or point.noise < first.noise]
        return PrecisionCurve(
            tuple(sorted(better, key=lambda point: (point is not first, point.time))), self.time_of(frozenset())
        )

    def _between(self, low: frozenset[Node], high: frozenset[Node]) -> list[frozenset[Node]]:
        """The divisions between two of the hull, in the order of their prices."""
        dearer = self.cautious.time(high) - self.cautious.time(low)
        better = self.noise_of(low) - self.noise_of(high)
        if better <= 0 or dearer <= LEAST_TIME_STEP * self.problem.time(self.whole):
            return []
        price = dearer / better
        found = self.divide(price, low, high)
        if self._cost(found, price) >= self._cost(low, price) * (1 - 1e-9):
            return []
        return [*self._between(low, found), found, *self._between(found, high)]

    def _cost(self, integer: Set[Node], price: float) -> float:
        return self.cautious.time(integer) + price * self.noise_of(integer)


def find_rounding_nodes(model: Model, plan: Plan, members: Sequence[Value]) -> set[Node]:
    """The nodes of a plan that write some tensors, or read them, on codes; the layer where it absorbs an activation.

    Of a plan with quantizers in front of readers alone, these readers.
    """
    if plan.reads is not None:
        return {node for value in members for node in plan.reads.get(value, ())}
    found: set[Node] = set()
    for value in members:
        made = value.producer()
        found |= {node for node in (made, *model.readers(value)) if node is not None}
    found |= {layer for activation, layer in plan.absorbed.items() if activation in found}
    return {node for node in found if node in plan.integer}
