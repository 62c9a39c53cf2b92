"""Tables as CSV: what `--csv` writes."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any


def csv_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line a row, below the names of the columns. None is an empty cell; several values are parted by blanks, those
    of a shape by x.
    """
    names = list(dict.fromkeys(name for row in rows for name in row))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(names)
    writer.writerows([_cell(name, row.get(name)) for name in names] for row in rows)
    return out.getvalue()


def _cell(name: str, value: Any) -> Any:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return " ".join(f"{key}={_cell(key, part)}" for key, part in value.items())
    if isinstance(value, list | tuple):
        return ("x" if name == "shape" else " ").join(str(_cell("", part)) for part in value)
    return value
