"""This module holds what a study of the number of calibration images found, as data, and says how many are enough.

    level  = median over all draws of at least half of the images
    enough = least count, at most half of all, whose worst draw is no more than TOLERANCE_DB below the level, and from
             which on, up to half of all, the median of each count is not either

Sets of more than half are close to all images whatever the curve does, so they are what others are compared with. All
images alone would not do: one set may be a decibel better or worse than another by rounding luck.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from qconv.errors import format_count
from qconv.results.scores import (
    ALWAYS_TOLD,
    DECIBEL,
    SHARE,
    Metric,
    Score,
    as_values,
    find_score,
    metrics_of,
)

SCHEMA = 1
TOLERANCE_DB = 0.5
ROUNDING_LUCK_DB = 1.0
"""How much better one set of images may be than another of its size by rounding alone."""
COUNT_STEPS = (1, 2, 5)


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """The network calibrated with some images and scored on others.

    Attributes:
        pictures: Images that it was calibrated with.
        seed: The draw that they are from.
        scores: Of the worst output, each metric once.
    """

    pictures: int
    seed: int
    scores: tuple[Score, ...]

    def value_of(self, metric: Metric) -> float | None:
        """Return the value of a metric, infinite for equal outputs without a number; None where not measured."""
        found = find_score(self.scores, metric)
        if found is None:
            return None
        return math.inf if found.value is None else found.value


@dataclass(frozen=True, slots=True)
class Spread:
    """The worst, the median and the best draw of one number of images. Infinite decibels are equal outputs."""

    worst: float
    median: float
    best: float

    @classmethod
    def of(cls, values: Sequence[float], metric: Metric) -> Spread | None:
        """Compute the spread of measured values; None where nothing was measured."""
        if not values:
            return None
        ends = min(values), max(values)
        worst, best = ends if metric.higher_is_better else ends[::-1]
        return cls(worst, float(median(values)), best)

    def __iter__(self) -> Iterator[float]:
        return iter((self.worst, self.median, self.best))


def counts_up_to(most: int) -> list[int]:
    """List 1, 2, 5, 10, 20, 50 ... below `most`, and `most` itself."""
    decades = range(len(str(most)))
    return [*(count for ten in decades for step in COUNT_STEPS if (count := step * 10**ten) < most), most]


@dataclass(slots=True)
class SampleCurve:
    """Everything that one study measured.

    Attributes:
        points: By number of images, then draw.
        draws: Draws of each number.
        scored: Images that points were scored on.
        scored_on: The folders that they come from; empty where they were held out.
        seconds: By number of images, what the calibration pass took until so many were seen.
    """

    version: str
    model: str
    recipe: dict[str, Any]
    preprocessing: dict[str, Any] | None
    points: list[CurvePoint]
    draws: int
    scored: int
    scored_on: tuple[str, ...]
    seconds: dict[int, float]
    warnings: list[str] = field(default_factory=list)
    time: dict[str, float] = field(default_factory=dict)
    peak_rss_mb: float | None = None

    @property
    def counts(self) -> list[int]:
        """Numbers of images, ascending."""
        return sorted({point.pictures for point in self.points})

    @property
    def pictures(self) -> int:
        """The number of all calibration images."""
        return max(self.counts)

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """What was measured; first those that every comparison tells of."""
        return metrics_of([point.scores for point in self.points], first=ALWAYS_TOLD)

    @property
    def judged(self) -> Metric | None:
        """The first metric, in decibels or a share, in which any draw has a number: it says what is enough."""
        return next((m for m in self.metrics if m.unit in (DECIBEL, SHARE) and self.drawn(m)), None)

    def drawn(self, metric: Metric) -> list[tuple[CurvePoint, float]]:
        """List the points that have a number in a metric, with that number."""
        found = [(point, point.value_of(metric)) for point in self.points]
        return [(point, value) for point, value in found if value is not None and math.isfinite(value)]

    def spread(self, metric: Metric, count: int | None = None) -> Spread | None:
        """Return the spread of a metric over the draws.

        Args:
            metric: Infinite where outputs are equal and it has no number for that.
            count: Of so many images; None for all draws of at least half of them.

        Returns:
            In the metric's unit; None where no draw of any number has a number.
        """
        if not self.drawn(metric):
            return None
        points = [p for p in self.points if (p.pictures >= self._half if count is None else p.pictures == count)]
        return Spread.of([value for p in points if (value := p.value_of(metric)) is not None], metric)

    @property
    def enough(self) -> int | None:
        """How many images are enough, as the module defines it; None where the curve does not say."""
        later = self._last_unsteady or 0
        return next((c for c in self._small if later < c and self._is_within(c, lambda s: s.worst)), None)

    @property
    def level(self) -> Spread | None:
        """The spread over all draws of at least half of the images, in the unit of `judged`."""
        return None if self.judged is None else self.spread(self.judged)

    @property
    def _half(self) -> int:
        return -(-self.pictures // 2)

    @property
    def _small(self) -> list[int]:
        return [count for count in self.counts if 2 * count <= self.pictures]

    @property
    def _last_unsteady(self) -> int | None:
        """The largest of the small counts at which half of the draws are too far below the level."""
        found = [count for count in self._small if not self._is_within(count, lambda spread: spread.median)]
        return max(found, default=None)

    def _is_within(self, count: int, of: Callable[[Spread], float]) -> bool:
        shortfall = self.shortfall(count, of)
        return shortfall is not None and shortfall <= self.tolerance

    @property
    def tolerance(self) -> float:
        """What `enough` tolerates: TOLERANCE_DB, or for a share one standard error."""
        if self._in_decibels:
            return TOLERANCE_DB
        share = 1.0 if self.level is None else self.level.median
        return math.sqrt(max(share * (1 - share), 1 / self.scored) / self.scored)

    def shortfall(self, count: int, of: Callable[[Spread], float] = lambda spread: spread.worst) -> float | None:
        """Return by how much draws of `count` images are worse than the level, in dB or as a share; never below 0.

        Args:
            count: Images.
            of: Which draw, the worst or the median.
        """
        metric, level = self.judged, self.level
        here = None if metric is None else self.spread(metric, count)
        if metric is None or here is None or level is None:
            return None
        return 0.0 if of(here) == level.median else max(0.0, metric.lost(level.median, of(here)))

    def in_words(self) -> str:
        """Describe the curve in one or two sentences."""
        everything, enough = format_count(self.pictures, "picture"), self.enough
        if enough is not None:
            return (
                f"{format_count(enough, 'picture')} {'is' if enough == 1 else 'are'} enough here: the "
                "worst draw is at most "
                f"{self._gap(self.tolerance)} below the level of sets of {self._half} to {self.pictures}.{self._fall()}"
            )
        last = max(self._small, default=None)
        shortfall = None if last is None else self.shortfall(last)
        if last is None or shortfall is None:
            return f"{everything} {'says' if self.pictures == 1 else 'say'} nothing of more: add pictures."
        return (
            f"The curve still rises at {everything}: the worst draw of {last} is {self._gap(shortfall)} below the "
            f"level of larger sets. Add pictures."
        )

    def how(self) -> str:
        """Describe how the points were made."""
        draws = "one draw" if self.draws == 1 else f"{self.draws} draws"
        others = f"pictures of {' and '.join(self.scored_on)}" if self.scored_on else "others, held back"
        return (
            f"{draws} of each number out of {format_count(self.pictures, 'picture')}, each larger set "
            "holding the smaller "
            f"ones; scored on {self.scored} {others}; calibrator {self.recipe['calibrator']}."
        )

    @property
    def _in_decibels(self) -> bool:
        return self.judged is not None and self.judged.unit == DECIBEL

    def _gap(self, size: float) -> str:
        if self._in_decibels:
            return f"{size:.2g} dB" if size < 10 else f"{size:.0f} dB"
        return f"{100 * size:.1f} points of {'' if self.judged is None else self.judged.label}".rstrip()

    def _fall(self) -> str:
        """Describe a fall of the curve: ranges that only grow with every image can become too wide."""
        metric, level = self.judged, self.level
        if metric is None or level is None or not self._in_decibels:
            return ""
        gains = {c: metric.lost(s.median, level.median) for c in self._small if (s := self.spread(metric, c))}
        best = max(gains, key=lambda count: gains[count], default=None)
        if best is None or not ROUNDING_LUCK_DB < gains[best] < math.inf:
            return ""
        return (
            f" More than {best} cost {self._gap(gains[best])}: rare extremes widen the ranges, so try another "
            f"--calibrator than {self.recipe['calibrator']}."
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the object that `--json` prints."""
        return {
            "schema": SCHEMA,
            "version": self.version,
            "model": self.model,
            "recipe": self.recipe,
            "preprocessing": self.preprocessing,
            "pictures": self.pictures,
            "holdout": self.scored,
            "images": list(self.scored_on),
            "draws": self.draws,
            "points": [{"pictures": p.pictures, "seed": p.seed, **as_values(p.scores)} for p in self.points],
            "spread": [
                {
                    "pictures": count,
                    **{metric.name: _as_list(self.spread(metric, count)) for metric in self.metrics},
                    "seconds": round(self.seconds[count], 3),
                }
                for count in self.counts
            ],
            "enough": self.enough,
            "tolerance_db": TOLERANCE_DB if self._in_decibels else None,
            "words": self.in_words(),
            "warnings": self.warnings,
            "time": {name: round(seconds, 3) for name, seconds in self.time.items()},
            "peak_rss_mb": self.peak_rss_mb,
        }


def _as_list(spread: Spread | None) -> list[float | None] | None:
    """Return [worst, median, best] JSON-ready, infinity as null."""
    return None if spread is None else [value if math.isfinite(value) else None for value in spread]
