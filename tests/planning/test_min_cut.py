"""The cheapest division, against trying them all."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from qconv.planning.min_cut import FlowNetwork


@pytest.mark.parametrize("seed", range(40))
def test_no_division_is_cheaper(seed: int) -> None:
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 8))
    network = FlowNetwork()
    ends = [network.source, network.sink, *range(count)]
    edges = []
    for start, end in itertools.permutations(range(count + 2), 2):
        if start != 1 and end != 0 and rng.random() < 0.5:
            edges.append((ends[start], ends[end], float(rng.choice([rng.random(), rng.integers(1, 9)]))))
    for edge in edges:
        network.edge(*edge)

    def cost(chosen: set[object]) -> float:
        return sum(room for start, end, room in edges if start in chosen and end not in chosen)

    sets = (set(s) | {network.source} for n in range(count + 1) for s in itertools.combinations(range(count), n))
    least = min(map(cost, sets))
    assert cost({*network.source_side(), network.source}) == pytest.approx(least)


def test_ford_and_fulkersons_bottleneck() -> None:
    """A chain is cut at its narrowest edge."""
    network = FlowNetwork()
    for start, end, room in ((network.source, "a", 5.0), ("a", "b", 2.0), ("b", network.sink, 4.0)):
        network.edge(start, end, room)
    assert network.source_side() == {"a"}


def test_what_may_not_be_cut_holds_together() -> None:
    network = FlowNetwork()
    for start, end, room in ((network.source, "a", 3.0), ("a", "b", math.inf), ("b", network.sink, 1.0)):
        network.edge(start, end, room)
    assert network.source_side() == {"a", "b"}


def test_no_finite_cut_is_an_error() -> None:
    network = FlowNetwork()
    network.edge(network.source, "a", math.inf)
    network.edge("a", network.sink, math.inf)
    with pytest.raises(ValueError, match="infinitely"):
        network.source_side()
