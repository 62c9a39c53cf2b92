"""`qconv audit` reports what ONNX Runtime runs in integers and in float, and why."""

from __future__ import annotations

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
from qconv.cli.options import HELP_WIDTH, batch_option, csv_option, output_options, size_option
from qconv.config.choices import MOST_THREADS
from qconv.reporter import Reporter


@dataclass(frozen=True, slots=True)
class AuditArguments:
    """The options of `audit`."""

    wanted: OutputOptions
    model: str
    batch: int | None
    size: tuple[int, int] | None
    threads: int


@click.command(context_settings=HELP_WIDTH, short_help="Tell what ONNX Runtime runs in integers, and why.")
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
def audit(**options: Any) -> int:
    """Say what ONNX Runtime runs of MODEL in integers, what in float, by which rule, and what each costs."""
    given = make_arguments(AuditArguments, options)
    require_names({"MODEL": given.model})

    def work(reporter: Reporter) -> CommandResult:
        from qconv.auditing.audit import audit_file
        from qconv.ir.files import source_of
        from qconv.report import text

        found = audit_file(source_of(given.model), threads=given.threads, batch=given.batch, size=given.size)
        told = found.as_dict()
        show = print_to(lambda: text.format_audit(found, verbose=given.wanted.verbose))
        return CommandResult(told, show, told["layers"])

    return run_command(given.wanted, CommandFiles((given.model,)), work, imports="qconv.auditing.audit")
