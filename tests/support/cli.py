"""The command line as tests call it: in this process or in one of its own, with a small model and pictures of noise."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image

from tests.support.models import network

HERE = Path(__file__).parents[1]
CIFAR = HERE / "models" / "cifar_mobilenet.onnx"
PHOTOS = HERE.parent / "calib_samples"
BODY = "c = Conv(x, w)  r = Relu(c)  p = GlobalAveragePool(r)  f = Flatten(p)  y = Gemm(f, g)"
QUICK = ("--samples", "8", "--resize", "exact")


@dataclass
class Done:
    """How a command ended: its status and what it wrote."""

    status: int
    out: bytes
    err: str

    @property
    def json(self) -> dict[str, Any]:
        (line,) = self.out.decode().splitlines()
        found = json.loads(line, parse_constant=pytest.fail)
        assert isinstance(found, dict)
        return found


Qconv = Callable[..., Done]


def start(*args: object, **options: Any) -> subprocess.Popen[bytes]:
    """`qconv ARGUMENTS` in a process of its own."""
    command = [sys.executable, "-W", "error", "-m", "qconv", *map(str, args)]
    return subprocess.Popen(command, **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options})


def finish(process: subprocess.Popen[bytes], stdin: bytes | None = None) -> Done:
    out, err = process.communicate(stdin, timeout=50)
    return Done(process.returncode, out, (err or b"").decode())


def really(*args: object, stdin: bytes | None = None, **options: Any) -> Done:
    return finish(start(*args, stdin=None if stdin is None else subprocess.PIPE, **options), stdin)


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def net(body: str = BODY, x: tuple[int | str, ...] = ("N", 3, 8, 8), **more: Any) -> onnx.ModelProto:
    constants = {"w": (4, 3, 3, 3), "g": (4, 10)} | {n: v for n, v in more.items() if n not in ("outputs", "opset")}
    used = {name: value for name, value in constants.items() if re.search(rf"\b{name}\b", body)}
    return network(body, x, **{n: more[n] for n in ("outputs", "opset") if n in more}, **used)


def picture(path: Path, seed: int, size: tuple[int, ...] = (8, 8, 3)) -> None:
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, size, np.uint8)).save(path)


def write_with_data_file(path: Path, location: str = "model.data") -> None:
    (path.parent / "model.data").unlink(missing_ok=True)
    onnx.save(net(), path, save_as_external_data=True, location="model.data", size_threshold=0)
    if location != "model.data":
        proto = onnx.load(path, load_external_data=False)
        for tensor in proto.graph.initializer:
            tensor.external_data[0].value = location
        path.write_bytes(proto.SerializeToString())


def write_with_open_size(path: Path) -> None:
    path.write_bytes(net(x=("N", 3, "H", "W")).SerializeToString())


def assert_error(done: Done, says: str) -> None:
    """The form of every error: the fact, the fix, and nothing else."""
    assert "Traceback" not in done.err
    assert done.status == 1
    assert done.out == b""
    lines = done.err.splitlines()
    assert lines[0].startswith("Error: ")
    assert lines[-1].startswith("Hint:  ")
    assert len(lines) == 2
    assert re.search(says, done.err), done.err
