"""`qconv merge-stats` adds up calibration statistics of parts of a data set."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import click

from qconv.cli.command import CommandFiles, CommandResult, OutputOptions, make_arguments, require_names, run_command
from qconv.cli.options import HELP_WIDTH, output_options
from qconv.errors import format_count, printable
from qconv.reporter import Reporter


@dataclass(frozen=True, slots=True)
class MergeStatsArguments:
    """The options of `merge-stats`."""

    wanted: OutputOptions
    files: tuple[str, ...]
    output: str


@click.command("merge-stats", context_settings=HELP_WIDTH, short_help="Add up statistics of parts of the pictures.")
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@click.option("-o", "--output", required=True, metavar="OUT", help="Where to write the sum.")
@output_options
def merge_stats(**options: Any) -> int:
    """Add up statistics that `quantize --save-stats` wrote of parts of a set of pictures."""
    given = make_arguments(MergeStatsArguments, options)
    require_names({"files": given.files, "--output": given.output})
    if given.output == "-":
        raise click.UsageError("the sum cannot be written to standard output: name a file.")

    def work(reporter: Reporter) -> CommandResult:
        from qconv.calibration.statistics_file import merge_files

        total = merge_files(given.files, Path(given.output), reporter)

        def show(stream: TextIO) -> None:
            sizes = f"{format_count(total.pictures, 'picture')}, {format_count(len(total.tensors), 'tensor')}"
            print(f"{given.output}: {sizes}", file=stream)
            for name in total.tensors if given.wanted.verbose else ():
                print(f"  {printable(name)}", file=stream)

        return CommandResult(total.as_dict(), show)

    return run_command(given.wanted, CommandFiles(), work)
