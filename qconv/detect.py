"""Which preprocessing a network was trained with, found out: the decision behind `--preprocess auto`.

A fact (evidence.py) leaves one preset. Otherwise every published normalisation, in either colour order, is tried on a
few of the user's pictures and scored by how well the first layers' statistics fit what training has stored (fit.py):

    score = prior - SHARPNESS ln(misfit + floor(pictures)) - t |t| / 2

where t compares the entropies of the output with those of the best (Student 1908, paired). The softmax of the scores, with one more share for a preprocessing that nobody thought of, gives each candidate a
probability; the margin is the winner's less the runner-up's. Only a margin of at least CERTAIN is no guess.

What the user says always wins. It then limits the candidates, and evidence that speaks clearly against it is told.
Nothing depends on the order of files, the batch size or the clock: pictures are taken from the sorted listing in a
fixed draw, and how many follows from the input's size and from the scores. It will not guess how pictures were resized:
a crop hardly moves a mean.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconv import images, save
from qconv.errors import QconvError
from qconv.evidence import Fact, Reference, fact_of, references
from qconv.feed import Feed
from qconv.fit import Moments, entropies, sureness
from qconv.graph import Model
from qconv.listing import SAMPLE_SUFFIXES, Listing, suffix_of
from qconv.preprocess import InputSpec, resolve
from qconv.recipe import Color, Layout, Preprocessing, PreprocessingOptions
from qconv.runtime import Session

CERTAIN = 0.98
SHARPNESS = 5.0
"""A misfit half as large is 2^5 = 32 times as probable."""
SHARPNESS_OF_GUESSES = 2.0
UNKNOWN = 0.15
"""Misfit at which a preprocessing that is none of the candidates is as probable as the one that fits best."""
OTHER_ORDER = -1.5
"""ln of how much rarer the other colour order is than the preset's own."""
OUT_OF_SIGHT = 8.0
"""Candidates that lie this far behind the best are not looked at again."""
SETTLED = 6.0
NEAR = 5.0
"""Candidates that lie no further behind the best are compared by the confidence of the output, too."""
MOST_RIVALS = 4
ALIKE = 3.0
"""Ratio of gains up to which confidence may be compared."""
KEEP_DEFAULT = 1.0
"""A guess that is not better by this much does not replace the default."""
PIXELS = 1_200_000
FEWEST, MOST = 8, 64
"""Pictures to look at: as many as have PIXELS pixels, within these limits."""
ROUNDS = (2, 8, 16, 32, 64)
SHAPE_ONLY = ("layout", "resize", "filter", "size")
"""Options that say nothing about the pixels' values."""


@dataclass(frozen=True, slots=True)
class Family:
    """A normalisation that networks were trained with. options: as the command line takes them. prior: ln of how
    frequent it is beside the others."""

    name: str
    options: PreprocessingOptions
    prior: float = 0.0

    @property
    def settled_by(self) -> str:
        """The options that ask for it."""
        numbers = (("scale", self.options.scale), ("mean", self.options.mean), ("std", self.options.std))
        more = (f" --{name} {_number(value)}" for name, value in numbers if value is not None)
        return f"--preprocess {self.options.preset}{''.join(more)}"


COLOURED: tuple[Family, ...] = (
    Family("imagenet", PreprocessingOptions("imagenet")),
    Family("tf", PreprocessingOptions("tf")),
    Family("caffe", PreprocessingOptions("caffe"), -0.5),
    Family("unit", PreprocessingOptions("unit")),
    Family("raw", PreprocessingOptions("raw")),
    Family("unit less 0.5", PreprocessingOptions("unit", mean=(0.5,)), -1.0),
    Family("raw less 127.5", PreprocessingOptions("raw", mean=(127.5,)), -1.0),
    Family("imagenet without std", PreprocessingOptions("imagenet", std=(1.0,)), -1.5),
)
GREY: tuple[Family, ...] = (
    Family("unit", PreprocessingOptions("unit")),
    Family("tf", PreprocessingOptions("tf")),
    Family("raw", PreprocessingOptions("raw")),
    Family("MNIST's mean and std", PreprocessingOptions("unit", mean=(0.1307,), std=(0.3081,)), -0.5),
    Family("unit less 0.5", PreprocessingOptions("unit", mean=(0.5,)), -1.0),
)


