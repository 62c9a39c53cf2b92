"""Systems that lack what this one has: Windows has neither `fcntl` nor `resource`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from qconv.runtime import benchmark

HERE = Path(__file__).parent
HIDDEN = """
import importlib, pkgutil, sys, warnings

class Hide:
    def find_spec(self, name, path=None, target=None):
        if name in ("fcntl", "resource"):
            raise ImportError(f"{name} is hidden")

sys.meta_path.insert(0, Hide())
for name in ("fcntl", "resource"):
    sys.modules.pop(name, None)
warnings.filterwarnings("ignore", message="only soft file lock is available")  # what filelock says of a Unix without
import qconv
for module in pkgutil.walk_packages(qconv.__path__, "qconv."):
    if module.name.rpartition(".")[2] == "__main__":
        continue
    try:
        importlib.import_module(module.name)
    except ModuleNotFoundError as error:
        if error.name.partition(".")[0] not in ("torch", "jinja2", "markupsafe", "plotly", "psutil"):
            raise
from qconv.cli.main import main
sys.argv[0] = "qconv"
main()
"""


def test_without_fcntl_and_resource(tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    stale = tmp_path / ".out.onnx.x.qconv-tmp"
    stale.mkdir()
    command = [sys.executable, "-W", "error", "-c", HIDDEN, "quantize", str(HERE / "models" / "cifar_mobilenet.onnx")]
    command += ["--calib", str(HERE.parent / "calib_samples"), "--samples", "8", "--effort", "fast", "--json"]
    done = subprocess.run([*command, "-o", str(out)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert json.loads(done.stdout)["output"] == str(out)
    assert [path.name for path in tmp_path.iterdir()] == ["out.onnx"]


def test_memory_is_not_known_where_the_system_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(self: Path, *args: object, **named: object) -> str:
        raise FileNotFoundError(self)

    assert benchmark.peak_rss_mb()
    monkeypatch.setattr(Path, "read_text", missing)
    assert benchmark.peak_rss_mb()  # the rusage of this system
    monkeypatch.setitem(sys.modules, "resource", None)
    assert benchmark.peak_rss_mb() is None
