"""What is compared at few bits: settings, granularities, and the ways of quantizing, as plain data.

A new way is an entry in VARIANTS. One whose options `qconv quantize --help` does not know yet is skipped, and said so.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

GRANULARITIES = ("per-channel", "per-tensor")


@dataclass(frozen=True)
class Setting:
    """Bits of weights and of activations; 32: activations stay float. First and last layer have 8 at least."""

    weight: int
    activation: int

    def __str__(self) -> str:
        return f"W{self.weight}A{self.activation}"


def setting(text: str) -> Setting:
    """'W4A8', or 'W4' for weights only."""
    found = re.fullmatch(r"W(\d+)(?:A(\d+))?", text.upper())
    if found is None:
        raise ValueError(f"{text} is no setting such as W4A8")
    return Setting(int(found[1]), int(found[2] or 32))


# weights of 16 bits are as good as float: what is lost at W16A8 is lost by 8-bit activations, whatever the rounding
CEILING = setting("W16A8")
BELOW = ("W8A8", "W6A6", "W4A8", "W4A4", "W3A8", "W3A3", "W2A8", "W2A4", "W4A32", "W3A32")
SETTINGS = (CEILING, *map(setting, BELOW))
W8A8 = setting("W8A8")


@dataclass(frozen=True)
class Variant:
    """One way to call `qconv quantize`.

    pinned: given as far as they are known, so that the variant stays what it is when defaults move on.
    settings: those that it is for; None for all. granularities: of weights.
    """

    name: str
    what: str
    options: tuple[str, ...] = ()
    pinned: tuple[str, ...] = ()
    settings: tuple[Setting, ...] | None = None
    granularities: tuple[str, ...] = GRANULARITIES


@dataclass(frozen=True)
class Peer:
    """Another tool, at 8 bits.

    how: its method. most: pictures of 224x224, where it keeps all their tensors. nncf: run by the interpreter that
    --nncf names, on a file whose BatchNorms quant_pre_process has folded, as NNCF itself leaves them in float.
    """

    name: str
    what: str
    how: str
    most: int | None = None
    nncf: bool = False

    @property
    def granularities(self) -> tuple[str, ...]:
        """NNCF has no choice for ONNX."""
        return GRANULARITIES[:1] if self.nncf else GRANULARITIES


NEAREST = ("--effort", "fast", "--rounding", "nearest")

VARIANTS: tuple[Variant, ...] = (
    Variant(
        "naive",
        "round to nearest, min-max",
        ("--effort", "fast", "--calibrator", "minmax"),
        settings=tuple(each for each in SETTINGS if each.activation < 32),
    ),
    Variant("nearest", "round to nearest, ranges by output-mse", pinned=NEAREST),
    Variant(
        "aciq",
        "Banner et al.'s recipe",
        ("--recipe-name", "aciq-w4a4"),
        settings=(setting("W4A4"),),
        granularities=GRANULARITIES[:1],
    ),
    Variant("balanced", "second-order rounding", ("--effort", "balanced")),
    Variant("best", "and what takes longer", ("--effort", "best")),
)
PEERS: tuple[Peer, ...] = (
    Peer("static-minmax", "quantize_static, MinMax", "MinMax"),
    Peer("static-entropy", "quantize_static, Entropy", "Entropy", most=32),
    Peer("static-percentile", "quantize_static, Percentile", "Percentile", most=32),
    Peer("nncf", "nncf.quantize's default, BatchNorms folded before", "performance", nncf=True),
    Peer("nncf-mixed", "the same with asymmetric activations", "mixed", nncf=True),
    Peer("nncf-accurate", "the same with asymmetric activations and slow bias correction", "accurate", nncf=True),
)
NAMES = tuple(way.name for way in (*VARIANTS, *PEERS))

Known = Mapping[str, frozenset[str] | None]


def known_options(help_text: str) -> Known:
    """The options in what --help prints: to the values that each takes, or None where it does not list them."""
    line = re.compile(r"^\s+(?:-\w, )?(--[a-z][a-z-]*)(?: / (--[a-z][a-z-]*))?(?: \[([^\]\s]+)\])?", re.MULTILINE)
    known: dict[str, frozenset[str] | None] = {}
    for name, other, values in line.findall(help_text):
        known[name] = frozenset(values.split("|")) if values else None
        if other:
            known[other] = None
    return known


def unknown(options: Sequence[str], known: Known) -> str | None:
    """The first of `options` (a name before each value) that `known` lacks."""
    for index, option in enumerate(options):
        if not option.startswith("--"):
            continue
        if option not in known:
            return option
        value = options[index + 1] if index + 1 < len(options) else ""
        allowed = known[option]
        if allowed is not None and value not in allowed:
            return f"{option} {value}".strip()
    return None


def given(variant: Variant, known: Known) -> tuple[str, ...]:
    """The variant's options, and of its pinned ones those that are known. Both are pairs of name and value."""
    pairs = zip(variant.pinned[::2], variant.pinned[1::2], strict=True)
    pinned = [word for pair in pairs if unknown(pair, known) is None for word in pair]
    return (*pinned, *variant.options)
