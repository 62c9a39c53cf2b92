"""Priors and what deltas make of them, by examples worked by hand."""

from __future__ import annotations

import numpy as np
import pytest

from qconv.decoding.priors import PriorGrid, cells_by_stride, halve_cells, move_points, move_priors, tile_priors


def test_priors_lie_in_the_middle_of_cells_row_by_row() -> None:
    """Two rows of one cell, each with a square and a lying prior."""
    grid = PriorGrid((2, 1), [(0.1, 0.1), (0.4, 0.2)])
    expected = [[0.5, 0.25, 0.1, 0.1], [0.5, 0.25, 0.4, 0.2], [0.5, 0.75, 0.1, 0.1], [0.5, 0.75, 0.4, 0.2]]
    assert tile_priors([grid]) == pytest.approx(np.array(expected))
    assert len(grid) == 4


def test_a_step_of_its_own_leaves_a_part_of_the_image_free() -> None:
    """SSD300's grid of 3 has a step of 100 of 300 pixels; its grid of 38 one of 8, so that 4 pixels are beyond."""
    grid = PriorGrid((38, 38), [(0.1, 0.1)], (8 / 300, 8 / 300))
    assert grid.tile()[-1, :2] == pytest.approx([37.5 * 8 / 300] * 2)


def test_cells_that_are_filled_in_part_count() -> None:
    assert cells_by_stride((240, 320), 64) == (4, 5)  # of UltraFace's 4420 priors, 60 are three for each of these
    assert halve_cells((19, 19), 5) == [(19, 19), (10, 10), (5, 5), (3, 3), (2, 2), (1, 1)]  # SSD300's, Liu et al.


def test_deltas_move_and_stretch() -> None:
    """0.5 + 1 * 0.1 * 0.2 = 0.52 of 100 pixels; 0.4 * exp(5 * 0.2 * ln 2 / ln 2 ...): size 0.2 * e of 100 pixels."""
    prior = np.array([[0.5, 0.5, 0.2, 0.2]])
    box = move_priors(prior, np.array([[1.0, 0.0, 5.0, 0.0]]), (200, 100))
    half = 0.2 * np.e / 2
    assert box == pytest.approx(np.array([[100 * (0.52 - half), 80, 100 * (0.52 + half), 120]]))


def test_points_are_moved_by_the_size_of_the_prior() -> None:
    """0.5 + 10 * 0.1 * 0.2 = 0.7 of 100 pixels across, and 0.5 - 5 * 0.1 * 0.2 = 0.4 of 200 down."""
    points = move_points(np.array([[0.5, 0.5, 0.2, 0.2]]), np.array([[10.0, -5.0, 0.0, 0.0]]), (200, 100))
    assert points == pytest.approx(np.array([[[70, 80, 1], [50, 100, 1]]]))
