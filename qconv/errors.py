"""The one exception that reaches the user: the thing, the fact, the fix."""

from __future__ import annotations


class QconvError(Exception):
    """Something the user can mend. The command line prints it as `Error:` and `Hint:` and exits with status 1.

    `message` names the thing and the fact, `hint` the fix.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
