"""What a diagnosis found, and what a sweep over recipes measured, as data."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Cause:
    """Something that can cost accuracy. kind: a short name that stays the same, such as `channel-imbalance`.

    where: nodes or tensors, the worst first. what: the evidence in words, with its numbers. share: their part in the
    error at the outputs, None where it was not measured. handled: what of the recipe takes care of it already, empty
    where nothing does. harmless: whether it costs nothing on the pictures that were looked at.
    """

    kind: str
    where: tuple[str, ...]
    what: str
    share: float | None = None
    handled: str = ""
    harmless: bool = False

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
    there is no result, empty where there is one. agreement_interval: at 95 %.
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

    @property
    def equal(self) -> bool:
        """Whether outputs do not differ from the float model's."""
        return not self.failed and self.sqnr_db is None and self.agreement in (None, 1.0)

    @property
    def accuracy_db(self) -> float:
        """SQNR in dB; of outputs that are classes alone, 10 log10 of one over the share that differs."""
        if self.failed:
            return -math.inf
        if self.sqnr_db is not None:
            return self.sqnr_db
        return math.inf if self.equal else -10 * math.log10(1 - (self.agreement or 0.0))

    @property
    def typed(self) -> str:
        """The options, to be pasted into a shell."""
        return shlex.join(self.options)

    def as_dict(self) -> dict[str, Any]:
        """What `--json` prints of it."""
        return {
            "name": self.name,
            "options": self.typed,
            "causes": list(self.causes),
            "sqnr_db": self.sqnr_db,
            "agreement": self.agreement,
            "agreement_interval": None if self.agreement_interval is None else list(self.agreement_interval),
            "size": None if self.failed else self.size,
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
            "recipes": [
                {**trial.as_dict(), "output": None if trial.failed else out, "non_dominated": best}
                for trial, out, best in rows
            ],
        }


def _is_faster(one: Trial, other: Trial) -> bool:
    return one.ratio is not None and other.ratio is not None and one.ratio[2] < other.ratio[0]


def undominated(trials: Sequence[Trial]) -> tuple[bool, ...]:
    """Whether no other trial is at least as good in SQNR, size and latency, and better in one of them.

    Times that lie within each other's turns, from the 10th to the 90th percentile, are no better and no worse.
    """

    def beats(one: Trial, other: Trial) -> bool:
        slower, faster = _is_faster(other, one), _is_faster(one, other)
        as_good = one.accuracy_db >= other.accuracy_db and one.size <= other.size and not slower
        return as_good and (one.accuracy_db > other.accuracy_db or one.size < other.size or faster)

    able = [trial for trial in trials if not trial.failed]
    return tuple(not trial.failed and not any(beats(other, trial) for other in able) for trial in trials)
