"""Runs one command of qconv in this process, within a time, and says how it ended."""

from __future__ import annotations

import contextlib
import io
import re
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from types import FrameType
from typing import Any

import click

from qconv.cli.main import cli
from qconv.errors import QconvError

ENDS_WELL = ("done", "error", "usage", "gate")
"""How a command may end, whatever it is given."""


class OutOfTime(BaseException):
    """Raised by the alarm: no command's `except Exception` may catch it."""


@dataclass(frozen=True, slots=True)
class Ending:
    """How a command ended.

    Attributes:
        how: One of ENDS_WELL, or "traceback", "late" (out of time), "dead" (the process died).
        words: The error's message, or the last lines of the traceback.
        seconds: Of wall-clock time.
        out: What it printed to standard output.
    """

    how: str
    words: str = ""
    seconds: float = 0.0
    out: str = ""

    @property
    def reason(self) -> str:
        """The words without what is another in each model: names in quotes, numbers, paths."""
        text = re.sub(r"'[^']*'|\"[^\"]*\"", "'...'", self.words)
        if self.how == "traceback":
            return text[:160]
        text = re.sub(r"\S*[/\\]\S+|\S+\.(onnx|npy|npz|png)\b", "FILE", text)
        return re.sub(r"\d+", "N", text)[:160]

    def as_dict(self) -> dict[str, Any]:
        """What is recorded."""
        found = asdict(self)
        del found["out"]
        return found


def run_command(arguments: Sequence[object], limit: float = 60.0) -> Ending:
    """Run `qconv` with these arguments. limit: seconds, 0 for none."""
    words = [str(argument) for argument in arguments]
    started, out = time.monotonic(), io.StringIO()
    how, said = "done", ""
    argv, sys.argv = sys.argv, ["qconv", *words]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()), _alarm(limit):
            status = cli.main(words, standalone_mode=False)
            how = "gate" if status == 3 else "done"
    except OutOfTime:
        how, said = "late", f"{words[0]}: no end within {limit:g} s"
    except QconvError as error:
        how, said = "error", error.message
        if not error.hint:
            how, said = "traceback", f"an error without a hint: {error.message}"
    except click.ClickException as error:
        how, said = "usage", error.format_message()
    except OSError as error:
        how, said = ("error", f"{error.strerror}") if error.filename is not None else ("traceback", _last_lines())
    except MemoryError:
        how, said = "error", "out of memory"
    except (Exception, SystemExit):
        how, said = "traceback", _last_lines()
    finally:
        sys.argv = argv
    return Ending(how, said, time.monotonic() - started, out.getvalue())


def _last_lines() -> str:
    kind, error, trace = sys.exc_info()
    places = [f"{f.filename.rpartition('qconv/')[2]}:{f.lineno} {f.name}" for f in traceback.extract_tb(trace)[-3:]]
    return f"{getattr(kind, '__name__', kind)}: {error} at {' < '.join(reversed(places))}"[:600]


@contextlib.contextmanager
def _alarm(limit: float) -> Iterator[None]:
    """Raise OutOfTime in this thread after `limit` seconds; work inside a library is only left when it returns."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise OutOfTime

    kept = {number: signal.getsignal(number) for number in (signal.SIGALRM, signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in kept.items():
            signal.signal(number, handler)
