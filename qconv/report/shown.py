"""What a page for the eye is made of: all that `html.render` puts on it, and nothing that it has to work out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qconv.results.comparison import Comparison, Diagnosis, Sweep
from qconv.results.quantize import Audit
from qconv.results.training import SynthesisResult

Tone = Literal["good", "bad", "plain"]


@dataclass(frozen=True, slots=True)
class Tile:
    """A number to see first. label: what it is of; value: with its unit; note: how it came about."""

    label: str
    value: str
    note: str = ""
    tone: Tone = "plain"


@dataclass(frozen=True, slots=True)
class Picture:
    """A small picture. name: of the file that it is of; png: the bytes of another."""

    name: str
    png: bytes


@dataclass(frozen=True, slots=True)
class Page:
    """One report. Whatever is None or empty has no place on the page.

    verdict: one or two sentences. without: why `compared` is None. fed: the preprocessing in words. contact: pictures
    as the network got them; caption: what is to be said of those, or why there are none. command: makes the page
    again; recipe: as JSON. changes: (step, what, how often); skipped: (where, why).
    """

    title: str
    subtitle: str
    tiles: tuple[Tile, ...]
    verdict: str
    version: str
    warnings: tuple[str, ...] = ()
    compared: Comparison | None = None
    without: str = ""
    audit: Audit | None = None
    fed: str = ""
    contact: tuple[Picture, ...] = ()
    caption: str = ""
    command: str = ""
    recipe: str = ""
    changes: tuple[tuple[str, str, int], ...] = ()
    skipped: tuple[tuple[str, str], ...] = ()
    diagnosis: Diagnosis | None = None
    sweep: Sweep | None = None
    synthesis: SynthesisResult | None = None
