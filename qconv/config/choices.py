"""Lists the values that recipe options accept, by the names that users know, and validates plain values.

Standard library only, so that `qconv --help` imports no numpy. The `require_*`, `as_*` and `take_types` functions check
and convert what classes of options are given, and raise a QconvError with the fix.
"""

from __future__ import annotations

import functools
import math
import operator
import reprlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from enum import StrEnum
from os import PathLike, fspath
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from qconv.errors import QconvError, format_shape


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

PACKED_BITS = 7
"""Codes of up to so many bits can be stored in less than a byte each."""

INT4_BITS, INT4_OPSET, INT4_RUNTIME = 4, 21, (1, 23)
"""Codes that int4 holds; from which on ONNX Runtime computes a Cast of it at load. Measured on 1.19.2 to 1.32.0."""

OLDEST_RUNTIME = (1, 19)
"""The oldest ONNX Runtime that a file can be written for by `--needs`: older ones were not measured."""

COMMON_RUNTIME = (1, 30)
"""What packed codes may need where `--needs` does not say it: the common ground of the newest three releases."""

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

    activations: WIDE_BITS and FLOAT_BITS are for any node, which computes on as many bits, and writes them.
    in_float: the node stays float, and no bits are its.
    """

    weights: int | None = None
    activations: int | None = None
    in_float: bool = False

    def __post_init__(self) -> None:
        take_types(self, {name: f"{name} of LayerBits" for name in ("weights", "activations", "in_float")})

    @property
    def impossible(self) -> str | None:
        """What of it no layer can have, in words."""
        given_bits = {"weights": self.weights, "activations": self.activations}
        known = {"weights": WEIGHT_BITS | {None}, "activations": ACTIVATION_BITS | {None}}
        return next((f"{kind} of {bits} bits" for kind, bits in given_bits.items() if bits not in known[kind]), None)

    @property
    def names_any_node(self) -> bool:
        """Whether it says something of nodes without weights, too."""
        return self.in_float or self.activations in (WIDE_BITS, FLOAT_BITS)


PICTURE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif"})
"""Of the files in a folder that are decoded."""

SAMPLE_SUFFIXES = frozenset({".npy", ".npz"})
"""Of those that hold arrays."""

DROP_MEASURES = {
    **dict.fromkeys(("agreement", "boxes", "map", "miou", "top1"), "a share from 0 to 1"),
    "sqnr": "decibels",
}

GATE_OPTIONS = ("min_agreement", "min_boxes", "min_map", "min_miou", "min_sqnr")
"""Options that end with status 3 where the result falls short: shares, but for decibels of SQNR."""

EVALUATE_GATES = (*GATE_OPTIONS, "min_top1")
"""Those of `evaluate`, which reads class folders unasked."""

CANDIDATE_BITS = (2, 3, 4, 5, 6, 8)

WIDE_BITS, FLOAT_BITS = 16, 32
"""Bits of activations where 8 lose too much."""

FLOAT_BUDGET = 0.1
"""Share of the all-integer time that may be spent on float for accuracy."""

PRECISE_SHARE = 0.2
"""Share of activations that may have more than 8 bits where times are not known."""


@dataclass(frozen=True, slots=True)
class Drop:
    """What bits may cost on the calibration pictures.

    measure: one of DROP_MEASURES. value: the share that may be lost; of "sqnr" the least dB.
    """

    measure: str
    value: float

    def __post_init__(self) -> None:
        take_types(self, {"measure": "measure of Drop", "value": "value of Drop"})

    def __str__(self) -> str:
        return f"{self.measure}:{self.value:g}"


def option_name(name: str) -> str:
    """A field's name as it is spelt on the command line."""
    return f"--{name.replace('_', '-')}"


def take_types(options: Any, said: Mapping[str, str] | None = None) -> None:
    """Give the fields of a frozen dataclass the types of their annotations.

    What stands for such a value is taken: numpy's numbers, paths for texts, several values in a list, one in place of
    several. Members of enumerations may stay texts, see `as_member`.

    Args:
        options: The dataclass.
        said: What an error calls a field; by default the option of its name.

    Raises:
        QconvError: A value has another type.
    """
    kind: Any = type(options)
    for name, wanted in _field_types(kind).items():
        told = (said or {}).get(name, option_name(name))
        object.__setattr__(options, name, as_type(getattr(options, name), wanted, told))


