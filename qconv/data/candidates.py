"""The preprocessings that may have been meant: published normalisations in either colour order, as far as a fact in the
file and the user's word leave them possible.

A family that is no preset is there so that what was trained otherwise is not taken for a preset that is only near.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from qconv.config.preprocessing import Color, Preprocessing, PreprocessingOptions
from qconv.data.evidence import Fact, Reference
from qconv.data.fit import Moments
from qconv.data.preprocess import InputSpec, resolve

OTHER_ORDER = -1.5
"""ln of how much rarer the other colour order is than the preset's own."""


@dataclass(frozen=True, slots=True)
class Family:
    """A normalisation that networks were trained with. options: as the command line takes them. prior: ln of how
    frequent it is beside the others."""

    name: str
    options: PreprocessingOptions
    prior: float = 0.0

    @property
    def settled_by(self) -> str:
        """The options that ask for it."""
        numbers = (("scale", self.options.scale), ("mean", self.options.mean), ("std", self.options.std))
        more = (f" --{name} {_number(value)}" for name, value in numbers if value is not None)
        return f"--preprocess {self.options.preset}{''.join(more)}"


COLOURED: tuple[Family, ...] = (
    Family("imagenet", PreprocessingOptions("imagenet")),
    Family("tf", PreprocessingOptions("tf")),
    Family("caffe", PreprocessingOptions("caffe"), -0.5),
    Family("unit", PreprocessingOptions("unit")),
    Family("raw", PreprocessingOptions("raw")),
    Family("unit less 0.5", PreprocessingOptions("unit", mean=(0.5,)), -1.0),
    Family("raw less 127.5", PreprocessingOptions("raw", mean=(127.5,)), -1.0),
    Family("imagenet without std", PreprocessingOptions("imagenet", std=(1.0,)), -1.5),
)
GREY: tuple[Family, ...] = (
    Family("unit", PreprocessingOptions("unit")),
    Family("tf", PreprocessingOptions("tf")),
    Family("raw", PreprocessingOptions("raw")),
    Family("MNIST's mean and std", PreprocessingOptions("unit", mean=(0.1307,), std=(0.3081,)), -0.5),
    Family("unit less 0.5", PreprocessingOptions("unit", mean=(0.5,)), -1.0),
)


def _number(value: float | tuple[float, ...]) -> str:
    return ",".join(f"{v:.6g}" for v in (value if isinstance(value, tuple) else (value,)))


@dataclass(slots=True)
class Candidate:
    """One way to feed the network, and what was seen of it.

    prior: ln of how frequent it is. fit: ln of its probability by the first layers' statistics, but for a constant;
    lead: what the confidence of the output adds. peaks: of the class scores, a picture each (fit.py).
    """

    family: str
    settled_by: str
    preprocessing: Preprocessing
    prior: float
    moments: Moments
    fit: float
    swapped: bool = False
    lead: float = 0.0
    peaks: list[float] = field(default_factory=list)

    @property
    def name(self) -> str:
        """As the report calls it."""
        return f"{self.family} in {self.preprocessing.color.upper()}" if self.swapped else self.family

    @property
    def score(self) -> float:
        """ln of its probability by all that was seen, but for a constant."""
        return self.fit + self.lead

    @property
    def numbers(self) -> tuple[Any, ...]:
        """What tells two of them apart."""
        prep = self.preprocessing
        wide = (tuple(np.broadcast_to(np.array(v), prep.channels).tolist()) for v in (prep.mean, prep.std))
        return (prep.color, prep.scale, *wide)

    def is_twin_of(self, other: Candidate) -> bool:
        """Whether only the colour order differs."""
        return self.family == other.family and self.preprocessing.color is not other.preprocessing.color


def inverted(candidate: Candidate, known: Sequence[Reference]) -> Candidate:
    """The candidate with black for white, which is no family: (255 - pixel) in place of the pixel."""
    prep = candidate.preprocessing
    mean = tuple(m - 255 * prep.scale for m in prep.mean)
    return Candidate("inverted", "", replace(prep, scale=-prep.scale, mean=mean), 0.0, Moments(known), 0.0)


@dataclass(frozen=True, slots=True)
class Field:
    """What all candidates share: the network's input, how pictures get its size, and what they are compared with."""

    spec: InputSpec
    default: Preprocessing
    known: Sequence[Reference]

    def candidates(self, fact: Fact | None, said: dict[str, Any]) -> list[Candidate]:
        """What is possible: the families, or what a fact leaves of them, with the user's word put over all of it."""
        families = COLOURED if self.default.channels == 3 else GREY
        if "preset" in said:
            families = (Family(said["preset"], PreprocessingOptions(said["preset"])),)
        elif fact is not None:
            families = (Family(str(fact.options.preset), fact.options),)
        found: dict[tuple[Any, ...], Candidate] = {}
        for family in families:
            for candidate in self._orders(family, said):
                found.setdefault(candidate.numbers, candidate)
        return list(found.values())

    def _orders(self, family: Family, said: dict[str, Any]) -> list[Candidate]:
        """The family in its own colour order and, unless that is settled, in the other."""
        options = replace(family.options, **self._shape(family), **said)
        own = self._candidate(family, options, swapped=False)
        if options.color is not None or self.default.channels == 1 or "preset" in said:
            return [own]
        other = Color.RGB if own.preprocessing.color is Color.BGR else Color.BGR
        return [own, self._candidate(family, replace(options, color=other), swapped=True)]

    def _shape(self, family: Family) -> dict[str, Any]:
        """How pictures get the input's size; a fact may know, where the user has said nothing."""
        prep = self.default
        resize = family.options.resize if prep.resize == "auto" else prep.resize
        shape: dict[str, Any] = {"layout": prep.layout, "filter": prep.filter, "size": prep.size, "resize": resize}
        return shape | ({"color": None} if prep.channels == 1 else {})

    def _candidate(self, family: Family, options: PreprocessingOptions, *, swapped: bool) -> Candidate:
        prep = resolve(options, self.spec, class_vector=self.default.class_vector)
        settled_by = family.settled_by + (f" --color {prep.color}" if swapped else "")
        prior = family.prior + (OTHER_ORDER if swapped else 0.0)
        return Candidate(family.name, settled_by, prep, prior, Moments(self.known), prior, swapped)
