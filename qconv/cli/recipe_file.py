"""Options of `quantize` that stand in files: a recipe (`--recipe`), or a table for each of several (`--sweep`).

    calib = ["imgs"]                # paths lie beside the file
    weight-bits = 4
    keep-float = ["stem*", "head"]
    tune-ranges = false             # --no-tune-ranges

    [layer-bits]                    # or the name of a file for --layer-bits
    "blocks.1.*" = 8

What is beside the file on the command line wins. What says where and in which form results are written stays there.
A model that qconv wrote is a recipe as well: it carries the one that it was made by.
"""

from __future__ import annotations

import difflib
import json
import os
import shlex
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from qconv.cli.command import CommandFiles
from qconv.cli.recipe_options import collect_fields, find_typed_options, make_request_of_fields, quantize_parameters
from qconv.config.choices import FLOAT_BITS, GATE_OPTIONS, NAMED_RECIPES, NO_IMAGES
from qconv.config.data_options import LABEL_OPTIONS, DataOptions
from qconv.config.recipe import Recipe
from qconv.config.serialization import (
    LAYER_BITS_KEY,
    ODD_TYPE_ERRORS,
    PATH_KEYS,
    SEARCH_KEYS,
    format_recipe,
    parse_layer_bits,
    read_toml,
    recipe_lines,
)
from qconv.errors import QconvError

NOT_IN_RECIPES = frozenset(
    {"output", "csv", "report", "sweep", "recipe", "save_recipe", "save_stats", "save_layer_bits"}
    | {"as_json", "quiet", "verbose"}
)
"""Options that say where and in which form results are written, or name other recipes."""

WHERE = ("which says where or how results are written", "pass --{key} on the command line.")

RUNS_CODE = ("which runs code, so that no file says it", "pass --{key} on the command line.")

NESTED = ("which names another recipe", "write its lines here.")

EXAMPLE = 'write options of quantize, as weight-bits = 4, effort = "best" or keep-float = ["stem*"]'

NEAR = 3
"""How many names a hint gives."""


@dataclass(frozen=True, slots=True)
class GivenOptions:
    """The options of a command.

    Attributes:
        values: What click calls them, with their values, defaults included.
        typed: Those that a named recipe does not replace, as they were given.
        file: What a recipe file says, if there is one, as on a command line.
    """

    values: dict[str, Any]
    typed: frozenset[str]
    file: str = ""

    def request(self, **others: Any) -> tuple[Recipe, DataOptions]:
        """The recipe and the images that they say; what does not go together is a usage error.

        others: what the command itself does not ask for.
        """
        return make_request_of_fields(self.fields(**others))

    def fields(self, **others: Any) -> dict[str, Any]:
        """The same as `make_request` takes it, before any of them follows from others."""
        fields = collect_fields({**others, **self.values}, self.typed)
        if fields.get("activation_bits") == 32 and "activation_scheme" in find_typed_options():
            told = "--activation-scheme with --activation-bits 32 is not possible."
            raise click.UsageError(f"{told} Leave one of them out: with 32 activations stay float.")
        try:
            make_request_of_fields(fields)
        except click.UsageError as error:
            raise click.UsageError(" ".join(filter(None, (error.message, self.file)))) from None
        return fields

    @property
    def read_files(self) -> list[str]:
        """Files of options that are read."""
        return [name for name in (self.values["recipe"], self.values["layer_bits"]) if isinstance(name, str)]

    @property
    def layer_bits_file(self) -> str | None:
        """The file for --layer-bits that says what these options do."""
        bits = self.values["layer_bits"]
        if bits is None or isinstance(bits, str):
            return bits
        name: str = self.values["recipe"]
        if name.lower().endswith(".onnx"):
            fact = f"{name} carries bits of single layers, for which there is no option but --layer-bits."
            raise QconvError(
                fact, "make a file of the recipe with `qconv quantize --recipe --save-recipe`, and pass it."
            )
        return name


