"""The command line as its users have it: statuses, streams, messages, what lies in the folder afterwards."""

from __future__ import annotations

import io
import json
import os
import pty
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from PIL import Image

import qconv
from qconv.cli import main, quantize, study_samples
from qconv.storage import STAGING_SUFFIX
from tests.support.models import network

ROOT = os.geteuid() == 0
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


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]) -> Iterator[Qconv]:
    """`qconv ARGUMENTS` within this process, its real entry point included. C++ libraries are heard, too."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGPIPE)}

    def run(*args: object, stdin: bytes = b"") -> Done:
        monkeypatch.setattr("sys.argv", ["qconv", *map(str, args)])
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        capfdbinary.readouterr()
        with pytest.raises(SystemExit) as caught:
            main.main()
        out, err = capfdbinary.readouterr()
        status = caught.value.code
        assert isinstance(status, int)
        return Done(status, out, err.decode())

    yield run
    for number, handler in before.items():
        signal.signal(number, handler)


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


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A folder of its own with `model.onnx`, a few kilobytes."""
    folder = tmp_path / "work"
    folder.mkdir()
    path = folder / "model.onnx"
    path.write_bytes(net().SerializeToString())
    return path


def picture(path: Path, seed: int, size: tuple[int, ...] = (8, 8, 3)) -> None:
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, size, np.uint8)).save(path)


