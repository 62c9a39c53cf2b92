"""Lists the values that recipe options accept, by the names that users know, and validates plain values.

Standard library only, so that `qconv --help` imports no numpy. The `require_*` and `as_*` functions check and convert
what `config/recipe.py` and `config/data_options.py` are given, and raise a QconvError with the fix.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from enum import StrEnum
from os import PathLike
from typing import Any

from qconv.errors import QconvError


class Scheme(StrEnum):
    """Whether zero sits on a fixed code (symmetric) or where the range puts it (asymmetric)."""

    SYMMETRIC = "symmetric"
    ASYMMETRIC = "asymmetric"


class WeightGranularity(StrEnum):
    """How many weights share a scale."""

    PER_TENSOR = "per-tensor"
    PER_CHANNEL = "per-channel"
    PER_BLOCK = "per-block"


BLOCK_SIZE = 32

PACKED_BITS = 4
"""Codes of up to so many bits can be stored two in a byte."""

CALIBRATOR_NAMES = ("minmax", "ema", "mean-extremes", "percentile", "entropy", "mse", "output-mse", "aciq")

PERCENTILE = 99.99

WEIGHT_CALIBRATORS = ("max", "mse", "aciq")

ROUNDINGS = ("nearest", "second-order", "reconstruct")

EFFORTS = ("fast", "balanced", "best")

BIT_ALLOCATIONS = ("none", "weights", "activations", "both")

CHANNEL_CALIBRATORS = ("minmax", "aciq")
"""Calibrators that know a range for each channel of a tensor."""

BIAS_CORRECTIONS = ("measured", "sequential", "analytic", "none")

NO_IMAGES = "none"
"""In place of calibration pictures: what BatchNormalization tells must do."""

FALLBACKS = ("random", "synthesized")
"""What is looked at where that does not do."""

SYNTHESIS_STEPS = 30
"""Moves of a synthesized picture: statistics come no nearer in more."""

TASKS = ("auto", "classify", "segment", "regress")
"""What a model is for; auto finds it out, output by output."""

DEVICES = ("auto", "cpu", "cuda")

OPTION_CHOICES = {
    "calibrator": CALIBRATOR_NAMES,
    "weight_calibrator": WEIGHT_CALIBRATORS,
    "effort": EFFORTS,
    "rounding": ROUNDINGS,
    "bit_allocation": BIT_ALLOCATIONS,
    "bias_correction": BIAS_CORRECTIONS,
}

NAMED_RECIPES: dict[str, dict[str, Any]] = {
    "aciq-w4a4": {
        "weight_bits": 4,
        "activation_bits": 4,
        "calibrator": "aciq",
        "weight_calibrator": "max",
        "bit_allocation": "both",
        "bias_correction": "measured",
        "rounding": "nearest",
        "equalize": False,
        "tune_ranges": False,
    },
}
"""Published recipes by name: fields of Recipe. `aciq-w4a4`: Banner et al. 2019, arXiv 1810.05723, who clip activations
and not weights."""

FEW_BITS_CALIBRATOR = "output-mse"

FEW_BITS = 6
"""Up to so many, differences of codes are no larger than 63: in eight bits there is room to move zero to code 0, and no
pair of products overflows 16 bits."""

WEIGHT_BITS = frozenset({*range(2, 9), 16})

ACTIVATION_BITS = WEIGHT_BITS | {32}


@dataclass(frozen=True, slots=True)
class LayerBits:
    """Bits of a layer's weights, and of the tensor that it reads; None for the recipe's own.

    in_float: the layer stays float, and no bits are its.
    """

    weights: int | None = None
    activations: int | None = None
    in_float: bool = False

    @property
    def impossible(self) -> str | None:
        """What of it no layer can have, in words."""
        wishes = {"weights": self.weights, "activations": self.activations}
        known = WEIGHT_BITS | {None}
        return next((f"{kind} of {bits} bits" for kind, bits in wishes.items() if bits not in known), None)


PICTURE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif"})
"""Of the files in a folder that are decoded."""

SAMPLE_SUFFIXES = frozenset({".npy", ".npz"})
"""Of those that hold arrays."""

DROP_MEASURES = {"agreement": "a share from 0 to 1", "top1": "a share from 0 to 1", "sqnr": "decibels"}

CANDIDATE_BITS = (2, 3, 4, 5, 6, 8)

FLOAT_BITS = 32


@dataclass(frozen=True, slots=True)
class Drop:
    """What bits may cost on the calibration pictures.

    measure: "agreement" or "top1", and value the share that may be lost; "sqnr", and value the least dB.
    """

    measure: str
    value: float

    def __str__(self) -> str:
        return f"{self.measure}:{self.value:g}"


def option_name(name: str) -> str:
    """A field's name as it is spelt on the command line."""
    return f"--{name.replace('_', '-')}"


