"""Compares embeddings, the vectors by which networks tell pictures apart, with those of the float model.

    cosine   = mean over pictures of  ref . got / (|ref| |got|)
    nearest  = share of pictures i whose got_i has no larger cosine with any ref_j than with ref_i

The second is verification by nearest neighbour: whether a gallery of the float model's embeddings still knows the
picture. It is harder the more pictures there are.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconv.metrics.similarity import bootstrap_interval, share_interval
from qconv.results.scores import NEAREST, PICTURE_COSINE, Score
from qconv.runtime.outputs import ModelOutput

MOST_PICTURES = 4096
"""Pictures that are told from each other; those that follow do not count."""

ROWS_AT_ONCE = 512

TIE = 1e-6
"""Cosines that differ by less are equal: vectors are kept in float32."""


def _as_rows(array: NDArray[Any]) -> NDArray[np.float64]:
    """A vector a picture, (N, D); what is no finite number is 0."""
    rows = array.reshape(len(array) if array.ndim > 1 else 1, -1).astype(np.float64)
    return np.where(np.isfinite(rows), rows, 0.0)


@dataclass(slots=True)
class PictureCosine:
    """Mean cosine of each picture's embedding with the float model's. rows: their sum, and pictures, of each batch."""

    output: ModelOutput
    rows: list[tuple[float, int]] = field(default_factory=list)

    def update(self, reference: NDArray[Any], got: NDArray[Any]) -> None:
        """Take in a batch. A picture for which the float model gives zeros does not count."""
        ref, other = _as_rows(reference), _as_rows(got)
        product, powers = (ref * other).sum(axis=1), (ref * ref).sum(axis=1) * (other * other).sum(axis=1)
        cosines = np.divide(product, np.sqrt(powers), out=np.zeros_like(product), where=powers > 0)
        known = ref.any(axis=1)
        self.rows.append((float(cosines[known].sum()), int(known.sum())))

    def score(self, *, spans: bool) -> Score | None:
        """The interval is the bootstrap's over batches."""
        total, pictures = (sum(column) for column in zip(*self.rows, strict=True)) if self.rows else (0.0, 0)
        if not pictures:
            return None
        rows = np.array(self.rows, np.float64)
        span = bootstrap_interval(rows, lambda sums: sums[:, 0] / sums[:, 1]) if spans else None
        return Score(PICTURE_COSINE, total / pictures, span)


@dataclass(slots=True)
class Nearest:
    """Share of pictures that a gallery of the float model's embeddings knows again.

    references, embeddings: of each batch, of length 1 or zero, (N, D).
    """

    output: ModelOutput
    references: list[NDArray[np.float32]] = field(default_factory=list)
    embeddings: list[NDArray[np.float32]] = field(default_factory=list)
    pictures: int = 0

    def update(self, reference: NDArray[Any], got: NDArray[Any]) -> None:
        """Take in a batch."""
        if self.pictures >= MOST_PICTURES:
            return
        for kept, array in ((self.references, reference), (self.embeddings, got)):
            rows = _as_rows(array)
            lengths = np.linalg.norm(rows, axis=1, keepdims=True)
            kept.append(np.divide(rows, lengths, out=np.zeros_like(rows), where=lengths > 0).astype(np.float32))
        self.pictures += len(self.references[-1])

    def score(self, *, spans: bool) -> Score | None:
        """None of a single picture, which has no other one beside it. A vector of zeros is nearest to nothing."""
        if self.pictures < 2:
            return None
        gallery, found = (np.concatenate(rows).astype(np.float64) for rows in (self.references, self.embeddings))
        hits = 0
        for start in range(0, len(found), ROWS_AT_ONCE):
            part = found[start : start + ROWS_AT_ONCE]
            cosines = part @ gallery.T
            own = cosines[np.arange(len(part)), start + np.arange(len(part))]
            hits += int((part.any(axis=1) & (own >= cosines.max(axis=1) - TIE)).sum())
        return Score(NEAREST, hits / len(found), share_interval(hits, len(found)) if spans else None)
