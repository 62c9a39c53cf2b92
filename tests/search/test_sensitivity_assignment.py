"""The solver against all assignments tried, on small problems."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qconv.search.sensitivity import (
    BitAssignment,
    LayerSensitivity,
    fill_to_size,
    find_convex_hull,
    find_pareto_curve,
    make_assignment,
)

CHOICES = (2, 3, 4, 8)
LAYERS = st.lists(
    st.builds(
        lambda count, noises: LayerSensitivity(count, dict(zip(CHOICES, noises, strict=True))),
        st.integers(1, 50),
        st.lists(st.floats(0, 100, allow_subnormal=False), min_size=4, max_size=4),
    ),
    min_size=1,
    max_size=4,
)


def everything(layers: list[LayerSensitivity]) -> list[BitAssignment]:
    return [make_assignment(layers, bits) for bits in itertools.product(*(sorted(layer.noise) for layer in layers))]


def test_by_hand() -> None:
    """A large layer that bears 2 bits well and a small one that does not: the small one is served first."""
    layers = [LayerSensitivity(100, {2: 1.0, 4: 0.5}), LayerSensitivity(10, {2: 8.0, 4: 2.0, 8: 0.0})]
    found = [(point.bits, point.size, point.noise) for point in find_pareto_curve(layers)]
    assert found == [((2, 2), 220, 9.0), ((2, 4), 240, 3.0), ((2, 8), 280, 1.0), ((4, 8), 480, 0.5)]


def test_corners_of_the_hull() -> None:
    """3 bits lie above the line from 2 to 4; 8 save nothing more."""
    assert find_convex_hull(LayerSensitivity(1, {2: 9.0, 3: 8.0, 4: 1.0, 8: 1.0})) == [2, 4]
    assert find_convex_hull(LayerSensitivity(1, {2: 9.0, 3: 3.0, 4: 1.0, 8: 0.0})) == [2, 3, 4, 8]
    assert find_convex_hull(LayerSensitivity(1, {2: 1.0, 3: 2.0, 4: 0.5})) == [2, 4]


@given(LAYERS)
def test_nothing_of_its_size_or_less_beats_a_point_of_the_curve(layers: list[LayerSensitivity]) -> None:
    tried = everything(layers)
    points = find_pareto_curve(layers)
    for point in points:
        best = min(other.noise for other in tried if other.size <= point.size)
        assert point.noise <= best + 1e-9
    sizes, noises = ([getattr(point, name) for point in points] for name in ("size", "noise"))
    assert sizes == sorted(set(sizes))
    assert all(more >= less for more, less in itertools.pairwise(noises))
    assert points[0].size == min(other.size for other in tried)
    assert noises[-1] == pytest.approx(min(other.noise for other in tried))


@given(LAYERS, st.floats(0, 1))
def test_what_is_left_of_a_size_is_spent(layers: list[LayerSensitivity], share: float) -> None:
    """It lies between the point before and the optimum by trying, and never above the size."""
    points = find_pareto_curve(layers)
    size = round(points[0].size + share * (points[-1].size - points[0].size))
    start = max((point for point in points if point.size <= size), key=lambda point: point.size)
    found = fill_to_size(layers, start, size)
    assert found.size <= size
    assert found.noise <= start.noise
    assert found.noise >= min(other.noise for other in everything(layers) if other.size <= size) - 1e-9
    assert found == make_assignment(layers, found.bits)
