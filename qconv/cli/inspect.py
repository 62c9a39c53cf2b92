"""`qconv inspect` reports what is in a float or a quantized model."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import click

from qconv.cli.command import (
    CommandFiles,
    CommandResult,
    OutputOptions,
    make_arguments,
    print_to,
    require_names,
    run_command,
)
from qconv.cli.options import HELP_WIDTH, csv_option, output_options
from qconv.cli.recipe_options import find_typed_options
from qconv.config.targets import TARGETS
from qconv.errors import QconvError


@dataclass(frozen=True, slots=True)
class InspectArguments:
    """The options of `inspect`."""

    wanted: OutputOptions
    model: str
    target: str


@click.command(context_settings=HELP_WIDTH, short_help="Tell what is in a model, float or quantized.")
@click.argument("model")
@csv_option
@click.option(
    "--target",
    default="ort-cpu",
    show_default=True,
    type=click.Choice(list(TARGETS)),
    help="Of the default run that a float model is looked at for.",
)
@output_options
def inspect(**options: Any) -> int:
    """Tell what is in MODEL: of a float one what would be quantized and what is in the way, of another how it was."""
    given = make_arguments(InspectArguments, options)
    require_names({"MODEL": given.model})
    if given.model == "-" and sys.stdin is None:
        raise QconvError("Standard input is closed.", "pipe the model into it, or name its file.")
    return run_command(given.wanted, CommandFiles((given.model,)), lambda reporter: _inspect(given))


def _inspect(given: InspectArguments) -> CommandResult:
    from qconv.analysis import inspect_float, inspect_quantized
    from qconv.ir.files import external_data_files, read_proto, source_of
    from qconv.report import text_inspect

    source = source_of(given.model)
    proto = read_proto(source)
    given.wanted.check(CommandFiles(reads=tuple(map(str, external_data_files(proto, source)))))
    found: Any
    text: Callable[..., str]
    if inspect_quantized.is_quantized_file(proto):
        if "target" in find_typed_options():
            fact = f"--target is for a float model, and {source.name} is quantized."
            raise QconvError(fact, "leave it out: the file says what it was made for.")
        found, text = inspect_quantized.inspect_quantized(source), text_inspect.format_quantized_model
    else:
        found, text = inspect_float.inspect_float(source, given.target), text_inspect.format_float_model
    return CommandResult(found.as_dict(), print_to(lambda: text(found, verbose=given.wanted.verbose)), found.rows)
