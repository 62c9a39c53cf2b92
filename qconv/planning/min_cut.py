"""Finds minimum cuts of graphs with capacities, as maximum flows (Ford and Fulkerson 1956; Dinic 1970)."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass

Vertex = Hashable

LEAST_CAPACITY = 1e-9
"""A remaining capacity below this is a rounding error."""


class FlowNetwork:
    """A graph with capacities, for minimum cuts. Vertices are of any kind; flow goes from `source` to `sink`."""

    def __init__(self) -> None:
        self.source, self.sink = object(), object()
        self._capacity: dict[Vertex, dict[Vertex, float]] = {self.source: {}, self.sink: {}}

    def edge(self, start: Vertex, end: Vertex, capacity: float) -> None:
        """Add an edge: with `start` on the side of the source and `end` on the other, a cut costs `capacity`.

        What no cut ever pays is left out.
        """
        if start is end or start is self.sink or end is self.source:
            return
        out = self._capacity.setdefault(start, {})
        out[end] = out.get(end, 0.0) + capacity
        self._capacity.setdefault(end, {}).setdefault(start, 0.0)

    def source_side(self) -> set[Vertex]:
        """The source's side of the cheapest cut, the smallest such set.

        Raises ValueError where every cut costs infinitely much.
        """
        things = list(self._capacity)
        number = {thing: index for index, thing in enumerate(things)}
        ends = [[number[other] for other in capacities] for capacities in self._capacity.values()]
        places = [{end: place for place, end in enumerate(some)} for some in ends]
        flow = _Flow(
            number[self.source],
            number[self.sink],
            ends,
            [list(capacities.values()) for capacities in self._capacity.values()],
            [[places[end][start] for end in some] for start, some in enumerate(ends)],
        )
        return {things[index] for index in flow.saturate()} - {self.source}


@dataclass(slots=True)
class _Flow:
    """The network with numbers for vertices: cuts are looked for many times in a run.

    ends: of the edges that start at each vertex. left: their capacities that are left. back: where the edge of the
    other direction stands among those of its end.
    """

    source: int
    sink: int
    ends: list[list[int]]
    left: list[list[float]]
    back: list[list[int]]

    def saturate(self) -> list[int]:
        """Send as much flow as fits. Returns the vertices that are still reached from the source."""
        while True:
            level = self._levels()
            if level[self.sink] < 0:
                return [index for index, distance in enumerate(level) if distance >= 0]
            seen = [0] * len(self.ends)  # edges that have nothing left, or lead nowhere
            while (pushed := self._augment(level, seen)) > 0:
                if math.isinf(pushed):
                    raise ValueError("every cut costs infinitely much")

    def _levels(self) -> list[int]:
        """The distance of every vertex from the source, along edges with capacity left; -1 where there is no way."""
        level = [-1] * len(self.ends)
        level[self.source] = 0
        waiting = deque([self.source])
        while waiting:
            here = waiting.popleft()
            beyond = level[here] + 1
            for other, capacity in zip(self.ends[here], self.left[here], strict=True):
                if capacity > LEAST_CAPACITY and level[other] < 0:
                    level[other] = beyond
                    waiting.append(other)
        return level

    def _augment(self, level: list[int], seen: list[int]) -> float:
        """Send as much flow as fits along one path of rising levels. Returns how much; 0 where no path is left."""
        path = [self.source]
        while path[-1] != self.sink:
            here = path[-1]
            ends, left, beyond = self.ends[here], self.left[here], level[here] + 1
            for place in range(seen[here], len(ends)):
                if left[place] > LEAST_CAPACITY and level[ends[place]] == beyond:
                    seen[here] = place
                    path.append(ends[place])
                    break
            else:  # a dead end: nobody need come here again
                level[here] = -1
                path.pop()
                if not path:
                    return 0.0
        path.pop()
        amount = min(self.left[here][seen[here]] for here in path)
        for here in path:
            place = seen[here]
            if not math.isinf(self.left[here][place]):
                self.left[here][place] -= amount
            self.left[self.ends[here][place]][self.back[here][place]] += amount
        return amount
