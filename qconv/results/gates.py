"""Defines `Gate`: what the user demands of a result, and whether it has that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Gate:
    """A demand of the user's, which more is better of.

    Attributes:
        name: Of the option, as "min-map".
        want: The least that it takes.
        got: What the result has; None where the metric has no number: see `Verification.reaches`.
        held: Whether that is enough.
        of_float: What the float model itself has by the same labels; None where labels do not tell.
    """

    name: str
    want: float
    got: float | None
    held: bool
    of_float: float | None = None

    @property
    def float_held(self) -> bool | None:
        """Whether the float model itself has enough; None where that is not known."""
        return None if self.of_float is None else self.of_float >= self.want

    @property
    def in_words(self) -> str:
        """What it came to, for a line of a summary."""
        if self.held:
            return f"--{self.name} {self.want:g}: held"
        return f"--{self.name} {self.want:g}: fell short{self._beside_float}"

    @property
    def as_error(self) -> str:
        """A sentence on how far it fell short."""
        got = "no such measure" if self.got is None else f"{self.got:.4g}"
        return f"Gate fell short: --{self.name} {self.want:g}, got {got}{self._beside_float}."

    @property
    def _beside_float(self) -> str:
        if self.of_float is None:
            return ""
        if self.float_held:
            return f"; the float model has {self.of_float:.4g}"
        why = "no quantized file can be expected to reach it"
        return f"; the float model itself has {self.of_float:.4g} on these pictures, so that {why}"

    def as_dict(self) -> dict[str, Any]:
        """What `--json` prints of it."""
        return {
            "name": self.name,
            "want": self.want,
            "got": self.got,
            "held": self.held,
            "float": self.of_float,
            "float_held": self.float_held,
        }
