"""`qconv quantize` in pipes, with streams that are closed or full, and on a terminal."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

from tests.support.cli import CIFAR, Qconv, finish, listing, net, really, start


def test_from_standard_input_to_standard_output(tmp_path: Path, tiny: Path, calib: Path) -> None:
    out = tmp_path / "out.onnx"
    assert really("quantize", tiny, "--calib", calib, "-o", out, "-q").status == 0
    piped = really("quantize", "-", "--calib", calib, "-o", "-", "--json", stdin=tiny.read_bytes(), cwd=tmp_path)
    assert piped.status == 0
    assert piped.out == out.read_bytes()
    last = piped.err.splitlines()[-1]  # warnings may come before
    assert json.loads(last)["output"] == "-"
    assert all(line.startswith("Warning:") for line in piped.err.splitlines()[:-1])
    assert listing(tmp_path) == ["models", "out.onnx"]


@pytest.mark.parametrize("how", ["file to stdout", "stdin to file"])
def test_half_a_pipe(call: Qconv, tiny: Path, calib: Path, how: str) -> None:
    out = tiny.with_name("out.onnx")
    assert call("quantize", tiny, "--calib", calib, "-o", out).status == 0
    before = out.read_bytes()
    out.unlink()
    if how == "file to stdout":
        done = call("quantize", tiny, "--calib", calib, "-o", "-")
        assert done.out == before
        assert "SQNR" in done.err
        assert listing(tiny.parent) == ["model.onnx"]
    else:
        assert call("quantize", "-", "--calib", calib, "-o", out, stdin=tiny.read_bytes()).status == 0
        assert out.read_bytes() == before


def test_standard_output_carries_nothing_but_the_model(call: Qconv, tiny: Path, calib: Path) -> None:
    for more in (("-v",), ("-q",), ("--min-sqnr", "200")):
        onnx.checker.check_model(onnx.load_from_string(call("quantize", tiny, "--calib", calib, "-o", "-", *more).out))
    assert call("quantize", tiny, "--calib", calib, "-o", "-", "-q").err == ""


def test_errors_leave_standard_output_empty(call: Qconv, calib: Path) -> None:
    for data in (b"", b"text", CIFAR.read_bytes()[:5000]):
        done = call("quantize", "-", "--calib", calib, "-o", "-", "--json", stdin=data)
        assert (done.status, done.out) == (1, b"")
        assert "standard input" in done.err


def test_standard_input_needs_an_output(call: Qconv, calib: Path) -> None:
    done = call("quantize", "-", "--calib", calib, stdin=net().SerializeToString())
    assert done.status == 2
    assert "-o" in done.err


def test_a_reader_that_goes_away(tiny: Path, calib: Path) -> None:
    process = start("quantize", tiny, "--calib", calib, "-o", "-", "-q")
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    with process.stderr:
        assert process.stderr.read() == b""
    assert process.wait() != 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("more", [("-o", "-"), ("--json",)])
def test_standard_output_on_a_full_disk(tiny: Path, calib: Path, more: tuple[str, ...]) -> None:
    with open("/dev/full", "wb") as full:
        done = really("quantize", tiny, "--calib", calib, *more, stdout=full)
    assert done.status == 1
    assert "Traceback" not in done.err
    assert "Error:" in done.err
    assert "No space" in done.err


@pytest.mark.parametrize(("closed", "more"), [("<&-", ("-", "-o", "out.onnx")), (">&-", ("model.onnx",))])
def test_closed_streams(tiny: Path, calib: Path, closed: str, more: tuple[str, ...]) -> None:
    """As cron and some supervisors start their children."""
    command = f'"$0" -m qconv quantize --calib "$1" {" ".join(more)} {closed}'
    done = subprocess.run(
        ["sh", "-c", command, sys.executable, calib], cwd=tiny.parent, capture_output=True, text=True, check=False
    )
    assert "Traceback" not in done.stderr
    assert done.returncode == (1 if closed == "<&-" else 0)


def on_terminal(*args: object) -> tuple[int, str]:
    """The status, and what a terminal on stderr has shown."""
    ours, theirs = pty.openpty()
    env = {name: value for name, value in os.environ.items() if name != "NO_COLOR"} | {"TERM": "xterm"}
    process = start(*args, stderr=theirs, stdout=subprocess.DEVNULL, env=env)
    os.close(theirs)
    shown = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # Linux says EIO where others say end of file
            break
        if not part:
            break
        shown += part
    os.close(ours)
    return process.wait(), shown.decode()


def test_a_progress_bar_on_a_terminal_only(tiny: Path, calib: Path) -> None:
    args = ("quantize", tiny, "--calib", calib)
    # CI services set this to have colours in their logs
    elsewhere = start(*args, "-o", tiny.with_name("o"), env=os.environ | {"FORCE_COLOR": "1", "TERM": "xterm"})
    status, shown = on_terminal(*args)
    assert status == 0
    assert "calibrate" in shown
    assert "20/20" in shown
    assert "calibrate" not in finish(elsewhere).err


def test_closed_standard_error_spoils_no_model(tiny: Path, calib: Path, tmp_path: Path) -> None:
    """What has nowhere to go does not go into the model."""
    out = tmp_path / "out.onnx"
    command = (
        f"'{sys.executable}' -m qconv quantize '{tiny}' --calib '{calib}' -o - --json --min-sqnr 300 2>&- > '{out}'"
    )
    done = subprocess.run(["bash", "-c", command], check=False, cwd=Path(__file__).parents[2])
    assert done.returncode == 3
    onnx.checker.check_model(onnx.load_from_string(out.read_bytes()))
