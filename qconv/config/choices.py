"""What a recipe chooses from, by the names that users know."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any


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

CALIBRATORS = ("minmax", "ema", "mean-extremes", "percentile", "entropy", "mse", "output-mse", "aciq")
PERCENTILE = 99.99
WEIGHT_CALIBRATORS = ("max", "mse", "aciq")
ROUNDINGS = ("nearest", "second-order", "reconstruct")
EFFORTS = ("fast", "balanced", "best")
BIT_ALLOCATIONS = ("none", "weights", "activations", "both")
CHANNEL_CALIBRATORS = ("minmax", "aciq")
"""Calibrators that know a range for each channel of a tensor."""
BIAS_CORRECTIONS = ("measured", "sequential", "analytic", "none")
NO_PICTURES = "none"
"""In place of calibration pictures: what BatchNormalization tells must do."""
FALLBACKS = ("random", "synthesized")
"""What is looked at where that does not do."""
STEPS = 30
"""Moves of a synthesized picture: statistics come no nearer in more."""
DEVICES = ("auto", "cpu", "cuda")
CHOICES = {
    "calibrator": CALIBRATORS,
    "weight_calibrator": WEIGHT_CALIBRATORS,
    "effort": EFFORTS,
    "rounding": ROUNDINGS,
    "bit_allocation": BIT_ALLOCATIONS,
    "bias_correction": BIAS_CORRECTIONS,
}
RECIPES: dict[str, dict[str, Any]] = {
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


CALIBRATOR = "output-mse"
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


DROPS = {"agreement": "a share from 0 to 1", "top1": "a share from 0 to 1", "sqnr": "decibels"}
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