@dataclass(slots=True)
class RecipeTable:
    """Options that a file gives.

    Attributes:
        file: Where they stand.
        name: Of the table in it; empty where the whole file is one.
        refused: Parameters that cannot be given here, each with the fact and the fix of the error.
        values: What they say, by the names of click's parameters.
        words: The same on a command line.
    """

    file: Path
    name: str = ""
    refused: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    words: list[str] = field(default_factory=list)

    def add(self, key: str, value: Any) -> None:
        """Take in one line. Raises QconvError, which names file, key and what is near, for what is no option's."""
        option = self._find(key)
        if key == LAYER_BITS_KEY and isinstance(value, dict):
            self.add_layer_bits(parse_layer_bits(self.file, value))
            return
        if option.is_flag:
            if not isinstance(value, bool):
                raise self._error(key, value, "true and false are what it takes")
            found: Any = value
            own = option.opts if value else option.secondary_opts
            self.words += own[:1]  # a switch that is off and has no name for it is said by nothing
        else:
            texts = self._texts(option, key, value)
            texts = [_beside(self.file, text) for text in texts] if key in PATH_KEYS else texts
            found = tuple(texts) if option.multiple else self._converted(option, key, texts[0], value)
            self.words += [word for text in texts for word in (f"--{key}", text)]
        self.values[option.name or ""] = found

    def add_layer_bits(self, assignment: Any) -> None:
        """Bits of single layers that stand in the file itself."""
        self.values["layer_bits"] = assignment
        self.words += [f"--{LAYER_BITS_KEY}", str(self.file)]

    def add_recipe(self) -> None:
        """Take over what the file of its line `recipe` says, if it has one, where this one says nothing."""
        if "recipe" in self.values:
            other = read_recipe_file(Path(self.values.pop("recipe")), self.refused)
            self.values = {**other.values, **self.values}

    @property
    def in_words(self) -> str:
        """All that it says, as on a command line."""
        return shlex.join(self.words) or "nothing"

    @property
    def _place(self) -> str:
        return f"{self.file}: {self.name}" if self.name else str(self.file)

    def _find(self, key: str) -> click.Option:
        options = {name.removeprefix("--"): option for option in quantize_parameters() for name in option.opts}
        option = options.get(key)
        if option is None or f"--{key}" not in option.opts:
            near = difflib.get_close_matches(key, [name for name in options if not name.startswith("-")], NEAR)
            named = f"did you mean {' or '.join(near)}? " if near else ""
            raise QconvError(f"{self._place} says {key!r}, which is no option of quantize.", f"{named}{EXAMPLE}.")
        if option.name in self.refused:
            fact, fix = self.refused[option.name]
            raise QconvError(f"{self._place} says {key!r}, {fact}.", fix.format(key=key))
        return option

    def _texts(self, option: click.Option, key: str, value: Any) -> list[str]:
        """The value as it would be typed, once or several times."""
        plain = value if isinstance(value, list) else [value]
        if not all(isinstance(item, str | int | float) and not isinstance(item, bool) for item in plain):
            raise self._error(key, value, "it takes texts and numbers")
        texts = [str(item) for item in plain]
        return texts if option.multiple or not isinstance(value, list) else [",".join(texts)]

    def _converted(self, option: click.Option, key: str, text: str, value: Any) -> Any:
        try:
            with click.Context(click.Command("quantize")) as context:
                return option.type.convert(text, option, context)
        except click.BadParameter as error:
            raise self._error(key, value, error.message.rstrip(".")) from None

    def _error(self, key: str, value: Any, why: str) -> QconvError:
        said = json.dumps(value, default=str, ensure_ascii=False)
        return QconvError(f"{self._place} says {key} = {said}: {why}.", f"{EXAMPLE}.")


def _beside(file: Path, path: str) -> str:
    """A path that a file names lies beside it."""
    here = path == NO_IMAGES or file.parent == Path()
    return path if here else os.path.join(file.parent, path)


def read_recipe_file(
    file: Path, refused: Mapping[str, tuple[str, str]], decided: Mapping[str, Any] | None = None
) -> RecipeTable:
    """What a recipe says: a TOML file, or a model that qconv wrote. Raises QconvError where it is none.

    refused: as in RecipeTable. decided: what the command does whatever is said, by option; a line may say that, too.
    """
    never = {**dict.fromkeys(NOT_IN_RECIPES, WHERE), "recipe": NESTED, "decode": RUNS_CODE}
    table = RecipeTable(file, refused={**refused, **never})
    if file.suffix.lower() == ".onnx":
        lines = _read_carried_recipe(file)
    else:
        lines = read_toml(file, "--recipe", f"{EXAMPLE}; a model that qconv wrote ends in .onnx")
    for key, value in lines.items():
        name = key.replace("-", "_")
        if decided and name in decided and value == decided[name]:
            continue
        if key == LAYER_BITS_KEY and isinstance(value, tuple):
            table.add_layer_bits(value)
        else:
            table.add(key, list(value) if isinstance(value, tuple) else value)
    return table


def _read_carried_recipe(file: Path) -> dict[str, Any]:
    """The lines of the recipe that a model carries. Bits that a search has found stand for the search."""
    from qconv.ir.files import Source, metadata_of, read_proto
    from qconv.ir.metadata import read_recipe

    said = read_recipe(metadata_of(read_proto(Source(str(file), file))))
    try:
        lines = recipe_lines(said) if said else {}
    except ODD_TYPE_ERRORS:
        said = {}
    if not said:
        fact = f"{file} carries no recipe that this version of qconv knows."
        raise QconvError(fact, "name a model that `qconv quantize` wrote, or a file of options in TOML.")
    return lines if LAYER_BITS_KEY not in lines else {key: v for key, v in lines.items() if key not in SEARCH_KEYS}


