"""Detects the preprocessing that a network was trained with: the decision behind `--preprocess auto`.

A fact (`data.evidence`) leaves one preset. Otherwise a sequential test scores every hypothesis on a few images:

    fit = prior - FIT_SHARPNESS ln(misfit + _misfit_by_chance(images))        lead = t |t| / 2

misfit is that of the first layers' statistics; t compares the peaks of the class scores with those of the best
candidate (paired Student's t). Candidates that fall behind are not run again, so that most of them see two images,
drawn from the sorted listing. The softmax of the scores, with a share for an unknown preprocessing (an inverted image,
or a misfit that no candidate is believed from), gives probabilities. A margin of CERTAIN_MARGIN or more over the
runner-up is no guess. What the user says always wins; evidence against it is reported.

Nothing depends on the order of files, the batch size or the clock. It will not guess how images were resized: a crop
hardly moves a mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qconv.config.data_options import (
    AUTO,
    LETTERBOX_OPTIONS,
    Preprocessing,
    PreprocessingOptions,
    require_letterbox,
)
from qconv.data.evidence import PreprocessingFact, ReferenceStatistics, find_fact, find_references
from qconv.data.hypotheses import (
    CandidateSpace,
    PreprocessingCandidate,
    invert_candidate,
    score_peaks,
    shrunken_paired_t,
)
from qconv.data.preprocessing import InputSpec, arrange_pixels, cast_pixels, normalize_pixels
from qconv.errors import QconvError
from qconv.ir import subgraph
from qconv.ir.metadata import describe_odd_metadata
from qconv.ir.model import Model
from qconv.runtime.session import Session

if TYPE_CHECKING:
    from qconv.data.loader import DataLoader


FIT_SHARPNESS = 5.0
"""A misfit half as large is 2^5 = 32 times as probable."""

GUESSED_FIT_SHARPNESS = 2.0

UNKNOWN_MISFIT = 0.12
"""Misfit at which a preprocessing that is none of the candidates is as probable as the one that fits best."""

INVERTED_PRIOR = -3.0
"""ln of how much rarer than a published normalisation one with black for white is."""

DROP_MARGIN = 6.0
"""Candidates whose score lies this far behind the best are not run again."""

SETTLED_MARGIN = 6.0

DECISIVE_LOG_ODDS = 3.9
"""ln of the odds at which one candidate rules out another: 98 % of the probability."""

RIVAL_MARGIN = 5.0
"""Candidates no further behind the best than this are compared by the confidence of the output, too."""

MOST_RIVALS = 4

MOST_GAIN_RATIO = 3.0
"""Largest ratio of gains between candidates whose confidence is compared."""

PIXEL_BUDGET = 820_000

FEWEST_IMAGES, MOST_IMAGES = 8, 64
"""Limits on the number of images, which is otherwise PIXEL_BUDGET over the pixels of one."""

ROUND_SIZES = (2, 8, 16, 32, 64)


@dataclass(slots=True)
class SequentialTest:
    """A sequential test between preprocessing candidates.

    model: as loaded, not yet folded.
    session: the user's own model.
    iter_pixels: returns up to so many images as pixels, as `DataLoader.iter_pixels` does.
    known: statistics that the first layers should see.
    other: after `run`, ln of the probability of an unknown preprocessing, on the scale of the candidates' fit.
    """

    model: Model
    session: Session
    spec: InputSpec
    iter_pixels: Callable[[Preprocessing, int], Iterator[NDArray[np.uint8]]]
    known: Sequence[ReferenceStatistics]
    threads: int | None
    other: float = -math.inf
    _seen: list[NDArray[np.uint8]] = field(default_factory=list)
    _unseen: Iterator[NDArray[np.uint8]] = field(default_factory=lambda: iter(()))
    _most: int = 0

    @property
    def stored(self) -> bool:
        """Whether the model has statistics of training, and not guesses only."""
        return bool(self.known) and self.known[0].stored

    def fits(self, candidate: PreprocessingCandidate) -> bool:
        """Whether a few images show that no other candidate can fit better by DECISIVE_LOG_ODDS."""
        if not self.stored:
            return False
        self._open(candidate.preprocessing)
        try:
            session = self._first_layers()
            if session is None:
                return False
            self._measure(session, candidate, self._first(FEWEST_IMAGES))
        except QconvError:
            return False  # the run itself will say why
        moments = candidate.moments
        floor = _misfit_by_chance(max(moments.pictures, 1))
        return moments.pictures > 0 and FIT_SHARPNESS * math.log((moments.misfit + floor) / floor) < DECISIVE_LOG_ODDS

    def run(self, candidates: Sequence[PreprocessingCandidate], *, confidence: bool) -> None:
        """Score all candidates; those with the same numbers are run once.

        confidence: whether to run the whole network, too, which takes time.
        """
        alike: dict[tuple[Any, ...], list[PreprocessingCandidate]] = {}
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
            self._most = min(max(FEWEST_IMAGES, PIXEL_BUDGET // math.prod(prep.size)), MOST_IMAGES)
            self._unseen = self.iter_pixels(prep, self._most)

    # -- statistics of the first layers --------------------------------------------------------------------------------

    def _compare_statistics(self, runners: list[PreprocessingCandidate]) -> None:
        session = self._first_layers()
        if session is None:
            return
        for upto in ROUND_SIZES:
            pixels = self._first(upto)
            for runner in runners:
                self._measure(session, runner, pixels)
            ranked = sorted((runner.fit for runner in runners), reverse=True)
            ahead = ranked[0] - ranked[1] if len(ranked) > 1 else math.inf
            runners = [runner for runner in runners if runner.fit > ranked[0] - DROP_MARGIN]
            enough = upto >= (self._most if self.stored else FEWEST_IMAGES)
            if len(pixels) < upto or enough or (upto > ROUND_SIZES[0] and ahead > SETTLED_MARGIN):
                break
        best = max(runners, key=lambda runner: runner.fit)
        self.other = self._something_else(session, best, pixels) if self.stored else best.fit

    def _first_layers(self) -> Session | None:
        part = subgraph.build_moments_model(self.model, [reference.name for reference in self.known])
        return None if part is None else Session(part, name="the first layers", threads=self.threads)

    def _something_else(self, session: Session, best: PreprocessingCandidate, pixels: list[NDArray[np.uint8]]) -> float:
        negative = invert_candidate(best, self.known)
        if self.spec.dtype.kind == "f":
            self._measure(session, negative, pixels)
        unknown = -FIT_SHARPNESS * math.log(UNKNOWN_MISFIT + _misfit_by_chance(FEWEST_IMAGES))
        return max(unknown, negative.fit + INVERTED_PRIOR) if negative.moments.pictures else unknown

    def _measure(self, session: Session, candidate: PreprocessingCandidate, pixels: list[NDArray[np.uint8]]) -> None:
        """Measure the candidate on the images that it has not seen yet."""
        moments = candidate.moments
        for batch, count in self._batches(pixels[moments.pictures :], candidate.preprocessing):
            moments.add(session.run_all(batch), count)
        if moments.pictures:
            sharpness = FIT_SHARPNESS if self.stored else GUESSED_FIT_SHARPNESS
            candidate.fit = candidate.prior - sharpness * math.log(moments.misfit + _misfit_by_chance(moments.pictures))

    # -- confidence of the output --------------------------------------------------------------------------------------

    def _compare_confidence(self, runners: list[PreprocessingCandidate]) -> None:
        best, *rest = sorted(runners, key=lambda runner: runner.fit, reverse=True)
        near = [r for r in rest if r.fit > best.fit - RIVAL_MARGIN and self._comparable(r, best)][: MOST_RIVALS - 1]
        for upto in ROUND_SIZES[1:] if near else ():
            pixels = self._first(upto)
            for runner in (best, *near):
                for batch, count in self._batches(pixels[len(runner.peaks) :], runner.preprocessing):
                    runner.peaks += score_peaks(self.session, batch, count).tolist()
            for runner in near:
                t = shrunken_paired_t(np.subtract(runner.peaks, best.peaks))
                runner.lead = t * abs(t) / 2
            gaps = [abs(best.score - runner.score) for runner in near]
            # a guess stays one, however many pictures the whole network sees
            if len(pixels) < upto or upto >= self._most or min(gaps) >= SETTLED_MARGIN or not self.stored:
                break

    def _comparable(self, one: PreprocessingCandidate, other: PreprocessingCandidate) -> bool:
        """Whether confidence may compare two candidates: of two colour orders, or of about the same gain."""
        if self.stored:
            return one.is_twin_of(other)
        gains = [abs(c.preprocessing.scale) / float(np.mean(c.preprocessing.std)) for c in (one, other)]
        return max(gains) <= MOST_GAIN_RATIO * min(gains)

    # -- pictures ------------------------------------------------------------------------------------------------------

    def _first(self, count: int) -> list[NDArray[np.uint8]]:
        """The first `count` images, (H, W, C) each; fewer if there are no more."""
        while len(self._seen) < min(count, self._most) and (one := next(self._unseen, None)) is not None:
            self._seen.append(one)
        return self._seen[:count]

    def _batches(
        self, pixels: Sequence[NDArray[np.uint8]], prep: Preprocessing
    ) -> Iterator[tuple[dict[str, NDArray[Any]], int]]:
        """Yield batches of the network's fixed size, or of one, and how many of their images count."""
        size = self.spec.shape[0] or 1
        for start in range(0, len(pixels), size):
            arrays = [
                cast_pixels(normalize_pixels(arrange_pixels(p, prep), prep), self.spec.dtype)
                for p in pixels[start : start + size]
            ]
            yield {self.spec.name: np.stack((arrays * size)[:size])}, len(arrays)