@dataclass(slots=True)
class Candidate:
    """One way to feed the network, and what was seen of it. entropies: of the output, a picture each."""

    name: str
    settled_by: str
    preprocessing: Preprocessing
    prior: float
    moments: Moments
    entropies: list[float] = field(default_factory=list)

    def score(self, sharpness: float) -> float:
        """ln of its probability, but for a constant, by the statistics alone."""
        if not self.moments.pictures:
            return self.prior
        return self.prior - sharpness * math.log(self.moments.misfit + _floor(self.moments.pictures))


@dataclass(frozen=True, slots=True)
class Detected:
    """What was decided. runner_up, margin: None where nothing had to be found out. doubt: what the user should know."""

    preprocessing: Preprocessing | None
    runner_up: str | None = None
    margin: float | None = None
    doubt: str = ""

    def in_words(self) -> str:
        """One sentence for the summary."""
        if self.preprocessing is None:
            return ""
        found = "" if self.margin is None else f", margin {self.margin:.2f}"
        against = "" if self.runner_up is None else f", runner-up {self.runner_up}"
        return f"{self.preprocessing.in_words()}{against}{found}"


def detect(
    model: Model, session: Session, feed: Feed, options: PreprocessingOptions, *, threads: int | None = None
) -> Detected:
    """Decide how pictures are fed.

    model: as loaded, not yet folded. session: the user's own model. feed: with the default preprocessing. options: what
    the user said. Never raises for want of evidence: then the default stays, and the doubt says so.
    """
    default = feed.preprocessing
    if default is None:
        return Detected(None)
    spec = feed.inputs[0]
    fact = fact_of(model, spec.dtype, default.layout)
    known = [] if fact is not None and fact.options.color is not None else references(model)
    joined = partial(_candidates, spec=spec, default=default, known=known)
    own, free = joined(fact, _said(options)), joined(fact, {})
    told = _said(options).keys() - {"preset"} or options.preset != "auto"
    race = _Race(model, session, feed, known, fact, threads)
    if told and len(own) == 1:
        race.run([*own, *free], confidence=False)
        return Detected(default, doubt=_against(own[0], free, race))
    if len(own) > 1:
        race.run([*own, *(free if told else ())], confidence=True)
    found = _decided(own, race, default)
    against = _against(_nearest(own, found), free, race) if told else ""
    return replace(found, doubt=against or found.doubt)


def _said(options: PreprocessingOptions) -> dict[str, Any]:
    """What the user said of the pixels' values."""
    said = {part.name: getattr(options, part.name) for part in fields(options) if part.name not in SHAPE_ONLY}
    return {name: value for name, value in said.items() if value is not None and value != "auto"}


# -- candidates --------------------------------------------------------------------------------------------------------


def _candidates(
    fact: Fact | None, said: dict[str, Any], *, spec: InputSpec, default: Preprocessing, known: Sequence[Reference]
) -> list[Candidate]:
    """What is possible: the families, or what a fact leaves of them, with the user's word put over all of it."""
    families = COLOURED if default.channels == 3 else GREY
    if "preset" in said:
        families = (Family(said["preset"], PreprocessingOptions(said["preset"])),)
    elif fact is not None:
        families = (Family(str(fact.options.preset), fact.options),)
    found: dict[tuple[Any, ...], Candidate] = {}
    for family in families:
        for swapped in (False, True) if default.channels == 3 else (False,):
            candidate = _candidate(family, swapped, said, spec=spec, default=default, known=known)
            if candidate is not None:
                found.setdefault(_numbers(candidate.preprocessing), candidate)
    return list(found.values())


