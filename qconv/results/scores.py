"""Scores: what was measured of a model, as numbers that say themselves how they are called and printed.

Reports, tables, gates and searches print and compare any list of scores, whatever they measure. A `Metric` describes
what is measured; `metrics.comparison` says which are measured of which outputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

Interval = tuple[float, float]

DECIBEL, SHARE = "dB", "share"
"""Units. A share is from 0 to 1, and printed as a percentage."""


@dataclass(frozen=True, slots=True)
class Metric:
    """What a score measures.

    name: its key in JSON and in tables. label: as people read it. unit: DECIBEL, SHARE or "" for a plain number.
    equal: its value where nothing differs; None where it has no bound, as SQNR. sentence, brief: how a summary and a
    list of outputs say it, around its value. good, poor, useless: from the first on a value is good, below the second
    it is bad, below the third nothing is left of the model; above them, where less is better. has_interval: whether an
    interval can be given. rank: where summaries list it: 0 for what its task is judged by, 1 for SQNR, 2 for others.
    by_labels: whether labels measure it, of one model by itself.
    """

    name: str
    label: str
    unit: str = ""
    higher_is_better: bool = True
    equal: float | None = None
    sentence: str = ""
    brief: str = ""
    good: float | None = None
    poor: float | None = None
    useless: float | None = None
    has_interval: bool = True
    rank: int = 0
    by_labels: bool = False

    @property
    def sign(self) -> str:
        """The sign that stands behind a value; empty for a plain number."""
        return "%" if self.unit == SHARE else self.unit

    @property
    def heading(self) -> str:
        """The heading above a column of values."""
        return f"{self.label} {self.sign}".rstrip()

    @property
    def factor(self) -> float:
        """The factor on a value as it is printed."""
        return 100.0 if self.unit == SHARE else 1.0

    def number(self, value: float, digits: int = 1) -> str:
        """A value without its unit. digits: after the point; plain numbers have 5."""
        return f"{self.factor * value:.{digits if self.unit else 5}f}"

    def format(self, value: float | None, digits: int = 1) -> str:
        """A value with its unit."""
        if value is None:
            return "equal" if self.equal is None else "-"
        return f"{self.number(value, digits)}{'' if self.unit == SHARE else ' '}{self.sign}".rstrip()

    def worst(self, values: Iterable[float]) -> float | None:
        """The worst of several values; None of none."""
        return min(values, default=None) if self.higher_is_better else max(values, default=None)

    def lost(self, before: float, after: float) -> float:
        """By how much a value has become worse."""
        return before - after if self.higher_is_better else after - before


@dataclass(frozen=True, slots=True)
class Score:
    """A value of a metric.

    value: None where nothing differs, and that has no number. interval: at 95 %. count: of how many things a share is;
    None where that is not told.
    """

    metric: Metric
    value: float | None
    interval: Interval | None = None
    count: int | None = None

    @property
    def name(self) -> str:
        """The key of the metric."""
        return self.metric.name

    @property
    def unit(self) -> str:
        """The unit of the value."""
        return self.metric.unit

    @property
    def higher_is_better(self) -> bool:
        """Whether a larger value is the better one."""
        return self.metric.higher_is_better

    @property
    def shows_no_difference(self) -> bool:
        """Whether the value is that of equal outputs."""
        return self.value == self.metric.equal

    @property
    def is_poor(self) -> bool:
        """Whether trouble is to be expected."""
        return self._is_beyond(self.metric.poor)

    @property
    def is_useless(self) -> bool:
        """Whether nothing is left of the model."""
        return self._is_beyond(self.metric.useless)

    def _is_beyond(self, limit: float | None) -> bool:
        return self.value is not None and limit is not None and self.metric.lost(limit, self.value) > 0

    def in_words(self, template: str = "") -> str:
        """The value, within `template`, or else behind the metric's label."""
        own = f"{self.metric.label} {{}}{' by labels' if self.metric.by_labels else ''}"
        return (template or own).format(self.metric.format(self.value), "" if self.count is None else f"{self.count} ")