def _misfit_by_chance(pictures: int) -> float:
    """The misfit that a draw of so many images has by chance."""
    return 0.004 + 0.08 / pictures


CERTAIN_MARGIN = 0.98

EVIDENT_SHARE = 0.9
"""Probability at which generated images decide on a normalisation, in either colour order."""

SHAPE_OPTIONS = ("layout", "resize", "filter", "size", *LETTERBOX_OPTIONS)
"""Options that do not change the pixels' values."""

UNKNOWN_PREPROCESSING = "something else"


@dataclass(frozen=True, slots=True)
class DetectedPreprocessing:
    """The preprocessing that was decided on. runner_up, margin: None without a test. doubt: a warning for the user.

    evident: whether the model itself decides, by a fact or by statistics of training. against: whether these clearly
    contradict the user's options. ignored: what in the file's metadata is odd, a sentence each.
    """

    preprocessing: Preprocessing | None
    runner_up: str | None = None
    margin: float | None = None
    doubt: str = ""
    evident: bool = False
    against: bool = False
    ignored: tuple[str, ...] = ()

    def doubts(self) -> list[str]:
        """The warnings for the user."""
        odd = self.preprocessing.doubt() if self.preprocessing is not None else ""
        return [text for text in (*self.ignored, odd and f"{odd}.", self.doubt) if text]

    def in_words(self) -> str:
        """One sentence for the summary; empty where no images are read."""
        if self.preprocessing is None:
            return ""
        against = "" if self.runner_up is None else f", runner-up {self.runner_up}"
        margin = "" if self.margin is None else f", margin {self.margin:.2f}"
        return f"{self.preprocessing.in_words()}{against}{margin}"


