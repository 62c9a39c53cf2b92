"""Defines `Trial`, a recipe that was carried out and measured, and how trials are ranked.

    rank    = (10 log10(1 / share lost of what the task is judged by), SQNR), compared one after the other

A task is judged by labels where there are some, else by what is left of what the float model says: its boxes, its map.
Shares of few images are coarse and often equal, and then SQNR tells trials apart. `pareto_mask` marks the trials that
no other trial dominates in rank, size and latency; times that lie within each other's 10th to 90th percentile count as
equal.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qconv.results.float_share import FloatShare
from qconv.results.scores import (
    AGREEMENT,
    ALWAYS_TOLD,
    PART_SQNR,
    SHARE,
    SQNR,
    LabelledScores,
    Metric,
    Score,
    find_score,
    metrics_of,
    shown_metrics,
    value_of,
)

LEAST_LOST = 0.005
"""Share of a task's measure that counts as nothing."""

LEAST_GAIN_DB = 0.5
"""Gain from which on something has helped."""


@dataclass(frozen=True, slots=True)
class Trial:
    """A recipe that was carried out and measured.

    Attributes:
        name: Of the remedy or recipe.
        options: What the command line needs in addition.
        causes: The kinds of causes that it is for.
        scores: Of the worst output, and what the task is judged by.
        size: Bytes of the file.
        ms: Median time of one run.
        ratio: That time over the float model's: (low, middle, high).
        failed: Why there is no result; empty where there is one.
        ranked_by: What the task is judged by; None where that is SQNR alone.
        labelled: How right it is by labels; None without these.
        in_float: How much of the network stays in float; None where it failed.
    """

    name: str
    options: tuple[str, ...]
    causes: tuple[str, ...] = ()
    scores: tuple[Score, ...] = ()
    size: int = 0
    ms: float | None = None
    ratio: tuple[float, float, float] | None = None
    seconds: float = 0.0
    failed: str = ""
    ranked_by: Metric | None = None
    labelled: LabelledScores | None = None
    in_float: FloatShare | None = None

    @property
    def sqnr_db(self) -> float | None:
        """In dB; None where nothing differs, or the outputs are classes alone."""
        return value_of(self.scores, SQNR)

    @property
    def agreement(self) -> float | None:
        """None where no output holds classes."""
        return value_of(self.scores, AGREEMENT)

    @property
    def equal(self) -> bool:
        """Whether something was compared with the float model, and nothing differs."""
        beside = [score for score in self.scores if not score.metric.by_labels]
        return not self.failed and bool(beside) and all(score.shows_no_difference for score in beside)

    @property
    def noise_db(self) -> float:
        """SQNR in dB, the mean over parts where outputs have some; infinite where nothing differs."""
        score = find_score(self.scores, PART_SQNR) or find_score(self.scores, SQNR)
        if self.failed:
            return -math.inf
        if score is not None and score.value is not None:
            return score.value
        return math.inf if self.equal or score is not None else 0.0

    @property
    def lost(self) -> float | None:
        """What is lost of the measure that its task is judged by, a share; None without such a measure."""
        if self.labelled is not None:
            return self.labelled.lost
        value = None if self.ranked_by is None else value_of(self.scores, self.ranked_by)
        if self.ranked_by is None or self.ranked_by.equal is None or value is None:
            return None
        return self.ranked_by.lost(self.ranked_by.equal, value)

    @property
    def surely_lost(self) -> float:
        """The least that this may be on other images, where an interval tells; 0 without such a measure."""
        score = None if self.ranked_by is None else find_score(self.scores, self.ranked_by)
        if self.labelled is not None:
            span = self.labelled.differences[0].interval
            return (self.lost or 0.0) if span is None else -span[1]
        if score is None or score.interval is None or score.metric.equal is None:
            return self.lost or 0.0
        return min(score.metric.lost(score.metric.equal, end) for end in score.interval)

    @property
    def task_db(self) -> float:
        """10 log10(1 / share lost) of what the task is judged by; less than LEAST_LOST counts as that.

        So few images do not tell less from nothing.
        """
        if self.failed:
            return -math.inf
        return -10 * math.log10(max(self.lost or 0.0, LEAST_LOST))

    @property
    def rank(self) -> tuple[float, float]:
        """What trials are ranked by, the best has the largest: the task's measure, and of equal ones SQNR."""
        return self.task_db, self.noise_db

    def gain_over(self, other: Trial, most: float = math.inf) -> float:
        """By how many dB it is better: in SQNR, or more where the task's measure says the same, or against it.

        most: dB of SQNR from which on more counts nothing.
        """
        moved = self.task_db - other.task_db
        nearer = min(self.noise_db, most) - min(other.noise_db, most)
        if abs(moved) < LEAST_GAIN_DB:
            return nearer
        return max(moved, nearer) if moved > 0 else min(moved, nearer)

    @property
    def typed(self) -> str:
        """The options, to be pasted into a shell."""
        return shlex.join(self.options)

    def as_dict(self) -> dict[str, Any]:
        """Return the row that `--json` prints."""
        return {
            "name": self.name,
            "options": self.typed,
            "causes": list(self.causes),
            **self._score_fields(),
            "labels": None if self.labelled is None else self.labelled.as_dict(),
            "size": None if self.failed else self.size,
            "in_float": None if self.in_float is None else self.in_float.as_dict(),
            "ms": self.ms,
            "ratio_to_float": None if self.ratio is None else list(self.ratio),
            "seconds": round(self.seconds, 3),
            "failed": self.failed or None,
        }

    def _score_fields(self) -> dict[str, Any]:
        """Values by their names, and behind each share its interval."""
        found: dict[str, Any] = {}
        for metric in metrics_of([self.scores], first=ALWAYS_TOLD):
            score = find_score(self.scores, metric)
            found[metric.name] = None if score is None else score.value
            if metric.unit == SHARE:
                span = None if score is None else score.interval
                found[f"{metric.name}_interval"] = None if span is None else list(span)
        return found


def find_ranking(trials: Sequence[Trial]) -> Metric | None:
    """What trials are ranked by before SQNR; None where it is SQNR alone."""
    able = (trial for trial in trials if trial.lost is not None)
    return next((trial.ranked_by for trial in able), None)


def name_ranking(trials: Sequence[Trial]) -> str:
    """The name of the measure that trials are ranked by."""
    return (find_ranking(trials) or SQNR).name


def list_trial_metrics(trials: Sequence[Trial]) -> tuple[Metric, ...]:
    """The metrics of a table of trials: first what they are ranked by, then SQNR."""
    ranking = find_ranking(trials)
    shown = shown_metrics(trial.scores for trial in trials)
    return tuple(dict.fromkeys((*([] if ranking is None else [ranking]), *sorted(shown, key=lambda m: m.rank != 1))))


def _is_faster(one: Trial, other: Trial) -> bool:
    return one.ratio is not None and other.ratio is not None and one.ratio[2] < other.ratio[0]


def pareto_mask(trials: Sequence[Trial]) -> tuple[bool, ...]:
    """Mark the trials that no other dominates: at least as good in rank, size and latency, and better in one.

    Times that lie within each other's range, from the 10th to the 90th percentile, count as equal.
    """

    def beats(one: Trial, other: Trial) -> bool:
        slower, faster = _is_faster(other, one), _is_faster(one, other)
        as_good = one.rank >= other.rank and one.size <= other.size and not slower
        return as_good and (one.rank > other.rank or one.size < other.size or faster)

    able = [trial for trial in trials if not trial.failed]
    return tuple(not trial.failed and not any(beats(other, trial) for other in able) for trial in trials)
