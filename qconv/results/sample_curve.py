"""This module holds what a study of the number of calibration images found, as data, and says how many are enough.

    level  = median over all draws of at least half of the images
    enough = least count, at most half of all, whose worst draw is no more than TOLERANCE_DB below the level, and from
             which on, up to half of all, the median of each count is not either

Sets of more than half are close to all images whatever the curve does, so they are what others are compared with. All
images alone would not do: one set may be a decibel better or worse than another by rounding luck.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from qconv.errors import format_count

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
        sqnr_db: In dB; None where outputs are equal or cannot be compared.
        agreement: Share of equal classes; None where there are none.
    """

    pictures: int
    seed: int
    sqnr_db: float | None
    agreement: float | None


@dataclass(frozen=True, slots=True)
class Spread:
    """The worst, the median and the best draw of one number of images. Infinite decibels are equal outputs."""

    least: float
    median: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """Compute the spread of measured values; None where nothing was measured."""
        return cls(min(values), float(median(values)), max(values)) if values else None

    def as_list(self) -> list[float | None]:
        """Return the values JSON-ready, infinity as null."""
        return [value if math.isfinite(value) else None for value in (self.least, self.median, self.most)]


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
    def in_decibels(self) -> bool:
        """Whether any draw differs from the float model in an output with an SQNR."""
        return any(point.sqnr_db is not None for point in self.points)

    def sqnr_db(self, count: int) -> Spread | None:
        """Return the spread of SQNR over the draws of `count` images, in dB."""
        if not self.in_decibels:
            return None
        return Spread.of([math.inf if p.sqnr_db is None else p.sqnr_db for p in self._at(count)])

    def agreement(self, count: int) -> Spread | None:
        """Return the spread of agreement over the draws of `count` images, 0 to 1."""
        return Spread.of([p.agreement for p in self._at(count) if p.agreement is not None])

    def _at(self, count: int) -> Iterable[CurvePoint]:
        return [point for point in self.points if point.pictures == count]

    @property
    def enough(self) -> int | None:
        """How many images are enough, as the module defines it; None where the curve does not say."""
        later = self._last_unsteady or 0
        return next((c for c in self._small if later < c and self._is_within(c, lambda s: s.least)), None)

    @property
    def level(self) -> Spread | None:
        """The spread over all draws of at least half of the images: SQNR in dB, else agreement."""
        large = [count for count in self.counts if count >= self._half]
        if self.in_decibels:
            return Spread.of([math.inf if p.sqnr_db is None else p.sqnr_db for c in large for p in self._at(c)])
        return Spread.of([p.agreement for c in large for p in self._at(c) if p.agreement is not None])

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
        """What `enough` tolerates: TOLERANCE_DB, or for agreement one standard error."""
        if self.in_decibels:
            return TOLERANCE_DB
        share = 1.0 if self.level is None else self.level.median
        return math.sqrt(max(share * (1 - share), 1 / self.scored) / self.scored)

    def shortfall(self, count: int, of: Callable[[Spread], float] = lambda spread: spread.least) -> float | None:
        """Return how far draws of `count` images are below the level, in dB or as a share; never below 0.

        Args:
            count: Images.
            of: Which draw, the worst or the median.
        """
        here = self.sqnr_db(count) if self.in_decibels else self.agreement(count)
        if here is None or self.level is None:
            return None
        return 0.0 if of(here) >= self.level.median else self.level.median - of(here)

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

    def _gap(self, size: float) -> str:
        if self.in_decibels:
            return f"{size:.2g} dB" if size < 10 else f"{size:.0f} dB"
        return f"{100 * size:.1f} points of agreement"

    def _fall(self) -> str:
        """Describe a fall of the curve: ranges that only grow with every image can become too wide."""
        medians = {c: spread.median for c in self._small if (spread := self.sqnr_db(c)) is not None}
        best = max(medians, key=lambda count: medians[count], default=None)
        if best is None or self.level is None or not ROUNDING_LUCK_DB < medians[best] - self.level.median < math.inf:
            return ""
        lost = self._gap(medians[best] - self.level.median)
        return (
            f" More than {best} cost {lost}: rare extremes widen the ranges, so try another --calibrator "
            f"than {self.recipe['calibrator']}."
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
            "points": [
                {"pictures": p.pictures, "seed": p.seed, "sqnr_db": p.sqnr_db, "agreement": p.agreement}
                for p in self.points
            ],
            "spread": [
                {
                    "pictures": count,
                    "sqnr_db": _spread_as_list(self.sqnr_db(count)),
                    "agreement": _spread_as_list(self.agreement(count)),
                    "seconds": round(self.seconds[count], 3),
                }
                for count in self.counts
            ],
            "enough": self.enough,
            "tolerance_db": TOLERANCE_DB if self.in_decibels else None,
            "words": self.in_words(),
            "warnings": self.warnings,
            "time": {name: round(seconds, 3) for name, seconds in self.time.items()},
            "peak_rss_mb": self.peak_rss_mb,
        }


def format_score(value: float | None, factor: float = 1) -> str:
    """Format a number with one place; "equal" for infinite decibels, "-" for none."""
    if value is None:
        return "-"
    return f"{factor * value:.1f}" if math.isfinite(value) else "equal"


def _spread_as_list(spread: Spread | None) -> list[float | None] | None:
    return None if spread is None else spread.as_list()
