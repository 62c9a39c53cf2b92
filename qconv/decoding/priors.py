"""Defines the boxes that a detector starts from, its priors (also: anchors, default boxes), and how it moves them.

    centre = prior centre + delta * variance[0] * prior size       size = prior size * exp(delta * variance[1])

(Liu et al. 2016, arXiv 1512.02325.) A prior is (x, y, width, height) as shares of the image, at the middle of a cell.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from qconv.decoding.boxes import Float64, corners_of

Size = tuple[int, int]

VARIANCES = (0.1, 0.2)
"""Of centres and of sizes, in nearly all published detectors; others write 10, 10, 5, 5."""


@dataclass(frozen=True, slots=True)
class PriorGrid:
    """A grid of priors. cells: rows and columns. shapes: width and height of each prior of a cell, (S, 2).

    step: height and width of a cell as shares of the image; None where the cells fill the image.
    """

    cells: Size
    shapes: ArrayLike
    step: tuple[float, float] | None = None

    def __len__(self) -> int:
        """How many priors it has."""
        return self.cells[0] * self.cells[1] * len(np.asarray(self.shapes))

    def tile(self) -> Float64:
        """All priors, cell by cell and row by row, (A, 4)."""
        shapes = np.asarray(self.shapes, np.float64)
        down, right = self.step or (1 / self.cells[0], 1 / self.cells[1])
        y, x = np.mgrid[: self.cells[0], : self.cells[1]].reshape(2, -1) + 0.5
        centres = np.repeat(np.stack([x * right, y * down], axis=1), len(shapes), axis=0)
        return np.concatenate([centres, np.tile(shapes, (x.size, 1))], axis=1)


def tile_priors(grids: Sequence[PriorGrid]) -> Float64:
    """The priors of several grids, in order, (A, 4)."""
    return np.concatenate([grid.tile() for grid in grids])


def cells_by_stride(size: Size, stride: int) -> Size:
    """Rows and columns of a grid over an image of this height and width; cells that it fills in part count."""
    return -(-size[0] // stride), -(-size[1] // stride)


def halve_cells(cells: Size, times: int) -> list[Size]:
    """A grid and those that follow from it by convolutions with stride 2 and padding."""
    found = [cells]
    for _ in range(times):
        found.append(cells_by_stride(found[-1], 2))
    return found


def move_priors(priors: Float64, deltas: Float64, size: Size) -> Float64:
    """Boxes in pixels, (A, 4), of priors (A, 4) and deltas (A, 4) of x, y, width and height."""
    centres = priors[:, :2] + deltas[:, :2] * VARIANCES[0] * priors[:, 2:]
    sizes = priors[:, 2:] * np.exp(deltas[:, 2:] * VARIANCES[1])
    return scale_boxes(corners_of(centres, sizes), size)


def move_points(priors: Float64, deltas: Float64, size: Size) -> Float64:
    """Points in pixels with a score of 1, (A, K, 3), of priors (A, 4) and deltas (A, 2 * K) of x and y."""
    steps = deltas.reshape(len(deltas), deltas.shape[1] // 2, 2) * VARIANCES[0]
    places = priors[:, None, :2] + steps * priors[:, None, 2:]
    return with_full_scores(places * np.array([size[1], size[0]]))


def scale_boxes(shares: Float64, size: Size) -> Float64:
    """Boxes in pixels, of boxes as shares of an image of this height and width; both by their edges, (A, 4)."""
    return shares * np.array([size[1], size[0], size[1], size[0]], np.float64)


def with_full_scores(places: Float64) -> Float64:
    """Keypoints (A, K, 3) of places (A, K, 2) whose networks give no score for each."""
    return np.concatenate([places, np.ones((*places.shape[:2], 1))], axis=2)