def require_integer(name: str, value: object) -> None:
    """Raises QconvError for what is no whole number."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    require(whole, f"{option_name(name)} {value!r}", "use a whole number.")


def as_numbers(value: Any, option: str) -> tuple[float, ...]:
    """One number or several, as floats."""
    try:
        return tuple(
            float(v) for v in (value if isinstance(value, Iterable) and not isinstance(value, str) else [value])
        )
    except (TypeError, ValueError, OverflowError):
        raise QconvError(f"{option} {value!r} is not possible.", "use numbers.") from None


def as_texts(value: Any, option: str) -> tuple[str, ...]:
    """One text or path, or several."""
    if isinstance(value, str | PathLike):
        return (str(value),)
    require(isinstance(value, Iterable), f"{option} {value!r}", "use a text, or several in a tuple.")
    return tuple(map(str, value))


def as_member(kind: type[StrEnum], value: str, option: str) -> StrEnum:
    """The member that is spelt like `value`: plain texts are fine for those who write Python."""
    require(value in list(kind), f"{option} {value}", f"use {' or '.join(kind)}.")
    return kind(value)


def as_json_value(thing: Any) -> Any:
    """JSON-ready form of what is checked here."""
    if hasattr(thing, "__dataclass_fields__"):
        return {f.name: as_json_value(getattr(thing, f.name)) for f in fields(thing)}
    if isinstance(thing, tuple):
        return [as_json_value(item) for item in thing]
    return str(thing) if isinstance(thing, StrEnum) else thing


def require(condition: bool, fact: str, fix: str) -> None:
    """Raises QconvError where the condition does not hold."""
    if not condition:
        raise QconvError(f"{fact} is not possible.", fix)


MOST_THREADS = 1024


def check_run_options(threads: int | None, min_agreement: float | None = None, min_sqnr: float | None = None) -> None:
    """Raises QconvError for a number of threads, and for gates (a share, and in dB), that cannot be."""
    if threads is not None:
        require_integer("threads", threads)
    few = threads is None or 1 <= threads <= MOST_THREADS
    require(few, f"--threads {threads}", f"use 1 to {MOST_THREADS}.")
    share = min_agreement is None or 0 <= min_agreement <= 1
    require(share, f"--min-agreement {min_agreement}", "use a share from 0 to 1.")
    finite = min_sqnr is None or math.isfinite(min_sqnr)
    require(finite, f"--min-sqnr {min_sqnr}", "use a number of dB.")


def require_finite(option: str, numbers: tuple[float, ...] | None) -> None:
    """Raises QconvError for an empty list, and for numbers that are not finite; None is no list."""
    if numbers is None:
        return
    if not numbers:
        raise QconvError(f"{option} is empty.", "give one number, or one a channel.")
    odd = next((number for number in numbers if not math.isfinite(number)), None)
    if odd is not None:
        raise QconvError(f"{option} has a value that is no finite number: {odd}.", "give one number, or one a channel.")
