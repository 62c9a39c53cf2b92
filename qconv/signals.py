"""How a run ends when a signal comes.

An exception may come out of a handler between any two steps of the program: also when a library has opened a file and
not yet handed it to the `with` that closes it, or while a `with` removes what it made. Nobody owns that file then. So
the exception waits until no function that opens or closes things is on the stack; it does not wait for long, as one may
hang (a pipe that nobody writes to).
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any, TypeVar

EXIT_SIGNALS = (signal.SIGINT, signal.SIGTERM)
OPENERS = frozenset({"PIL", "contextlib", "filelock", "onnx", "pathlib", "subprocess", "tempfile", "zipfile"})
"""Libraries whose functions open files, make folders or start processes, or enter and leave a `with`, and return soon.
"""
MODULE_READERS = frozenset({"get_data", "set_data"})
"""Functions of importlib that hold a file open: others run whole modules, which may take long."""
PATIENCE = 0.5
"""Seconds that a signal waits for them at most."""
OWN_PATIENCE = 5.0
"""Seconds that it waits for our own, which do not hang: for as long as large files take to be removed."""
AGAIN = 0.001
"""Seconds until it looks again."""

_Function = TypeVar("_Function", bound=Callable[..., Any])
_uninterrupted: set[CodeType] = set()


def uninterrupted(function: _Function) -> _Function:
    """Decorate a function that takes something and hands it to its caller, or gives it back: no signal comes between.

    Of a generator under `contextlib.contextmanager` that is its two ends: between them it is not on the stack.
    """
    _uninterrupted.add(function.__code__)
    return function


def exit_at_once_on_signals() -> None:
    """While libraries are imported nothing is half-written, and an exception inside them would only confuse them."""
    for number in EXIT_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)


def raise_exit_on_signals() -> None:
    """From here on a signal leaves through the `finally` clauses, which remove what is half-written."""
    for number in EXIT_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _leave)


def _leave(number: int, frame: FrameType | None) -> None:
    """Raise SystemExit now, or as soon as nothing is being opened or closed."""
    _leave_when_free(128 + number, frame, time.monotonic())


def _leave_when_free(status: int, frame: FrameType | None, since: float) -> None:
    if not hasattr(signal, "setitimer") or time.monotonic() - since >= _patience(frame):
        raise SystemExit(status)
    signal.signal(signal.SIGALRM, lambda _, later: _leave_when_free(status, later, since))
    signal.setitimer(signal.ITIMER_REAL, AGAIN)


def _patience(frame: FrameType | None) -> float:
    """Seconds to wait for the functions that have not yet returned: 0 where none of them opens or closes anything."""
    patience = 0.0
    while frame is not None:
        library = frame.f_globals.get("__name__", "").partition(".")[0]
        if frame.f_code in _uninterrupted:
            return OWN_PATIENCE
        reads_module = library in ("importlib", "_frozen_importlib_external") and frame.f_code.co_name in MODULE_READERS
        if library in OPENERS or reads_module:
            patience = PATIENCE
        frame = frame.f_back
    return patience
