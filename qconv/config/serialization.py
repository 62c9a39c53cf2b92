"""Converts recipes to command lines, to TOML and back from dictionaries, and reads and writes per-layer bits as TOML.

    [layers]
    "stem*" = 8                                         # bits of the weights
    "blocks.1.*" = { weights = 4, activations = 8 }     # and of the tensor that the layer reads
    "blocks.1.silu" = { activations = 16 }              # of any node: it computes on 16 bits, or on "float"
    "classifier" = "float"

The first glob that matches a layer counts, so exceptions stand above the rule. Names are those of the nodes of the
folded model; globs are those of `fnmatch`, and case counts. A command line leaves out every option that the recipe
implies. Three things cannot be written as options: per-layer bits (a file), the user's images, and what only steers a
run. A recipe file names options as the command line does, without the dashes, and may hold the bits itself:

    calib = ["imgs"]                # lies beside the file
    keep-float = ["stem*", "head"]
    tune-ranges = false             # --no-tune-ranges

    [layer-bits]
    "blocks.1.*" = 8
"""

from __future__ import annotations

import glob
import json
import os
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from qconv.config.choices import FLOAT_BITS, NO_IMAGES, Drop, LayerBits, WeightGranularity, option_name
from qconv.config.data_options import LABEL_OPTIONS, DataOptions, PreprocessingOptions
from qconv.config.recipe import RUN_ONLY_OPTIONS, Recipe, make_request
from qconv.config.recipe_checks import format_bits
from qconv.errors import QconvError

TOML_BITS = 64

LONG_NUMBER = f"a number has more than {TOML_BITS} bits"


def read_toml(path: Path, option: str, example: str) -> dict[str, Any]:
    """The content. option: that named the file. example: what to write, in words, without a full stop.

    Raises QconvError where it cannot be read, or is no TOML.
    """
    try:
        content = tomllib.loads(path.read_text("utf-8-sig"))
        _refuse_long_numbers(content)
        return content
    except OSError as error:
        raise QconvError(f"{path} cannot be read: {error.strerror}.", f"check the path of {option}.") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, RecursionError):
            why = "it is nested too deeply"
        elif isinstance(error, UnicodeDecodeError):
            why = "it is no text"
        else:  # Python itself refuses to read numbers of thousands of digits, in words that lead nowhere
            why = str(error) if isinstance(error, tomllib.TOMLDecodeError) else LONG_NUMBER
        raise QconvError(f"{path} is no TOML: {why}.", f"{example}.") from None


def _refuse_long_numbers(content: Any) -> None:
    """Raise ValueError for a number that TOML does not have: its integers have 64 bits."""
    values = content.values() if isinstance(content, dict) else content if isinstance(content, list) else ()
    for value in values:
        if isinstance(value, int) and value.bit_length() > TOML_BITS:
            raise ValueError(LONG_NUMBER)
        _refuse_long_numbers(value)


LAYERS_TABLE, FLOAT_WORD = "layers", "float"

LAYER_BITS_KEY = "layer-bits"
"""A table of layers inside a recipe; as a text, the name of a file with one."""

BITS_KEYS = ("weights", "activations")

LAYER_BITS_EXAMPLE = 'write [layers] and below it lines as "stem*" = 8 or "head" = "float"'

LayerBitsAssignment = tuple[tuple[str, LayerBits], ...]


def read_layer_bits(path: Path) -> LayerBitsAssignment:
    """What the file says, in its order. Raises QconvError where it cannot be read or says no such thing."""
    content = read_toml(path, "--layer-bits", LAYER_BITS_EXAMPLE)
    if isinstance(content.get(LAYER_BITS_KEY), dict):
        return parse_layer_bits(path, content[LAYER_BITS_KEY])  # of a recipe
    other = next((key for key in content if key != LAYERS_TABLE), None)
    if LAYERS_TABLE in content and other is not None:
        raise QconvError(
            f"{path} has {other!r} beside its table of layers.", f"{LAYER_BITS_EXAMPLE}; names with a dot need quotes."
        )
    return parse_layer_bits(path, content.get(LAYERS_TABLE))


def parse_layer_bits(path: Path, table: Any) -> LayerBitsAssignment:
    """What a table of layers in this file says, in its order. Raises QconvError where it says no such thing."""
    if not isinstance(table, dict) or not table:
        raise QconvError(f"{path} has no table of layers.", f"{LAYER_BITS_EXAMPLE}.")
    return tuple((name, _parse_layer_bits(path, name, value)) for name, value in table.items())


