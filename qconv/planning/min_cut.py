"""Finds minimum cuts of graphs with capacities, as maximum flows (Ford and Fulkerson 1956; Dinic 1970)."""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Hashable, Iterator

Vertex = Hashable

LEAST_CAPACITY = 1e-9
"""A remaining capacity below this is a rounding error."""


class FlowNetwork:
    """A graph with capacities, for minimum cuts. Vertices are of any kind; flow goes from `source` to `sink`."""

    def __init__(self) -> None:
        self.source, self.sink = object(), object()
        self._residual_capacity: dict[Vertex, dict[Vertex, float]] = {self.source: {}, self.sink: {}}

    def edge(self, start: Vertex, end: Vertex, capacity: float) -> None:
        """Add an edge: with `start` on the side of the source and `end` on the other, a cut costs `capacity`.

        What no cut ever pays is left out.
        """
        if start is end or start is self.sink or end is self.source:
            return
        out = self._residual_capacity.setdefault(start, {})
        out[end] = out.get(end, 0.0) + capacity
        self._residual_capacity.setdefault(end, {}).setdefault(start, 0.0)

    def source_side(self) -> set[Vertex]:
        """The source's side of the cheapest cut, the smallest such set. Consumes the network.

        Raises ValueError where every cut costs infinitely much.
        """
        while True:
            level = self._levels()
            if self.sink not in level:
                return set(level) - {self.source}
            edges = {thing: iter(list(capacities)) for thing, capacities in self._residual_capacity.items()}
            while (pushed := self._augment(level, edges)) > 0:
                if math.isinf(pushed):
                    raise ValueError("every cut costs infinitely much")

    def _levels(self) -> dict[Vertex, int]:
        """The distance of every vertex from the source, along edges with capacity left."""
        level: dict[Vertex, int] = {self.source: 0}
        waiting = deque([self.source])
        while waiting:
            thing = waiting.popleft()
            for other, capacity in self._residual_capacity[thing].items():
                if capacity > LEAST_CAPACITY and other not in level:
                    level[other] = level[thing] + 1
                    waiting.append(other)
        return level

    def _augment(self, level: dict[Vertex, int], edges: dict[Vertex, Iterator[Vertex]]) -> float:
        """Send as much flow as fits along one path of rising levels. Returns how much; 0 where no path is left."""
        path = [self.source]
        while path[-1] is not self.sink:
            here = path[-1]
            for other in edges[here]:
                if self._residual_capacity[here][other] > LEAST_CAPACITY and level.get(other) == level[here] + 1:
                    path.append(other)
                    break
            else:  # a dead end: nobody need come here again
                level.pop(here, None)
                path.pop()
                if not path:
                    return 0.0
        steps = list(itertools.pairwise(path))
        amount = min(self._residual_capacity[start][end] for start, end in steps)
        for start, end in steps:
            if not math.isinf(self._residual_capacity[start][end]):
                self._residual_capacity[start][end] -= amount
            self._residual_capacity[end][start] += amount
        for thing in path[:-1]:  # edges that still have capacity must be seen again
            edges[thing] = iter(list(self._residual_capacity[thing]))
        return amount
