"""Defines the error type that users see, the findings that passes return, and the formats of numbers in messages.

A `QconvError` states the thing, the fact and the fix; the command line prints it and exits with status 1. A pass
returns findings as data: a `Change` for what it did, a `Skipped` with the reason for what it refused to do. The report
prints both. `printable` makes text of a model harmless. `require_torch` raises a QconvError where the optional package
PyTorch is missing.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from dataclasses import dataclass


class QconvError(Exception):
    """Something the user can mend. The command line prints it as `Error:` and `Hint:` and exits with status 1.

    `message` names the thing and the fact, `hint` the fix.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


def format_count(number: int, noun: str) -> str:
    """`1 picture`, `2 pictures`, `2 batches`."""
    ending = "es" if noun.endswith(("ch", "sh", "s", "x")) else "s"
    return f"{number} {noun}" if number == 1 else f"{number} {noun}{ending}"


def format_some(names: Sequence[str], most: int = 3) -> str:
    """`a, b, c and 2 more`: the first names, and how many others there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def format_shape(shape: Sequence[int | None]) -> str:
    """`1x3x?x?` for (1, 3, None, None)."""
    return "x".join("?" if size is None else str(size) for size in shape) or "scalar"


def format_bytes(count: int) -> str:
    """`3.56 MB`, `12.0 kB`: so many bytes."""
    return f"{count / 1e6:.2f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def printable(text: str) -> str:
    """Write control characters as `\\x1b`: a stranger's file must not move the cursor of whoever looks at it."""
    return _CONTROLS.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def require_torch(what: str) -> None:
    """Raise QconvError where PyTorch is not installed, or cannot be loaded. what: that needs it, as in a sentence."""
    try:
        importlib.import_module("torch")
    except ModuleNotFoundError as error:
        why = "is not installed" if error.name == "torch" else f"cannot be loaded: {error}"
    except (ImportError, OSError) as error:
        why = f"cannot be loaded: {error}"
    else:
        return
    raise QconvError(
        f"{what} needs PyTorch, which {why.rstrip('.')}.",
        "install the extra: pip install 'qconv[torch]' "
        "(without a GPU: pip install torch --index-url https://download.pytorch.org/whl/cpu first).",
    )


@dataclass(frozen=True, slots=True)
class Change:
    """A finding: `step` changed the node or tensor `where`; `what` says how.

    kind: the same without names, so that a summary can count equal changes; `what` itself where it has none.
    """

    step: str
    where: str
    what: str
    kind: str = ""


@dataclass(frozen=True, slots=True)
class Skipped:
    """A finding: `step` left the node or tensor `where` as it is; `why` says the reason."""

    step: str
    where: str
    why: str


Finding = Change | Skipped