def _parse_layer_bits(path: Path, name: str, value: Any) -> LayerBits:
    if value == FLOAT_WORD:
        return LayerBits(in_float=True)
    given_bits = dict(value) if isinstance(value, dict) else {"weights": value}
    if given_bits.get("activations") == FLOAT_WORD:
        given_bits["activations"] = FLOAT_BITS
    known = bool(given_bits) and set(given_bits) <= set(BITS_KEYS)
    if not known or not all(isinstance(bits, int) and not isinstance(bits, bool) for bits in given_bits.values()):
        fix = 'use a number of bits, { weights = 4, activations = 8 } or "float"; names with a dot need quotes.'
        raise QconvError(f"{path} gives {name!r} the bits {_quote_value(value)}.", fix)
    found = LayerBits(**given_bits)
    if found.impossible is not None:
        raise QconvError(f"{path} gives {name!r} {found.impossible}.", "use 2 to 8, or 16.")
    return found


def _quote_value(value: Any) -> str:
    return str(value) if isinstance(value, Mapping) else json.dumps(value, default=str)


def format_layer_bits(assignment: Iterable[tuple[str, LayerBits]], table: str = "layers") -> str:
    """The text of a file that `read_layer_bits` reads back. table: what the table is called."""
    lines = [f"{_quote_text(pattern)} = {_format_bits(bits)}" for pattern, bits in assignment]
    return "\n".join([f"[{table}]", *lines]) + "\n"


def _format_bits(bits: LayerBits) -> str:
    if bits.in_float:
        return f'"{FLOAT_WORD}"'
    if bits.activations is None and bits.weights is not None:
        return str(bits.weights)
    given_bits = {key: getattr(bits, key) for key in BITS_KEYS if getattr(bits, key) is not None}
    words = {key: f'"{FLOAT_WORD}"' if wish == FLOAT_BITS else str(wish) for key, wish in given_bits.items()}
    return "{ " + ", ".join(f"{key} = {wish}" for key, wish in words.items()) + " }"


def escape_glob(name: str) -> str:
    """The glob that matches this name alone."""
    return glob.escape(name)


CANDIDATE_FIELDS = ("candidate_bits", "candidate_activation_bits")
"""Fields of a Recipe that are lists of bits."""

IMAGES_PLACEHOLDER = ("the user's pictures",)
"""Stand in for those a file does not name: without any, other defaults hold."""

SHORT_NUMBER_DIGITS, FRACTION_TOLERANCE = 10, 1e-9
"""Numbers of more characters may be fractions, if they are no smaller."""

NEGATABLE_OPTIONS = frozenset({"equalize", "tune_ranges", "saturation_safe"})
"""Switches that can be said both ways."""


ODD_TYPE_ERRORS = (QconvError, TypeError, ValueError, AttributeError, LookupError, ArithmeticError)
"""What a recipe of other types than ours trips over."""


def recipe_from_dict(recipe: Mapping[str, Any]) -> Recipe | None:
    """The Recipe of what `Recipe.as_dict` gave; None where this version knows no such recipe."""
    try:
        return _make_request(_as_field_types(recipe))[0]
    except ODD_TYPE_ERRORS:
        return None


def command_line_options(recipe: Mapping[str, Any]) -> list[str]:
    """The options of `quantize` that make `recipe`, what `Recipe.as_dict` gave; the defaults are left out.

    Of a recipe that this version does not know, all that it can say of it.
    """
    try:
        said = _fields_that_matter(recipe)
    except ODD_TYPE_ERRORS:
        return list(_format_all_options(recipe))
    return [word for name, value in said.items() for word in format_option(name, value)]


def request_fields(recipe: Recipe, data: DataOptions) -> dict[str, Any]:
    """What `make_request` makes both of, without what follows from the others."""
    steering = {name: getattr(recipe, name) for name in RUN_ONLY_OPTIONS if getattr(recipe, name) is not None}
    read = {"calib": data.paths, "batch": data.batch, "samples": data.samples, "arrays": data.arrays}
    read |= {name: getattr(data, name) for name in ("decode", *LABEL_OPTIONS)}
    return {**_fields_that_matter(recipe.as_dict(data)), **steering, **read}


