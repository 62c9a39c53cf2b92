"""What values must be, said in one way: for the types of recipe.py and pixels.py, which check themselves."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import fields
from enum import StrEnum
from os import PathLike
from typing import Any

from qconv.errors import QconvError


def spelt(name: str) -> str:
    """A field's name as it is spelt on the command line."""
    return f"--{name.replace('_', '-')}"


def require_whole(name: str, value: object) -> None:
    """Raises QconvError for what is no whole number."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    require(whole, f"{spelt(name)} {value!r}", "use a whole number.")


def as_numbers(value: Any, option: str) -> tuple[float, ...]:
    """One number or several, as floats."""
    try:
        return tuple(
            float(v) for v in (value if isinstance(value, Iterable) and not isinstance(value, str) else [value])
        )
    except (TypeError, ValueError):
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


def plain(thing: Any) -> Any:
    """JSON-ready form of what is checked here."""
    if hasattr(thing, "__dataclass_fields__"):
        return {f.name: plain(getattr(thing, f.name)) for f in fields(thing)}
    if isinstance(thing, tuple):
        return [plain(item) for item in thing]
    return str(thing) if isinstance(thing, StrEnum) else thing


def require(condition: bool, fact: str, fix: str) -> None:
    """Raises QconvError where the condition does not hold."""
    if not condition:
        raise QconvError(f"{fact} is not possible.", fix)


def require_finite(option: str, numbers: tuple[float, ...] | None) -> None:
    """Raises QconvError for an empty list, and for numbers that are not finite; None is no list."""
    if numbers is None:
        return
    if not numbers:
        raise QconvError(f"{option} is empty.", "give one number, or one a channel.")
    odd = next((number for number in numbers if not math.isfinite(number)), None)
    if odd is not None:
        raise QconvError(f"{option} has a value that is no finite number: {odd}.", "give one number, or one a channel.")
