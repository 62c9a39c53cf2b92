"""Whole or nothing: whatever happens on the way, the output is new, or what it was, or absent."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from filelock import FileLock, Timeout

from qconv import storage
from qconv.errors import QconvError
from qconv.ir.files import stage_model
from qconv.ir.model import Model
from tests.support.models import loaded, network, run

ROOT = os.geteuid() == 0


def model_of(bias: float = 1.0) -> Model:
    return loaded(network("c = Conv(x, w)  y = Add(c, k)", w=(4, 3, 3, 3), k=bias))


def write(model: Model, out: Path) -> None:
    with stage_model(model, out) as found:
        found.commit(out)


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_file_is_there_and_nothing_else(tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    with stage_model(model_of(), out) as found:
        assert not out.exists()
        assert found.path.parent.parent == tmp_path  # one file system: the rename is atomic
        assert found.size == found.path.stat().st_size
        found.commit(out)
    assert listing(tmp_path) == ["out.onnx"]
    onnx.checker.check_model(str(out))
    x = np.ones((2, 3, 6, 6), np.float32)
    np.testing.assert_array_equal(run(onnx.load(out), {"x": x})["y"], run(model_of(), {"x": x})["y"])


def test_without_a_commit_nothing_stays(tmp_path: Path) -> None:
    with stage_model(model_of(), tmp_path / "out.onnx") as found:
        assert found.path.exists()
    assert listing(tmp_path) == []


def _fail_between(out: Path) -> None:
    with stage_model(model_of(), out):
        raise KeyboardInterrupt


def test_an_exception_leaves_what_was_there(tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    out.write_bytes(b"before")
    with pytest.raises(KeyboardInterrupt):
        _fail_between(out)
    assert listing(tmp_path) == ["out.onnx"]
    assert out.read_bytes() == b"before"


def test_an_existing_file_is_replaced_whole(tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    out.write_bytes(b"before" * 10_000)
    write(model_of(), out)
    onnx.checker.check_model(str(out))


def test_equal_models_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("a.onnx", "b.onnx"):
        write(model_of(), tmp_path / name)
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    write(model_of(2.0), tmp_path / "b.onnx")
    assert (tmp_path / "a.onnx").read_bytes() != (tmp_path / "b.onnx").read_bytes()


def test_names_that_look_like_patterns(tmp_path: Path) -> None:
    out = tmp_path / "a[1]*.onnx"
    stale = tmp_path / f".{out.name}.x{storage.STAGING_SUFFIX}"
    stale.mkdir()
    write(model_of(), out)
    assert listing(tmp_path) == ["a[1]*.onnx"]


def test_without_a_place_the_file_lies_among_the_temporary_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where what a killed run left behind is removed, too."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with stage_model(model_of(), None) as found:
        (living,) = listing(tmp_path)
        onnx.checker.check_model(str(found.path))
        (tmp_path / f".qconv-model.onnx.dead{storage.STAGING_SUFFIX}").mkdir()
        with stage_model(model_of(), None):
            assert len(listing(tmp_path)) == 2
            assert living in listing(tmp_path)
    assert listing(tmp_path) == []


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_permissions_follow_the_umask(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        write(model_of(), tmp_path / "out.onnx")
        model = model_of()
        model.external = True
        write(model, tmp_path / "large.onnx")
    finally:
        os.umask(before)
    assert len(listing(tmp_path)) == 3
    for path in tmp_path.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask, path.name


# -- data files --------------------------------------------------------------------------------------------------------


def external(factor: float) -> Model:
    """432 bytes of weights go into the data file, 4 stay in the model."""
    weight = np.full((4, 3, 3, 3), factor, np.float32)
    model = loaded(network("c = Conv(x, w)  y = Mul(c, k)", w=weight, k=2.0))
    model.external = True
    return model


def test_data_files_are_named_by_their_content_and_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    write(external(1.0), out)
    first = listing(tmp_path)
    assert len(first) == 2
    write(external(1.0), out)
    assert listing(tmp_path) == first
    write(external(2.0), out)
    second = listing(tmp_path)
    assert len(second) == 2
    assert second != first
    tensors = onnx.load(out, load_external_data=False).graph.initializer
    assert [e.value for t in tensors for e in t.external_data if e.key == "location"] == [second[1]]
    x = np.ones((2, 3, 6, 6), np.float32)
    np.testing.assert_array_equal(run(onnx.load(out), {"x": x})["y"], run(external(2.0), {"x": x})["y"])
    write(model_of(), out)
    assert listing(tmp_path) == ["out.onnx"]


def test_data_files_of_others_stay(tmp_path: Path) -> None:
    others = ["out.onnx.data", "other.onnx.01234567.data", "out.onnx.0123456.data"]
    for name in others:
        (tmp_path / name).write_bytes(b"")
    for _ in range(2):
        write(model_of(), tmp_path / "out.onnx")
    assert listing(tmp_path) == sorted([*others, "out.onnx"])


def test_external_but_tiny_weights_need_no_data_file(tmp_path: Path) -> None:
    model = loaded(network("y = Mul(x, k)", k=2.0))
    model.external = True
    write(model, tmp_path / "out.onnx")
    assert listing(tmp_path) == ["out.onnx"]


# -- full disks and places that cannot be ----------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "says"), [(errno.ENOSPC, "No space is left"), (errno.EDQUOT, "No space is left"),
                                              (errno.EIO, "cannot be written")])  # fmt: skip
@pytest.mark.parametrize("where", ["write", "sync", "rename"])
def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, says: str, where: str) -> None:
    out = tmp_path / "out.onnx"
    out.write_bytes(b"before")

    def fail(*args: Any) -> None:
        raise OSError(number, os.strerror(number))

    target = {"write": "pathlib.Path.write_bytes", "sync": "os.fsync", "rename": "os.replace"}[where]
    model = model_of()
    with monkeypatch.context() as patch:
        patch.setattr(target, fail)
        with pytest.raises(QconvError, match=says) as caught:
            write(model, out)
    assert str(out) in caught.value.message
    assert caught.value.hint
    assert listing(tmp_path) == ["out.onnx"]
    assert out.read_bytes() == b"before"


def test_a_really_full_disk(tmp_path: Path) -> None:
    """/dev/full says ENOSPC at the first byte; a limit on the size of files stands for it in a process of its own."""
    code = f"""
