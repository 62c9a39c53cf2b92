"""Candidates on the user's pictures, until one has won or the pictures are used up.

    fit = prior - SHARPNESS ln(misfit + floor(pictures))
    lead = t |t| / 2

misfit is that of the first layers' statistics, and t compares the peaks of the class scores with those of the candidate
that fits best (fit.py; Student's, paired). A candidate that falls behind is not run again, so that most of them see
two pictures. What nobody thought of takes part as well: the best candidate with black for white, and a misfit from
which on no candidate is believed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconv.config.preprocessing import Preprocessing
from qconv.data import images
from qconv.data.candidates import Candidate, inverted
from qconv.data.evidence import Reference
from qconv.data.fit import peaks, sureness
from qconv.data.preprocess import InputSpec
from qconv.errors import QconvError
from qconv.ir import subgraph
from qconv.ir.model import Model
from qconv.runtime.session import Session

SHARPNESS = 5.0
"""A misfit half as large is 2^5 = 32 times as probable."""
SHARPNESS_OF_GUESSES = 2.0
UNKNOWN = 0.12
"""Misfit at which a preprocessing that is none of the candidates is as probable as the one that fits best."""
INVERTED = -3.0
"""ln of how much rarer than a published normalisation one with black for white is."""
OUT_OF_SIGHT = 6.0
"""Candidates that lie this far behind the best are not looked at again."""
SETTLED = 6.0
DECISIVE = 3.9
"""ln of the odds from which on one candidate speaks against another: 98 % of the probability."""
NEAR = 5.0
"""Candidates that lie no further behind the best are compared by the confidence of the output, too."""
MOST_RIVALS = 4
ALIKE = 3.0
"""Ratio of gains up to which confidence may be compared."""
PIXELS = 820_000
FEWEST, MOST = 8, 64
"""Pictures to look at: as many as have PIXELS in all, within these limits."""
ROUNDS = (2, 8, 16, 32, 64)


@dataclass(slots=True)
class Race:
    """model: as loaded, not yet folded. session: the user's own model. drawn: up to so many pictures as pixels, as
    `Feed.drawn` gives them. known: what the first layers should see.

    other: after the race, ln of the probability that it was something else, on the scale of the candidates' fit.
    """

    model: Model
    session: Session
    spec: InputSpec
    drawn: Callable[[Preprocessing, int], Iterator[NDArray[np.uint8]]]
    known: Sequence[Reference]
    threads: int | None
    other: float = -math.inf
    _seen: list[NDArray[np.uint8]] = field(default_factory=list)
    _unseen: Iterator[NDArray[np.uint8]] = field(default_factory=lambda: iter(()))
    _most: int = 0

    @property
    def stored(self) -> bool:
        """Whether training has left statistics, or there are guesses only."""
        return bool(self.known) and self.known[0].stored

    def fits(self, candidate: Candidate) -> bool:
        """Whether a few pictures suffice to see that no other candidate can fit much better, DECISIVE or more."""
        if not self.stored:
            return False
        self._open(candidate.preprocessing)
        try:
            session = self._first_layers()
            if session is None:
                return False
            self._measure(session, candidate, self._first(FEWEST))
        except QconvError:
            return False  # the run itself will say why
        moments = candidate.moments
        floor = _floor(max(moments.pictures, 1))
        return moments.pictures > 0 and SHARPNESS * math.log((moments.misfit + floor) / floor) < DECISIVE

    def run(self, candidates: Sequence[Candidate], *, confidence: bool) -> None:
        """Score all candidates; those with the same numbers are run once. confidence: whether it may take the time
        that the whole network takes."""
        alike: dict[tuple[Any, ...], list[Candidate]] = {}
        for candidate in candidates:
            alike.setdefault(candidate.numbers, []).append(candidate)
        runners = [first for first, *_ in alike.values()]
        prep = runners[0].preprocessing
        self._open(prep)
        try:
            if self.known and len(runners) > 1:
                self._compare_statistics(runners)
            if confidence and prep.class_vector:
                self._compare_confidence(runners)
        except QconvError:
            pass  # the network or the pictures cannot be used: the run itself will say why
        for first, *others in alike.values():
            for other in others:
                other.fit, other.lead = first.fit - first.prior + other.prior, first.lead

    def _open(self, prep: Preprocessing) -> None:
        if not self._most:
            self._most = min(max(FEWEST, PIXELS // math.prod(prep.size)), MOST)
            self._unseen = self.drawn(prep, self._most)

    # -- statistics of the first layers --------------------------------------------------------------------------------

    def _compare_statistics(self, runners: list[Candidate]) -> None:
        session = self._first_layers()
        if session is None:
            return
        for upto in ROUNDS:
            pixels = self._first(upto)
            for runner in runners:
                self._measure(session, runner, pixels)
            ranked = sorted((runner.fit for runner in runners), reverse=True)
            ahead = ranked[0] - ranked[1] if len(ranked) > 1 else math.inf
            runners = [runner for runner in runners if runner.fit > ranked[0] - OUT_OF_SIGHT]
            enough = upto >= (self._most if self.stored else FEWEST)
            if len(pixels) < upto or enough or (upto > ROUNDS[0] and ahead > SETTLED):
                break
        best = max(runners, key=lambda runner: runner.fit)
        self.other = self._something_else(session, best, pixels) if self.stored else best.fit

    def _first_layers(self) -> Session | None:
        part = subgraph.build_moments_model(self.model, [reference.name for reference in self.known])
        return None if part is None else Session(part, name="the first layers", threads=self.threads)

    def _something_else(self, session: Session, best: Candidate, pixels: list[NDArray[np.uint8]]) -> float:
        negative = inverted(best, self.known)
        if self.spec.dtype != np.uint8:
            self._measure(session, negative, pixels)
        unknown = -SHARPNESS * math.log(UNKNOWN + _floor(FEWEST))
        return max(unknown, negative.fit + INVERTED) if negative.moments.pictures else unknown

    def _measure(self, session: Session, candidate: Candidate, pixels: list[NDArray[np.uint8]]) -> None:
        """Add the pictures that the candidate has not seen yet."""
        moments = candidate.moments
        for batch, count in self._batches(pixels[moments.pictures :], candidate.preprocessing):
            moments.add(session.run_all(batch), count)
        if moments.pictures:
            sharpness = SHARPNESS if self.stored else SHARPNESS_OF_GUESSES
            candidate.fit = candidate.prior - sharpness * math.log(moments.misfit + _floor(moments.pictures))

    # -- confidence of the output --------------------------------------------------------------------------------------

    def _compare_confidence(self, runners: list[Candidate]) -> None:
        best, *rest = sorted(runners, key=lambda runner: runner.fit, reverse=True)
        near = [r for r in rest if r.fit > best.fit - NEAR and self._comparable(r, best)][: MOST_RIVALS - 1]
        for upto in ROUNDS[1:] if near else ():
            pixels = self._first(upto)
            for runner in (best, *near):
                for batch, count in self._batches(pixels[len(runner.peaks) :], runner.preprocessing):
                    runner.peaks += peaks(self.session, batch, count).tolist()
            for runner in near:
                t = sureness(np.subtract(runner.peaks, best.peaks))
                runner.lead = t * abs(t) / 2
            gaps = [abs(best.score - runner.score) for runner in near]
            # a guess stays one, however many pictures the whole network sees
            if len(pixels) < upto or upto >= self._most or min(gaps) >= SETTLED or not self.stored:
                break

    def _comparable(self, one: Candidate, other: Candidate) -> bool:
        """Where statistics tell the range, confidence tells the order alone; else what spreads pixels about as wide."""
        if self.stored:
            return one.is_twin_of(other)
        gains = [abs(c.preprocessing.scale) / float(np.mean(c.preprocessing.std)) for c in (one, other)]
        return max(gains) <= ALIKE * min(gains)

    # -- pictures ------------------------------------------------------------------------------------------------------

    def _first(self, count: int) -> list[NDArray[np.uint8]]:
        """The first pictures, (H, W, C) each; fewer if there are no more."""
        while len(self._seen) < min(count, self._most) and (one := next(self._unseen, None)) is not None:
            self._seen.append(one)
        return self._seen[:count]

    def _batches(
        self, pixels: Sequence[NDArray[np.uint8]], prep: Preprocessing
    ) -> Iterator[tuple[dict[str, NDArray[Any]], int]]:
        """Pictures as the network takes them, one by one or in its own batch, and how many of them count."""
        size = self.spec.shape[0] or 1
        for start in range(0, len(pixels), size):
            arrays = [
                images.as_type(images.normalised(images.arranged(p, prep), prep), self.spec.dtype)
                for p in pixels[start : start + size]
            ]
            yield {self.spec.name: np.stack((arrays * size)[:size])}, len(arrays)


def _floor(pictures: int) -> float:
    """Misfit that a draw of so many pictures has by chance."""
    return 0.004 + 0.08 / pictures
