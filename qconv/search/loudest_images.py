"""Picks the images that a search measures on: those whose outputs say the most, and some that stand for the rest.

Most images of a detector's calibration set may hold hardly any object. What the rare ones lose is what users see, and
by chance none of them may be among a few images.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconv.data.loader import Batch, DataLoader, count_images
from qconv.ir.model import Model
from qconv.ir.subgraph import runnable_with_outputs
from qconv.metrics.output_parts import PartCounts, Parts, sum_errors
from qconv.runtime.session import Session

STEP = "read again"

FEW_NUMBERS = 64
"""Numbers of an image's outputs up to which a few images tell little."""

MOST_HELD = 2**24
"""Bytes of outputs that are held for all images; more are computed anew for those that are picked."""

FEWEST_APART = 4
"""Batches from which on what was not picked tells enough by itself."""

Float64 = NDArray[np.float64]

Picked = dict[int, float]
"""Indices of batches, each with the number of batches that it stands for."""


@dataclass(frozen=True, slots=True)
class PickedImages:
    """Batches of images, the loudest first, then others in the order in which they are read.

    weights: the number of batches that each stands for. clean: what the float network says of each, tensor by tensor.
    few_numbers: whether that is up to FEW_NUMBERS for an image. apart: whether nothing is chosen on them. counts: as
    what the places of clean outputs count, found once.
    """

    feeds: Sequence[Batch]
    weights: Sequence[float]
    clean: Sequence[Sequence[NDArray[Any]]]
    few_numbers: bool = False
    apart: bool = False
    counts: PartCounts = field(default_factory=dict)

    @property
    def count(self) -> int:
        """The number of images."""
        return sum(map(count_images, self.feeds))


@dataclass(slots=True)
class HeardOutputs:
    """What the float network has said of all images, batch by batch, as far as picking needs it.

    names: of the tensors that count. parts: of these. powers: (parts,) of each batch. sizes: numbers for an image.
    outputs: of each batch, while they are few enough.
    """

    names: Sequence[str]
    parts: Parts
    powers: list[Float64] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    outputs: list[Sequence[NDArray[Any]]] | None = field(default_factory=list)
    held: int = 0

    def hear(self, found: Sequence[NDArray[Any]], images: int) -> None:
        """Take in the tensors of the next batch, which must not change any more."""
        self.powers.append(sum_errors(self.parts, self.names, found, found)[:, 0])
        self.sizes.append(sum(np.size(x) for x in found) // max(1, images))
        self.held += sum(x.nbytes for x in found if isinstance(x, np.ndarray))
        if self.outputs is not None:
            self.outputs.append([*found])
        if self.held > MOST_HELD:
            self.outputs = None

    @property
    def loudness(self) -> Float64:
        """The largest share that each batch has of the power of any part of the outputs, (batches,)."""
        powers = np.array(self.powers)
        whole = powers.sum(axis=0)
        shares = np.divide(powers, whole, out=np.zeros_like(powers), where=whole > 0)
        return np.asarray(shares.max(axis=1, initial=0.0))


def pick_images(
    model: Model,
    feed: DataLoader,
    counts: tuple[int, int, int],
    threads: int | None,
    heard: HeardOutputs,
) -> tuple[PickedImages, PickedImages]:
    """Pick the loudest images and others, and set some apart before.

    counts: how many images are loud, are others, and are set apart. heard: what the float network says of all images;
    it runs where nothing was heard yet. Where hardly any images are left to be set apart, those that were picked are
    returned twice.
    """

    @cache
    def session() -> Session:  # opened where it has to run at all
        with runnable_with_outputs(model, heard.names) as runnable:
            return Session(runnable, name="the folded float model", threads=threads)

    if not heard.powers:
        for batch in feed.iter_batches(STEP):
            heard.hear(session().run(heard.names, batch), count_images(batch))
    few = max(heard.sizes, default=0) <= FEW_NUMBERS
    loud, others, most_apart = (-(-count // feed.batch) for count in counts)
    picked, aside = _split(heard.loudness, loud, others, None if few else most_apart, sparse=bool(heard.parts))
    wanted = picked | aside
    read = {index: batch for index, batch in enumerate(feed.iter_batches(STEP)) if index in wanted}
    known = dict(enumerate(heard.outputs or []))

    def gather(chosen: Picked, *, apart: bool) -> PickedImages:
        clean = [known[at] if at in known else session().run(heard.names, read[at]) for at in chosen]
        return PickedImages([read[index] for index in chosen], [*chosen.values()], clean, few, apart)

    first = gather(picked, apart=False)
    return first, first if aside is picked else gather(aside, apart=True)


def _split(loudness: Float64, loud: int, others: int, most_apart: int | None, *, sparse: bool) -> tuple[Picked, Picked]:
    """Batches to choose on and batches apart, each with the number that it stands for.

    loudness: of each batch. most_apart: None for all that are left. sparse: whether few images have much to say, as a
    detector's have. Some of those apart are loud, too, and stand for all that are: every third of the loudest where
    outputs are sparse, since most noise is there, else those that come next. The others are taken evenly by loudness.
    """
    ranked = np.argsort(-loudness, kind="stable").tolist()
    if len(ranked) < loud + others + FEWEST_APART:
        picked = pick_batches(len(ranked), ranked[:loud], others)
        return picked, picked
    top = ranked[: loud + loud // 2]
    never = top[2::3] if sparse else []
    first = [index for index in top if index not in never][:loud]
    picked = pick_batches(len(ranked), first, others, never)
    picked |= dict.fromkeys(first, (len(first) + len(never)) / max(1, len(first)))
    rest = [index for index in ranked if index not in picked]
    loud_apart = never or rest[: loud // 2]
    left = [index for index in rest if index not in loud_apart]
    count = len(left) if most_apart is None else max(1, min(most_apart - len(loud_apart), len(left)))
    some = left[:: max(1, len(left) // count)][:count]
    stand_for = loud + len(loud_apart)
    aside = dict.fromkeys(loud_apart, stand_for / max(1, len(loud_apart)))
    return picked, aside | dict.fromkeys(some, (len(ranked) - stand_for) / max(1, len(some)))


def pick_batches(count: int, first: Iterable[int], others: int, never: Collection[int] = ()) -> Picked:
    """Pick batches of `count`, each with the number it stands for.

    first: those that stand for themselves; some others stand for the rest. never: those that are not picked.
    """
    alone = dict.fromkeys(map(int, first), 1.0)
    rest = [index for index in range(count) if index not in alone and index not in never]
    some = [rest[at * len(rest) // others] for at in range(others)] if 0 < others < len(rest) else rest
    return alone | dict.fromkeys(some, len(rest) / max(1, len(some)))
