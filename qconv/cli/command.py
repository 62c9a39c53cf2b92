"""Runs a command: does what all of them do around their own work, and writes its result.

Places are checked before any work. Warnings and progress go to standard error, signals leave nothing half-written, and
the result goes as text, JSON or CSV to standard output or a file, and as a page into a file. Exit status 3 says that a
gate fell short.
"""

from __future__ import annotations

import csv
import gc
import io
import json
import shlex
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

import click

from qconv.cli.options import require_output
from qconv.cli.recipe_options import take_preprocessing_options
from qconv.errors import QconvError, printable
from qconv.reporter import Reporter
from qconv.signals import raise_exit_on_signals

if TYPE_CHECKING:
    from qconv.report.html import Page
    from qconv.results.gates import Gate


@dataclass(frozen=True, slots=True)
class CommandFiles:
    """The files of a command, so that what is written spoils nothing that is read.

    Attributes:
        models: Names of models that are read; their external data is read, too. `-` is standard input.
        reads: Names of other files that are read; None stands for none.
        writes: Names of files that are written, by what they are called in words; None stands for none.
    """

    models: tuple[str, ...] = ()
    reads: tuple[str | None, ...] = ()
    writes: Mapping[str, str | None] = field(default_factory=dict)

    @property
    def read(self) -> list[Path]:
        """All that is read, without the external data of models."""
        return [Path(name) for name in (*self.models, *self.reads) if name not in (None, "-")]

    def require_distinct_place(self, place: Path, own: str) -> None:
        """Raise QconvError where `place`, which is `own` in words, is written already."""
        for what, name in self.writes.items():
            if name not in (None, "", "-") and Path(name).resolve() == place.resolve():
                raise QconvError(f"{place} is both {own} and {what}.", "choose two names.")

    def external_data(self) -> Iterator[Path]:
        """The external data of the models that are files."""
        from qconv.ir.files import Source, external_data_files, read_proto

        for name in self.models:
            if name != "-":
                source = Source(name, Path(name))
                yield from external_data_files(read_proto(source), source)


@dataclass(frozen=True, slots=True)
class CommandResult:
    """What came of a command, in every form in which it may be wanted.

    Attributes:
        found: What `--json` prints.
        show: Writes the text for people.
        rows: Of the table for `--csv`.
        page: Makes the page for `--report` of the command line that makes it again.
        gates: Demands that it may have fallen short of.
        model: A model for standard output; the rest then goes to standard error.
        status: The exit status where all gates hold.
        after_page: Makes the result that tells of the seconds that the page took; None where it tells no time.
    """

    found: Mapping[str, Any]
    show: Callable[[TextIO], None]
    rows: Sequence[Mapping[str, Any]] = ()
    page: Callable[[str], Page] | None = None
    gates: Sequence[Gate] = ()
    model: bytes | None = None
    status: int = 0
    after_page: Callable[[float], CommandResult] | None = None


