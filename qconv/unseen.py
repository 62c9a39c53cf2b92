"""Statistics without pictures, as those who ask for them know them: sketches and channels by what is told (told.py).

Tensors that nothing tells of are watched on made-up pictures where the user has asked for that; else they are an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from qconv.calibrate import Tap, observer, watch, watch_apart
from qconv.choices import NO_PICTURES
from qconv.errors import QconvError, counted
from qconv.findings import Change
from qconv.graph import DataType, Model, Value
from qconv.imagined import Imagined, pixels, read_by
from qconv.normal import Normal
from qconv.portray import channels_of, sketched
from qconv.reach import Channels, seen_by_channel
from qconv.sketch import Sketch
from qconv.told import MOST_GUESSES, told

STEP = "told"
NAMED = 3
"""Tensors that an error names."""


@dataclass(slots=True)
class Unseen:
    """model: the name of the user's file. imagined: what stands in for its pictures; fallback: whether it is watched.

    findings: where the newest statistics are from.
    """

    model: str
    imagined: Imagined
    fallback: str | None
    threads: int | None
    findings: list[Change] = field(default_factory=list)

    def known(self, model: Model) -> dict[Value, Normal | str]:
        """What is told of every tensor of a folded model, or why nothing is."""
        return told(model, {value: _as_read(value, self.imagined) for value in model.graph.inputs})

    def sketches(self, model: Model, taps: Sequence[Tap]) -> dict[str, Sketch]:
        """Of these tensors. Raises QconvError where nothing tells of some, and they are not to be watched."""
        found = {value.name or "": known for value, known in self.known(model).items()}
        missing = self._missing(taps, found)
        seen = {}
        if missing:
            seen = watch(observer(model, missing, self.threads), missing, self.imagined.all("calibrate"))
        self.findings = []
        for tap in taps:
            known = found.get(tap.name, "")
            if isinstance(known, Normal):
                seen[tap.name] = sketched(tap.name, known)
            self._tell(tap.name, known)
        return seen

    def channels(self, model: Model, taps: Sequence[Tap]) -> dict[str, Channels]:
        """The same, channel by channel; nothing of what is neither told nor watched."""
        known = self.known(model)
        by_name = {value.name or "": found for value, found in known.items()}
        told_of = {value.name or "": channels_of(f, value) for value, f in known.items() if isinstance(f, Normal)}
        missing = [tap for tap in taps if not isinstance(by_name.get(tap.name), Normal)] if self.fallback else []
        if missing:
            seen = watch_apart(observer(model, missing, self.threads), missing, self.imagined.all("equalize"))
            told_of |= seen_by_channel(seen)
        wanted = {tap.name for tap in taps}
        return {name: found for name, found in told_of.items() if name in wanted}

    def _missing(self, taps: Sequence[Tap], found: dict[str, Normal | str]) -> list[Tap]:
        missing = [tap for tap in taps if not isinstance(found.get(tap.name), Normal)]
        if missing and self.fallback is None:
            shown = ", ".join(repr(tap.name) for tap in missing[:NAMED])
            more = f" and {len(missing) - NAMED} more" if len(missing) > NAMED else ""
            why = found.get(missing[0].name)
            told_of = f"{counted(len(missing), 'tensor')} of {len(taps)} that need a range: {shown}{more}"
            raise QconvError(
                f"{self.model} says nothing of {told_of} ({why or 'nothing leads there'}).",
                f"--calib {NO_PICTURES} lives on BatchNormalizations that are still there: export the model before they "
                "are folded, pass pictures, or pass --fallback random to watch made-up ones.",
            )
        return missing

    def _tell(self, tensor: str, known: Normal | str | None) -> None:
        if not isinstance(known, Normal):
            what = f"range by {self.imagined.kind} pictures: {known or 'nothing tells of it'}"
            self.findings.append(Change(STEP, tensor, what, f"ranges by {self.imagined.kind} pictures"))
        elif known.guesses == 1:
            what = "range guessed by weights: no BatchNormalization follows the layer in front"
            self.findings.append(Change(STEP, tensor, what, "ranges guessed by weights"))
        else:
            what = "range by pixels" if known.guesses else "range by what BatchNormalization says"
            self.findings.append(Change(STEP, tensor, what, "ranges by what BatchNormalization says"))


def _as_read(value: Value, imagined: Imagined) -> Normal:
    """What one input of the network holds."""
    prep = imagined.preprocessing
    assert prep is not None
    as_bytes = value.dtype == DataType.UINT8 and not prep.keeps_pixels
    found = pixels(prep.channels) if as_bytes else read_by(prep)
    return Normal(found.mean, found.std, True, found.low, found.high, None, MOST_GUESSES)