def _candidate(
    family: Family,
    swapped: bool,
    said: dict[str, Any],
    *,
    spec: InputSpec,
    default: Preprocessing,
    known: Sequence[Reference],
) -> Candidate | None:
    """None where the other colour order is out of the question."""
    shape = {"layout": default.layout, "filter": default.filter, "size": default.size, "resize": default.resize}
    if default.resize == "auto" and family.options.resize != "auto":
        shape["resize"] = family.options.resize
    grey = {"color": None} if default.channels == 1 else {}
    options = replace(family.options, **{**grey, **shape, **said})
    own = resolve(options, spec, class_vector=default.class_vector)
    if not swapped:
        return Candidate(family.name, family.settled_by, own, family.prior, Moments(known))
    if options.color is not None or "preset" in said:
        return None
    other = Color.RGB if own.color is Color.BGR else Color.BGR
    turned = resolve(replace(options, color=other), spec, class_vector=default.class_vector)
    name, settled_by = f"{family.name} in {other.upper()}", f"{family.settled_by} --color {other}"
    return Candidate(name, settled_by, turned, family.prior + OTHER_ORDER, Moments(known))


def _numbers(prep: Preprocessing) -> tuple[Any, ...]:
    """What tells two preprocessings apart."""
    wide = (tuple(np.broadcast_to(np.float32(v), prep.channels).tolist()) for v in (prep.mean, prep.std))
    return (prep.color, prep.scale, *wide)


def _number(value: float | tuple[float, ...]) -> str:
    return ",".join(f"{v:.6g}" for v in (value if isinstance(value, tuple) else (value,)))


def _floor(pictures: int) -> float:
    """Misfit that a draw of so many pictures has by chance."""
    return 0.004 + 0.03 / pictures


