"""Which preprocessing a network was trained with, found out: the decision behind `--preprocess auto`.

A fact (evidence.py) leaves one preset. Otherwise every published normalisation (candidates.py) is tried on a few of the
user's pictures and scored by how well the first layers' statistics fit what training has stored, and by how sure the
output is (race.py). The softmax of the scores, with a share for what nobody thought of, gives each candidate a
probability. The margin is the winner's less the runner-up's, and only a margin of CERTAIN or more is no guess.

What the user says always wins. It then limits the candidates, and evidence that speaks clearly against it is told.
Nothing depends on the order of files, the batch size or the clock: pictures are taken from the sorted listing in a
fixed draw, and how many follows from the input's size and from the scores. It will not guess how pictures were resized:
a crop hardly moves a mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from qconv.config.preprocessing import AUTO, Preprocessing, PreprocessingOptions
from qconv.data.candidates import Candidate, Field
from qconv.data.evidence import Fact, fact_of, references
from qconv.data.race import Race
from qconv.errors import QconvError
from qconv.ir.model import Model
from qconv.runtime.session import Session

if TYPE_CHECKING:
    from qconv.data.feed import Feed

CERTAIN = 0.98
EVIDENT = 0.9
"""Probability from which on made-up pictures tell a normalisation, in either order of colours."""
SHAPE_ONLY = ("layout", "resize", "filter", "size")
"""Options that say nothing about the pixels' values."""
SOMETHING_ELSE = "something else"


@dataclass(frozen=True, slots=True)
class Detected:
    """What was decided. runner_up, margin: None where nothing had to be found out. doubt: what the user should know.

    evident: whether the model itself tells, by a fact or by what training has stored. against: whether what it tells
    speaks clearly against what the user said.
    """

    preprocessing: Preprocessing | None
    runner_up: str | None = None
    margin: float | None = None
    doubt: str = ""
    evident: bool = False
    against: bool = False

    def doubts(self) -> list[str]:
        """What the user is warned of, if anything."""
        odd = self.preprocessing.doubt() if self.preprocessing is not None else ""
        return [text for text in (odd and f"{odd}.", self.doubt) if text]

    def in_words(self) -> str:
        """One sentence for the summary; empty where no pictures are read."""
        if self.preprocessing is None:
            return ""
        against = "" if self.runner_up is None else f", runner-up {self.runner_up}"
        margin = "" if self.margin is None else f", margin {self.margin:.2f}"
        return f"{self.preprocessing.in_words()}{against}{margin}"


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
    known = references(model)
    field, said = Field(spec, default, known), _said(options)
    own, free = field.candidates(fact, said), field.candidates(fact, {})
    race = Race(model, session, spec, feed.drawn, known, threads)
    if "preset" in said or (said and len(own) == 1):
        if fact is None and race.fits(own[0]):
            return Detected(default)
        race.run([*own, *free], confidence=False)
        told = _against(own[0], free, race, fact)
        return Detected(default, doubt=told, against=bool(told))
    race.run([*own, *free] if said else own, confidence=True)
    chosen, found = _decided(own, race, fact)
    told = _against(chosen, free, race, fact) if said else ""
    return replace(found, doubt=told or found.doubt, against=bool(told))


def detect_unseen(
    model: Model, session: Session, feed: Feed, options: PreprocessingOptions, *, threads: int | None = None
) -> Detected:
    """The same with made-up pictures, in which the order of colours hardly shows: then the usual one is taken.

    Raises QconvError where the network does not tell and the user has not.
    """
    default, said = feed.preprocessing, _said(options)
    if default is None or "preset" in said:
        return Detected(default)
    known = references(model)
    fact, field = fact_of(model, feed.inputs[0].dtype, default.layout), Field(feed.inputs[0], default, known)
    own = field.candidates(fact, said)
    race = Race(model, session, feed.inputs[0], feed.drawn, known, threads)
    race.run(own, confidence=False)
    best, *others = sorted(own, key=lambda candidate: candidate.score, reverse=True)
    shares, _ = _shares([best, *others], race, fact)
    alike = [i for i, one in enumerate([best, *others]) if one.family == best.family]
    share = sum(shares[i] for i in alike)
    if fact is None and not (race.stored and share >= EVIDENT):
        guess = f": {best.settled_by} is the best guess" if race.stored else ""
        tells = f"its BatchNorms do not make it evident{guess}" if race.stored else "no BatchNorm in it tells"
        fact_told = f"How {session.name} wants to be fed is not known without pictures: {tells}."
        raise QconvError(fact_told, "pass --preprocess NAME, or --scale, --mean and --std, as it was trained.")
    chosen = replace(best.preprocessing, source=_source(race, fact, certain=True))
    doubt = ""
    if len(alike) > 1 and shares[0] < CERTAIN * share:
        color = chosen.color
        doubt = (
            f"whether the network wants RGB or BGR does not show without pictures; the file says {color.upper()}, "
            f"which changes no weight: --color {color} settles it."
        )
    return Detected(chosen, None, round(share, 4), doubt, evident=True)


