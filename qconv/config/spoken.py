"""A recipe as a user would have typed it: the options that make it, and no more of them than are needed.

An option is left out where the recipe is the same without it, since many defaults follow from others: `--effort fast`
says `--rounding nearest` as well. Three things cannot be said: bits of single layers stand in a file of their own
(`--layer-bits`), pictures are the user's, and what only steers a run is not kept in files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

from qconv.config.checks import spelt
from qconv.config.choices import FLOAT_BITS, NO_PICTURES, Drop, LayerBits, WeightGranularity
from qconv.config.pixels import PreprocessingOptions
from qconv.config.recipe import STEERING, Recipe
from qconv.errors import QconvError

PICTURES = ("the user's pictures",)
"""Stand in for those a file does not name: without any, other defaults hold."""
SHORT, FINEST = 10, 1e-9
"""Numbers of more characters may be fractions, if they are no smaller."""
ALSO_NO = frozenset({"equalize", "tune_ranges", "saturation_safe"})
"""Switches that can be said both ways."""


def recipe_from(recipe: Mapping[str, Any]) -> Recipe | None:
    """The Recipe of what `Recipe.as_dict` gave; None where this version knows no such recipe."""
    try:
        return _made(_typed(recipe))
    except (QconvError, TypeError, ValueError, AttributeError):
        return None


def options_of(recipe: Mapping[str, Any]) -> list[str]:
    """The options of `quantize` that make `recipe`, what `Recipe.as_dict` gave; the defaults are left out.

    Of a recipe that this version does not know, all that it can say of it.
    """
    try:
        said = _typed(recipe)
        whole = _made(said)
    except (QconvError, TypeError, ValueError, AttributeError):
        return list(_all_said(recipe))
    if whole.weight_granularity is not WeightGranularity.PER_BLOCK:
        said.pop("block_size", None)  # without effect, and refused
        whole = _made(said)
    for name in tuple(said):
        rest = {other: value for other, value in said.items() if other != name}
        if _same(rest, whole):
            said = rest
    return [word for name, value in said.items() for word in words(name, value)]


def _made(said: Mapping[str, Any]) -> Recipe:
    return Recipe(calib=() if said.get("data_free") else PICTURES, **said)


def _same(said: Mapping[str, Any], whole: Recipe) -> bool:
    try:
        made = _made(said)
    except QconvError:
        return False
    return made.as_dict() == whole.as_dict()


def _typed(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of Recipe as it takes them; what is None is left to it."""
    known = [part.name for part in fields(Recipe) if part.name not in STEERING]
    found = {name: recipe[name] for name in known if recipe.get(name) is not None}
    for name in ("keep_float", "keep_float_op", "candidate_bits"):
        if name in found:
            found[name] = tuple(found[name])
    if "layer_bits" in found:
        found["layer_bits"] = tuple((glob, LayerBits(**bits)) for glob, bits in found["layer_bits"])
    if "max_drop" in found:
        found["max_drop"] = Drop(**found["max_drop"])
    if "preprocessing" in found:
        parts = found["preprocessing"].items()
        given: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in parts}
        found["preprocessing"] = PreprocessingOptions(**given)
    return found


def words(name: str, value: Any) -> Iterator[str]:
    """One field of a Recipe as it is spelt on the command line."""
    if name == "data_free":
        yield from (spelt("calib"), NO_PICTURES) if value else ()
    elif name == "preprocessing":
        yield from _of_pictures(value)
    elif name in ("keep_float", "keep_float_op"):
        for item in value:
            yield from (spelt(name), str(item))
    elif name == "candidate_bits":
        yield from (spelt(name), ",".join("float" if bits == FLOAT_BITS else str(bits) for bits in value))
    elif isinstance(value, Drop):
        yield from (spelt(name), f"{value.measure}:{value.value!r}")
    elif isinstance(value, bool):
        if value:
            yield spelt(name)
        elif name in ALSO_NO:
            yield spelt(f"no_{name}")
    elif name != "layer_bits":
        yield from (spelt(name), str(value))


def _of_pictures(options: PreprocessingOptions) -> Iterator[str]:
    default = PreprocessingOptions()
    for part in fields(options):
        value = getattr(options, part.name)
        if value is None or value == getattr(default, part.name):
            continue
        match part.name:
            case "preset":
                yield from ("--preprocess", value)
            case "size":
                yield from ("--size", "x".join(map(str, value)))
            case "scale" | "mean" | "std":
                yield from (spelt(part.name), ",".join(map(in_words, value if isinstance(value, tuple) else (value,))))
            case _:
                yield from (spelt(part.name), str(value))


def in_words(value: float) -> str:
    """Exactly this number: 1/255 where that is what was typed."""
    text = f"{value:.10g}" if float(f"{value:.10g}") == value else repr(value)
    inverse = round(1 / value, 4) if abs(value) > FINEST else 0.0
    return f"1/{inverse:.10g}" if len(text) > SHORT and inverse and 1 / inverse == value else text


def _all_said(recipe: Mapping[str, Any]) -> Iterator[str]:
    default = Recipe(calib=PICTURES).as_dict()
    for name, value in recipe.items():
        alone = isinstance(default.get(name, ""), str | int | float | None)
        if alone and value != default.get(name) and isinstance(value, str | int | float):
            yield from words(name, value)