import resource, signal, sys
sys.path[:0] = {sys.path!r}
from pathlib import Path
from tests.support.models import loaded, network
from qconv.errors import QconvError
from qconv.ir.files import stage_model
model = loaded(network("y = Conv(x, w)", w=(40, 3, 5, 5)))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    with stage_model(model, Path("out.onnx")) as found:
        found.commit(Path("out.onnx"))
except QconvError as error:
    print(error.message)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("out.onnx cannot be written: File too large")
    assert listing(tmp_path) == []


def test_a_folder_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(QconvError, match=r"The folder .*nowhere does not exist"):
        write(model_of(), tmp_path / "nowhere" / "out.onnx")


def test_an_output_that_is_a_folder(tmp_path: Path) -> None:
    with pytest.raises(QconvError, match="is a folder"):
        write(model_of(), tmp_path)


def test_an_output_that_is_no_file(tmp_path: Path) -> None:
    """Renaming a file onto /dev/null as root would end it for the whole system."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(QconvError, match="a device or a pipe"):
        write(model_of(), tmp_path / "pipe")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


@pytest.mark.skipif(ROOT, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(QconvError, match="cannot be written to"):
            write(model_of(), tmp_path / "out.onnx")
    finally:
        tmp_path.chmod(0o700)


def test_a_name_that_is_too_long(tmp_path: Path) -> None:
    with pytest.raises(QconvError, match="cannot be written: File name too long"):
        write(model_of(), tmp_path / ("n" * 250))
    assert listing(tmp_path) == []


# -- killed ------------------------------------------------------------------------------------------------------------

HANG = """
import sys, time
sys.path[:0] = {path!r}
from pathlib import Path
from tests.support.models import loaded, network
from qconv.ir.files import stage_model
model = loaded(network("y = Conv(x, w)", w=(4, 3, 3, 3)))
with stage_model(model, Path("out.onnx")):
    print("written", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def hanging(tmp_path: Path) -> Any:
    """A process that has written its file and not yet renamed it."""
    process = subprocess.Popen(
        [sys.executable, "-c", HANG.format(path=sys.path)], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "written\n"
    yield process
    process.kill()
    process.stdout.close()
    process.wait()


def test_a_kill_leaves_what_was_there_and_the_next_run_cleans_up(
    tmp_path: Path, hanging: subprocess.Popen[str]
) -> None:
    out = tmp_path / "out.onnx"
    out.write_bytes(b"before")
    hanging.send_signal(signal.SIGKILL)
    hanging.wait()
    left = listing(tmp_path)
    assert len(left) == 2
    assert left[0].startswith(".out.onnx.")
    assert out.read_bytes() == b"before"
    write(model_of(), tmp_path / "another.onnx")
    assert left[0] in listing(tmp_path)  # not this output's
    write(model_of(), out)
    assert listing(tmp_path) == ["another.onnx", "out.onnx"]


def test_the_folder_of_a_living_run_stays(tmp_path: Path, hanging: subprocess.Popen[str]) -> None:
    (alive,) = listing(tmp_path)
    write(model_of(), tmp_path / "out.onnx")
    assert listing(tmp_path) == [alive, "out.onnx"]
    assert (tmp_path / alive / "out.onnx").exists()


def test_two_runs_of_one_process_do_not_disturb_each_other(tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    with stage_model(model_of(1.0), out) as first, stage_model(model_of(2.0), out) as second:
        second.commit(out)
        assert first.path.exists()
        first.commit(out)
    assert listing(tmp_path) == ["out.onnx"]


@pytest.mark.parametrize("when", ["before the lock's file is there", "before it is locked", "after it is locked"])
def test_a_folder_that_another_run_removes_is_replaced(
    when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another run may see the new folder in the instant before it is locked, and think it stale."""
    lock: Callable[..., Any] = FileLock.acquire
    thefts: list[Path] = []

    def lock_with_theft(self: FileLock, **named: Any) -> Any:
        (folder,) = tmp_path.iterdir()
        first = not thefts
        thefts.append(folder)
        if first and when == "before it is locked":
            Path(self.lock_file).touch()
        if first and when != "after it is locked":
            shutil.rmtree(folder)
        found = lock(self, **named)
        if first:
            shutil.rmtree(folder)
        return found

    monkeypatch.setattr(FileLock, "acquire", lock_with_theft)
    with stage_model(model_of(), tmp_path / "out.onnx") as found:
        assert len(set(thefts)) == 2
        assert listing(tmp_path) == [thefts[1].name]
        found.commit(tmp_path / "out.onnx")
    assert listing(tmp_path) == ["out.onnx"]


def test_a_folder_that_another_run_is_about_to_remove_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock: Callable[..., Any] = FileLock.acquire
    others: list[FileLock] = []

    def lock_after_another(self: FileLock, **named: Any) -> Any:
        if not others:
            others.append(FileLock(self.lock_file))
            lock(others[0], blocking=False)
        return lock(self, **named)

    monkeypatch.setattr(FileLock, "acquire", lock_after_another)
    with stage_model(model_of(), tmp_path / "out.onnx") as found:
        assert found.folder != Path(others[0].lock_file).parent
        found.commit(tmp_path / "out.onnx")
    others[0].release()
    assert listing(tmp_path) == ["out.onnx"]


@pytest.mark.parametrize(
    "refusal", [OSError(errno.ENOLCK, "No locks available"), NotImplementedError("no flock"), Timeout("held")]
)
def test_without_locks_stale_folders_stay(refusal: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not every file system has them: nobody can tell then whether a folder's run is alive.

    filelock tells of some (ENOLCK, by version) as of a lock that another holds.
    """

    def refuse(self: FileLock, **named: Any) -> None:
        raise refusal

    monkeypatch.setattr(FileLock, "acquire", refuse)
    stale = tmp_path / f".out.onnx.x{storage.STAGING_SUFFIX}"
    stale.mkdir()
    write(model_of(), tmp_path / "out.onnx")
    assert listing(tmp_path) == [stale.name, "out.onnx"]


def test_links_are_not_followed_when_cleaning(tmp_path: Path) -> None:
    """A hidden link of the right name points to the user's pictures."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    (pictures / "cat.jpg").write_bytes(b"")
    (tmp_path / f".out.onnx.x{storage.STAGING_SUFFIX}").symlink_to(pictures)
    write(model_of(), tmp_path / "out.onnx")
    assert listing(pictures) == ["cat.jpg"]


def test_pictures_of_a_folder_that_is_read_stay(tmp_path: Path) -> None:
    """What else lies there is nobody's input."""
    inside = tmp_path / "imgs" / "cats"
    inside.mkdir(parents=True)
    for name in ("a.JPG", "b.npz", "c.onnx"):
        (inside / name).write_bytes(b"")
    (tmp_path / "link").symlink_to(inside)
    read = [str(tmp_path / "imgs")]
    for out in (inside / "a.JPG", inside / "b.npz", tmp_path / "link" / "a.JPG"):
        with pytest.raises(QconvError, match="is among the pictures of"):
            storage.refuse_overwriting_inputs(out, read)
    listing = tmp_path / "list.txt"
    listing.write_text("# pictures\nimgs/cats/a.JPG\n")
    with pytest.raises(QconvError, match="is among the pictures of"):
        storage.refuse_overwriting_inputs(inside / "a.JPG", [listing])
    storage.refuse_overwriting_inputs(inside / "b.npz", [listing])
    for out in (inside / "new.jpg", inside / "c.onnx"):
        storage.refuse_overwriting_inputs(out, read)