def _said(options: PreprocessingOptions) -> dict[str, Any]:
    """What the user said of the pixels' values."""
    said = {part.name: getattr(options, part.name) for part in fields(options) if part.name not in SHAPE_ONLY}
    return {name: value for name, value in said.items() if value not in (None, AUTO)}


def _decided(own: Sequence[Candidate], race: Race, fact: Fact | None) -> tuple[Candidate, Detected]:
    best, *others = sorted(own, key=lambda candidate: candidate.score, reverse=True)
    shares, other = _shares([best, *others], race, fact)
    # a guess leaves half of the probability to something else, which is not worth a name
    margin = shares[0] - max([*shares[1:], other if race.stored else 0.0], default=0.0)
    certain = margin >= CERTAIN
    strange = race.stored and other > max(shares[1:], default=0.0)
    second = others[0] if others and not strange else None
    runner_up = SOMETHING_ELSE if strange else second.name if second else None
    chosen = replace(best.preprocessing, source=_source(race, fact, certain))
    doubt = "" if certain else _doubt(best, second, others, margin)
    evident = race.stored or fact is not None
    return best, Detected(chosen, runner_up, round(max(margin, 0.0), 4), doubt, evident)


def _shares(ranked: Sequence[Candidate], race: Race, fact: Fact | None) -> tuple[list[float], float]:
    """Probability of each candidate, best first, and that of something else, which a fact rules out."""
    scores = [candidate.score - ranked[0].score for candidate in ranked]
    if fact is None:
        # confidence moves probability between candidates, not away from what is none of them
        scores.append((race.other if race.known else ranked[0].fit) - ranked[0].fit)
    weights = np.exp(np.array(scores) - max(scores))
    shares = [float(share) for share in weights / weights.sum()]
    return (shares, 0.0) if fact is not None else (shares[:-1], shares[-1])


def _source(race: Race, fact: Fact | None, certain: bool) -> str:
    if fact is not None:
        return fact.why
    if not race.known:
        return "the default, as nothing in the model tells"
    by = "the statistics in its BatchNorms" if race.stored else "the size of its first layers' outputs"
    return f"{'detected' if certain else 'guessed'} by {by}"


def _doubt(best: Candidate, second: Candidate | None, others: Sequence[Candidate], margin: float) -> str:
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


def _against(mine: Candidate, free: Sequence[Candidate], race: Race, fact: Fact | None) -> str:
    """What speaks clearly against the user's word; empty where nothing does."""
    if any(same(mine.preprocessing, candidate.preprocessing) for candidate in free) and fact is not None:
        return ""
    best = max(free, key=lambda candidate: candidate.score)
    if same(mine.preprocessing, best.preprocessing):
        return ""
    if fact is not None:
        return f"{fact.why}, which speaks for {best.settled_by} and against the options given."
    told = replace(mine, fit=mine.fit - mine.prior)  # what was said is no rarity
    (share, mine_share), other = _shares([best, told], race, None)
    if not race.stored or share - max(mine_share, other) < CERTAIN:
        return ""
    return f"the statistics in the model's BatchNorms speak for {best.settled_by} and against the options given."


def same(one: Preprocessing, other: Preprocessing) -> bool:
    """Whether both feed pixels alike: black and white end up within a tenth of the range of each other, in every
    channel of the input."""
    ends = [
        np.array([(level * p.scale - np.array(p.mean)) / np.array(p.std) * np.ones(p.channels) for level in (0, 255)])
        for p in (one, other)
    ]
    spread = np.abs(ends[0][1] - ends[0][0])
    return one.color == other.color and bool((np.abs(ends[0] - ends[1]) <= 0.1 * spread).all())
