"""The one exception that reaches the user: the thing, the fact, the fix."""

from __future__ import annotations

from collections.abc import Sequence


class QconvError(Exception):
    """Something the user can mend. The command line prints it as `Error:` and `Hint:` and exits with status 1.

    `message` names the thing and the fact, `hint` the fix.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


def counted(number: int, noun: str) -> str:
    """`1 picture`, `2 pictures`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def shaped(shape: Sequence[int | None]) -> str:
    """`1x3x?x?` for (1, 3, None, None)."""
    return "x".join("?" if size is None else str(size) for size in shape) or "scalar"


def sized(count: int) -> str:
    """`3.56 MB`, `12.0 kB`: so many bytes."""
    return f"{count / 1e6:.2f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"
