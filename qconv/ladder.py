"""What a diagnosis found, and what a sweep over recipes measured, as data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Cause:
    """Something that can cost accuracy. kind: a short name that stays the same, such as `channel-imbalance`.

    where: nodes or tensors, the worst first. what: the evidence in words, with its numbers. share: their part in the
    error at the outputs, None where it was not measured. handled: what of the recipe takes care of it already, empty
    where nothing does.
    """

    kind: str
    where: tuple[str, ...]
    what: str
    share: float | None = None
    handled: str = ""

    def as_dict(self) -> dict[str, Any]:
        """What `--json` prints of it."""
        return {
            "kind": self.kind,
            "where": list(self.where),
            "what": self.what,
            "output_share": self.share,
            "handled": self.handled or None,
        }


@dataclass(frozen=True, slots=True)
class Trial:
    """A recipe that was carried out and measured.

    name: of a remedy or of a recipe. options: what is to be added to the command line for it. causes: the kinds that it
    is for. size: bytes. ms: median of one run; ratio: of it to the float model's, (low, middle, high). failed: why
    there is no result, empty where there is one. low, high: the 95 % interval of agreement.
    """

    name: str
    options: tuple[str, ...]
    causes: tuple[str, ...] = ()
    sqnr_db: float | None = None
    agreement: float | None = None
    agreement_interval: tuple[float, float] | None = None
    size: int = 0
    ms: float | None = None
    ratio: tuple[float, float, float] | None = None
    seconds: float = 0.0
    failed: str = ""

    def as_dict(self) -> dict[str, Any]:
        """What `--json` prints of it."""
        return {
            "name": self.name,
            "options": " ".join(self.options),
            "causes": list(self.causes),
            "sqnr_db": self.sqnr_db,
            "agreement": self.agreement,
            "agreement_interval": None if self.agreement_interval is None else list(self.agreement_interval),
            "size": self.size,
            "ms": self.ms,
            "ratio_to_float": None if self.ratio is None else list(self.ratio),
            "seconds": round(self.seconds, 3),
            "failed": self.failed or None,
        }


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What costs accuracy, and what mends it. trials: the recipe as it was asked for, and then remedy by remedy.

    pictures: that were measured on; unseen: whether none of them was calibrated with. recommended: the whole command
    line; best: the trial that it comes to. float_ms: of one run of the float model, None where nothing was timed.
    """

    model: str
    pictures: int
    unseen: bool
    causes: tuple[Cause, ...]
    trials: tuple[Trial, ...]
    best: Trial
    recommended: str
    conclusion: str
    float_ms: float | None = None
    warnings: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        return {
            "schema": 1,
            "model": self.model,
            "pictures": self.pictures,
            "unseen": self.unseen,
            "float_ms": self.float_ms,
            "causes": [cause.as_dict() for cause in self.causes],
            "ladder": [trial.as_dict() for trial in self.trials],
            "best": self.best.name,
            "conclusion": self.conclusion,
            "recommended": self.recommended,
            "warnings": self.warnings,
        }


@dataclass(frozen=True, slots=True)
class Sweep:
    """Several recipes on the same pictures. outputs: the files, in the order of the trials."""

    model: str
    float_bytes: int
    float_ms: float | None
    pictures: int
    unseen: bool
    trials: tuple[Trial, ...]
    outputs: tuple[str, ...]

    @property
    def best(self) -> tuple[bool, ...]:
        """Which trials no other is better than in accuracy, size and latency at once."""
        return undominated(self.trials)

    def as_dict(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        rows = zip(self.trials, self.outputs, self.best, strict=True)
        return {
            "schema": 1,
            "model": self.model,
            "float": {"size": self.float_bytes, "ms": self.float_ms},
            "pictures": self.pictures,
            "unseen": self.unseen,
            "recipes": [{**trial.as_dict(), "output": out, "non_dominated": best} for trial, out, best in rows],
        }


TIMES_ALIKE = 1.03
"""Ratio up to which two times are the same: what turns on one machine differ by."""


def undominated(trials: Sequence[Trial]) -> tuple[bool, ...]:
    """Whether no other trial is at least as good in SQNR, size and latency, and better in one of them."""

    def decibel(trial: Trial) -> float:
        return math.inf if trial.sqnr_db is None else trial.sqnr_db

    def beats(one: Trial, other: Trial) -> bool:
        mine, its = one.ms or 0.0, other.ms or 0.0
        as_good = decibel(one) >= decibel(other) and one.size <= other.size and mine <= its * TIMES_ALIKE
        better = decibel(one) > decibel(other) or one.size < other.size or mine * TIMES_ALIKE < its
        return as_good and better

    able = [trial for trial in trials if not trial.failed]
    return tuple(not trial.failed and not any(beats(other, trial) for other in able) for trial in trials)