# -- the race ----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Race:
    """Candidates on the user's pictures, until one has won or the pictures are used up."""

    model: Model
    session: Session
    feed: Feed
    known: Sequence[Reference]
    fact: Fact | None
    threads: int | None
    scores: dict[int, float] = field(default_factory=dict)
    _pixels: list[NDArray[np.uint8]] = field(default_factory=list)
    _source: Iterator[NDArray[np.uint8]] = field(default_factory=lambda: iter(()))
    most: int = 0

    @property
    def stored(self) -> bool:
        """Whether training has left statistics, or there are guesses only."""
        return bool(self.known) and self.known[0].stored

    @property
    def sharpness(self) -> float:
        return SHARPNESS if self.stored else SHARPNESS_OF_GUESSES

    def score(self, candidate: Candidate) -> float:
        return self.scores.get(id(candidate), candidate.prior)

    def run(self, candidates: Iterable[Candidate], *, confidence: bool) -> None:
        """Score all candidates; those with the same numbers once."""
        alike: dict[tuple[Any, ...], list[Candidate]] = {}
        for candidate in candidates:
            alike.setdefault(_numbers(candidate.preprocessing), []).append(candidate)
        runners = [group[0] for group in alike.values()]
        if len(runners) > 1:
            self._look_at_pictures(runners, confidence)
        for first, *others in alike.values():
            for other in others:
                difference = other.prior - first.prior
                self.scores[id(other)] = self.score(first) + difference

    def _look_at_pictures(self, runners: list[Candidate], confidence: bool) -> None:
        prep = runners[0].preprocessing
        self.most = min(max(FEWEST, PIXELS // math.prod(prep.size)), MOST)
        self._source = _pixels(self.feed.listing, prep, self.most)
        try:
            if self.known:
                self._compare_statistics(runners)
            if confidence and prep.class_vector:
                self._compare_confidence(runners)
        except QconvError:
            pass  # the network or the pictures cannot be used: the run itself will say why

    def _compare_statistics(self, runners: list[Candidate]) -> None:
        part = save.moments_of(self.model, [reference.name for reference in self.known])
        if part is None:
            return
        session = Session(part, name="the first layers", threads=self.threads)
        for upto in ROUNDS:
            pixels = self._first(upto)
            for runner in runners:
                for batch, count in self._batches(pixels[runner.moments.pictures :], runner.preprocessing):
                    runner.moments.add(session.run_all(batch), count)
            self.scores |= {id(runner): runner.score(self.sharpness) for runner in runners}
            ranked = sorted(map(self.score, runners), reverse=True)
            runners = [runner for runner in runners if self.score(runner) > ranked[0] - OUT_OF_SIGHT]
            if len(pixels) < upto or upto >= self.most or (upto > ROUNDS[0] and ranked[0] - ranked[1] > SETTLED):
                break

    def _compare_confidence(self, runners: list[Candidate]) -> None:
        best, *rest = sorted(runners, key=self.score, reverse=True)
        near = [r for r in rest if self.score(r) > self.score(best) - NEAR and _alike(r, best)][: MOST_RIVALS - 1]
        before = {id(runner): self.score(runner) for runner in near}
        for upto in ROUNDS[1:]:
            pixels = self._first(upto)
            for runner in (best, *near) if near else ():
                for batch, count in self._batches(pixels[len(runner.entropies) :], runner.preprocessing):
                    ((_, array),) = batch.items()
                    runner.entropies += entropies(self.session, array, count).tolist()
            for runner in near:
                t = sureness(np.subtract(runner.entropies, best.entropies))
                self.scores[id(runner)] = before[id(runner)] - t * abs(t) / 2
            gaps = [abs(self.score(best) - self.score(runner)) for runner in near]
            if len(pixels) < upto or upto >= self.most or min(gaps, default=SETTLED) >= SETTLED:
                break

    def _first(self, count: int) -> list[NDArray[np.uint8]]:
        """The first pictures, (H, W, C) each; fewer if there are no more."""
        while len(self._pixels) < min(count, self.most) and (one := next(self._source, None)) is not None:
            self._pixels.append(one)
        return self._pixels[:count]

    def _batches(
        self, pixels: Sequence[NDArray[np.uint8]], prep: Preprocessing
    ) -> Iterator[tuple[dict[str, NDArray[Any]], int]]:
        """Pictures as the network takes them, one by one or in its own batch, and how many of them count."""
        spec = self.feed.inputs[0]
        size = spec.shape[0] or 1
        for start in range(0, len(pixels), size):
            arrays = [images.cast(images.normalised(p, prep), spec.dtype) for p in pixels[start : start + size]]
            count = len(arrays)
            yield {spec.name: np.stack((arrays * size)[:size] if count < size else arrays)}, count


def _pixels(listing: Listing, prep: Preprocessing, most: int) -> Iterator[NDArray[np.uint8]]:
    """Decode up to `most` pictures to (H, W, C), RGB or grey: a fixed draw of the sorted paths."""
    paths = sorted(path for path in listing.paths if suffix_of(path) not in SAMPLE_SUFFIXES)
    drawn = tuple(paths[i] for i in np.random.default_rng(0).permutation(len(paths))[:most])
    color = Color.GREY if prep.color is Color.GREY else Color.RGB
    plain = replace(prep, color=color, scale=1.0, mean=(0.0,), std=(1.0,), layout=Layout.NHWC)
    as_bytes = InputSpec("x", np.dtype(np.uint8), (None, None, None, None))
    chosen = Listing(drawn, len(drawn), 0)
    for batch in images.batches(chosen, [as_bytes], plain, batch=1, workers=2, warn=lambda text: None):
        yield batch["x"][0]


def _alike(one: Candidate, other: Candidate) -> bool:
    """Whether both spread pixels about as wide."""
    gains = [c.preprocessing.scale / float(np.mean(c.preprocessing.std)) for c in (one, other)]
    return max(gains) <= ALIKE * min(gains)


# -- the decision ------------------------------------------------------------------------------------------------------


def _decided(own: Sequence[Candidate], race: _Race, default: Preprocessing) -> Detected:
    best, *others = sorted(own, key=race.score, reverse=True)
    shares = _shares([race.score(c) for c in (best, *others)], race)
    margin = shares[0] - (shares[1] if others else 0.0)
    if margin < CERTAIN:
        usual = next((c for c in others if _numbers(c.preprocessing) == _numbers(default)), None)
        if usual is not None and race.score(best) - race.score(usual) < KEEP_DEFAULT:
            others.remove(usual)
            best, others = usual, [best, *others]
    second = others[0] if others else None
    chosen = replace(best.preprocessing, source=_source(race, margin))
    doubt = "" if margin >= CERTAIN else _doubt(best, second, margin, race)
    return Detected(chosen, second.name if second else None, round(max(margin, 0.0), 4), doubt)


def _shares(scores: Sequence[float], race: _Race) -> list[float]:
    """Probabilities of candidates, best first. Where no fact says otherwise it may also have been something else."""
    all_scores = list(scores)
    if race.fact is None:
        floor = _floor(FEWEST)
        all_scores.append(-SHARPNESS * math.log(UNKNOWN + floor) if race.stored else max(scores))
    weights = np.exp(np.array(all_scores) - max(all_scores))
    return [float(share) for share in (weights / weights.sum())[: len(scores)]]


def _source(race: _Race, margin: float) -> str:
    if race.fact is not None:
        return f"known: {race.fact.why}"
    verb = "detected" if margin >= CERTAIN else "guessed"
    if not race.known:
        return "the default, for nothing in the model tells"
    by = "BatchNorm statistics" if race.stored else "the size of the first layers' outputs"
    return f"{verb} by {by}"


def _doubt(best: Candidate, second: Candidate | None, margin: float, race: _Race) -> str:
    says = f"(margin {max(margin, 0.0):.2f})"
    if second is not None and _is_twin(best, second) and (race.stored or race.fact is not None):
        color = best.preprocessing.color
        other = second.preprocessing.color
        return (
            f"whether the network wants RGB or BGR is not certain {says}: it gets {color.upper()}; "
            f"--color {color} or --color {other} settles it."
        )
    instead = "" if second is None else f", the next best is {second.name}: {second.settled_by}"
    return (
        f"how the network was fed in training is not certain {says}: it gets {best.name}; "
        f"{best.settled_by} settles it{instead}."
    )


def _is_twin(one: Candidate, other: Candidate) -> bool:
    """Whether only the colour order differs."""
    a, b = one.preprocessing, other.preprocessing
    return a.preset == b.preset and a.scale == b.scale and {a.color, b.color} == {Color.RGB, Color.BGR}


def _nearest(own: Sequence[Candidate], found: Detected) -> Candidate:
    assert found.preprocessing is not None
    numbers = _numbers(found.preprocessing)
    return next(c for c in own if _numbers(c.preprocessing) == numbers)


def _against(mine: Candidate, free: Sequence[Candidate], race: _Race) -> str:
    """What speaks clearly against the user's word; empty where nothing does."""
    best, *others = sorted(free, key=race.score, reverse=True)
    if _nearly_same(mine.preprocessing, best.preprocessing):
        return ""
    if race.fact is not None:
        if any(_nearly_same(mine.preprocessing, c.preprocessing) for c in others):
            return ""
        return f"{race.fact.why}, which speaks for {best.settled_by} and against the options given."
    # a word given is as good as any preset
    told = race.score(mine) - mine.prior
    shares = _shares([race.score(best), told], race)
    if not race.stored or shares[0] < CERTAIN:
        return ""
    return (
        f"the BatchNorm statistics in the model speak for {best.settled_by} and against the options given "
        f"(margin {shares[0] - shares[1]:.2f})."
    )


def _nearly_same(one: Preprocessing, other: Preprocessing) -> bool:
    """Whether black and white end up within a tenth of the range of each other, in every channel of the input."""
    ends = [
        np.array(
            [(level * p.scale - np.float64(p.mean)) / np.float64(p.std) * np.ones(p.channels) for level in (0, 255)]
        )
        for p in (one, other)
    ]
    spread = np.abs(ends[0][1] - ends[0][0])
    return one.color == other.color and bool((np.abs(ends[0] - ends[1]) <= 0.1 * spread).all())
