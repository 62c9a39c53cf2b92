"""What the tests of commands share: the entry point called in this process, a small model, pictures."""

from __future__ import annotations

import io
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from qconv.cli import main
from tests.support.cli import Done, Qconv, net, picture


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


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A folder of its own with `model.onnx`, a few kilobytes."""
    folder = tmp_path / "models"
    folder.mkdir()
    path = folder / "model.onnx"
    path.write_bytes(net().SerializeToString())
    return path


@pytest.fixture(scope="session")
def calib(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 pictures of 8x8 random pixels."""
    folder = tmp_path_factory.mktemp("calib")
    for number in range(20):
        picture(folder / f"{number:02}.png", number)
    return folder


@pytest.fixture
def twenty(tmp_path: Path) -> Path:
    """Ten class folders of two pictures each."""
    (tmp_path / "labelled").mkdir()
    for number in range(20):
        picture(tmp_path / "labelled" / f"class{number // 2}" / f"{number}.png", number)
    return tmp_path / "labelled"