@dataclass(frozen=True, slots=True)
class OutputOptions:
    """What the user asked for.

    Attributes:
        as_json: One JSON object in place of text.
        quiet: No text.
        verbose: More of it.
        csv: A file for the table, or `-`.
        report: A file for the page.
    """

    as_json: bool
    quiet: bool
    verbose: bool
    csv: str | None = None
    report: str | None = None

    @classmethod
    def take(cls, options: dict[str, Any]) -> OutputOptions:
        """Take these out of what click hands to a command; some commands have no table or no page."""
        return cls(**{name: options.pop(name) for name in cls.__dataclass_fields__ if name in options})

    def check(self, files: CommandFiles) -> None:
        """Say before any work what cannot be written."""
        if self.csv == "":
            raise click.UsageError("--csv needs a name.")
        if self.csv == "-" and self.as_json:
            raise click.UsageError("--json and '--csv -' both go to standard output: name a file.")
        require_output(self.as_json or self.csv == "-")
        if self.csv not in (None, "-"):
            from qconv import storage

            storage.check_output_path(Path(self.csv))
            storage.refuse_overwriting_inputs(Path(self.csv), files.read)
            files.require_distinct_place(Path(self.csv), "the table")

    def check_report(self, files: CommandFiles) -> None:
        """Say before any work where no page can be written."""
        if self.report is None:
            return
        if self.report in ("", "-"):
            raise click.UsageError("--report needs the name of a file.")
        from qconv import storage
        from qconv.report import html

        html.require_report_extra()
        place = Path(self.report)
        storage.check_output_path(place)
        CommandFiles(writes={**files.writes, "the table": self.csv}).require_distinct_place(place, "the report")
        if place.is_file():
            storage.refuse_overwriting_inputs(place, [*files.read, *files.external_data()])

    def write_page(self, result: CommandResult) -> CommandResult:
        """Write the page, where one is wanted. Returns what is to be told then."""
        if self.report is None or result.page is None:
            return result
        from qconv import storage
        from qconv.report import html

        start = time.perf_counter()
        storage.write_atomically(Path(self.report), html.render_page(result.page(format_command_line())))
        return result if result.after_page is None else result.after_page(time.perf_counter() - start)

    def put(self, result: CommandResult) -> None:
        """Write the rest: the model, the table, and JSON or text."""
        stream: TextIO | None = sys.stdout
        if result.model is not None:
            sys.stdout.buffer.write(result.model)
            sys.stdout.buffer.flush()
            stream = sys.stderr
        self._put_table(result.rows)
        if self.as_json:
            print(json.dumps(result.found, allow_nan=False), file=stream)
        elif not self.quiet and self.csv != "-" and stream is not None:
            result.show(stream)

    def _put_table(self, rows: Sequence[Mapping[str, Any]]) -> None:
        from qconv import storage

        if self.csv == "-":
            print(format_csv(rows), end="")
        elif self.csv is not None:
            storage.write_atomically(Path(self.csv), format_csv(rows).encode())


def print_to(text: Callable[[], str]) -> Callable[[TextIO], None]:
    """What `CommandResult.show` takes, of a function that returns the text."""
    return lambda stream: print(printable(text()), file=stream)


def format_command_line() -> str:
    """The command line, to be pasted into a shell."""
    return shlex.join(["qconv", *sys.argv[1:]])


def format_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line a row, below the names of the columns. None is an empty cell; several values are parted by blanks, those
    of a shape by x.
    """
    names = list(dict.fromkeys(name for row in rows for name in row))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(names)
    writer.writerows([_format_cell(name, row.get(name)) for name in names] for row in rows)
    return out.getvalue()


def _format_cell(name: str, value: Any) -> Any:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return " ".join(f"{key}={_format_cell(key, part)}" for key, part in value.items())
    if isinstance(value, list | tuple):
        return ("x" if name == "shape" else " ").join(str(_format_cell("", part)) for part in value)
    return value


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


def run_command(
    wanted: OutputOptions, files: CommandFiles, work: Callable[[Reporter], CommandResult], *, imports: str | None = None
) -> int:
    """Check what is going to be written, do the work, and write its result.

    Args:
        wanted: How the result is written.
        files: What is read and written.
        work: The work.
        imports: The module that brings most of what the work needs. It is imported before garbage is looked for.

    Returns:
        The exit status.
    """
    wanted.check(files)
    wanted.check_report(files)
    from qconv.report.console import Console

    if imports is not None:
        import_module(imports)
    _resume_collection()
    console = Console(quiet=wanted.quiet)
    raise_exit_on_signals()
    try:
        result = wanted.write_page(work(Reporter(console.warn, console.progress)))
    finally:
        console.close()
    wanted.put(result)
    return _tell_gates(result.gates, quiet=wanted.quiet) or result.status


def _resume_collection() -> None:
    """Look for garbage again, where `run` has put that off, but not among what is there by now.

    Modules and libraries make hundreds of thousands of objects that stay to the end. To look through them while they
    are imported, and time and again in a run, is a twelfth of all that a short one does.
    """
    if not gc.isenabled():
        gc.freeze()
        gc.enable()


def _tell_gates(gates: Sequence[Gate], *, quiet: bool) -> int:
    """Say which gates fell short. Returns the exit status."""
    for gate in gates:
        if not gate.held and not quiet:
            print(gate.as_error, file=sys.stderr)
    return 0 if all(gate.held for gate in gates) else GATE_FELL_SHORT