def _fields_that_matter(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that make `recipe`, what `Recipe.as_dict` gave, without those that follow from the others."""
    said = _as_field_types(recipe)
    whole, data = _make_request(said)
    if whole.weight_granularity is not WeightGranularity.PER_BLOCK:
        said.pop("block_size", None)  # without effect, and refused
        whole, data = _make_request(said)
    for name in tuple(said):
        rest = {other: value for other, value in said.items() if other != name}
        if _makes_same_recipe(rest, whole.as_dict(data)):
            said = rest
    return said


def _make_request(said: Mapping[str, Any]) -> tuple[Recipe, DataOptions]:
    return make_request({"calib": () if said.get("data_free") else IMAGES_PLACEHOLDER, **said})


def _makes_same_recipe(said: Mapping[str, Any], whole: Mapping[str, Any]) -> bool:
    try:
        recipe, data = _make_request(said)
    except QconvError:
        return False
    return recipe.as_dict(data) == whole


def _as_field_types(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of Recipe and DataOptions as these take them; what is None is left to them."""
    known = [*Recipe().as_dict(DataOptions()), "task"]
    found = {name: recipe[name] for name in known if recipe.get(name) is not None}
    for name in ("keep_float", "keep_float_op", *CANDIDATE_FIELDS):
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


def format_option(name: str, value: Any) -> Iterator[str]:
    """One field of a Recipe or of DataOptions as it is spelt on the command line."""
    for option, said in _option_values(name, value):
        if isinstance(said, bool):
            if said:
                yield option_name(option)
            elif name in NEGATABLE_OPTIONS:
                yield option_name(f"no-{option}")
        elif isinstance(said, tuple):
            for item in said:
                yield from (option_name(option), item)
        else:
            yield from (option_name(option), str(said))


OptionValue = str | int | float | bool | tuple[str, ...]
"""A tuple is of an option that can be repeated."""


def _option_values(name: str, value: Any) -> Iterator[tuple[str, OptionValue]]:
    """The options that say one field of either, without dashes in front; none for bits of single layers."""
    option = name.replace("_", "-")
    if name == "data_free":
        yield from [("calib", (NO_IMAGES,))] if value else []
    elif name == "preprocessing":
        yield from _preprocessing_values(value)
    elif name in ("keep_float", "keep_float_op"):
        yield option, tuple(map(str, value))
    elif name in CANDIDATE_FIELDS:
        yield option, format_bits(value)
    elif isinstance(value, Drop):
        yield option, f"{value.measure}:{value.value!r}"
    elif name != "layer_bits":
        yield option, value if isinstance(value, bool | int | float) else str(value)


def _preprocessing_values(options: PreprocessingOptions) -> Iterator[tuple[str, OptionValue]]:
    default = PreprocessingOptions()
    for part in fields(options):
        value = getattr(options, part.name)
        if value is None or value == getattr(default, part.name):
            continue
        match part.name:
            case "preset":
                yield "preprocess", str(value)
            case "size":
                yield "size", "x".join(map(str, value))
            case "scale" | "mean" | "std":
                yield part.name, ",".join(map(format_number, value if isinstance(value, tuple) else (value,)))
            case _:
                yield part.name.replace("_", "-"), str(value)


def format_number(value: float) -> str:
    """Exactly this number: 1/255 where that is what was typed."""
    text = f"{value:.10g}" if float(f"{value:.10g}") == value else repr(value)
    inverse = round(1 / value, 4) if abs(value) > FRACTION_TOLERANCE else 0.0
    return f"1/{inverse:.10g}" if len(text) > SHORT_NUMBER_DIGITS and inverse and 1 / inverse == value else text


def _format_all_options(recipe: Mapping[str, Any]) -> Iterator[str]:
    default = Recipe().as_dict(DataOptions())
    for name, value in recipe.items():
        alone = isinstance(default.get(name, ""), str | int | float | None) and name not in CANDIDATE_FIELDS
        if alone and value != default.get(name) and isinstance(value, str | int | float):
            yield from format_option(name, value)


PATH_KEYS = ("calib", "stats", "recipe", "labels", "label-map", "classes", LAYER_BITS_KEY)
"""Options of a recipe that name what is read."""

SEARCH_KEYS = ("max-drop", "target-size", "candidate-bits")
"""Options of a search for bits."""


def recipe_lines(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The lines of the file that makes `recipe`, what `Recipe.as_dict` gave; the defaults are left out.

    Raises one of ODD_TYPE_ERRORS for a recipe that this version does not know.
    """
    said = _fields_that_matter(recipe)
    lines: dict[str, Any] = {key: value for name in said for key, value in _option_values(name, said[name])}
    if said.get("layer_bits"):
        lines[LAYER_BITS_KEY] = said["layer_bits"]
    return lines


def format_recipe(lines: Mapping[str, Any], folder: Path) -> str:
    """The text of the file of these lines. folder: where it is going to lie, beside the paths that it names."""
    plain = {key: value for key, value in lines.items() if key != LAYER_BITS_KEY}
    text = "".join(f"{key} = {_format_value(_beside(key, value, folder))}\n" for key, value in plain.items())
    table = format_layer_bits(lines[LAYER_BITS_KEY], LAYER_BITS_KEY) if LAYER_BITS_KEY in lines else ""
    return text + ("\n" if text and table else "") + table


def _beside(key: str, value: Any, folder: Path) -> Any:
    if key not in PATH_KEYS:
        return value
    return tuple(_relative(path, folder) for path in value) if isinstance(value, tuple) else _relative(value, folder)


def _relative(path: str, folder: Path) -> str:
    """The path as it is seen from `folder`, unless it is absolute."""
    if path == NO_IMAGES or os.path.isabs(path):
        return path
    try:
        found = os.path.relpath(path, folder)
    except ValueError:  # on another drive
        return os.path.abspath(path)
    return os.path.join(os.curdir, found) if found == NO_IMAGES else found


def _format_value(value: OptionValue) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_format_value, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return _quote_text(value)
    return repr(value)


def _quote_text(text: str) -> str:
    """A basic string of TOML, whose escapes are those of JSON but for one control character."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
