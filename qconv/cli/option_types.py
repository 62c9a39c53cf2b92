"""This module defines the types of values that options take."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Any

import click

from qconv.config.choices import FLOAT_BITS, Drop

if TYPE_CHECKING:
    from click import ParamType
else:

    class ParamType(click.ParamType):
        """click's, which takes the type of its values in brackets only from 8.4 on."""

        def __class_getitem__(cls, values):
            return cls


class NumbersType(ParamType[tuple[float, ...]]):
    """Comma-separated numbers; fractions such as 1/255 are accepted."""

    name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        """The numbers, or a usage error."""
        if isinstance(value, tuple):
            return value
        try:
            return tuple(parse_number(part) for part in str(value).split(","))
        except (ValueError, ZeroDivisionError):
            self.fail(f"{value!r} is no number, fraction or comma-separated list of them.", param, ctx)


def parse_number(text: str) -> float:
    """A number or a fraction, such as 0.485, 1/255 or 1/127.5. Raises ValueError or ZeroDivisionError."""
    top, slash, bottom = text.partition("/")
    return float(top) / float(bottom) if slash else float(top)


class SizeType(ParamType[tuple[int, int]]):
    """HxW in pixels, or one number for a square."""

    name = "HxW"

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        """What --help shows for the value."""
        return "HxW"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """Height and width, or a usage error."""
        if isinstance(value, tuple):
            return value
        parts = str(value).lower().split("x")
        if len(parts) > 2 or not all(part.isdigit() and int(part) > 0 for part in parts):
            self.fail(f"{value!r} is no size; write for example 224x224.", param, ctx)
        return int(parts[0]), int(parts[-1])


class ResizeType(ParamType[str | int]):
    """auto, exact, letterbox, or the shorter side in pixels."""

    name = "resize"

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        """What --help shows for the value."""
        return "[auto|exact|letterbox|N]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str | int:
        """The word or the number, or a usage error."""
        text = str(value)
        if text in ("auto", "exact", "letterbox"):
            return text
        if not text.isdigit() or int(text) < 1:
            self.fail(f"{text!r} is none of auto, exact, letterbox or a number of pixels.", param, ctx)
        return int(text)


class DropType(ParamType[Drop]):
    """MEASURE:NUMBER, such as agreement:0.01 or sqnr:25."""

    name = "drop"

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        """What --help shows for the value."""
        return "MEASURE:NUMBER"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Drop:
        """The measure and the number, or a usage error."""
        if isinstance(value, Drop):
            return value
        measure, _, text = str(value).partition(":")
        try:
            return Drop(measure, parse_number(text.lower().removesuffix("db")))
        except (ValueError, ZeroDivisionError):
            self.fail(
                f"{value!r} is no measure with a number; write for example agreement:0.01 or sqnr:25.", param, ctx
            )


class BitsType(ParamType[tuple[int, ...]]):
    """Comma-separated numbers of bits, and float."""

    name = "bits"

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        """What --help shows for the value."""
        return "N,N,...[,float]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """The numbers, 32 for float, or a usage error."""
        if isinstance(value, tuple):
            return value
        parts = [part.strip() for part in str(value).split(",")]
        if not all(part == "float" or (part.isdigit() and part.isascii()) for part in parts):
            self.fail(f"{value!r} is no list of bits; write for example 8,float.", param, ctx)
        return tuple(FLOAT_BITS if part == "float" else int(part) for part in parts)


def make_choice(kind: type[StrEnum]) -> click.Choice[str]:
    """The members of an enumeration."""
    return click.Choice([str(member) for member in kind])
