"""Runs a command: does what all of them do around their own work.

Places are checked before any work. Warnings and progress go to standard error, signals leave nothing half-written, and
the result is written in the forms that were asked for. Exit status 3 says that a gate fell short.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

from qconv.cli.output import CommandFiles, CommandResult, OutputOptions
from qconv.cli.recipe_options import take_preprocessing_options
from qconv.reporter import Reporter
from qconv.signals import raise_exit_on_signals

if TYPE_CHECKING:
    from qconv.results.quantize import Gate

GATE_FELL_SHORT = 3

Arguments = TypeVar("Arguments")


def make_arguments(kind: type[Arguments], options: Mapping[str, Any]) -> Arguments:
    """The dataclass of a command, of what click hands to it.

    Options on how results are written become `wanted`, those on how pictures are fed `preprocessing`.
    """
    rest = dict(options)
    made: dict[str, Any] = {"wanted": OutputOptions.take(rest)}
    if "preprocess" in rest:
        made["preprocessing"] = take_preprocessing_options(rest)
    return kind(**made, **rest)


def require_names(named: Mapping[str, str | Collection[str] | None]) -> None:
    """Usage errors for names that are empty. named: what is named, by what it is called in words."""
    if any("" in ((name,) if isinstance(name, str) else name or ()) for name in named.values()):
        *others, last = named
        told = f"{', '.join(others)} and {last} need" if others else f"{last} needs"
        raise click.UsageError(f"{told} a name.")


def run_command(wanted: OutputOptions, files: CommandFiles, work: Callable[[Reporter], CommandResult]) -> int:
    """Check what is going to be written, do the work, and write its result.

    Returns:
        The exit status.
    """
    wanted.check(files)
    wanted.check_report(files)
    from qconv.report.console import Console

    console = Console(quiet=wanted.quiet)
    raise_exit_on_signals()
    try:
        result = work(Reporter(console.warn, console.progress))
        wanted.write_page(result)
    finally:
        console.close()
    wanted.put(result)
    return _tell_gates(result.gates, quiet=wanted.quiet) or result.status


def _tell_gates(gates: Sequence[Gate], *, quiet: bool) -> int:
    """Say which gates fell short. Returns the exit status."""
    for gate in gates:
        if not gate.held and not quiet:
            got = "no such measure" if gate.got is None else f"{gate.got:.4g}"
            print(f"Gate fell short: --{gate.name} {gate.want:g}, got {got}.", file=sys.stderr)
    return 0 if all(gate.held for gate in gates) else GATE_FELL_SHORT
