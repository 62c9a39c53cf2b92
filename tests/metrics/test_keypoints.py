"""Keypoints whose distances are sides of triangles with whole sides."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from qconv.metrics.keypoints import choose_step, mean_distance, pck
from qconv.runtime.outputs import ModelOutput

SQUARE = np.float32([[0, 0], [60, 0], [60, 80], [0, 80], [30, 40]])
"""Five points whose box has a diagonal of 100."""


def measured(reference: NDArray[np.float32], got: NDArray[np.float32], **of: object) -> list[float | None]:
    """Distance and PCK of a batch."""
    output = ModelOutput("landmarks", True, reference.shape, **of)  # type: ignore[arg-type]
    found: list[float | None] = []
    for make in (mean_distance, pck):
        metric = make(output)
        metric.update(reference, got)
        score = metric.score(spans=True)
        found.append(None if score is None else score.value)
    return found


@pytest.mark.parametrize("shape", [(1, 5, 2), (1, 10), (1, 1, 1, 10), (1, 10, 1, 1)])
@pytest.mark.parametrize("unit", [1.0, 1 / 640])
def test_distances_are_in_extents(shape: tuple[int, ...], unit: float) -> None:
    """Moved by (1.5, 2) and by (6, 8), three points not at all: 2.5 and 10 of 100, whatever the unit."""
    got = SQUARE.copy()
    got[0] += (1.5, 2)
    got[1] += (6, 8)
    assert measured(unit * SQUARE.reshape(shape), unit * got.reshape(shape)) == pytest.approx(
        [0.125 / 5, 4 / 5], abs=1e-5
    )


@pytest.mark.parametrize("layout", ["channels first", "channels last"])
def test_heat_maps_say_where_they_are_highest(layout: str) -> None:
    """Of 30x40 cells, whose diagonal is 50: one peak goes 3 down and 4 to the right, the other stays."""
    ref, got = np.zeros((1, 2, 30, 40), np.float32), np.zeros((1, 2, 30, 40), np.float32)
    ref[0, 0, 10, 20] = ref[0, 1, 0, 0] = 1
    got[0, 0, 13, 24] = got[0, 1, 0, 0] = 0.2
    image = (1, 3, 120, 160)
    if layout == "channels last":
        ref, got, image = np.moveaxis(ref, 1, 3), np.moveaxis(got, 1, 3), (1, 120, 160, 3)
    assert measured(ref, got, image=image) == pytest.approx([0.1 / 2, 1 / 2])


def test_depth_does_not_count() -> None:
    """Of points with a third number that moves alone."""
    points = np.concatenate([SQUARE, np.zeros((5, 1), np.float32)], axis=1)[None]
    assert measured(points, points + np.float32([0, 0, 9])) == [0.0, 1.0]


def test_a_point_that_is_no_number_is_lost() -> None:
    """By one whole extent; a point that the float model does not place does not count."""
    ref, got = SQUARE.copy()[None], SQUARE.copy()[None]
    got[0, 0, 0] = np.nan
    ref[0, 4] = np.inf
    assert measured(ref, got) == pytest.approx([1 / 4, 3 / 4])


@pytest.mark.parametrize("array", [np.ones((1, 7)), np.ones((1, 5, 2)), np.ones(4), np.ones((1, 3, 9))])
def test_what_holds_no_points_is_not_measured(array: NDArray[np.float64]) -> None:
    """Seven numbers are no points, equal points have no extent, and nine numbers a row are no point."""
    assert measured(array.astype(np.float32), array.astype(np.float32), task="keypoints") == [None, None]


@pytest.mark.parametrize("step", [2, 3, 5])
def test_flat_points_tell_how_many_numbers_they_have(step: int) -> None:
    """Thirty points on a spiral, as x y, x y z, or x y z with two shares behind."""
    t = np.linspace(0, 4, 30)
    columns = [100 + 20 * t * np.cos(t), 180 + 20 * t * np.sin(t), -5 * t, np.full(30, 0.9), np.full(30, 0.8)]
    assert choose_step(np.stack(columns[:step], axis=1).reshape(1, -1)) == step