SQNR = Metric("sqnr_db", "SQNR", DECIBEL, brief="{}", good=20.0, poor=10.0, useless=3.0, rank=1)

PART_SQNR = Metric("part_sqnr_db", "parts", DECIBEL, rank=1)
"""The mean over the parts of an output that mean one thing each."""

AGREEMENT = Metric(
    "agreement",
    "agreement",
    SHARE,
    equal=1.0,
    sentence="agrees with the float model on {}",
    good=0.97,
    poor=0.9,
    useless=0.5,
)

BOXES = Metric(
    "boxes",
    "boxes",
    SHARE,
    equal=1.0,
    sentence="finds {} of the float model's {}boxes",
    brief="boxes {}",
    good=0.98,
    poor=0.95,
    useless=0.5,
)

FLOAT_MAP = Metric(
    "float_map",
    "mAP",
    SHARE,
    equal=1.0,
    sentence="mAP {} with these for labels",
    brief="mAP {}",
    good=0.9,
)

TOP1 = Metric("top1", "top-1", SHARE, by_labels=True)

TOP5 = Metric("top5", "top-5", SHARE, by_labels=True)

MAP = Metric("map", "mAP", SHARE, by_labels=True)

MAP50 = Metric("map50", "mAP50", SHARE, by_labels=True)

MIOU = Metric("miou", "mIoU", SHARE, by_labels=True)

PIXEL_ACCURACY = Metric("pixel_accuracy", "pixel accuracy", SHARE, by_labels=True)

COSINE = Metric("cosine", "cosine", equal=1.0, has_interval=False, rank=2)

FLOAT_MIOU = Metric(
    "float_miou",
    "mIoU",
    SHARE,
    equal=1.0,
    sentence="mIoU {} with the float model's map",
    brief="mIoU {}",
    good=0.98,
    poor=0.95,
    useless=0.5,
)

PICTURE_COSINE = Metric(
    "picture_cosine",
    "cosine",
    equal=1.0,
    sentence="embeddings at cosine {} to the float model's",
    brief="cosine {}",
    good=0.99,
    poor=0.95,
    useless=0.5,
)

NEAREST = Metric(
    "nearest",
    "nearest",
    SHARE,
    equal=1.0,
    sentence="{} nearest to their own",
    brief="nearest {}",
    good=0.99,
    poor=0.95,
    useless=0.5,
)

PCK = Metric(
    "pck",
    "PCK",
    SHARE,
    equal=1.0,
    sentence="{} of keypoints within 5% of where the float model sees them",
    brief="PCK {}",
    good=0.98,
    poor=0.95,
    useless=0.2,
)

KEYPOINT_DISTANCE = Metric(
    "keypoint_distance",
    "distance",
    higher_is_better=False,
    equal=0.0,
    sentence="off by {} of their extent on average",
    brief="distance {}",
    good=0.01,
    poor=0.05,
    useless=0.5,
)

RELATIVE_ERROR = Metric(
    "relative_error",
    "relative error",
    higher_is_better=False,
    equal=0.0,
    good=0.1,
    poor=0.3,
    useless=0.7,
    rank=2,
)

PSNR = Metric("psnr_db", "PSNR", DECIBEL, good=40.0, poor=30.0, useless=15.0)

SSIM = Metric("ssim", "SSIM", equal=1.0, good=0.98, poor=0.95, useless=0.5)


