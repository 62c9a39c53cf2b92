"""`qconv audit`: of a file and of a pipe."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from tests.support.cli import CIFAR, PHOTOS, QUICK, Qconv, assert_error, net


def test_audit_of_a_file_and_of_a_pipe(call: Qconv, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qconv.planning.placement.FLOAT_MARGIN", 0.9)  # some layers are left in float
    for name in ("LEAST_GAIN_SHARE", "LEAST_GAIN_US"):
        monkeypatch.setattr(f"qconv.planning.placement.{name}", -math.inf)
    out = tmp_path / "q.onnx"
    call("quantize", CIFAR, "--calib", PHOTOS, *QUICK, "--preprocess", "imagenet", "-o", out, "--quiet")
    text = call("audit", out).out.decode()
    for told in ("Q/DQ", "integers", "in float by choice", "[placed]", "ONNX Runtime"):
        assert told in text
    found = call("audit", "-", "--json", stdin=out.read_bytes()).json
    assert found["integer"] + found["float"] == len(found["layers"])
    assert {"node", "op", "why", "remedy", "rule", "us"} == set(found["placed"][0])


def test_audit_asks_for_a_size_that_is_open(call: Qconv, tmp_path: Path) -> None:
    path = tmp_path / "open.onnx"
    path.write_bytes(net("y = Conv(x, w)", ("N", 3, "H", "W")).SerializeToString())
    assert_error(call("audit", path), "--size")
    assert call("audit", path, "--size", "9x8", "--quiet").status == 0
    assert_error(call("audit", tmp_path / "none.onnx"), "none.onnx")


def test_inspect_takes_a_target_for_a_float_model_alone(call: Qconv, tiny: Path, calib: Path) -> None:
    out = tiny.with_name("q.onnx")
    call("quantize", tiny, "--calib", calib, *QUICK, "-o", out, "--quiet")
    assert call("inspect", tiny, "--target", "generic").status == 0
    assert_error(
        call("inspect", out, "--target", "generic"), r"--target is for a float model, and .*q\.onnx is quantized"
    )
    assert call("inspect", out).status == 0