OF_IMAGES = ("samples", "batch", "seed", "pattern", *LABEL_OPTIONS)
"""Options that say nothing without pictures."""

GOES_WITH: dict[str, tuple[tuple[str, Callable[[Any], bool]], ...]] = {
    "block_size": (("weight_granularity", lambda kind: kind == "per-block"),),
    "calibrator": (("activation_bits", lambda bits: bits != FLOAT_BITS),),
    "percentile": (("calibrator", lambda kind: kind == "percentile"), ("activation_bits", lambda b: b != FLOAT_BITS)),
    "candidate_activation_bits": (
        ("activation_bits", lambda bits: bits == 8),
        ("calib", lambda calib: calib != (NO_IMAGES,)),
    ),
    "fallback": (("calib", lambda calib: calib == (NO_IMAGES,)),),
    **dict.fromkeys(OF_IMAGES, (("calib", lambda calib: calib != (NO_IMAGES,)),)),
}
"""Options that say nothing but beside some values of others: (the other one, whether a value of it is such). A gate is
no such option: it must not vanish in silence."""


def _is_overruled(option: str, typed: Mapping[str, Any], said: Collection[str]) -> bool:
    """Whether a line of a file says nothing any more: it is typed as well, or what it goes with is typed otherwise.

    typed: what is typed, and what a named recipe that is typed stands for. said: options of the file.
    """
    if option in typed or any(other in typed and not fits(typed[other]) for other, fits in GOES_WITH.get(option, ())):
        return True
    return option in OF_IMAGES and "stats" in typed and "calib" not in typed and "calib" not in said


def given_options(values: dict[str, Any], decided: Mapping[str, Any] | None = None) -> GivenOptions:
    """The options of the running command, over those of the file that `--recipe` names, if it names one.

    values: what click hands to the command. decided: as in `read_recipe_file`. Raises QconvError for a file that cannot
    be used.
    """
    name, typed = values["recipe"], find_typed_options()
    if name is None:
        return GivenOptions(values, typed)
    if name == "":
        raise click.UsageError("--recipe needs a name.")
    command = click.get_current_context().info_name
    absent = {option.name or "" for option in quantize_parameters()} - values.keys()
    fix = "leave it out."
    if name.lower().endswith(".onnx"):  # nobody can edit that
        fix = "make a file of it with `qconv quantize --recipe --save-recipe`, and leave it out there."
    refused = dict.fromkeys(absent, (f"which is not for {command}", fix))
    table = read_recipe_file(Path(name), refused, decided)
    effective = {**NAMED_RECIPES.get(values["recipe_name"] if "recipe_name" in typed else "", {})}
    effective |= {option: values[option] for option in typed & values.keys()}
    added = {o: value for o, value in table.values.items() if not _is_overruled(o, effective, table.values)}
    # a named recipe that is typed replaces what the file says
    whole = typed if "recipe_name" in typed else typed | added.keys()
    return GivenOptions({**values, **added}, whole, f"{name} says {table.in_words}.")


STEERING_FIELDS = ("stats", "threads", *GATE_OPTIONS)
"""Fields of a Recipe that shape no file, but are options that a recipe file may give."""


@dataclass(frozen=True, slots=True)
class SavedRecipe:
    """A file for `--recipe` that is going to be written. place: where; text: what is in it."""

    place: Path
    text: bytes

    @classmethod
    def of(cls, recipe: Recipe, data: DataOptions, place: Path, files: CommandFiles) -> SavedRecipe:
        """Raises QconvError, before any work, where it cannot be written. files: of the command."""
        from qconv import storage

        storage.check_output_path(place)
        storage.refuse_overwriting_inputs(place, files.read)
        others = {what: name for what, name in files.writes.items() if what != "--save-recipe"}
        CommandFiles(writes=others).require_distinct_place(place, "--save-recipe")
        lines: dict[str, Any] = {"calib": data.paths} if data.paths else {}
        if data.batch != DataOptions().batch:
            lines["batch"] = data.batch
        said = {name: getattr(recipe, name) for name in STEERING_FIELDS}
        said |= {name: getattr(data, name) and str(getattr(data, name)) for name in LABEL_OPTIONS}
        lines |= {name.replace("_", "-"): value for name, value in said.items() if value is not None}
        text = format_recipe({**lines, **recipe_lines(recipe.as_dict(data))}, place.parent)
        try:
            return cls(place, text.encode())
        except UnicodeEncodeError:
            fact = f"{place} cannot hold a name or a pattern that is no text, as TOML takes none."
            raise QconvError(fact, "rename the files, or leave --save-recipe out.") from None

    def write(self) -> None:
        """Write it, whole or not at all."""
        from qconv import storage

        storage.write_atomically(self.place, self.text)
