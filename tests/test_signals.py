"""A signal ends a run through its `finally` clauses, and leaves nothing that nobody owns."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

# The signal comes when `io.open` has returned, and before the `with` of the caller has the file.
OPENING = """
import io, os, signal, sys
from pathlib import Path
from qconv.signals import raise_exit_on_signals
number, path = int(sys.argv[1]), Path(sys.argv[2])
def send(frame, event, argument):
    if event == "c_return" and argument is io.open:
        sys.setprofile(None)
        os.kill(os.getpid(), number)
sys.setprofile(send)
raise_exit_on_signals()
try:
    for _ in range(3):
        with path.open("rb"):
            pass
        sum(range(10**6))
finally:
    print("finally")
"""
# The same where a module is imported: its file is open.
IMPORTING = """
import _io, os, signal, sys
from qconv.signals import raise_exit_on_signals
number, folder = int(sys.argv[1]), os.path.dirname(sys.argv[2])
with open(os.path.join(folder, "late.py"), "w") as file:
    file.write("made = 1")
sys.path.insert(0, folder)
def send(frame, event, argument):
    if event == "c_return" and argument is _io.open_code:
        sys.setprofile(None)
        os.kill(os.getpid(), number)
sys.setprofile(send)
raise_exit_on_signals()
try:
    import late
    for _ in range(3):
        sum(range(10**6))
finally:
    print("finally")
"""
TAKING = """
import os, signal, sys
from qconv.signals import raise_exit_on_signals, takes
number, taken = int(sys.argv[1]), []
@takes
def take():
    os.kill(os.getpid(), number)
    taken.append(sum(range(10**5)))
    return taken
raise_exit_on_signals()
try:
    found = take()
    while True:
        sum(range(10**5))
finally:
    print("finally", *map(str, found))
"""
HANGING = """
import os, signal, sys, threading
from pathlib import Path
from qconv.signals import raise_exit_on_signals
number, path = int(sys.argv[1]), Path(sys.argv[2])
os.mkfifo(path)
raise_exit_on_signals()
threading.Timer(0.1, os.kill, (os.getpid(), number)).start()
try:
    path.open("rb")
finally:
    print("finally")
"""


@pytest.mark.parametrize("number", [2, 15])
@pytest.mark.parametrize(
    ("code", "says"),
    [(OPENING, "finally"), (IMPORTING, "finally"), (TAKING, "finally 4999950000"), (HANGING, "finally")],
    ids=["opening", "importing", "taking", "hanging"],
)
def test_a_signal_while_something_is_being_opened(code: str, says: str, number: int, tmp_path: Path) -> None:
    path = tmp_path / "file"
    if code != HANGING:
        path.touch()
    command = [sys.executable, "-W", "error", "-c", code, str(number), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (128 + number, says, "")


WATCHED = """
import atexit, sys
import qconv.cli.main
atexit.register(print, "seen", flush=True)
how = sys.argv.pop(1)
if how == "trace":
    sys.settrace(lambda frame, event, argument: None)
elif how == "profile":
    sys.setprofile(lambda frame, event, argument: None)
elif how == "monitoring":
    sys.monitoring.use_tool_id(sys.monitoring.COVERAGE_ID, "coverage")
qconv.cli.main.run()
"""


@pytest.mark.parametrize(
    ("how", "seen"), [("trace", True), ("profile", True), ("monitoring", True), ("nothing", False)]
)
@pytest.mark.parametrize(("option", "status"), [("--version", 0), ("--nonsense", 2)])
def test_whoever_watches_a_run_may_write_what_it_saw(how: str, seen: bool, option: str, status: int) -> None:
    """A debugger, a profiler, a measurement of coverage; else the interpreter is not taken apart."""
    if how == "monitoring" and not hasattr(sys, "monitoring"):
        pytest.skip("a Python before 3.12 has no sys.monitoring")
    done = subprocess.run([sys.executable, "-c", WATCHED, how, option], capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    assert ("seen" in done.stdout) is seen
