"""`qconv inspect` reports what is in a float or a quantized model."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import click

from qconv.cli.options import (
    HELP_WIDTH,
    _model_files,
    csv_option,
    output_options,
)
from qconv.cli.output import OutputOptions
from qconv.config.targets import TARGETS
from qconv.errors import QconvError
from qconv.signals import raise_exit_on_signals


@click.command(context_settings=HELP_WIDTH)
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
def inspect(model: str, csv: str | None, target: str, as_json: bool, quiet: bool, verbose: bool) -> int:
    """Tell what is in MODEL: of a float one what would be quantized and what is in the way, of another how it was."""
    if not model:
        raise click.UsageError("MODEL needs a name.")
    wanted = OutputOptions(as_json, quiet, csv)
    wanted.check(*_model_files(model))
    if model == "-" and sys.stdin is None:
        raise QconvError("Standard input is closed.", "pipe the model into it, or name its file.")
    from qconv.analysis import inspect_float, inspect_quantized
    from qconv.ir.files import external_data_files, read_proto, source_of
    from qconv.report import text_inspect

    source = source_of(model)
    raise_exit_on_signals()
    proto = read_proto(source)
    wanted.check(*external_data_files(proto, source))
    found: Any
    text: Callable[..., str]
    if inspect_quantized.is_quantized_file(proto):
        found, text = inspect_quantized.inspect_quantized(source), text_inspect.format_quantized_model
    else:
        found, text = inspect_float.inspect_float(source, target), text_inspect.format_float_model
    wanted.put(found.as_dict(), found.rows, lambda: text(found, verbose=verbose))
    return 0
