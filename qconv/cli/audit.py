"""`qconv audit` reports what ONNX Runtime runs in integers and in float, and why."""

from __future__ import annotations

import click

from qconv.cli.options import (
    HELP_WIDTH,
    _model_files,
    batch_option,
    csv_option,
    output_options,
    size_option,
)
from qconv.cli.output import OutputOptions
from qconv.config.choices import MOST_THREADS
from qconv.signals import raise_exit_on_signals


@click.command(context_settings=HELP_WIDTH)
@click.argument("model")
@batch_option
@size_option
@csv_option
@output_options
@click.option(
    "--threads",
    default=1,
    show_default=True,
    metavar="N",
    type=click.IntRange(1, MOST_THREADS),
    help="Threads of ONNX Runtime.",
)
def audit(
    model: str,
    batch: int | None,
    size: tuple[int, int] | None,
    threads: int,
    csv: str | None,
    as_json: bool,
    quiet: bool,
    verbose: bool,
) -> int:
    """Say what ONNX Runtime runs of MODEL in integers, what in float, by which rule, and what each costs."""
    if not model:
        raise click.UsageError("MODEL needs a name.")
    wanted = OutputOptions(as_json, quiet, csv)
    wanted.check(*_model_files(model))
    from qconv.audit import audit as audit_audit
    from qconv.ir.files import source_of
    from qconv.report import text

    raise_exit_on_signals()
    found = audit_audit.audit_file(source_of(model), threads=threads, batch=batch, size=size)
    told = found.as_dict()
    wanted.put(told, told["layers"], lambda: text.format_audit(found, verbose=verbose))
    return 0
