"""`qconv` itself: help and version, wrong commands, what is not imported, a signal during the imports."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

import qconv
from qconv.cli import main
from tests.support.cli import CIFAR, Qconv, finish, listing


def test_no_command_and_no_model(call: Qconv, calib: Path) -> None:
    assert call().status == 2
    assert call("quantise").status == 2
    assert call("quantize", "--calib", calib).status == 2


def test_help_and_version(call: Qconv) -> None:
    assert call("--version").out.decode().split()[-1] == qconv.__version__
    text = call("quantize", "--help").out.decode()
    for param in main.cli.load_all()["quantize"].params:
        assert all(opt in text for opt in param.opts if opt.startswith("--"))


def test_a_command_imports_no_other_and_what_a_run_does_not_need_stays_out(tmp_path: Path, calib: Path) -> None:
    """What draws on terminals and pages, other commands, their analyses, and readers of labels: none of it is used."""
    args = ["quantize", CIFAR, "--calib", calib, "--samples", "1", "--effort", "fast", "-o", tmp_path / "q.onnx"]
    code = f"""
import sys
from qconv.cli.main import main
sys.argv = ["qconv", *{list(map(str, args))!r}]
try:
    main()
except SystemExit as leaving:
    assert not leaving.code, leaving.code
print(*sys.modules, file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stderr.splitlines()[-1].split())
    unused = {"rich.console", "rich.progress", "rich.table", "jinja2", "plotly", "torch", "xml.etree.ElementTree"}
    unused |= {"qconv.cli.compare", "qconv.cli.finetune", "qconv.report.pages", "qconv.report.html", "qconv.analysis"}
    unused |= {"qconv.data.voc_labels", "qconv.search.latency", "qconv.passes.embed_preprocessing", "sympy"}
    assert loaded & unused == set()
    assert {"qconv.cli.quantize", "onnxruntime"} <= loaded


def test_a_command_is_loaded_by_its_name() -> None:
    commands = main.cli.load_all()
    assert list(commands) == list(main.COMMANDS)
    assert all(command.name == name for name, command in commands.items())


@pytest.mark.parametrize("args", [["--help"], ["--version"], ["quantize", "--help"], ["quantize", "m.onnx"]])
def test_what_needs_no_model_imports_no_library(args: list[str]) -> None:
    """... and waits for none: an interpreter with click needs a tenth of a second."""
    code = f"""
import sys, time
start = time.perf_counter()
sys.argv = ["qconv", *{args!r}]
from qconv.cli.main import main
try:
    main()
except SystemExit:
    print(sorted({{"onnx", "onnxruntime", "numpy", "PIL", "rich", "onnx_ir", "sympy"}} & sys.modules.keys()))
    print(time.perf_counter() - start)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *_, heavy, seconds = done.stdout.splitlines()
    assert heavy == "[]"
    assert float(seconds) < 1


IMPORTING = """
import builtins, os, sys
plain, started = builtins.__import__, []
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name.endswith("onnxruntime_pybind11_state"):
            started.append(name)
def watching(name, *args, **kwargs):
    if len(started) == 1:
        started.append(name)
        os.kill(os.getpid(), {number})
    return plain(name, *args, **kwargs)
sys.meta_path.insert(0, Watch())
builtins.__import__ = watching
sys.argv = ["qconv", "quantize", {model!r}, "--calib", {calib!r}, "-o", "out.onnx"]
from qconv.cli.main import main
main()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_during_the_imports(tmp_path: Path, calib: Path, number: signal.Signals) -> None:
    """ONNX Runtime's C++ part imports numpy as it starts; what a handler raises there it takes for a broken numpy."""
    code = IMPORTING.format(number=int(number), model=str(CIFAR), calib=str(calib))
    done = finish(
        subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    )
    assert "Traceback" not in done.err
    assert done.status in (-number, 128 + number)
    assert listing(tmp_path) == []