def detect_preprocessing(
    model: Model, session: Session, feed: DataLoader, options: PreprocessingOptions, *, threads: int | None = None
) -> DetectedPreprocessing:
    """Decide on the preprocessing.

    model: as loaded, not yet folded. session: the user's own model. feed: with the default preprocessing. options: what
    the user said. Never raises for want of evidence: then the default stays, and the doubt says so; QconvError where
    the user speaks of a letterbox, and there is none.
    """
    default = feed.preprocessing
    if default is None:
        return DetectedPreprocessing(None)
    spec = feed.inputs[0]
    known = find_references(model)
    field, said = CandidateSpace(spec, default, known, _shape_options(options)), _pixel_options(options, spec, default)
    fact, ignored = _find_usable_fact(model, field)
    own, free = field.candidates(fact, said), field.candidates(fact, {})
    _require_letterbox(options, own[0], fact)
    race = SequentialTest(model, session, spec, feed.iter_pixels, known, threads)
    if "preset" in said or (said and len(own) == 1):
        source = default.source if fact is None or "preset" in said else options.name_beside(fact.why)
        settled = replace(own[0].preprocessing, source=source)
        if fact is None and race.fits(own[0]):
            return DetectedPreprocessing(settled, ignored=ignored)
        race.run([*own, *free], confidence=False)
        told = _describe_contradiction(own[0], free, race, fact)
        return DetectedPreprocessing(settled, doubt=told, against=bool(told), ignored=ignored)
    race.run([*own, *free] if said else own, confidence=True)
    chosen, found = _decide(own, race, fact)
    told = _describe_contradiction(chosen, free, race, fact) if said else ""
    return replace(found, doubt=told or found.doubt, against=bool(told), ignored=ignored)