@pytest.fixture(scope="session")
def calib(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 pictures of 8x8 random pixels."""
    folder = tmp_path_factory.mktemp("calib")
    for number in range(20):
        picture(folder / f"{number:02}.png", number)
    return folder


# -- the main job ------------------------------------------------------------------------------------------------------


def test_the_main_job(tmp_path: Path) -> None:
    """With nothing but a model and a folder; the summary is the result, so it is on stdout."""
    shutil.copy(CIFAR, tmp_path / "cat.onnx")
    done = really("quantize", "cat.onnx", "--calib", PHOTOS, *QUICK, cwd=tmp_path)
    assert done.status == 0
    assert listing(tmp_path) == ["cat.onnx", "cat.w8a8.onnx"]
    onnx.checker.check_model(str(tmp_path / "cat.w8a8.onnx"), full_check=True)
    text = done.out.decode()
    for told in ("cat.w8a8.onnx", "1.03 MB", "agrees", "SQNR", "22 x BatchNormalization", "opset 17"):
        assert told in text
    assert "\x1b" not in text
    # eight pictures of another kind do not tell RGB from BGR
    expected = ("Warning: the quantized model ran", "Warning: whether the network wants RGB or BGR is not certain")
    assert [line for line in done.err.splitlines() if not line.startswith(expected)] == []


KEYS = """schema version output float recipe preprocessing size opset ir_version needs verify audit gates mixed
          warnings time peak_rss_mb changes skipped tensors"""


def test_json_is_one_object_with_the_keys_of_the_contract(call: Qconv, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    done = call("quantize", CIFAR, "--calib", PHOTOS, *QUICK, "--json", "-o", out, "--min-sqnr", "1")
    found = done.json
    assert done.status == 0
    assert list(found) == KEYS.split()
    assert found["schema"] == 1
    assert found["version"] == qconv.__version__
    assert (found["output"], found["float"]) == (str(out), str(CIFAR))
    assert set(found["size"]) == {"float", "quantized", "ratio"}
    assert set(found["verify"]) == {"images", "sqnr_db", "agreement", "outputs"}
    assert [set(o) for o in found["verify"]["outputs"]] == [{"name", "sqnr_db", "agreement"}]
    assert set(found["audit"]) == {"integer", "float", "islands", "placed", "us", "saturating"}
    assert [set(gate) for gate in found["gates"]] == [{"name", "want", "got", "held"}]
    assert {"load", "fold", "calibrate", "verify", "total"} <= set(found["time"])
    rows = {"changes": "step where what", "skipped": "step where why"}
    rows["tensors"] = "name kind bits symmetric granularity scale zero_point why"
    for key, names in rows.items():
        assert all(set(row) == set(names.split()) for row in found[key]), key


def test_json_preprocessing_has_the_keys_of_the_contract(call: Qconv, tiny: Path, calib: Path) -> None:
    """Numbers that do not exist are null, not absent."""
    found = call("quantize", tiny, "--calib", calib, "--json").json
    assert {"preset", "source", "runner_up", "margin"} <= set(found["preprocessing"])


def test_json_numbers_are_those_of_the_file(call: Qconv, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    found = call("quantize", CIFAR, "--calib", PHOTOS, *QUICK, "--json", "-o", out).json
    proto = onnx.load(out)
    sizes = CIFAR.stat().st_size, out.stat().st_size
    assert (found["size"]["float"], found["size"]["quantized"]) == sizes
    assert found["size"]["ratio"] == pytest.approx(sizes[1] / sizes[0], abs=1e-4)
    assert found["opset"] == proto.opset_import[0].version
    assert found["ir_version"] == proto.ir_version
    assert found["verify"]["images"] == 8
    assert found["verify"]["sqnr_db"] == min(o["sqnr_db"] for o in found["verify"]["outputs"])
    assert [o["name"] for o in found["verify"]["outputs"]] == [o.name for o in proto.graph.output]
    carried = {entry.key: entry.value for entry in proto.metadata_props}
    assert json.loads(carried["qconv.recipe"]) == found["recipe"]
    assert all(tensor["name"] for tensor in found["tensors"])


def test_every_tensor_of_the_report_has_a_name(call: Qconv, tiny: Path, calib: Path) -> None:
    """A layer without a bias gets one when rounding moves its mean."""
    found = call("quantize", tiny, "--calib", calib, "--json").json
    assert [tensor for tensor in found["tensors"] if not tensor["name"]] == []


def test_quiet_prints_nothing(call: Qconv, tiny: Path, calib: Path) -> None:
    (calib_with_a_bad_one := tiny.parent / "pictures").mkdir()
    for path in calib.iterdir():
        shutil.copy(path, calib_with_a_bad_one)
    (calib_with_a_bad_one / "bad.png").write_bytes(b"no picture")
    done = call("quantize", tiny, "--calib", calib_with_a_bad_one, "-q", "--min-sqnr", "200")
    assert (done.status, done.out, done.err) == (3, b"", "")
    done = call("quantize", tiny, "--calib", calib_with_a_bad_one, "-q", "--json")
    assert (done.status, done.err) == (0, "")
    assert len(done.json["warnings"]) >= 1


def test_quiet_does_not_hide_errors(call: Qconv, tiny: Path) -> None:
    assert call("quantize", tiny, "--calib", tiny.parent / "none", "-q").err.startswith("Error:")


def test_verbose_tells_every_change_and_every_tensor(call: Qconv, tmp_path: Path) -> None:
    args = ("quantize", CIFAR, "--calib", PHOTOS, *QUICK, "-o", tmp_path / "out.onnx")
    found = call(*args, "--json").json
    text = call(*args, "-v").out.decode()
    for row in (*found["changes"], *found["skipped"]):
        assert (row.get("what") or row["why"]) in text
    for row in found["tensors"]:
        assert f"{row['name']}: {row['bits']} bits" in text


def test_an_input_may_be_called_without_its_suffix(call: Qconv, tiny: Path, calib: Path) -> None:
    tiny.rename(tiny.with_name("net"))
    assert call("quantize", tiny.with_name("net"), "--calib", calib, "--weight-bits", "4").status == 0
    assert listing(tiny.parent) == ["net", "net.w4a8.onnx"]


def test_names_that_are_no_utf_8_or_no_ascii(tiny: Path, calib: Path) -> None:
    """A file from an old disk, and a terminal that knows ASCII alone."""
    for name, env in (("\udcff.onnx", {}), ("ü.onnx", {"PYTHONIOENCODING": "ascii"})):
        shutil.copy(tiny, tiny.with_name(name))
        done = really("quantize", tiny.with_name(name), "--calib", calib, "--json", env=os.environ | env)
        assert "Traceback" not in done.err
        assert done.status == 0
        json.loads(done.out)


# -- pipes -------------------------------------------------------------------------------------------------------------


def test_from_standard_input_to_standard_output(tmp_path: Path, tiny: Path, calib: Path) -> None:
    out = tmp_path / "out.onnx"
    assert really("quantize", tiny, "--calib", calib, "-o", out, "-q").status == 0
    piped = really("quantize", "-", "--calib", calib, "-o", "-", "--json", stdin=tiny.read_bytes(), cwd=tmp_path)
    assert piped.status == 0
    assert piped.out == out.read_bytes()
    last = piped.err.splitlines()[-1]  # warnings may come before
    assert json.loads(last)["output"] == "-"
    assert all(line.startswith("Warning:") for line in piped.err.splitlines()[:-1])
    assert listing(tmp_path) == ["out.onnx", "work"]


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


# -- same input, same bytes --------------------------------------------------------------------------------------------


def test_same_input_same_bytes(call: Qconv, tmp_path: Path) -> None:
    """Two processes with other hash seeds and clocks, other threads, other folders, files made in another order."""
    names = sorted(path.name for path in PHOTOS.glob("*.jpg"))[:12]
    for folder, order in (("first", names), ("second", names[::-1])):
        (tmp_path / folder).mkdir()
        for name in order:
            shutil.copyfile(PHOTOS / name, tmp_path / folder / name)
        shutil.copy(CIFAR, tmp_path / folder / f"{folder}.onnx")
    runs = [
        start(
            "quantize", tmp_path / folder / f"{folder}.onnx", "--calib", tmp_path / folder, "--resize", "exact",
            *("--threads", threads, "-q"), env=os.environ | {"PYTHONHASHSEED": threads, "TZ": f"UTC+{threads}"},
        )
        for folder, threads in (("first", "1"), ("second", "2"))
    ]  # fmt: skip
    assert [finish(run).status for run in runs] == [0, 0]
    first = (tmp_path / "first" / "first.w8a8.onnx").read_bytes()
    assert first == (tmp_path / "second" / "second.w8a8.onnx").read_bytes()
    third = call("quantize", CIFAR, "--calib", tmp_path / "second", "--resize", "exact", "-o", "-")
    assert third.out == first

    carried = {entry.key: entry.value for entry in onnx.load_from_string(first).metadata_props}
    assert carried["qconv.version"] == qconv.__version__
    assert json.loads(carried["qconv.recipe"])["weight_bits"] == 8
    assert json.loads(carried["qconv.preprocessing"])["preset"] == "imagenet"
    text = " ".join(value for key, value in carried.items() if key.startswith("qconv."))
    assert not re.search(r"20\d\d-|:\d\d:", text)
    for secret in (tmp_path.name, "first.onnx", "second.onnx", "/first", "/second", PHOTOS.name, os.uname().nodename):
        assert secret not in text
        assert len(secret) < 6 or secret.encode() not in first  # codes may spell any short word


def test_another_seed_draws_other_pictures(call: Qconv, tiny: Path, calib: Path) -> None:
    def scales(*more: str) -> list[float]:
        done = call("quantize", tiny, "--calib", calib, "--samples", "2", "--json", "-o", tiny.with_name("o"), *more)
        return [row["scale"] for row in done.json["tensors"] if row["kind"] == "activation"]

    assert scales() == scales("--seed", "0") != scales("--seed", "1")


# -- gates -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("gate", "want", "status"), [("agreement", 0, 0), ("sqnr", 1, 0), ("sqnr", 200, 3)])
def test_gates(call: Qconv, tiny: Path, calib: Path, gate: str, want: float, status: int) -> None:
    done = call("quantize", tiny, "--calib", calib, f"--min-{gate}", want, "--json")
    assert done.status == status
    assert listing(tiny.parent) == ["model.onnx", "model.w8a8.onnx"]
    (row,) = done.json["gates"]
    assert (row["name"], row["want"], row["held"]) == (f"min-{gate}", want, status == 0)
    assert row["got"] == done.json["verify"]["sqnr_db" if gate == "sqnr" else gate]
    assert done.json["verify"]["images"] == 20
    assert ("fell short" in done.err) == (status == 3)


def test_a_gate_that_is_not_measured_does_not_hold(call: Qconv, tiny: Path, calib: Path) -> None:
    """There are no classes in four dimensions with one channel."""
    tiny.write_bytes(net("y = Conv(x, w)", w=(1, 3, 3, 3)).SerializeToString())
    done = call("quantize", tiny, "--calib", calib, "--min-agreement", "0.5", "--json")
    assert done.status == 3
    assert done.json["verify"]["agreement"] is None
    assert "Gate" in done.err


def test_a_gate_at_infinity_is_valid_json(call: Qconv, tiny: Path, calib: Path) -> None:
    """Equal outputs or nothing; or no wish at all. JSON has no infinity."""
    done = call("quantize", tiny, "--calib", calib, "--min-sqnr", "inf", "--json")
    assert done.status in (1, 2, 3)
    assert "Traceback" not in done.err
    if done.status == 3:
        assert done.json["gates"][0]["held"] is False


# -- usage -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("--colour rgb", "No such option"),
        ("--weight-bits 9", "2 to 8"),
        ("--weight-bits eight", "not a valid integer"),
        ("--activation-bits 9", "2 to 8"),
        ("--edge-bits 1", "2 to 8"),
        ("--edge-bits 32", "2 to 8"),
        ("--pack", "4 or fewer"),
        ("--min-agreement 1.01", "0 to 1"),
        ("--min-sqnr nan", "dB"),
        ("--samples 0", "samples"),
        ("--batch 0", "batch"),
        ("--threads 0", "threads"),
        ("--seed -1", "seed"),
        ("--size 0x8", "224x224"),
        ("--size 8x8x3", "224x224"),
        ("--resize wide", "letterbox"),
        ("--mean 1/0", "mean"),
        ("--mean nan", "mean"),
        ("--scale 1,2", "one number"),
        ("--scale 0", "scale"),
        ("--weight-scheme none", "symmetric"),
        ("--embed-preprocessing hwc", "nhwc"),
        ("--calibrator magic", "calibrator"),
        ("--target gpu", "target"),
        ("more.onnx", "more.onnx"),
    ],
)
def test_usage_errors_have_status_2(call: Qconv, tiny: Path, calib: Path, options: str, says: str) -> None:
    done = call("quantize", tiny, "--calib", calib, *options.split())
    assert listing(tiny.parent) == ["model.onnx"]
    assert done.out == b""
    assert "Error" in done.err
    assert says in done.err
    assert done.status == 2


def test_calibration_is_not_optional(call: Qconv, tiny: Path) -> None:
    done = call("quantize", tiny)
    assert done.status == 2
    assert "--calib" in done.err


def test_no_command_and_no_model(call: Qconv, calib: Path) -> None:
    assert call().status == 2
    assert call("quantise").status == 2
    assert call("quantize", "--calib", calib).status == 2


def test_help_and_version(call: Qconv) -> None:
    assert call("--version").out.decode().split()[-1] == qconv.__version__
    text = call("quantize", "--help").out.decode()
    for param in main.cli.commands["quantize"].params:
        assert all(opt in text for opt in param.opts if opt.startswith("--"))


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


# -- bad input ---------------------------------------------------------------------------------------------------------


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _text(path: Path) -> None:
    path.write_text("This is no model.\n" * 100)


def _cut(path: Path) -> None:
    path.write_bytes(CIFAR.read_bytes()[: CIFAR.stat().st_size // 2])


def _missing(path: Path) -> None:
    path.unlink()


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _external(path: Path, location: str = "model.data") -> None:
    (path.parent / "model.data").unlink(missing_ok=True)
    onnx.save(net(), path, save_as_external_data=True, location="model.data", size_threshold=0)
    if location != "model.data":
        proto = onnx.load(path, load_external_data=False)
        for tensor in proto.graph.initializer:
            tensor.external_data[0].value = location
        path.write_bytes(proto.SerializeToString())


def _external_missing(path: Path) -> None:
    _external(path)
    (path.parent / "model.data").unlink()


def _external_outside(path: Path) -> None:
    _external(path, "../model.data")
    (path.parent / "model.data").rename(path.parent.parent / "model.data")


def _quantized(path: Path) -> None:
    body = "q = QuantizeLinear(x, s, z)  d = DequantizeLinear(q, s, z)  y = Conv(d, w)"
    path.write_bytes(net(body, s=0.1, z=np.uint8(0)).SerializeToString())


def _nothing_to_quantize(path: Path) -> None:
    path.write_bytes(net("y = Relu(x)").SerializeToString())


def _custom_operator(path: Path) -> None:
    proto = net("c = Conv(x, w)  y = Relu(c)")
    proto.graph.node[1].op_type, proto.graph.node[1].domain = "Blur", "com.example"
    proto.opset_import.append(helper.make_opsetid("com.example", 1))
    path.write_bytes(proto.SerializeToString())


def _two_inputs(path: Path) -> None:
    proto = net("c = Conv(x, w)  y = Add(c, x2)", x2=(4, 1, 1))
    (value,) = [t for t in proto.graph.initializer if t.name == "x2"]
    proto.graph.initializer.remove(value)
    proto.graph.input.append(helper.make_tensor_value_info("x2", TensorProto.FLOAT, [4, 1, 1]))
    path.write_bytes(proto.SerializeToString())


def _no_input(path: Path) -> None:
    proto = net("c = Conv(k, w)  y = Relu(c)", k=(1, 3, 8, 8))
    del proto.graph.input[:]
    path.write_bytes(proto.SerializeToString())


def _open_size(path: Path) -> None:
    path.write_bytes(net(x=("N", 3, "H", "W")).SerializeToString())


def _five_channels(path: Path) -> None:
    path.write_bytes(net(x=(1, 5, 8, 8), w=(4, 5, 3, 3)).SerializeToString())


BAD_MODELS = {
    _empty: "is empty",
    _text: "not an ONNX model",
    _cut: "damaged",
    _missing: "does not exist",
    _folder: "directory|folder",
    _external_missing: "model.data, which is missing",
    _external_outside: "outside its own folder",
    _quantized: "already quantized",
    _nothing_to_quantize: "nothing to quantize",
    _custom_operator: "Blur",
    _two_inputs: r"2 inputs \(x, x2\)(?s:.*)\.npz",
    _no_input: "no input",
    _open_size: "--size",
    _five_channels: "5 channels",
}


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


@pytest.mark.parametrize("spoil", BAD_MODELS, ids=lambda spoil: spoil.__name__[1:])
def test_bad_models(call: Qconv, tiny: Path, calib: Path, spoil: Callable[[Path], None]) -> None:
    spoil(tiny)
    before = listing(tiny.parent)
    assert_error(call("quantize", tiny, "--calib", calib, "--json"), BAD_MODELS[spoil])
    assert listing(tiny.parent) == before


@pytest.mark.parametrize("model", [".", "..", "/", ""])
def test_folders_in_place_of_a_model(
    call: Qconv, tiny: Path, calib: Path, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    monkeypatch.chdir(tiny.parent)
    done = call("quantize", model, "--calib", calib)
    assert "Error" in done.err
    assert done.status in (1, 2)


def test_flipped_bytes(call: Qconv, tiny: Path, calib: Path) -> None:
    """Flipped in a weight they are another model; anywhere else they may be an error, never a crash."""
    content = tiny.read_bytes()
    rng = np.random.default_rng(0)
    statuses = []
    for _ in range(25):
        damaged = bytearray(content)
        for at in rng.integers(0, len(content), 8):
            damaged[at] ^= 1 << int(rng.integers(8))
        tiny.write_bytes(damaged)
        done = call("quantize", tiny, "--calib", calib, "--samples", "2", "-q")
        statuses.append(done.status)
        if done.status:
            assert_error(done, "")
            assert listing(tiny.parent) == ["model.onnx"]
        else:
            tiny.with_name("model.w8a8.onnx").unlink()
    assert set(statuses) <= {0, 1}
    assert 1 in statuses


def _no_pictures(folder: Path) -> None:
    pass


def _texts(folder: Path) -> None:
    for name in ("a.txt", "b.md"):
        (folder / name).write_text("text")


def _unreadable(folder: Path) -> None:
    for number in range(3):
        (folder / f"{number}.jpg").write_bytes(b"no picture")
    for number in range(17):
        picture(folder / f"{number}.png", number)


def _away(folder: Path) -> None:
    folder.rmdir()


def _binary(folder: Path) -> None:
    folder.rmdir()
    folder.write_bytes(bytes(range(256)))


def _list_of_missing(folder: Path) -> None:
    folder.rmdir()
    folder.write_text("# pictures\nnowhere.png\n")


def _wrong_samples(folder: Path) -> None:
    np.save(folder / "0.npy", np.zeros((3, 9, 8), np.float32))


BAD_PICTURES = {
    _no_pictures: "empty",
    _texts: "none is a picture",
    _unreadable: r"more than a tenth(?s:.*)\.jpg",
    _away: "does not exist",
    _binary: "neither a folder",
    _list_of_missing: "line 2",
    _wrong_samples: "3x9x8",
}


@pytest.mark.parametrize("spoil", BAD_PICTURES, ids=lambda spoil: spoil.__name__[1:])
def test_bad_pictures(call: Qconv, tiny: Path, tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    (tmp_path / "pictures").mkdir()
    spoil(tmp_path / "pictures")
    tiny.with_name("model.w8a8.onnx").write_bytes(b"before")
    assert_error(call("quantize", tiny, "--calib", tmp_path / "pictures", "-q"), BAD_PICTURES[spoil])
    assert listing(tiny.parent) == ["model.onnx", "model.w8a8.onnx"]
    assert tiny.with_name("model.w8a8.onnx").read_bytes() == b"before"


def test_one_corrupt_picture_among_good_ones(call: Qconv, tiny: Path, calib: Path, tmp_path: Path) -> None:
    shutil.copytree(calib, tmp_path / "pictures")
    cut = tmp_path / "pictures" / "broken[bold].png"
    cut.write_bytes((calib / "00.png").read_bytes()[:60])
    done = call("quantize", tiny, "--calib", tmp_path / "pictures", "--json", "--min-sqnr", "1")
    assert done.status == 0
    (warning,) = [text for text in done.json["warnings"] if "skipped" in text]
    assert str(cut) in warning
    assert done.err.count(str(cut)) == 1  # though all pictures are read twice
    assert done.json["verify"]["images"] == 20


# -- places ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["itself", "symlink", "hardlink", "other spelling"])
def test_the_model_is_never_overwritten(
    call: Qconv, tiny: Path, calib: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.chdir(tiny.parent)
    before = tiny.read_bytes()
    out = {"itself": "model.onnx", "other spelling": "../work/./model.onnx"}.get(how, "link.onnx")
    if how == "symlink":
        os.symlink("model.onnx", out)
    elif how == "hardlink":
        os.link("model.onnx", out)
    names = listing(tiny.parent)
    assert_error(call("quantize", tiny, "--calib", calib, "-o", out), "the model itself")
    assert listing(tiny.parent) == names
    assert tiny.read_bytes() == before


def test_the_models_data_file_is_never_overwritten(call: Qconv, tiny: Path, calib: Path) -> None:
    _external(tiny)
    data = tiny.with_name("model.data")
    before = data.read_bytes()
    done = call("quantize", tiny, "--calib", calib, "-o", data)
    assert data.read_bytes() == before
    assert_error(done, "data")


@pytest.mark.parametrize("out", ["nowhere/out.onnx", ".", "model.onnx/out.onnx", "n" * 300])
def test_places_that_cannot_be(call: Qconv, tiny: Path, calib: Path, monkeypatch: pytest.MonkeyPatch, out: str) -> None:
    monkeypatch.chdir(tiny.parent)
    assert_error(call("quantize", tiny, "--calib", calib, "-o", out), "")
    assert listing(tiny.parent) == ["model.onnx"]


@pytest.mark.skipif(ROOT, reason="root may write everywhere")
def test_a_folder_that_is_read_only(call: Qconv, tiny: Path, calib: Path) -> None:
    tiny.parent.chmod(0o500)
    try:
        assert_error(call("quantize", tiny, "--calib", calib), "cannot be written to")
        assert listing(tiny.parent) == ["model.onnx"]
    finally:
        tiny.parent.chmod(0o700)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """A disk of as many kilobytes as one asks for."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(kilobytes: int) -> Path:
        if shutil.which("mount") is None:
            pytest.skip("no mount command")
        command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(place)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"no small disk can be mounted here: {done.stderr.strip()}")
        return place

    yield mount
    if place.is_mount():
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("kilobytes", [100, 340, 400, 600])
def test_a_full_disk(call: Qconv, small_disk: Callable[[int], Path], kilobytes: int) -> None:
    """The result has 312 kB: room for less than it, for it alone, and for some of what checking writes beside it."""
    out = small_disk(kilobytes) / "out.onnx"
    out.write_bytes(b"before")
    done = call("quantize", CIFAR, "--calib", PHOTOS, *QUICK, "-o", out)
    assert listing(out.parent) == ["out.onnx"]
    if done.status == 0:  # fine where checking needs no room there
        assert kilobytes > 312
        onnx.checker.check_model(str(out))
        return
    assert out.read_bytes() == b"before"
    assert "No space is left" in done.err
    assert done.status == 1


