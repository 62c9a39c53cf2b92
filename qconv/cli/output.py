"""This module writes a command's result: text, JSON or CSV to standard output or a file, and ends a run on signals."""

from __future__ import annotations

import csv
import io
import json
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qconv.cli.options import require_output
from qconv.errors import QconvError

if TYPE_CHECKING:
    from qconv.ir.files import Source


@dataclass(frozen=True, slots=True)
class OutputOptions:
    """What the user asked for. csv: a file, or `-`."""

    as_json: bool
    quiet: bool
    csv: str | None = None

    def check(self, *read: Path, written: Mapping[str, str | None] | None = None) -> None:
        """Say before any work what cannot be written.

        read: files that must not be written over. written: what else is going to be, by what it is called.
        """
        if self.csv == "":
            raise click.UsageError("--csv needs a name.")
        if self.csv == "-" and self.as_json:
            raise click.UsageError("--json and '--csv -' both go to standard output: name a file.")
        require_output(self.as_json or self.csv == "-")
        if self.csv not in (None, "-"):
            from qconv import storage

            storage.check_output_path(Path(self.csv))
            storage.refuse_overwriting_inputs(Path(self.csv), read)
            _require_distinct_place(Path(self.csv), "the table", written or {})

    def put(self, found: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], text: Callable[[], str]) -> None:
        """found: what --json prints; rows: of the table; text: for people."""
        self.put_table(rows)
        if self.as_json:
            print(json.dumps(found, allow_nan=False))
        elif not self.quiet and self.csv != "-" and sys.stdout is not None:
            print(text())

    def put_table(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """The table alone, where one is wanted."""
        from qconv import storage

        if self.csv == "-":
            print(format_csv(rows), end="")
        elif self.csv is not None:
            storage.write_atomically(Path(self.csv), format_csv(rows).encode())


def check_report_path(
    report: str | None, models: Iterable[Source], read: Iterable[str | None], written: Mapping[str, str | None]
) -> Path | None:
    """Where the page goes; said before any work where it cannot. None where none is wanted.

    models, read: what must not be written over. written: what else is going to be, by what it is called.
    """
    if report is None:
        return None
    if report in ("", "-"):
        raise click.UsageError("--report needs the name of a file.")
    from qconv import storage
    from qconv.ir import files as ir_files
    from qconv.report import html

    html.require_report_extra()
    place = Path(report)
    storage.check_output_path(place)
    _require_distinct_place(place, "the report", written)
    if place.is_file():
        own = [model for model in models if model.path is not None]
        files = [
            file
            for model in own
            for file in (model.path, *ir_files.external_data_files(ir_files.read_proto(model), model))
            if file
        ]
        storage.refuse_overwriting_inputs(place, [*files, *(name for name in read if name)])
    return place


def _require_distinct_place(place: Path, own: str, written: Mapping[str, str | None]) -> None:
    for what, name in written.items():
        if name not in (None, "", "-") and Path(name).resolve() == place.resolve():
            raise QconvError(f"{place} is both {own} and {what}.", "choose two names.")


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