def _find_usable_fact(model: Model, field: CandidateSpace) -> tuple[PreprocessingFact | None, tuple[str, ...]]:
    """The strongest fact that suits the network's input, and what is ignored of the file's metadata, in sentences."""
    ignored = tuple(describe_odd_metadata(model.inner.metadata_props))
    fact = find_fact(model, field.spec.dtype, field.default.layout)
    try:
        field.candidates(fact, {})
    except QconvError as error:
        assert fact is not None
        return None, (*ignored, f"{fact.why} does not suit its input, and is ignored: {error.message}")
    return fact, ignored


def detect_without_images(
    model: Model, session: Session, feed: DataLoader, options: PreprocessingOptions, *, threads: int | None = None
) -> DetectedPreprocessing:
    """Decide on the preprocessing with generated images, which hardly show the colour order: the usual one is taken.

    Raises QconvError where neither the network nor the user settles it, or there is no letterbox of which the user
    speaks.
    """
    default = feed.preprocessing
    if default is None:
        return DetectedPreprocessing(None)
    said, known = _pixel_options(options, feed.inputs[0], default), find_references(model)
    field = CandidateSpace(feed.inputs[0], default, known, _shape_options(options))
    fact, ignored = _find_usable_fact(model, field)
    own = field.candidates(fact, said)
    _require_letterbox(options, own[0], fact)
    if "preset" in said:
        return DetectedPreprocessing(replace(own[0].preprocessing, source=default.source))
    race = SequentialTest(model, session, feed.inputs[0], feed.iter_pixels, known, threads)
    race.run(own, confidence=False)
    best, *others = sorted(own, key=lambda candidate: candidate.score, reverse=True)
    shares, _ = _candidate_probabilities([best, *others], race, fact)
    alike = [i for i, one in enumerate([best, *others]) if one.family == best.family]
    share = sum(shares[i] for i in alike)
    if fact is None and not (race.stored and share >= EVIDENT_SHARE):
        guess = f": {best.settled_by} is the best guess" if race.stored else ""
        tells = f"its BatchNorms do not make it evident{guess}" if race.stored else "no BatchNorm in it tells"
        fact_told = f"How {session.name} wants to be fed is not known without pictures: {tells}."
        raise QconvError(fact_told, "pass --preprocess NAME, or --scale, --mean and --std, as it was trained.")
    chosen = replace(best.preprocessing, source=_describe_source(race, fact, certain=True))
    doubt = ""
    if len(alike) > 1 and shares[0] < CERTAIN_MARGIN * share:
        color = chosen.color
        doubt = (
            f"whether the network wants RGB or BGR does not show without pictures; the file says {color.upper()}, "
            f"which changes no weight: --color {color} settles it."
        )
    return DetectedPreprocessing(chosen, None, round(share, 4), doubt, evident=True, ignored=ignored)


def _shape_options(options: PreprocessingOptions) -> PreprocessingOptions:
    """The user's options that do not change the pixels' values."""
    return PreprocessingOptions(**{name: getattr(options, name) for name in SHAPE_OPTIONS})


def _require_letterbox(
    options: PreprocessingOptions, chosen: PreprocessingCandidate, fact: PreprocessingFact | None
) -> None:
    told = fact is not None and fact.options.resize != AUTO
    why = f"as {fact.why} says" if fact is not None and told else "the default, as the file tells no other"
    require_letterbox(options, chosen.preprocessing.resize, why)


def _pixel_options(options: PreprocessingOptions, spec: InputSpec, default: Preprocessing) -> dict[str, Any]:
    """The user's options that change the pixels' values; an input of whole numbers that keeps these heeds no others."""
    said = {part.name: getattr(options, part.name) for part in fields(options) if part.name not in SHAPE_OPTIONS}
    found = {name: value for name, value in said.items() if value not in (None, AUTO)}
    if spec.dtype.kind in "iu" and default.keeps_pixels:
        color = {name: value for name, value in found.items() if name == "color"}
        return {"preset": default.preset, **color} if found else {}
    return found


