"""The cheapest way to divide things between two sides, where some prefer one side and neighbours prefer to agree.

A minimum cut of a network with two ends, found as a maximum flow by Dinic's algorithm (Dinic 1970, Soviet Mathematics
Doklady 11). By the theorem of Ford and Fulkerson (1956) both have the same value.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Hashable, Iterator

Thing = Hashable
LEAST = 1e-9
"""Capacities are real numbers: what is left of one below this is rounding."""


class Network:
    """Edges with capacities, between things of any kind. `first` and `second` are the two ends."""

    def __init__(self) -> None:
        self.first, self.second = object(), object()
        self._room: dict[Thing, dict[Thing, float]] = {self.first: {}, self.second: {}}

    def edge(self, start: Thing, end: Thing, capacity: float) -> None:
        """Make it cost `capacity` (0 to infinity) to have `start` on the first side and `end` on the second."""
        out = self._room.setdefault(start, {})
        out[end] = out.get(end, 0.0) + capacity
        self._room.setdefault(end, {}).setdefault(start, 0.0)

    def first_side(self) -> set[Thing]:
        """What is on the first side of the cheapest cut; the smallest such set. Uses the network up.

        Raises ValueError where every cut costs infinitely much.
        """
        while True:
            level = self._levels()
            if self.second not in level:
                return set(level) - {self.first}
            edges = {thing: iter(list(room)) for thing, room in self._room.items()}
            while (pushed := self._push(level, edges)) > 0:
                if math.isinf(pushed):
                    raise ValueError("every cut costs infinitely much")

    def _levels(self) -> dict[Thing, int]:
        """Steps from the first end along edges with room left."""
        level: dict[Thing, int] = {self.first: 0}
        waiting = deque([self.first])
        while waiting:
            thing = waiting.popleft()
            for other, room in self._room[thing].items():
                if room > LEAST and other not in level:
                    level[other] = level[thing] + 1
                    waiting.append(other)
        return level

    def _push(self, level: dict[Thing, int], edges: dict[Thing, Iterator[Thing]]) -> float:
        """Send as much as fits along one path of rising levels. Returns how much; 0 where none is left."""
        path = [self.first]
        while path[-1] is not self.second:
            here = path[-1]
            for other in edges[here]:
                if self._room[here][other] > LEAST and level.get(other) == level[here] + 1:
                    path.append(other)
                    break
            else:  # a dead end: nobody need come here again
                level.pop(here, None)
                path.pop()
                if not path:
                    return 0.0
        steps = list(itertools.pairwise(path))
        amount = min(self._room[start][end] for start, end in steps)
        for start, end in steps:
            if not math.isinf(self._room[start][end]):
                self._room[start][end] -= amount
            self._room[end][start] += amount
        for thing in path[:-1]:  # edges that still have room must be seen again
            edges[thing] = iter(list(self._room[thing]))
        return amount
