"""How a run ends when a signal comes."""

from __future__ import annotations

import signal
from typing import Any, NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def leave_at_once() -> None:
    """While libraries are imported nothing is half-written, and an exception inside them would only confuse them."""
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)


def leave_by_exceptions() -> None:
    """From here on a signal leaves through the `finally` clauses, which remove what is half-written."""
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _raise_exit)


def _raise_exit(number: int, frame: Any) -> NoReturn:
    raise SystemExit(128 + number)
