"""`qconv quantize`: what it prints, its JSON, its gates, and that the same input gives the same bytes."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest

import qconv
from qconv.cli import command
from tests.support.cli import CIFAR, PHOTOS, QUICK, Qconv, assert_error, finish, listing, net, really, start
from tests.support.models import network


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


KEYS = """schema version output float recipe preprocessing size opset ir_version needs outputs verify audit gates mixed
          precision warnings time peak_rss_mb changes skipped tensors"""


@pytest.mark.parametrize("paged", [False, True])
def test_the_time_is_that_of_the_page_too(
    call: Qconv, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, paged: bool
) -> None:
    """By a clock on which the page takes 1000 seconds; it may be most of the command."""
    pytest.importorskip("plotly")
    clock = SimpleNamespace(perf_counter=itertools.count(0, 1000).__next__)
    monkeypatch.setattr(command, "time", clock)
    words = ("quantize", CIFAR, "--calib", PHOTOS, *QUICK, "--effort", "fast", "-o", tmp_path / "out.onnx")
    page = ("--report", tmp_path / "page.html") if paged else ()
    told = call(*words, *page, "--json").json["time"]
    assert told.get("page") == (1000 if paged else None)
    assert (told["total"] > 1000) == paged
    seen = float(re.findall(r"took +([\d.]+) s", call(*words, *page).out.decode())[0])
    assert (seen > 1000) == paged


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
    assert set(found["verify"]) == {"images", "held_back", "sqnr_db", "agreement", "outputs", "heads", "labels"}
    assert [set(o) for o in found["verify"]["outputs"]] == [{"name", "kind", "sqnr_db", "agreement", "parts"}]
    assert set(found["audit"]) == {"integer", "float", "islands", "placed", "us", "saturating", "slow", "on_codes"}
    assert [set(gate) for gate in found["gates"]] == [{"name", "want", "got", "held", "float", "float_held"}]
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


@pytest.mark.parametrize("option", ["--min-agreement", "--min-boxes", "--min-miou"])
def test_a_gate_on_what_the_model_does_not_have_is_told_before_the_work(
    call: Qconv, tiny: Path, calib: Path, option: str
) -> None:
    """There are no classes in four dimensions with one channel, and no boxes."""
    tiny.write_bytes(net("y = Conv(x, w)", w=(1, 3, 3, 3)).SerializeToString())
    done = call("quantize", tiny, "--calib", calib, option, "0.5", "-o", "never.onnx")
    assert_error(done, f"{option} needs")
    assert not Path("never.onnx").exists()


def test_a_gate_at_infinity_is_valid_json(call: Qconv, tiny: Path, calib: Path) -> None:
    """Equal outputs or nothing; or no wish at all. JSON has no infinity."""
    done = call("quantize", tiny, "--calib", calib, "--min-sqnr", "inf", "--json")
    assert done.status in (1, 2, 3)
    assert "Traceback" not in done.err
    if done.status == 3:
        assert done.json["gates"][0]["held"] is False


@pytest.mark.parametrize("body", ["c = Conv(x, w)  y = Log(c)", "c = Conv(x, w)  r = Relu(c)  y = Div(k, r)"])
def test_outputs_that_are_no_numbers(call: Qconv, tiny: Path, calib: Path, body: str) -> None:
    """NaN and infinity have no place in JSON."""
    tiny.write_bytes(net(body, k=1.0).SerializeToString())
    done = call("quantize", tiny, "--calib", calib, "--json")
    assert "Traceback" not in done.err
    assert done.status == 0
    assert "sqnr_db" in done.json["verify"]  # valid JSON: neither NaN nor Infinity


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
    assert found["verify"] == {
        "images": 0,
        "held_back": False,
        "sqnr_db": None,
        "agreement": None,
        "outputs": [],
        "heads": [],
        "labels": None,
    }
    done = call("quantize", CIFAR, "--calib", "./none", "-o", out)
    assert (done.status, "./none does not exist" in done.err) == (1, True)


def test_a_file_with_nothing_but_quantized_weights_is_quantized(call: Qconv, tiny: Path, calib: Path) -> None:
    out = tiny.parent / "w.onnx"
    options = ("--calib", calib, "--preprocess", "unit")
    assert call("quantize", tiny, *options, "--activation-bits", "32", "-o", out).status == 0
    assert not {"QuantizeLinear", "DequantizeLinear"} & {node.op_type for node in onnx.load(out).graph.node}
    assert_error(call("quantize", out, *options), "already quantized")
    assert "weights only" in call("audit", out).out.decode()


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