@functools.cache
def _field_types(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def as_type(value: Any, wanted: Any, told: str) -> Any:
    """The value as this annotation has it, see `take_types`. told: what an error calls it."""
    try:
        return _convert(value, wanted)
    except (TypeError, ValueError, ArithmeticError):
        fix = f"use {describe_type(wanted)}."
        raise QconvError(f"{told} {reprlib.repr(value)} is not possible.", fix) from None


def _convert(value: Any, wanted: Any) -> Any:
    """Raises TypeError, ValueError or ArithmeticError for what has another type."""
    parts = get_args(wanted)
    if get_origin(wanted) in (Union, UnionType):
        return _convert_to_any(value, parts)
    if get_origin(wanted) is tuple:
        return _convert_to_tuple(value, parts)
    if type(value).__module__ == "numpy" and getattr(value, "shape", None) == ():
        value = value.item()
    convert = _CONVERSIONS.get(wanted)
    if convert is not None:
        return convert(value)
    if not isinstance(value, str if issubclass(wanted, StrEnum) else wanted):
        raise TypeError
    return value


def _convert_to_any(value: Any, kinds: Iterable[Any]) -> Any:
    for kind in kinds:
        try:
            return _convert(value, kind)
        except (TypeError, ValueError, ArithmeticError):
            continue
    raise TypeError


def _convert_to_tuple(value: Any, parts: tuple[Any, ...]) -> tuple[Any, ...]:
    """parts: kinds of its items; of any number of items where the second is `...`."""
    scalar = getattr(value, "shape", None) == ()  # an array without axes
    one = scalar or isinstance(value, str | bytes | PathLike | Mapping) or not isinstance(value, Iterable)
    if parts[-1] is not ...:
        return tuple(_convert(item, kind) for item, kind in zip((value,) if one else value, parts, strict=True))
    if one:
        return (_convert(value, parts[0]),)
    found = [_convert(item, parts[0]) for item in value]
    return tuple(sorted(found) if isinstance(value, set | frozenset) else found)  # whose order no one knows


def _as_bool(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value


def _as_integer(value: Any) -> int:
    if isinstance(value, bool):
        raise TypeError
    return operator.index(value)


def _as_float(value: Any) -> float:
    axes: tuple[int, ...] = getattr(value, "shape", ())
    if axes or isinstance(value, bool | str | bytes | bytearray):
        raise TypeError
    return float(value)


def _as_text(value: Any) -> str:
    found = fspath(value)
    if not isinstance(found, str):
        raise TypeError
    return str(found)


def _as_path(value: Any) -> Path:
    found = _as_text(value)
    if not found:
        raise ValueError("no path")
    return Path(found)


def _as_none(value: Any) -> None:
    if value is not None:
        raise TypeError


_CONVERSIONS: dict[Any, Callable[[Any], Any]] = {
    bool: _as_bool,
    int: _as_integer,
    float: _as_float,
    str: _as_text,
    Path: _as_path,
    NoneType: _as_none,
}

_TYPES_IN_WORDS: dict[Any, str] = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "a text",
    Path: "a path",
    NoneType: "None",
}


def describe_type(wanted: Any) -> str:
    """An annotation in the words of an error."""
    parts = get_args(wanted)
    if get_origin(wanted) in (Union, UnionType):
        return " or ".join(map(describe_type, parts))
    if get_origin(wanted) is tuple and parts[-1] is ...:
        return f"{describe_type(parts[0])}, or several in a tuple"
    if get_origin(wanted) is tuple:
        return f"({', '.join(map(describe_type, parts))})"
    if wanted in _TYPES_IN_WORDS:
        return _TYPES_IN_WORDS[wanted]
    return " or ".join(wanted) if issubclass(wanted, StrEnum) else f"{wanted.__name__}(...)"


def as_texts(value: Any, told: str) -> tuple[str, ...]:
    """One text or path, or several. told: what an error calls it."""
    found: tuple[str, ...] = as_type(value, tuple[str, ...], told)
    require("" not in found, f"{told} with an empty text", "name folders or files.")
    return found


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


def require_range(told: str, value: int | None, least: int, most: int | None = None) -> None:
    """Raise QconvError for a number out of range; None is one that was not given. most: None for no bound."""
    if value is None:
        return
    inside = least <= value and (most is None or value <= most)
    require(inside, f"{told} {value}", f"use {least} or more." if most is None else f"use {least} to {most}.")


def require_size(size: tuple[int, int] | None) -> None:
    """Raise QconvError for images without pixels. size: height and width, or None."""
    if size is not None:
        require(min(size) >= 1, f"--size {format_shape(size)}", "use at least 1x1.")


MOST_THREADS = 1024


def check_run_options(threads: int | None, gated: Any = None) -> None:
    """Raises QconvError for a number of threads, and for gates, that cannot be. gated: has some of EVALUATE_GATES."""
    require_range("--threads", as_type(threads, int | None, "--threads"), 1, MOST_THREADS)
    for name in EVALUATE_GATES:
        told = option_name(name)
        least = as_type(getattr(gated, name, None), float | None, told)
        if least is not None and name == "min_sqnr":
            require(math.isfinite(least), f"{told} {least}", "use a number of dB.")
        elif least is not None:
            require(0 <= least <= 1, f"{told} {least}", "use a share from 0 to 1.")


def require_finite(option: str, numbers: tuple[float, ...] | None) -> None:
    """Raises QconvError for an empty list, and for numbers that are not finite; None is no list."""
    if numbers is None:
        return
    if not numbers:
        raise QconvError(f"{option} is empty.", "give one number, or one a channel.")
    odd = next((number for number in numbers if not math.isfinite(number)), None)
    if odd is not None:
        raise QconvError(f"{option} has a value that is no finite number: {odd}.", "give one number, or one a channel.")
