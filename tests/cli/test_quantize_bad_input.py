"""`qconv quantize` with models and pictures that are none: one clear error, nothing written."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper

from tests.support.cli import (
    CIFAR,
    Qconv,
    assert_error,
    listing,
    net,
    picture,
    write_with_data_file,
    write_with_open_size,
)


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


def _external_missing(path: Path) -> None:
    write_with_data_file(path)
    (path.parent / "model.data").unlink()


def _external_outside(path: Path) -> None:
    write_with_data_file(path, "../model.data")
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
    write_with_open_size(path)


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
