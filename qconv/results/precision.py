"""Defines `PrecisionReport`: the curve of time and noise that a network's division was chosen on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from qconv.config.choices import FLOAT_BITS
from qconv.errors import format_count

FOR_ACCURACY = "accuracy"
"""What the reason of a node begins with that is in float for accuracy."""

LEAST_TOLD = 0.005
"""Least share of the time that is told as one: less is 0 %."""


@dataclass(frozen=True, slots=True)
class PreciseShare:
    """How many of a network's activations have more than 8 bits. Copies for readers of other bits count as tensors.

    Attributes:
        count: Tensors with more than 8 bits.
        of: All that are quantized, or would be in 8 bits.
        elements: Share of their elements in one run.
    """

    count: int
    of: int
    elements: float

    @property
    def tensors(self) -> float:
        """Share of the number of tensors."""
        return self.count / max(1, self.of)

    def is_within(self, budget: float) -> bool:
        """Whether both shares are no more than that."""
        return max(self.tensors, self.elements) <= budget


@dataclass(frozen=True, slots=True)
class PrecisionPoint:
    """A division of a network between integers and more precision.

    Attributes:
        time: Predicted, over that of all in integers; what is read and written where times are not known.
        predicted_db: SQNR at the outputs in dB, by the noises of tensors alone.
        corrected_db: The same, as what was measured of other points tells.
        measured_db: On pictures apart; None where it was not measured.
        nodes: How many have more than 8 bits beyond those of the fastest division.
        chosen: Whether it is the one that was taken.
    """

    time: float
    predicted_db: float
    corrected_db: float
    measured_db: float | None
    nodes: int
    chosen: bool = False

    def as_dict(self) -> dict[str, Any]:
        """What `--json` prints of it; null for what is infinite, too, as there is no such number."""
        found = {name: getattr(self, name) for name in self.__slots__}
        return {name: None if value == math.inf else value for name, value in found.items()}


@dataclass(frozen=True, slots=True)
class PrecisionReport:
    """The curve, from the fastest division to the one with the least noise.

    Attributes:
        points: In that order; the first is the division by times alone.
        float_time: The time of all in float, over that of all in integers.
        pictures: That points were measured on.
        apart: Whether nothing else was chosen on these.
        bits: What tensors have in place of 8; 32 for float.
        share: The activations that have them, where that is what was bounded, and not the time.
    """

    points: tuple[PrecisionPoint, ...]
    float_time: float
    pictures: int
    apart: bool
    bits: int = FLOAT_BITS
    share: PreciseShare | None = None

    @property
    def kind(self) -> str:
        """What tensors have in place of 8 bits, in words."""
        return "in float" if self.bits == FLOAT_BITS else f"in {self.bits} bits"

    @property
    def why(self) -> str:
        """Why nodes have more than 8 bits: what that gains, and takes."""
        if self.share is None:
            return f"{FOR_ACCURACY}: {self.in_words}"
        return f"{FOR_ACCURACY}: {self.gained_db:.1f} dB for {self.share.elements:.0%} of the activations {self.kind}"

    @property
    def chosen(self) -> PrecisionPoint:
        """The point that was taken."""
        return next(point for point in self.points if point.chosen)

    @property
    def gained_db(self) -> float:
        """What the division that was taken gains on the fastest, in dB."""
        own, first = self.chosen, self.points[0]
        return own.corrected_db - first.corrected_db

    @property
    def spent(self) -> float:
        """The time that it takes more, as a share of that of all in integers."""
        return self.chosen.time - self.points[0].time

    @property
    def in_words(self) -> str:
        """What the division that was taken gains, and for what: the reason of the nodes that it leaves in float."""
        spent = f"{self.spent:.0%} of the time" if self.spent >= LEAST_TOLD else "no time"
        return f"{self.gained_db:.1f} dB for {spent}"

    @property
    def conclusion(self) -> str:
        """What was taken, in a sentence."""
        first, own = self.points[0], self.chosen
        before = f"The division by times alone has {first.corrected_db:.1f} dB"
        if own is first:
            return f"{before}, and was taken: no other one that may be taken gains enough."
        left = format_count(own.nodes, "node")
        return f"{before}. With {left} in float it is {own.corrected_db:.1f} dB: {self.in_words}."

    def as_dict(self) -> dict[str, Any]:
        """What `--json` prints of it."""
        return {
            "float_time": self.float_time,
            "pictures": self.pictures,
            "apart": self.apart,
            "bits": self.bits,
            "share": None if self.share is None else {name: getattr(self.share, name) for name in self.share.__slots__},
            "points": [point.as_dict() for point in self.points],
        }