# -- killed ------------------------------------------------------------------------------------------------------------

# Every picture twice, so that there is a while between the first byte and the rename.
LONG = ("quantize", CIFAR, "--calib", PHOTOS, "--resize", "exact", "--min-sqnr", "0", "--threads", "1", "-q")


def whole(out: Path) -> bool:
    if out.read_bytes() == b"before":
        return False
    onnx.checker.check_model(str(out))
    return True


def size_of(path: Path) -> int:
    """0 for a file that has gone."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL], ids=lambda number: number.name)
def test_a_signal_while_the_result_is_being_checked(call: Qconv, tmp_path: Path, number: signal.Signals) -> None:
    many = tmp_path / "many"  # so that checking takes a while
    many.mkdir()
    for index in range(6):
        for picture in PHOTOS.glob("*.jpg"):
            (many / f"{index}_{picture.name}").symlink_to(picture)
    out = tmp_path / "place" / "out.onnx"
    out.parent.mkdir()
    out.write_bytes(b"before")
    process = start(*LONG, "--calib", many, "--samples", "480", "-o", out)
    # with bytes in it: a file that is just being opened is not yet being checked
    while not any(map(size_of, out.parent.glob(".out.onnx.*/out.onnx"))) and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(number)
    done = finish(process)
    assert (
        done.status
        in {
            signal.SIGTERM: (143, -15),
            signal.SIGINT: (130, -2),
            signal.SIGKILL: (-9,),
        }[number]
    )
    assert out.read_bytes() == b"before"
    assert "Traceback" not in done.err
    left = [name for name in listing(out.parent) if name != "out.onnx"]
    if number != signal.SIGKILL:
        assert left == []
        return
    (hidden,) = left
    assert hidden.startswith(".out.onnx.")
    assert hidden.endswith(STAGING_SUFFIX)
    assert call("quantize", CIFAR, "--calib", PHOTOS, *QUICK, "-o", out).status == 0
    assert listing(out.parent) == ["out.onnx"]
    assert whole(out)


def test_signals_at_random_moments(tmp_path: Path) -> None:
    """Whatever was running then, imports included: whole or as before, no traceback; only SIGKILL leaves a trace."""
    rng = random.Random(0)
    moments = [rng.uniform(0.15, 1.6) for _ in range(6)]
    problems: list[str] = []

    def one(index: int, moment: float) -> None:
        number = (signal.SIGTERM, signal.SIGINT, signal.SIGKILL)[index % 3]
        out = tmp_path / str(index) / "out.onnx"
        out.parent.mkdir()
        out.write_bytes(b"before")
        process = start(*LONG, "-o", out)
        time.sleep(moment)
        process.send_signal(number)
        done = finish(process)
        told = f"{number.name} after {moment:.2f} s: status {done.status}"
        finished = whole(out)
        if finished and done.status not in (0, -number, 128 + number):
            problems.append(f"{told} with a result")
        if not finished and done.status not in (-number, 128 + number):
            problems.append(told)
        left = [name for name in listing(out.parent) if name != "out.onnx"]
        if left and number != signal.SIGKILL:
            problems.append(f"{told}, left {left}")
        if "Traceback" in done.err:
            problems.append(f"{told}, traceback: {done.err.splitlines()[-1]}")

    for group in (moments[:3], moments[3:]):
        base = moments.index(group[0])
        threads = [threading.Thread(target=one, args=(base + i, moment)) for i, moment in enumerate(group)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(listing(tmp_path)) == len(moments)
    assert problems == []


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


# -- on a terminal -----------------------------------------------------------------------------------------------------


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


# -- options reach the pictures and the file ---------------------------------------------------------------------------


def test_ways_to_name_pictures(call: Qconv, tiny: Path, calib: Path, tmp_path: Path) -> None:
    """A folder, the same as a list, its halves one after the other, one picture, a pattern."""
    halves = tmp_path / "a", tmp_path / "b"
    for number, path in enumerate(sorted(calib.iterdir())):
        (folder := halves[number // 10]).mkdir(exist_ok=True)
        shutil.copy(path, folder)
    (text := tmp_path / "list.txt").write_text("".join(f"{path}\n" for path in sorted(calib.iterdir())))
    results = {
        args: call("quantize", tiny, *args.split(), "-o", "-").out
        for args in (f"--calib {calib}", f"--calib {text}", f"--calib {halves[0]} --calib {halves[1]}")
    }
    assert len(set(results.values())) == 1

    def images(*args: object) -> int:
        args = ("quantize", tiny, *args, "--min-sqnr", "-100", "--json", "-o", tiny.with_name("o"))
        return int(call(*args).json["verify"]["images"])

    assert images("--calib", calib / "00.png") == 1
    assert images("--calib", calib, "--glob", "0*.png") == 10
    assert images("--calib", calib, "--samples", "7") == 7
    assert images("--calib", calib, "--samples", "7", "--batch", "3") == 7


def initializers(path: Path) -> dict[str, onnx.TensorProto]:
    return {tensor.name: tensor for tensor in onnx.load(path).graph.initializer}


def test_keep_float_keeps_a_layer(call: Qconv, tiny: Path, calib: Path) -> None:
    done = call("quantize", tiny, "--calib", calib, "--keep-float", "[xyz]", "--json")
    weights = [row["name"] for row in done.json["tensors"] if row["kind"] == "weight" and row["bits"] == 8]
    assert len(weights) == 1
    (island,) = [row for row in done.json["audit"]["islands"] if row["op"] in ("Gemm", "MatMul")]
    assert "--keep-float" in island["why"]
    kept = [t for t in initializers(tiny.with_name("model.w8a8.onnx")).values() if t.data_type == TensorProto.FLOAT]
    assert sorted([4, 10]) in [sorted(t.dims) for t in kept]
    all_kept = call("quantize", tiny, "--calib", calib, "--keep-float", "*")
    assert_error(all_kept, "nothing to quantize(?s:.*)--keep-float")


def test_a_pattern_that_keeps_nothing_is_told(call: Qconv, tiny: Path, calib: Path) -> None:
    """A misspelt --keep-float must not pass in silence."""
    done = call("quantize", tiny, "--calib", calib, "--keep-float", "clasifier*")
    assert "clasifier" in done.err


def test_open_sizes_need_a_size(call: Qconv, tiny: Path, calib: Path) -> None:
    _open_size(tiny)
    done = call("quantize", tiny, "--calib", calib, "--size", "6x10", "--json")
    assert done.status == 0
    assert done.json["preprocessing"]["size"] == [6, 10]
    assert_error(call("quantize", CIFAR, "--calib", calib, "--size", "33x32", "-o", tiny.with_name("o")), "33x32")


def test_preprocessing_options_reach_the_pictures(call: Qconv, tiny: Path, tmp_path: Path) -> None:
    """One picture of one colour: the scale of the input follows from (pixel * scale - mean) / std by hand."""
    (tmp_path / "one").mkdir()
    Image.new("RGB", (8, 8), (255, 51, 0)).save(tmp_path / "one" / "0.png")
    for options, low, high in (
        ("--preprocess raw", 0, 255),
        ("--preprocess unit", 0, 1),
        ("--preprocess tf", -1, 1),
        ("--preprocess caffe", -103.939, 255 - 123.68),
        ("--preprocess raw --color bgr --mean 255,0,0", -255, 255),
        ("--preprocess raw --scale 1/51 --std 5", 0, 1),
    ):
        done = call("quantize", tiny, "--calib", tmp_path / "one", *options.split(), "--json")
        (row,) = [row for row in done.json["tensors"] if row["name"] == "x"]
        assert row["scale"] == pytest.approx((high - low) / 255, rel=1e-4), options
        assert row["zero_point"] == round(-low / row["scale"])


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_a_file_that_takes_pixels(call: Qconv, tmp_path: Path, layout: str) -> None:
    """The summary says so; the file gives the same bytes again, and the classes that the float model gives."""
    options = ("--calib", PHOTOS, *QUICK, "--preprocess", "imagenet", "--embed-preprocessing", layout)
    outs = [tmp_path / name for name in ("a.onnx", "b.onnx")]
    text = call("quantize", CIFAR, *options, "-o", outs[0]).out.decode()
    found = call("quantize", CIFAR, *options, "-o", outs[1], "--json").json
    assert outs[0].read_bytes() == outs[1].read_bytes()
    assert f"pictures      RGB pixels as they are, uint8 {layout.upper()} 32x32, stretched; inside the file: " in text
    assert found["recipe"]["embed_preprocessing"] == found["preprocessing"]["layout"] == layout
    assert found["preprocessing"]["embedded"]["mean"] == [0.485, 0.456, 0.406]
    assert found["audit"]["islands"] == []
    assert found["verify"]["agreement"] > 0.8
    assert_error(call("quantize", outs[0], *options, "-o", tmp_path / "c.onnx"), "already quantized")


def test_samples_have_no_preprocessing_to_embed(call: Qconv, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    np.save(tmp_path / "s" / "0.npy", np.zeros((3, 8, 8), np.float32))
    done = call("quantize", tiny, "--calib", tmp_path / "s", "--embed-preprocessing", "nchw")
    assert_error(done, "preprocessed already(.|\n)*leave --embed-preprocessing out")
    assert listing(tiny.parent) == [tiny.name]


@pytest.mark.parametrize("body", ["c = Conv(x, w)  y = Log(c)", "c = Conv(x, w)  r = Relu(c)  y = Div(k, r)"])
def test_outputs_that_are_no_numbers(call: Qconv, tiny: Path, calib: Path, body: str) -> None:
    """NaN and infinity have no place in JSON."""
    tiny.write_bytes(net(body, k=1.0).SerializeToString())
    done = call("quantize", tiny, "--calib", calib, "--json")
    assert "Traceback" not in done.err
    assert done.status == 0
    assert "sqnr_db" in done.json["verify"]  # valid JSON: neither NaN nor Infinity


@pytest.mark.parametrize(
    ("text", "scale"),
    [("1/255", 1 / 255), ("1/127.5", 1 / 127.5), ("0.5", 0.5), (" 2 / 4 ", 0.5), ("-1/255", -1 / 255)],
)
def test_numbers_may_be_fractions(call: Qconv, tiny: Path, calib: Path, text: str, scale: float) -> None:
    done = call("quantize", tiny, "--calib", calib, "--json", "--preprocess", "raw", "--scale", text)
    assert done.json["preprocessing"]["scale"] == scale


@pytest.mark.parametrize("text", ["1/0", "a", "1/2/3", "", "1,2"])
def test_what_is_no_number_is_a_usage_error(call: Qconv, tiny: Path, calib: Path, text: str) -> None:
    done = call("quantize", tiny, "--calib", calib, "--scale", text)
    assert done.status == 2
    assert "--scale" in done.err


def test_closed_standard_error_spoils_no_model(tiny: Path, calib: Path, tmp_path: Path) -> None:
    """What has nowhere to go does not go into the model."""
    out = tmp_path / "out.onnx"
    command = (
        f"'{sys.executable}' -m qconv quantize '{tiny}' --calib '{calib}' -o - --json --min-sqnr 300 2>&- > '{out}'"
    )
    done = subprocess.run(["bash", "-c", command], check=False, cwd=Path(__file__).parents[2])
    assert done.returncode == 3
    onnx.checker.check_model(onnx.load_from_string(out.read_bytes()))


def test_outputs_of_whole_numbers_that_differ_are_not_called_equal(call: Qconv, tmp_path: Path, calib: Path) -> None:
    """ArgMax over the scores of random weights at 2 bits: some classes change."""
    body = "c = Conv(x, w) r = Relu(c) d = Conv(r, v) y = ArgMax<axis=1>(d)"
    proto = network(body, ("N", 3, 8, 8), w=(8, 3, 3, 3), v=(10, 8, 1, 1))
    model = tmp_path / "classes.onnx"
    onnx.save(proto, model)
    bits = ("--weight-bits", "2", "--activation-bits", "2", "--edge-bits", "2")
    done = call("quantize", model, "--calib", calib, *bits)
    (line,) = [line for line in done.out.decode().splitlines() if line.startswith("accuracy")]
    assert "agrees with the float model on" in line
    assert "100.0%" not in line
    assert "equal" not in line
    assert "cannot" not in line


# -- study-samples -----------------------------------------------------------------------------------------------------


def test_a_study_on_the_terminal(call: Qconv, tiny: Path, calib: Path) -> None:
    """A table and sentences of at most 80 columns; nothing is written but what -o names."""
    done = call("study-samples", tiny, "--calib", calib, "--seeds", 2, "--preprocess", "unit")
    assert (done.status, done.err) == (0, "")
    head, *rows = done.out.decode().splitlines()
    assert head.split()[:3] == ["pictures", "SQNR", "dB"]
    assert [row.split()[0] for row in rows[: rows.index("")]] == ["1", "2", "5", "10", "16"]
    assert max(map(len, [head, *rows])) <= 80
    assert "scored on 4 others, held back" in " ".join(rows)
    assert listing(tiny.parent) == ["model.onnx"]


def test_a_study_as_json(call: Qconv, tiny: Path, calib: Path) -> None:
    done = call("study-samples", tiny, "--calib", calib, "--json", "--seeds", 2, "--holdout", 5, "--preprocess", "raw")
    found = done.json
    assert list(found)[:6] == ["schema", "version", "model", "recipe", "preprocessing", "pictures"]
    assert (found["schema"], found["pictures"], found["holdout"], found["draws"]) == (1, 15, 5, 2)
    assert found["preprocessing"]["preset"] == "raw"
    assert [(p["pictures"], p["seed"]) for p in found["points"]] == [
        *((count, seed) for count in (1, 2, 5, 10) for seed in (0, 1)),
        (15, 0),
    ]
    assert set(found["points"][0]) == {"pictures", "seed", "sqnr_db", "agreement"}
    assert found["enough"] in (None, 1, 2, 5)
    assert [row["pictures"] for row in found["spread"]] == [1, 2, 5, 10, 15]


@pytest.mark.parametrize("name", ["study.png", "study.html", "STUDY.PNG"])
def test_a_study_is_drawn(call: Qconv, tiny: Path, calib: Path, name: str) -> None:
    out = tiny.parent / name
    done = call("study-samples", "-", "--calib", calib, "--seeds", 1, "--quiet", "-o", out, stdin=tiny.read_bytes())
    assert (done.status, done.out, done.err) == (0, b"", "")
    assert listing(tiny.parent) == sorted(["model.onnx", name])
    if name.lower().endswith("png"):
        Image.open(out).verify()
    else:
        assert out.read_text("utf-8").startswith("<!DOCTYPE html>")


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        ((), 2, "pass the calibration pictures"),
        (("--calib", "CALIB", "-o", "study.pdf"), 2, "ends in .png or .html"),
        (("--calib", "CALIB", "-o", ""), 2, "need a name"),
        (("--calib", "CALIB", "--seeds", "0"), 2, "--seeds"),
        (("--calib", "CALIB", "--stats", "s.npz"), 2, "No such option"),
        (("--calib", "CALIB", "--holdout", "20"), 1, "leaves none of the 20 pictures"),
        (("--calib", "CALIB", "-o", "missing/study.png"), 1, "does not exist"),
        (("--calib", "missing"), 1, "does not exist"),
    ],
)
def test_what_study_samples_refuses(
    call: Qconv, tiny: Path, calib: Path, options: tuple[str, ...], status: int, message: str
) -> None:
    """And writes nothing."""
    done = call("study-samples", tiny, *(str(calib) if option == "CALIB" else option for option in options))
    assert done.status == status
    assert message in " ".join(done.err.split())
    assert done.out == b""
    assert listing(tiny.parent) == ["model.onnx"]


def test_a_study_takes_the_options_of_quantize() -> None:
    """A new one of `quantize` is one here, too, unless it is about the file that is written."""
    own = {"calib", "output", "seeds", "holdout", "images", "verbose"}
    names = {option.name for option in quantize.quantize.params} - study_samples.OPTIONS_NOT_STUDIED
    assert {option.name for option in study_samples.study_samples.params} == names | own


# -- without pictures --------------------------------------------------------------------------------------------------


def test_no_picture_is_looked_at(call: Qconv, tiny: Path) -> None:
    """The summary says so, and the page; and a folder of that name is named with its place."""
    out = tiny.with_name("out.onnx")
    page = tiny.with_name("page.html")
    done = call("quantize", CIFAR, "--calib", "none", "--preprocess", "tf", "-o", out, "--report", page)
    assert done.status == 0, done.err
    assert b"not measured: no picture was looked at" in done.out
    assert "no picture was looked at" in page.read_text()
    found = call("quantize", CIFAR, "--calib", "none", "--preprocess", "tf", "-o", out, "--json").json
    assert found["recipe"]["data_free"] is True
    assert found["verify"] == {"images": 0, "sqnr_db": None, "agreement": None, "outputs": []}
    done = call("quantize", CIFAR, "--calib", "./none", "-o", out)
    assert (done.status, "./none does not exist" in done.err) == (1, True)


@pytest.mark.parametrize(
    ("command", "options", "why"),
    [
        ("quantize", ("--sweep", "recipes.toml"), "a sweep scores recipes on them"),
        ("quantize", ("--samples", "4"), "--samples with --calib none is not possible"),
        ("study-samples", (), "how many of them it takes"),
        ("diagnose", (), "a diagnosis scores on some of them"),
    ],
)
def test_what_needs_pictures(call: Qconv, tiny: Path, command: str, options: tuple[str, ...], why: str) -> None:
    done = call(command, tiny, "--calib", "none", *options)
    assert done.status == 2
    assert why in " ".join(done.err.split())
    assert listing(tiny.parent) == ["model.onnx"]


# -- commands that look ------------------------------------------------------------------------------------------------


@pytest.fixture
def twenty(tmp_path: Path) -> Path:
    """Ten class folders of two pictures each."""
    (tmp_path / "labelled").mkdir()
    for number in range(20):
        picture(tmp_path / "labelled" / f"class{number // 2}" / f"{number}.png", number)
    return tmp_path / "labelled"


def test_evaluate_alone_and_against(call: Qconv, tiny: Path, calib: Path, twenty: Path) -> None:
    out = tiny.parent / "q.onnx"
    assert call("quantize", tiny, "--calib", calib, "--preprocess", "unit", "-o", out, "--quiet").status == 0
    alone = call("evaluate", out, "--images", twenty).out.decode()
    assert "20 pictures, labels by the folders in alphabetical order" in " ".join(alone.split())
    assert max(map(len, alone.replace(str(tiny.parent), "").splitlines())) <= 80
    found = call("evaluate", out, "--images", twenty, "--against", tiny, "--json").json
    assert set(found) >= {"model", "images", "top1", "top5", "against", "intervals"}
    assert found["images"] == 20
    assert found["against"]["agreement"] > 0.8
    assert set(found["against"]["flips"]) == {"won", "lost", "p_value"}
    text = " ".join(call("evaluate", out, "--images", twenty, "--against", tiny).out.decode().split())
    assert "McNemar" in text
    assert "SQNR dB" in text


def test_evaluate_reads_a_pipe(call: Qconv, tiny: Path, twenty: Path) -> None:
    done = call("evaluate", "-", "--images", twenty, "--preprocess", "unit", "--json", stdin=tiny.read_bytes())
    assert done.json["model"] == "the model on standard input"


@pytest.mark.parametrize("name", ["p.csv", "p.npz"])
def test_predictions_appear_whole(call: Qconv, tiny: Path, twenty: Path, name: str) -> None:
    out = tiny.parent / name
    done = call("evaluate", tiny, "--images", twenty, "--preprocess", "unit", "--save-predictions", out, "--quiet")
    assert (done.status, done.out) == (0, b"")
    assert sorted(listing(tiny.parent)) == ["model.onnx", name]
    if name == "p.csv":
        assert len(out.read_text().splitlines()) == 21


@pytest.mark.parametrize(
    ("arguments", "fact"),
    [
        (("--images", "nowhere"), "nowhere does not exist"),
        (("--images", "IMAGES", "--classes", "nothing.txt"), "nothing.txt cannot be read"),
        (("--images", "IMAGES", "--label-offset", "5"), "10 class folders, shifted by 5, do not fit 10 outputs"),
        (("--images", "IMAGES", "--against", "nothing.onnx"), "nothing.onnx"),
        (("--images", "IMAGES", "--save-predictions", "no/such/p.csv"), "no/such"),
    ],
)
def test_evaluate_says_what_is_wrong(
    call: Qconv, tiny: Path, twenty: Path, arguments: tuple[str, ...], fact: str
) -> None:
    given = [str(twenty) if argument == "IMAGES" else argument for argument in arguments]
    assert_error(call("evaluate", tiny, "--preprocess", "unit", *given), fact)


@pytest.mark.parametrize(
    "arguments",
    [(), ("--images", "x", "--save-predictions", "p.txt"), ("--images", "x", "--against", "-"), ("--images", "")],
)
def test_evaluate_has_usage_errors(call: Qconv, tiny: Path, arguments: tuple[str, ...]) -> None:
    assert call("evaluate", tiny, *arguments).status == 2


def test_audit_of_a_file_and_of_a_pipe(call: Qconv, tmp_path: Path) -> None:
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


def test_targets_and_their_refusals(call: Qconv, tiny: Path, calib: Path) -> None:
    options = ("--calib", calib, "--preprocess", "unit")
    done = call("quantize", tiny, *options, "--target", "tensorrt")
    assert done.status == 0
    assert "as tensorrt decides" in done.out.decode()
    assert "speed here" not in done.out.decode()
    refused = call("quantize", tiny, *options, "--target", "tensorrt", "--activation-scheme", "asymmetric")
    assert refused.status == 2
    assert "zero point 0" in refused.err


def test_saturation_is_a_choice_of_three(call: Qconv, tiny: Path, calib: Path) -> None:
    options = ("--calib", calib, "--preprocess", "unit", "--json", "-o", tiny.parent / "o.onnx")
    kept = [
        call("quantize", tiny, *options, *more).json["recipe"]["saturation_safe"]
        for more in ((), ("--saturation-safe",), ("--no-saturation-safe",))
    ]
    assert kept == [None, True, False]


def test_a_file_with_nothing_but_quantized_weights_is_quantized(call: Qconv, tiny: Path, calib: Path) -> None:
    out = tiny.parent / "w.onnx"
    options = ("--calib", calib, "--preprocess", "unit")
    assert call("quantize", tiny, *options, "--activation-bits", "32", "-o", out).status == 0
    assert not {"QuantizeLinear", "DequantizeLinear"} & {node.op_type for node in onnx.load(out).graph.node}
    assert_error(call("quantize", out, *options), "already quantized")
    assert "weights only" in call("audit", out).out.decode()


@pytest.mark.parametrize(
    "options",
    [
        ("--saturation-safe", "--activation-bits", "32"),
        ("--no-saturation-safe", "--weight-bits", "16"),
        ("--no-saturation-safe", "--target", "tensorrt"),
        ("--block-size", "16"),
    ],
)
def test_options_that_would_do_nothing_are_refused(
    call: Qconv, tiny: Path, calib: Path, options: tuple[str, ...]
) -> None:
    done = call("quantize", tiny, "--calib", calib, "--preprocess", "unit", *options)
    assert done.status == 2
    assert options[0] in done.err
    assert listing(tiny.parent) == ["model.onnx"]


def test_a_seed_is_of_a_draw(call: Qconv, tiny: Path, twenty: Path) -> None:
    assert call("evaluate", tiny, "--images", twenty, "--seed", "3").status == 2
    done = call("evaluate", tiny, "--images", twenty, "--preprocess", "unit", "--seed", "3", "--samples", "5", "--json")
    assert done.json["images"] == 5


def test_tuning_has_a_line_of_its_own_and_takes_the_size_of_samples(call: Qconv, tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    model = tmp_path / "work" / "model.onnx"
    model.write_bytes(net(x=("N", 3, "H", "W")).SerializeToString())
    (tmp_path / "samples").mkdir()
    for number in range(3):
        np.save(tmp_path / "samples" / f"{number}.npy", np.random.default_rng(number).random((3, 8, 8), np.float32))
    done = call("quantize", model, "--calib", tmp_path / "samples", "--tune-latency", "--threads", "1")
    assert done.status == 0
    assert re.search(r"^tuned +placed .*the fastest here: float", done.out.decode(), re.MULTILINE)
