"""Where `qconv quantize` writes: never over what it reads, whole or not at all, on a full disk and when killed."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import onnx
import pytest

from qconv.storage import STAGING_SUFFIX
from tests.support.cli import CIFAR, PHOTOS, QUICK, Qconv, assert_error, finish, listing, start, write_with_data_file

ROOT = os.geteuid() == 0


@pytest.mark.parametrize("how", ["itself", "symlink", "hardlink", "other spelling"])
def test_the_model_is_never_overwritten(
    call: Qconv, tiny: Path, calib: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.chdir(tiny.parent)
    before = tiny.read_bytes()
    out = {"itself": "model.onnx", "other spelling": "../models/./model.onnx"}.get(how, "link.onnx")
    if how == "symlink":
        os.symlink("model.onnx", out)
    elif how == "hardlink":
        os.link("model.onnx", out)
    names = listing(tiny.parent)
    assert_error(call("quantize", tiny, "--calib", calib, "-o", out), "the model itself")
    assert listing(tiny.parent) == names
    assert tiny.read_bytes() == before


def test_the_models_data_file_is_never_overwritten(call: Qconv, tiny: Path, calib: Path) -> None:
    write_with_data_file(tiny)
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
