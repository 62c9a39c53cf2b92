"""Keeps what a long run has found, item by item, so that it can be cut off, die, and go on.

An item is written down when it begins and when it has ended. What has begun and not ended was the death of its process.
`survive` starts the run again, in a process of its own, until it has come to its end. Records of other code do
not count.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import qconv


class Record:
    """A file with one JSON object a line, beside those of other code."""

    def __init__(self, folder: Path, name: str) -> None:
        self.path = path = folder / f"{name}-{digest_code()}.jsonl"
        self.ended: dict[str, dict[str, Any]] = {}
        begun: str | None = None
        if path.exists():
            for line in path.read_text("utf-8").splitlines():
                entry = json.loads(line)
                if "begin" in entry:
                    begun = entry["begin"]
                else:
                    self.ended[entry["item"]] = entry
                    begun = None
        if begun is not None:
            self.end(begun, {"how": "dead", "words": "the process died"})

    def begin(self, item: str) -> bool:
        """Write down that an item begins. False where it has ended before."""
        if item in self.ended:
            return False
        self._write({"begin": item})
        return True

    def end(self, item: str, found: dict[str, Any]) -> None:
        """Write down what came of it."""
        self.ended[item] = {"item": item, **found}
        self._write(self.ended[item])

    def _write(self, entry: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def count(self, *names: str) -> Counter[tuple[Any, ...]]:
        """How often each combination of these entries is in the record."""
        return Counter(tuple(entry.get(name) for name in names) for entry in self.ended.values())


def digest_code() -> str:
    """A hash of all that is run: the package and this folder."""
    files = [*Path(qconv.__file__).parent.rglob("*.py"), *Path(__file__).parent.glob("*.py")]
    found = hashlib.sha256()
    for file in sorted(files):
        found.update(file.read_bytes())
    return found.hexdigest()[:12]


def survive(module: str, arguments: Sequence[str]) -> int:
    """Run `python -m module --inside ARGUMENTS` until it does not die of a signal. Returns its exit status."""
    while True:
        status = subprocess.run([sys.executable, "-m", module, "--inside", *arguments], check=False).returncode
        if status >= 0:
            return status
        print(f"{module} died of signal {-status}; it goes on behind that item.", file=sys.stderr)
