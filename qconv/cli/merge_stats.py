"""`qconv merge-stats` adds up calibration statistics of parts of a data set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

import qconv
from qconv.cli.options import HELP_WIDTH, output_options
from qconv.errors import format_count
from qconv.signals import raise_exit_on_signals

if TYPE_CHECKING:
    pass


@click.command("merge-stats", context_settings=HELP_WIDTH)
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@click.option("-o", "--output", required=True, metavar="OUT", help="Where to write the sum.")
@output_options
def merge_stats(files: tuple[str, ...], output: str, as_json: bool, quiet: bool, verbose: bool) -> int:
    """Add up statistics that `quantize --save-stats` wrote of parts of a set of pictures."""
    if "" in (output, *files):
        raise click.UsageError("files and --output need a name.")
    from qconv.calibration import statistics_file
    from qconv.report import console as report_console

    console = report_console.Console(quiet=quiet)
    total, twice = statistics_file.merge_statistics(files)
    if twice:
        console.warn(f"{format_count(twice, 'picture')} came more than once, and count as often.")
    raise_exit_on_signals()
    statistics_file.write_statistics(total, Path(output))
    found = {
        "schema": 1,
        "version": qconv.__version__,
        "output": output,
        "model": total.name,
        "pictures": total.pictures,
        "repeated": twice,
        "tensors": len(total.sketches),
    }
    if as_json:
        print(json.dumps(found))
    elif not quiet:
        print(f"{output}: {format_count(total.pictures, 'picture')}, {format_count(len(total.sketches), 'tensor')}")
        for name in total.sketches if verbose else ():
            print(f"  {name}")
    return 0
