"""Pictures with what the float model says of them, kept in memory: any number of models can be scored on them."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconv.data.loader import Batch, DataLoader
from qconv.metrics.verify import Comparison
from qconv.results.quantize import Verification
from qconv.runtime.session import Session

Outputs = list[NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Scored:
    """Batches, each with the float model's outputs. pictures: how many they hold."""

    outputs: list[str]
    batches: list[tuple[Batch, Outputs]]
    pictures: int

    def score(self, quantized: Session, hear: Callable[[Outputs], None] = lambda outputs: None) -> Verification:
        """`quantized` against the float model. hear: gets what it says of each batch."""
        comparison = Comparison.of(self.outputs)
        for feeds, expected in self.batches:
            got = quantized.run(self.outputs, feeds)
            comparison.add(expected, got)
            hear(got)
        return Verification(self.pictures, comparison.scores())


def score_float(
    session: Session,
    feed: DataLoader,
    stage: str,
    *,
    most_bytes: int,
    warn: Callable[[str], None],
    batches: Collection[int] | None = None,
) -> Scored:
    """Run the float model on the pictures of `feed`, as many as there is room for with their outputs.

    batches: those that count; None for all.
    """
    kept: list[tuple[Batch, Outputs]] = []
    size, total = 0, len(feed.listing.paths)
    for index, feeds in enumerate(feed.all(stage)):
        if batches is not None and index not in batches:
            continue
        kept.append((feeds, session.run_all(feed.as_float(feeds))))
        size += sum(a.nbytes for a in (*feeds.values(), *kept[-1][1]) if isinstance(a, np.ndarray))
        if size >= most_bytes:
            break
    seen = sum(len(next(iter(feeds.values()))) for feeds, _ in kept)
    pictures = min(seen, total)
    if size >= most_bytes and pictures < total:
        warn(f"scored on {pictures} of {total} pictures: inputs and outputs of more would not fit into memory kept.")
    return Scored(session.outputs, kept, pictures)
