"""`qconv benchmark` times models in turns, each against the first."""

from __future__ import annotations

from pathlib import Path

import click

from qconv.cli.options import (
    HELP_WIDTH,
    NO_STREAM,
    batch_option,
    common_options,
    csv_option,
    size_option,
)
from qconv.cli.output import OutputOptions
from qconv.reporter import Reporter
from qconv.signals import raise_exit_on_signals


@click.command(context_settings=HELP_WIDTH)
@click.argument("models", nargs=-1, required=True, metavar="MODEL [OTHER]...")
@batch_option
@size_option
@click.option(
    "--rounds", default=24, show_default=True, metavar="N", type=click.IntRange(1), help="Turns that each model gets."
)
@csv_option
@common_options
def benchmark(
    models: tuple[str, ...],
    batch: int | None,
    size: tuple[int, int] | None,
    rounds: int,
    csv: str | None,
    threads: int | None,
    as_json: bool,
    quiet: bool,
    verbose: bool,
) -> int:
    """Time MODEL and OTHERs in turns, each against the first, with made-up input."""
    if "-" in models:
        raise click.UsageError(NO_STREAM)
    wanted = OutputOptions(as_json, quiet, csv)
    wanted.check(*map(Path, models))
    from qconv.report import console as report_console
    from qconv.report import text
    from qconv.runtime import benchmark as timing
    from qconv.runtime import session

    console = report_console.Console(quiet=quiet)
    raise_exit_on_signals()
    try:
        conditions = timing.TimingConditions(threads, batch, size, rounds)
        found = timing.benchmark(
            models, conditions, version=session.RUNTIME_VERSION, reporter=Reporter(console.warn, console.progress)
        )
    finally:
        console.close()
    if found.threads > found.cpu.cores:
        console.warn(f"{found.threads} threads share {found.cpu.cores} cores, so they wait for each other.")
    told = found.as_dict()
    wanted.put(told, told["models"], lambda: text.format_benchmark(found, verbose=verbose))
    return 0