@dataclass(frozen=True, slots=True)
class LabelledScores:
    """How right a model and its float model are by labels of the same pictures.

    Attributes:
        words: Where the labels come from.
        pictures: How many have some.
        scores, float_scores: Of both models, what their task is judged by first.
        differences: By how much measures are above the float model's.
    """

    words: str
    pictures: int
    scores: tuple[Score, ...]
    float_scores: tuple[Score, ...]
    differences: tuple[Score, ...]

    @property
    def metric(self) -> Metric:
        """What the task is judged by."""
        return self.scores[0].metric

    @property
    def pair(self) -> tuple[float, float] | None:
        """The float model's value of it, and the model's; None where no label counts."""
        before, after = self.float_scores[0].value, self.scores[0].value
        return None if before is None or after is None else (before, after)

    @property
    def lost(self) -> float | None:
        """By how much it has become worse; None where no label counts."""
        return None if self.pair is None else self.metric.lost(*self.pair)

    @property
    def in_words(self) -> str:
        """Both values."""
        if self.pair is None:
            return f"no {self.metric.label}, as no label counts"
        before, after = (self.metric.number(value, 2) for value in self.pair)
        return f"{self.metric.label} {before} -> {after} by labels"

    def as_dict(self) -> dict[str, Any]:
        """What `--json` prints of it."""
        spans = as_intervals(self.scores, told=())
        spans |= {f"float_{name}": span for name, span in as_intervals(self.float_scores, told=()).items()}
        spans |= {f"{name}_difference": span for name, span in as_intervals(self.differences, told=()).items()}
        return {
            "source": self.words,
            "pictures": self.pictures,
            **as_values(self.scores, told=()),
            "float": as_values(self.float_scores, told=()),
            "differences": as_values(self.differences, told=()),
            "intervals": spans,
        }


ALWAYS_TOLD = (SQNR, AGREEMENT)
"""Metrics whose keys stand in every comparison, null where they say nothing."""


def find_score(scores: Iterable[Score], metric: Metric) -> Score | None:
    """The score of a metric; None where it was not measured."""
    return next((score for score in scores if score.metric.name == metric.name), None)


def value_of(scores: Iterable[Score], metric: Metric) -> float | None:
    """The value of a metric; None where it was not measured, or nothing differs."""
    found = find_score(scores, metric)
    return None if found is None else found.value


def worst_scores(outputs: Iterable[Sequence[Score]]) -> tuple[Score, ...]:
    """The worst score of all outputs for each metric; one without a number only where no output has one."""
    found: dict[str, Score] = {}
    for score in (score for scores in outputs for score in scores):
        known = found.setdefault(score.name, score)
        if known.value is None or (score.value is not None and score.metric.lost(known.value, score.value) > 0):
            found[score.name] = score
    return tuple(found.values())


def metrics_of(outputs: Iterable[Sequence[Score]], *, first: Sequence[Metric] = ()) -> tuple[Metric, ...]:
    """All metrics of some lists of scores, each once. first: those that stand in front in any case."""
    found = {metric.name: metric for metric in first}
    for score in (score for scores in outputs for score in scores):
        found.setdefault(score.name, score.metric)
    return tuple(found.values())


def shown_metrics(outputs: Iterable[Sequence[Score]]) -> tuple[Metric, ...]:
    """The metrics that people are shown of some lists of scores: those that were measured, the usual ones in front."""
    lists = list(outputs)
    measured = {score.name for scores in lists for score in scores}
    usual = [metric for metric in ALWAYS_TOLD if metric.name in measured or not measured]
    return metrics_of(lists, first=usual)


def as_values(scores: Sequence[Score], *, told: Sequence[Metric] = ALWAYS_TOLD) -> dict[str, float | None]:
    """JSON-ready: {name: value}. told: metrics whose keys are there in any case."""
    return {metric.name: value_of(scores, metric) for metric in metrics_of([scores], first=told)}


def as_intervals(scores: Sequence[Score], *, told: Sequence[Metric] = ALWAYS_TOLD) -> dict[str, list[float] | None]:
    """JSON-ready: {name: [low, high]} of the metrics that can have intervals. told: as in `as_values`."""
    found: dict[str, list[float] | None] = {}
    for metric in metrics_of([scores], first=told):
        score = find_score(scores, metric)
        if metric.has_interval:
            found[metric.name] = None if score is None or score.interval is None else list(score.interval)
    return found


def by_rank(scores: Iterable[Score]) -> list[Score]:
    """Sort scores as summaries and tables of measures list them: what a task is judged by first, then SQNR."""
    return sorted(scores, key=lambda score: score.metric.rank)


def format_value(metric: Metric, value: float | None) -> str:
    """Format a value without its unit; "equal" for infinite ones, which equal outputs have, "-" for none."""
    if value is None:
        return "-"
    return metric.number(value) if math.isfinite(value) else "equal"
