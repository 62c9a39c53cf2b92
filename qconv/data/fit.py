"""How well pictures that are fed in one way fit a network: by its first statistics, and by how sure its output is.

The misfit of a tensor is the mean over its channels of the squared Hellinger distance between two normal densities,
that of the reference (m, v) and that of the pictures (m', v'):

    H^2 = 1 - sqrt(2 sqrt(v v') / (v + v')) exp(-(m - m')^2 / (4 (v + v')))

0 where they are equal, 1 where they have nothing in common; no channel can outweigh the others, as one with next to no
variance would in a Kullback-Leibler divergence. A channel that was dead in training says nothing and is left out.

Confidence is how far the highest class score stands above the mean score, picture by picture: a network that sees what
it knows has the higher peak (the maximum logit of Hendrycks et al. 2022, Scaling out-of-distribution detection for
real-world settings, made blind to what softmax is blind to). On the networks at hand it told the colour order from half
the pictures that entropy takes. It compares ranges badly: pixels that are too large make any network sure.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconv.data.evidence import Reference
from qconv.runtime.session import Session

Array = NDArray[np.float64]
DEAD = 1e-4
"""Share of the median variance below which a channel counts as dead."""
BARELY_NUMBERS = 1e-30


class Moments:
    """Mean and mean square of each channel of the references' tensors, over all pictures added so far."""

    def __init__(self, references: Sequence[Reference]) -> None:
        self._references = references
        self._sums: list[Array] = []
        self.pictures = 0

    def add(self, found: Sequence[NDArray[np.float32]], pictures: int) -> None:
        """What `save.moments_of` returned, (N, C, 1, 1) each, of which the first `pictures` count."""
        sums = [np.asarray(a[:pictures], np.float64).sum(axis=0).reshape(-1) for a in found]
        self._sums = [a + b for a, b in zip(self._sums, sums, strict=True)] if self._sums else sums
        self.pictures += pictures

    @property
    def misfit(self) -> float:
        """0 to 1, the mean over the references."""
        pairs = zip(self._sums[::2], self._sums[1::2], strict=True)
        misfits = []
        for reference, (total, squares) in zip(self._references, pairs, strict=True):
            mean = total / self.pictures
            with np.errstate(invalid="ignore", over="ignore"):
                misfits.append(misfit(reference, mean, squares / self.pictures - mean**2))
        return sum(misfits) / len(misfits)


def misfit(reference: Reference, mean: Array, var: Array) -> float:
    """Distance of the reference and of what pictures showed, 0 to 1. mean, var: (C,); what is no number counts as 1."""
    if mean.shape != reference.mean.shape:
        return 1.0
    live = reference.var >= DEAD * np.median(reference.var)
    stored, seen = reference.var[live], np.maximum(var[live], 0)
    with np.errstate(invalid="ignore", over="ignore"):
        both = stored + seen + BARELY_NUMBERS
        overlap = np.sqrt(2 * np.sqrt(stored * seen) / both)
        overlap *= np.exp(-((reference.mean[live] - mean[live]) ** 2) / (4 * both))
    return float(1 - np.nan_to_num(overlap, nan=0.0).mean())


def peaks(session: Session, batch: Mapping[str, NDArray[Any]], pictures: int) -> Array:
    """How far the highest class score of the first `pictures` of a batch stands above their mean, (pictures,).

    What sums up to one counts as probabilities, and their logarithms as the scores; a single score has a second of 0
    beside it. Raises QconvError where the network cannot be run.
    """
    index = next(i for i, shape in enumerate(session.output_shapes) if len(shape) == 2)
    (found,) = session.run([session.outputs[index]], batch)
    scores = np.nan_to_num(np.asarray(found[:pictures], np.float64))
    if scores.shape[1] == 1:
        scores = np.concatenate([scores, np.zeros_like(scores)], axis=1)
    elif scores.min() >= 0 and np.allclose(scores.sum(axis=1), 1, atol=1e-3):
        scores = np.log(np.maximum(scores, BARELY_NUMBERS))
    peak: Array = scores.max(axis=1) - scores.mean(axis=1)
    return peak


def sureness(differences: Array) -> float:
    """How clearly peaks differ: the paired t, drawn towards zero where few pictures speak.

    differences: (n,). Positive where they are positive on average.
    """
    n = len(differences)
    spread = float(differences.std(ddof=1)) if n > 1 else 0.0
    if not spread:
        return 0.0
    return float(differences.mean()) / spread * n / math.sqrt(n + 8)
