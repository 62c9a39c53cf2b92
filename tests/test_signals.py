"""A signal ends a run through its `finally` clauses, and leaves nothing that nobody owns."""

from __future__ import annotations

import os
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
from qconv.signals import raise_exit_on_signals, uninterrupted
number, taken = int(sys.argv[1]), []
@uninterrupted
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


# One process for each line that the two ends of a folder run through, with a signal at that line alone.
CLOSING = """
import os, signal, sys
from pathlib import Path
from qconv.signals import raise_exit_on_signals
from qconv.storage import locked_folder
WATCHED = ("qconv", "contextlib", "shutil", "tempfile", "filelock")
number, folder = int(sys.argv[1]), Path(sys.argv[2])
def use(line):
    seen = 0
    def trace(frame, event, argument):
        nonlocal seen
        if event == "line" and frame.f_globals["__name__"].partition(".")[0] in WATCHED:
            seen += 1
            if seen == line:
                os.kill(os.getpid(), number)
        return trace
    raise_exit_on_signals()
    sys.settrace(trace)
    with locked_folder(folder / "out") as own:
        (own / "out").write_text("half")
    sys.settrace(None)
    return seen
use(0)  # what is imported late, once
lines = use(0)
assert lines > 100
for line in range(1, lines + 1):
    child = os.fork()
    if child == 0:
        try:
            use(line)
            for _ in range(10**5):
                pass
        except SystemExit:
            os._exit(3)  # before the frames go, and with them what they hold
        os._exit(1)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 3 or list(folder.iterdir()):
        print("line", line, list(folder.iterdir()))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a system without fork")
def test_a_signal_while_a_folder_is_made_or_removed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", CLOSING, "15", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


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