def _decide(
    own: Sequence[PreprocessingCandidate], race: SequentialTest, fact: PreprocessingFact | None
) -> tuple[PreprocessingCandidate, DetectedPreprocessing]:
    best, *others = sorted(own, key=lambda candidate: candidate.score, reverse=True)
    shares, other = _candidate_probabilities([best, *others], race, fact)
    # a guess leaves half of the probability to something else, which is not worth a name
    margin = shares[0] - max([*shares[1:], other if race.stored else 0.0], default=0.0)
    certain = margin >= CERTAIN_MARGIN
    strange = race.stored and other > max(shares[1:], default=0.0)
    second = others[0] if others and not strange else None
    runner_up = UNKNOWN_PREPROCESSING if strange else second.name if second else None
    chosen = replace(best.preprocessing, source=_describe_source(race, fact, certain))
    doubt = "" if certain else _describe_doubt(best, second, others, margin)
    evident = race.stored or fact is not None
    return best, DetectedPreprocessing(chosen, runner_up, round(max(margin, 0.0), 4), doubt, evident)


def _candidate_probabilities(
    ranked: Sequence[PreprocessingCandidate], race: SequentialTest, fact: PreprocessingFact | None
) -> tuple[list[float], float]:
    """The probability of each candidate, best first, and of an unknown preprocessing, which a fact rules out."""
    scores = [candidate.score - ranked[0].score for candidate in ranked]
    if fact is None:
        # confidence moves probability between candidates, not away from what is none of them
        scores.append((race.other if race.known else ranked[0].fit) - ranked[0].fit)
    weights = np.exp(np.array(scores) - max(scores))
    shares = [float(share) for share in weights / weights.sum()]
    return (shares, 0.0) if fact is not None else (shares[:-1], shares[-1])


def _describe_source(race: SequentialTest, fact: PreprocessingFact | None, certain: bool) -> str:
    if fact is not None:
        return fact.why
    if not race.known:
        return "the default, as nothing in the model tells"
    by = "the statistics in its BatchNorms" if race.stored else "the size of its first layers' outputs"
    return f"{'detected' if certain else 'guessed'} by {by}"


def _describe_doubt(
    best: PreprocessingCandidate,
    second: PreprocessingCandidate | None,
    others: Sequence[PreprocessingCandidate],
    margin: float,
) -> str:
    says = f"(margin {max(margin, 0.0):.2f})"
    if second is not None and second.is_twin_of(best):
        colors = [candidate.preprocessing.color for candidate in (best, second)]
        return (
            f"whether the network wants RGB or BGR is not certain {says}; it gets {colors[0].upper()}: "
            f"--color {colors[0]} or --color {colors[1]} settles it."
        )
    what = (
        "no known preprocessing fits well" if second is None else "how the network was fed in training is not certain"
    )
    rival = next((candidate for candidate in others if not candidate.is_twin_of(best)), None)
    instead = "" if rival is None else f", {rival.settled_by} is the next best guess"
    return f"{what} {says}; it gets {best.name}: {best.settled_by} settles it{instead}."


def _describe_contradiction(
    mine: PreprocessingCandidate,
    free: Sequence[PreprocessingCandidate],
    race: SequentialTest,
    fact: PreprocessingFact | None,
) -> str:
    """The evidence against the user's options, in words; empty where there is none."""
    if (
        any(is_same_preprocessing(mine.preprocessing, candidate.preprocessing) for candidate in free)
        and fact is not None
    ):
        return ""
    best = max(free, key=lambda candidate: candidate.score)
    if is_same_preprocessing(mine.preprocessing, best.preprocessing):
        return ""
    if fact is not None and best.is_twin_of(mine):
        color = best.preprocessing.color
        return f"{fact.why}, with means of channels in {color.upper()}, which speaks for --color {color}."
    if fact is not None:
        return f"{fact.why}, which speaks for {best.settled_by} and against the options given."
    told = replace(mine, fit=mine.fit - mine.prior)  # what was said is no rarity
    (share, mine_share), other = _candidate_probabilities([best, told], race, None)
    if not race.stored or share - max(mine_share, other) < CERTAIN_MARGIN:
        return ""
    return f"the statistics in the model's BatchNorms speak for {best.settled_by} and against the options given."


def is_same_preprocessing(one: Preprocessing, other: Preprocessing) -> bool:
    """Whether both feed pixels alike: black and white end up within a tenth of the range of each other, in every
    channel of the input."""
    ends = [
        np.array([(level * p.scale - np.array(p.mean)) / np.array(p.std) * np.ones(p.channels) for level in (0, 255)])
        for p in (one, other)
    ]
    spread = np.abs(ends[0][1] - ends[0][0])
    return one.color == other.color and bool((np.abs(ends[0] - ends[1]) <= 0.1 * spread).all())
