"""One network learns from another: what both are fed with, and how near the first has come on pictures held back.

Pictures are mirrored, moved and mixed, for both alike: a teacher that answers to what it has not learned by heart tells
more of itself. Source: Beyer et al. 2022, arXiv 2106.05237; mixing: Zhang et al. 2018, arXiv 1710.09412.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qconv.config.preprocessing import Layout
from qconv.results.training import ValidationScore
from qconv.training.album import Album
from qconv.training.distance import agreeing, apart, kind_of, labelled
from qconv.training.learnable import Learned
from qconv.training.torchgraph import Network

Ints = NDArray[np.int64]
SHIFT = 1 / 8
"""Share of a side by which pictures are moved at most."""
MOST_MIXED = 1 / 2
"""Share of another picture that one gets at most."""
LOOK_AT = 64
"""Pictures of a look that run at once."""


class Inputs:
    """Pictures of an album, as tensors that both networks take."""

    def __init__(self, album: Album, device: torch.device) -> None:
        self.album, self.device = album, device
        prep = album.prep
        if prep is not None:
            shape = (1, -1, 1, 1) if prep.layout is Layout.NCHW else (1, 1, 1, -1)
            self._mean, self._std = (
                torch.tensor(numbers, dtype=torch.float32, device=device).reshape(shape)
                for numbers in (prep.mean, prep.std)
            )

    def of(self, chosen: NDArray[np.int64], rng: np.random.Generator | None = None, *, mix: bool = True) -> Tensor:
        """(n, ...), pixels or samples. rng: to mirror, move and mix them with; None leaves them as they are."""
        x = torch.from_numpy(np.ascontiguousarray(self.album.numbers[chosen])).to(self.device)
        if rng is None:
            return x
        x = self._shaken(x, rng)
        return self._mixed(x, rng) if mix else x

    def _shaken(self, x: Tensor, rng: np.random.Generator) -> Tensor:
        """Pictures mirrored and moved; samples may be anything, and stay."""
        prep, count = self.album.prep, len(x)
        if prep is None:
            return x
        rows, columns = (2, 3) if prep.layout is Layout.NCHW else (1, 2)
        mirrored = torch.from_numpy(rng.random(count) < 1 / 2).to(self.device)
        x = torch.where(mirrored.reshape(-1, 1, 1, 1), x.flip(columns), x)
        for axis in (rows, columns):
            most = int(SHIFT * x.shape[axis])
            x = _moved(x, axis, rng.integers(-most, most + 1, count))
        return x

    def _mixed(self, x: Tensor, rng: np.random.Generator) -> Tensor:
        """Half of them with a part of another: the teacher is less sure of these than of what it knows by heart."""
        drawn = rng.uniform(0, MOST_MIXED, len(x)) * (rng.random(len(x)) < 1 / 2)
        share = torch.from_numpy(drawn.astype(np.float32)).to(self.device)
        share = share.reshape([-1] + [1] * (x.ndim - 1))
        other = torch.from_numpy(rng.permutation(len(x))).to(self.device)
        mixed = (1 - share) * x + share * x[other]
        return mixed if self.album.prep is None else torch.round(mixed)

    def for_teacher(self, x: Tensor) -> Tensor:
        """What the float network takes."""
        prep = self.album.prep
        return x if prep is None else (x.float() * prep.scale - self._mean) / self._std

    def for_student(self, x: Tensor) -> Tensor:
        """What the quantized one takes."""
        return self.for_teacher(x) if self.album.order is None else x.permute(*self.album.order).float()


def _moved(x: Tensor, axis: int, by: NDArray[np.int64]) -> Tensor:
    """Each picture moved along an axis, its border repeated."""
    places = np.clip(np.arange(x.shape[axis]) + by[:, None], 0, x.shape[axis] - 1)
    index = torch.from_numpy(places).to(x.device)
    shape = [1] * x.ndim
    shape[0], shape[axis] = index.shape
    return torch.gather(
        x, axis, index.reshape(shape).expand(*[len(by) if i == 0 else s for i, s in enumerate(x.shape)])
    )


@dataclass(frozen=True, slots=True)
class Lesson:
    """Who learns from whom, and what from.

    taught, held: numbers of pictures. kinds: what each output holds (distance.py). vector: the output that is one score
    a class, None where none is; classes: how many it tells apart. labels: (N,), or None. fixed: the batch that the
    networks are fixed to, None where they take any.
    """

    student: Network
    teacher: Network
    learned: Learned
    inputs: Inputs
    taught: Ints
    held: Ints
    fixed: int | None
    kinds: tuple[str, ...]
    vector: int | None
    classes: int
    labels: Ints | None = None

    @classmethod
    def of(
        cls,
        student: Network,
        teacher: Network,
        learned: Learned,
        inputs: Inputs,
        taught: Ints,
        held: Ints,
        fixed: int | None,
    ) -> Lesson:
        """What the outputs hold is what the teacher says on some pictures."""
        first = np.resize(held, fixed or min(len(held), LOOK_AT))
        found = cls(student, teacher, learned, inputs, taught, held, fixed, (), None, 0)
        told = found.told(inputs.of(first))
        kinds = tuple(map(kind_of, told))
        vectors = [i for i, y in enumerate(told) if kinds[i] != "numbers" and y.ndim == 2]
        vector = vectors[0] if vectors else None
        classes = 0 if vector is None else int(told[vector].shape[1])
        return cls(student, teacher, learned, inputs, taught, held, fixed, kinds, vector, classes)

    def with_labels(self, labels: Ints | None) -> Lesson:
        """The same, with labels to learn from."""
        return replace(self, labels=labels)

    def told(self, x: Tensor) -> list[Tensor]:
        """What the teacher says of pictures, in the student's order of outputs."""
        with torch.no_grad():
            found = self.teacher.run({self.teacher.inputs[0]: self.inputs.for_teacher(x)}, self.student.outputs)
        return list(found.values())

    def said(self, x: Tensor, given: Mapping[str, Tensor]) -> list[Tensor]:
        """What the student says. given: what it has learned."""
        return list(self.student.run({self.student.inputs[0]: self.inputs.for_student(x), **given}).values())

    def loss(self, part: Ints, rng: np.random.Generator | None) -> Tensor:
        """Of some pictures."""
        x = self.inputs.of(part, rng, mix=self.labels is None)
        said = self.said(x, self.learned.given())
        loss = apart(self.kinds, self.told(x), said)
        if self.labels is None or self.vector is None:
            return loss
        scores = said[self.vector]
        return loss + labelled(self.kinds[self.vector], scores, torch.from_numpy(self.labels[part]).to(scores.device))

    def parts(self, chosen: Ints, most: int) -> Iterator[Ints]:
        """Pieces that run at once; those of networks with a batch of their own are filled up."""
        size = self.fixed or most
        for start in range(0, len(chosen), size):
            part = chosen[start : start + size]
            yield part if self.fixed is None else np.resize(part, size)

    def mark(self) -> ValidationScore:
        """On the pictures held back."""
        equal = places = pictures = 0
        total = 0.0
        with torch.no_grad():
            given = self.learned.given()
            for part in self.parts(self.held, LOOK_AT):
                x = self.inputs.of(part)
                wanted, said = self.told(x), self.said(x, given)
                hits, of = self.right(part, wanted, said)
                equal, places, pictures = equal + hits, places + of, pictures + len(part)
                total += float(apart(self.kinds, wanted, said)) * len(part)
        return ValidationScore(equal / places if places else None, total / pictures)

    def right(self, part: Ints, wanted: list[Tensor], said: list[Tensor]) -> tuple[int, int]:
        """At how many of how many places the student is right, by labels or by what its teacher says."""
        if self.labels is None or self.vector is None:
            return agreeing(self.kinds, wanted, said)
        hits = said[self.vector].argmax(dim=1).cpu().numpy() == self.labels[part]
        return int(hits.sum()), len(part)
