"""The commands that look at models and write none."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import click

from qconv.leaving import leave_by_exceptions
from qconv.options import WIDTH, common_options, require_output
from qconv.values import Size

NO_STREAM = "a model from standard input can be read only once: name its file."


def _print(found: dict[str, Any], text: Callable[[], str], *, as_json: bool, quiet: bool) -> None:
    if as_json:
        print(json.dumps(found, allow_nan=False))
    elif not quiet and sys.stdout is not None:
        print(text())


batch_option = click.option(
    "--batch", metavar="N", type=click.IntRange(1), help="Pictures a run.  [default: the model's own, or 1]"
)
size_option = click.option("--size", type=Size(), help="Of pictures, where a model leaves height and width open.")


@click.command(context_settings=WIDTH)
@click.argument("model")
@batch_option
@size_option
@common_options
def audit(
    model: str,
    batch: int | None,
    size: tuple[int, int] | None,
    threads: int | None,
    as_json: bool,
    quiet: bool,
    verbose: bool,
) -> int:
    """Say what ONNX Runtime runs of MODEL in integers, what in float, by which rule, and what each costs."""
    require_output(as_json)
    from qconv import examine, printing
    from qconv.source import source_of

    leave_by_exceptions()
    found = examine.examine(source_of(model), threads=threads or 1, batch=batch, size=size)
    _print(found.as_dict(), lambda: printing.audit(found, verbose=verbose), as_json=as_json, quiet=quiet)
    return 0


@click.command(context_settings=WIDTH)
@click.argument("models", nargs=-1, required=True, metavar="MODEL [OTHER]...")
@batch_option
@size_option
@click.option(
    "--rounds", default=24, show_default=True, metavar="N", type=click.IntRange(1), help="Turns that each model gets."
)
@common_options
def benchmark(
    models: tuple[str, ...],
    batch: int | None,
    size: tuple[int, int] | None,
    rounds: int,
    threads: int | None,
    as_json: bool,
    quiet: bool,
    verbose: bool,
) -> int:
    """Time MODEL and OTHERs in turns, each against the first, with made-up input."""
    if "-" in models:
        raise click.UsageError(NO_STREAM)
    require_output(as_json)
    from qconv import benchmark as timing
    from qconv import printing, runtime, summary

    console = summary.Console(quiet=quiet)
    leave_by_exceptions()
    try:
        conditions = timing.Conditions(threads, batch, size, rounds)
        found = timing.benchmark(models, conditions, version=runtime.VERSION, progress=console.progress)
    finally:
        console.close()
    if found.threads > found.cpu.cores:
        console.warn(f"{found.threads} threads share {found.cpu.cores} cores, so they wait for each other.")
    _print(found.as_dict(), lambda: printing.benchmark(found, verbose=verbose), as_json=as_json, quiet=quiet)
    return 0
