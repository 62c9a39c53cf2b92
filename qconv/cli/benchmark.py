"""`qconv benchmark` times models in turns, each against the first."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from qconv.cli.command import CommandFiles, CommandResult, OutputOptions, make_arguments, print_to, run_command
from qconv.cli.options import HELP_WIDTH, NO_STREAM, batch_option, common_options, csv_option, size_option
from qconv.reporter import Reporter


@dataclass(frozen=True, slots=True)
class BenchmarkArguments:
    """The options of `benchmark`."""

    wanted: OutputOptions
    models: tuple[str, ...]
    batch: int | None
    size: tuple[int, int] | None
    rounds: int
    threads: int | None


@click.command(context_settings=HELP_WIDTH, short_help="Time models in turns.")
@click.argument("models", nargs=-1, required=True, metavar="MODEL [OTHER]...")
@batch_option
@size_option
@click.option(
    "--rounds", default=24, show_default=True, metavar="N", type=click.IntRange(1), help="Turns that each model gets."
)
@csv_option
@common_options
def benchmark(**options: Any) -> int:
    """Time MODEL and OTHERs in turns, each against the first, with made-up input."""
    given = make_arguments(BenchmarkArguments, options)
    if "-" in given.models:
        raise click.UsageError(NO_STREAM)

    def work(reporter: Reporter) -> CommandResult:
        from qconv.ir import files
        from qconv.ir.files import Source
        from qconv.report import text
        from qconv.runtime import benchmark as timing
        from qconv.runtime import session

        size = given.size or files.find_carried_size(Source(model, Path(model)) for model in given.models)
        conditions = timing.TimingConditions(given.threads, given.batch, size, given.rounds)
        found = timing.benchmark(given.models, conditions, version=session.RUNTIME_VERSION, reporter=reporter)
        if found.threads > found.cpu.cores:
            reporter.warn(f"{found.threads} threads share {found.cpu.cores} cores, so they wait for each other.")
        told = found.as_dict()
        show = print_to(lambda: text.format_benchmark(found, verbose=given.wanted.verbose))
        return CommandResult(told, show, told["models"])

    return run_command(given.wanted, CommandFiles(given.models), work)
