"""Where a command's result goes: text or JSON to standard output, its main table as CSV into a file or there."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from qconv.options import require_output


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the user asked for. csv: a file, or `-`."""

    as_json: bool
    quiet: bool
    csv: str | None = None

    def check(self, *read: Path) -> None:
        """Say before any work what cannot be written. read: files that must not be written over."""
        if self.csv == "":
            raise click.UsageError("--csv needs a name.")
        if self.csv == "-" and self.as_json:
            raise click.UsageError("--json and '--csv -' both go to standard output: name a file.")
        require_output(self.as_json or self.csv == "-")
        if self.csv not in (None, "-"):
            from qconv import save

            save.check_place(Path(self.csv))
            save.refuse_what_is_read(Path(self.csv), read)

    def put(self, found: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], text: Callable[[], str]) -> None:
        """found: what --json prints; rows: of the table; text: for people."""
        if self.csv is not None:
            self._put_table(rows)
        if self.as_json:
            print(json.dumps(found, allow_nan=False))
        elif not self.quiet and self.csv != "-" and sys.stdout is not None:
            print(text())

    def _put_table(self, rows: Sequence[Mapping[str, Any]]) -> None:
        from qconv import save
        from qconv.tables import csv_of

        if self.csv == "-":
            print(csv_of(rows), end="")
        elif self.csv is not None:
            save.write_whole(Path(self.csv), csv_of(rows).encode())
