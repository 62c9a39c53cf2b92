"""Images from BatchNormalization. Oracles: ONNX Runtime for statistics, data.preprocessing for pixels, closed forms."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from PIL import Image

from qconv.config.data_options import DataOptions
from qconv.reporter import Reporter
from tests.support.folded import write_folded_float
from tests.support.libraries import runner
from tests.support.models import ints, loaded, network, run, statistics

torch = pytest.importorskip("torch", reason="needs the extra: pip install 'qconv[torch]'")

from qconv.cli.main import cli
from qconv.config.data_options import Color, Layout, PreprocessingOptions, ResizeFilter
from qconv.config.recipe import Recipe
from qconv.data.dataset import find_files
from qconv.data.preprocessing import arrange_pixels, normalize_pixels
from qconv.errors import Change, QconvError
from qconv.ir.files import Source
from qconv.pipeline import quantize
from qconv.storage import replace_folder_atomically
from qconv.training import synthesize
from qconv.training.network import TorchNetwork
from qconv.training.options import SynthesisOptions
from qconv.training.synthesize import (
    EDGE_LEVELS,
    VARIANCE_FLOOR,
    BatchNormTargets,
    ImageOptimizer,
    _class_stride,
    normalise_pixels,
    smoothing_step,
)

torch.set_num_threads(1)  # tests run side by side
HERE = Path(__file__).parents[1]
CIFAR = HERE / "models" / "cifar_mobilenet.onnx"
DATA = Path(os.environ.get("QCONV_DATA") or HERE.parents[1] / "shared" / "data")
BODY = (
    "c = Conv<pads=[1,1,1,1]>(x, w) n = BatchNormalization(c, g1, b1, m1, v1) r = Relu(n)"
    " d = Conv(r, u) k = BatchNormalization(d, g2, b2, m2, v2) s = Relu(k)"
    " p = GlobalAveragePool(s) f = Flatten(p) y = Gemm(f, g)"
)
RAW = PreprocessingOptions(preset="unit")


@cache
def remembering(channels: int = 3, batch: int | str = "N") -> bytes:
    """A network whose statistics are those of pictures: stripes, which leaves are not."""
    rng = np.random.default_rng(0)
    ones = {f"{name}{i}": np.ones(6, np.float32) for name in "gv" for i in (1, 2)}
    zeros = {f"{name}{i}": np.zeros(6, np.float32) for name in "bm" for i in (1, 2)}
    weights = {"w": (6, channels, 3, 3), "u": (6, 6, 1, 1), "g": (6, 4)}
    x = np.kron(rng.random((16, channels, 12, 1)), np.ones((1, 1, 1, 12))).astype(np.float32)
    found: dict[str, Any] = {**ones, **zeros}
    for i, tensor in ((1, "c"), (2, "d")):
        proto = network(BODY, ("N", channels, 12, 12), outputs=("y", tensor), **weights, **found)
        values = run(proto, {"x": x})[tensor].astype(np.float64)
        found[f"m{i}"] = values.mean((0, 2, 3)).astype(np.float32)
        found[f"v{i}"] = values.var((0, 2, 3)).astype(np.float32)
    return bytes(network(BODY, (batch, channels, 12, 12), **weights, **found).SerializeToString())


def source(data: bytes, tmp_path: Path) -> Source:
    (tmp_path / "net.onnx").write_bytes(data)
    return Source("net.onnx", tmp_path / "net.onnx")


def made(tmp_path: Path, data: bytes | None = None, out: str = "set", **more: Any) -> synthesize.SynthesizedImages:
    options: dict[str, Any] = {"count": 6, "steps": 12, "threads": 1, "device": "cpu", **more}
    request = SynthesisOptions(options.pop("preprocessing", RAW), **options)
    return synthesize.synthesize(source(data or remembering(), tmp_path), tmp_path / out, request)


def distances(data: bytes, x: np.ndarray) -> list[float]:
    """Of what both BatchNormalizations read, by ONNX Runtime."""
    proto = onnx.ModelProto.FromString(data)
    stored = {t.name: onnx.numpy_helper.to_array(t).astype(np.float64) for t in proto.graph.initializer}
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in "cd")
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    found = []
    for i, values in enumerate(session.run(["c", "d"], {"x": x}), 1):
        values = np.asarray(values, np.float64)
        var = stored[f"v{i}"] + VARIANCE_FLOOR * stored[f"v{i}"].mean()
        std = np.sqrt(values.var((0, 2, 3)) + VARIANCE_FLOOR * stored[f"v{i}"].mean())
        found.append(
            float((((values.mean((0, 2, 3)) - stored[f"m{i}"]) ** 2 + (std - np.sqrt(var)) ** 2) / var).mean())
        )
    return found


def constants_in(path: Path) -> dict[str, float]:
    """The scales of a file, and whatever else it holds as one number, by name."""
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    return {name: float(array) for name, array in stored.items() if array.size == 1 and array.dtype == np.float32}


def samples(folder: Path) -> np.ndarray:
    return np.stack([np.load(path) for path in sorted(folder.glob("*.npy"))])


# -- what comes out ----------------------------------------------------------------------------------------------------


def test_statistics_come_near_those_stored_by_onnx_runtime(tmp_path: Path) -> None:
    found = made(tmp_path, steps=30).found
    assert found.after < 0.25 * found.before
    assert [layer.after for layer in found.layers] == pytest.approx(
        distances(remembering(), samples(tmp_path / "set")), rel=1e-3, abs=1e-6
    )
    assert [(layer.tensor, layer.channels) for layer in found.layers] == [("c", 6), ("d", 6)]
    assert len(found.loss) == 30
    assert found.loss[0] == pytest.approx(found.before, rel=1e-4)


def test_batches_are_judged_together(tmp_path: Path) -> None:
    """Statistics are those of all pictures, so that those of two batches stay as different as they may."""
    whole, parts = (made(tmp_path, out=f"by{batch}", batch=batch, count=8, steps=30).found for batch in (8, 2))
    assert parts.batch == 2
    assert parts.after < 2 * whole.after + 0.01
    own = [np.mean(distances(remembering(), samples(tmp_path / "by2")[i : i + 2])) for i in range(0, 8, 2)]
    assert np.mean(own) > 2 * parts.after


def test_the_sample_is_what_the_network_gets_of_the_picture(tmp_path: Path) -> None:
    prep = PreprocessingOptions(preset="imagenet", color=Color.BGR)
    result = made(tmp_path, preprocessing=prep)
    names = sorted(path.name for path in (tmp_path / "set").iterdir())
    assert names == sorted([f"{i:03}.{kind}" for i in range(6) for kind in ("npy", "png")] + ["synthesized.json"])
    for number in range(6):
        pixels = np.asarray(Image.open(tmp_path / "set" / f"{number:03}.png"))
        assert np.array_equal(pixels, result.pixels[number])
        wanted = (pixels[:, :, ::-1] / 255 - np.array([0.406, 0.456, 0.485])) / np.array([0.225, 0.224, 0.229])
        sample = np.load(tmp_path / "set" / f"{number:03}.npy")
        assert sample.dtype == np.float32
        np.testing.assert_allclose(sample, wanted.transpose(2, 0, 1), atol=1e-5)


def test_pictures_move_and_differ(tmp_path: Path) -> None:
    result = made(tmp_path)
    first = made(tmp_path, out="first", steps=1, seed=0)
    other = made(tmp_path, out="other", seed=1)
    assert np.abs(result.pixels.astype(int) - first.pixels).mean() > 5
    assert np.abs(result.pixels.astype(int) - other.pixels).mean() > 5
    assert len({picture.tobytes() for picture in result.pixels}) == 6


def test_the_same_bytes_every_time(tmp_path: Path) -> None:
    made(tmp_path), made(tmp_path, out="again")
    for path in (tmp_path / "set").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


@pytest.mark.parametrize("batch", [1, 4])
def test_a_network_of_its_own_batch_is_served(tmp_path: Path, batch: int) -> None:
    result = made(tmp_path, remembering(batch=batch), count=5)
    assert (result.found.batch, len(result.pixels)) == (batch, 5)
    assert len(samples(tmp_path / "set")) == 5


def test_grey_pictures(tmp_path: Path) -> None:
    result = made(tmp_path, remembering(channels=1))
    assert result.pixels.shape == (6, 12, 12, 1)
    with Image.open(tmp_path / "set" / "000.png") as picture:
        assert picture.mode == "L"
    assert result.found.after < result.found.before


# -- the parts ---------------------------------------------------------------------------------------------------------


def test_pixels_become_what_they_become_elsewhere(tmp_path: Path) -> None:
    plain = made(tmp_path, count=1, steps=1).found.preprocessing
    rng = np.random.default_rng(0)
    for color in (Color.RGB, Color.BGR):
        for layout in (Layout.NCHW, Layout.NHWC):
            values = {"scale": 1 / 255, "mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7), "size": (5, 4)}
            prep = replace(plain, color=color, layout=layout, **values)
            pixels = rng.integers(0, 256, (2, 5, 4, 3), np.uint8)
            wanted = np.stack([normalize_pixels(arrange_pixels(one, prep), prep) for one in pixels])
            found = normalise_pixels(torch.from_numpy(pixels).permute(0, 3, 1, 2).float(), prep)
            np.testing.assert_allclose(found.numpy(), wanted, atol=1e-5)


def test_small_differences_fade_more_than_edges() -> None:
    flat = torch.full((1, 1, 3, 4), 7.0)
    assert not smoothing_step(flat).any()
    step = flat.clone()
    step[..., 2:] += EDGE_LEVELS
    # one neighbour of four is EDGE away, and counts half
    np.testing.assert_allclose(
        smoothing_step(step)[0, 0, 1].numpy(), [0, EDGE_LEVELS / 8, -EDGE_LEVELS / 8, 0], rtol=1e-6
    )
    step[..., 2:] = flat[..., 2:] + EDGE_LEVELS / 10
    share = float(smoothing_step(step)[0, 0, 1, 1]) / (EDGE_LEVELS / 10)
    assert share == pytest.approx(0.25 / 1.01)


@pytest.mark.parametrize("batch", [4, 2])
def test_pixels_move_along_the_gradient_of_the_distance(
    tmp_path: Path, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: PyTorch's own derivative of the distance, the other batch standing still."""
    monkeypatch.setattr("qconv.training.synthesize.CLASS_LOSS_WEIGHT", 0.0)
    prep = made(tmp_path, count=1, steps=1).found.preprocessing
    model = loaded(onnx.ModelProto.FromString(remembering()))
    wanted = BatchNormTargets.of(model, "net").wanted
    pixels = np.random.default_rng(0).integers(0, 256, (4, 12, 12, 3), np.uint8)
    optimizer, network = ImageOptimizer(TorchNetwork(model), prep, wanted, pixels, batch), TorchNetwork(model)
    optimizer.look()
    taken: list[torch.Tensor] = []
    monkeypatch.setattr(optimizer, "_step", lambda pixels, gradient, share: taken.append(gradient))
    optimizer._move(0, 1.0)

    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().requires_grad_()
    still = torch.cat([x[:batch], x[batch:].detach()])
    read = network.run({"x": normalise_pixels(still, prep)}, [reference.name for reference in wanted])
    losses = []
    for reference in wanted:
        values = read[reference.name]
        floor = VARIANCE_FLOOR * reference.var.mean()
        mean, var = values.mean((0, 2, 3)), values.var((0, 2, 3), correction=0)
        stored, ref = (torch.from_numpy(numbers).float() for numbers in (reference.mean, reference.var + floor))
        losses.append((((mean - stored) ** 2 + ((var + floor).sqrt() - ref.sqrt()) ** 2) / ref).mean())
    (gradient,) = torch.autograd.grad(torch.stack(losses).mean(), x)
    # what the step takes is of the batch's own moments: those of the whole are their mean
    torch.testing.assert_close(taken[0] * batch / 4 if batch < 4 else taken[0], gradient[:batch], rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize("classes", [2, 3, 10, 97, 1000, 1001])
def test_every_class_has_its_turn(classes: int) -> None:
    assert len({i * _class_stride(classes) % classes for i in range(classes)}) == classes


# -- into a folder, whole or not at all --------------------------------------------------------------------------------


def test_an_earlier_set_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    made(tmp_path, count=8)
    made(tmp_path, count=3)
    assert len(samples(tmp_path / "set")) == 3
    (tmp_path / "set" / "mine.txt").write_text("mine")
    with pytest.raises(QconvError, match=r"holds files that are no earlier result, such as mine\.txt"):
        made(tmp_path)
    assert (tmp_path / "set" / "mine.txt").read_text() == "mine"
    (tmp_path / "set" / "mine.txt").rename(tmp_path / "set" / "500.png")  # as ours are called, but there were three
    with pytest.raises(QconvError, match=r"such as 500\.png"):
        made(tmp_path)
    (tmp_path / "empty").mkdir()
    made(tmp_path, out="empty")
    assert len(samples(tmp_path / "empty")) == 6
    (tmp_path / "file").write_text("")
    with pytest.raises(QconvError, match="file is a file"):
        made(tmp_path, out="file")
    with pytest.raises(QconvError, match="does not exist"):
        made(tmp_path, out="no/where")


def test_what_fails_leaves_the_earlier_set_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made(tmp_path, count=8)
    before = {path.name: path.read_bytes() for path in (tmp_path / "set").iterdir()}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(QconvError, match="No space is left"):
        made(tmp_path, count=3)
    assert {path.name: path.read_bytes() for path in (tmp_path / "set").iterdir()} == before
    assert {path.name for path in tmp_path.iterdir()} <= {"set", "net.onnx"}


def test_a_folder_that_cannot_take_its_place_brings_the_old_one_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "old").write_text("old")
    rename, calls = os.rename, []

    def second_fails(a: str, b: str) -> None:
        calls.append(a)
        if len(calls) == 2:
            raise OSError(5, "Input/output error")
        rename(a, b)

    monkeypatch.setattr(os, "rename", second_fails)
    with pytest.raises(QconvError), replace_folder_atomically(tmp_path / "set", lambda folder: None) as folder:
        (folder / "new").write_text("new")
    assert [path.name for path in (tmp_path / "set").iterdir()] == ["old"]
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_what_comes_while_pictures_are_made_is_not_lost(tmp_path: Path) -> None:
    def put(stage: str, done: int, total: int) -> None:
        (tmp_path / "set").mkdir(exist_ok=True)
        (tmp_path / "set" / "mine.txt").write_text("mine")

    request = SynthesisOptions(RAW, count=2, steps=2, threads=1, device="cpu")
    with pytest.raises(QconvError, match=r"such as mine\.txt"):
        synthesize.synthesize(source(remembering(), tmp_path), tmp_path / "set", request, Reporter(on_progress=put))
    assert [path.name for path in (tmp_path / "set").iterdir()] == ["mine.txt"]


def test_the_mode_of_the_folder_stays(tmp_path: Path) -> None:
    made(tmp_path)
    (tmp_path / "set").chmod(0o700)
    made(tmp_path, seed=1)
    assert (tmp_path / "set").stat().st_mode & 0o777 == 0o700


def test_a_set_that_a_killed_run_moved_aside_comes_back(tmp_path: Path) -> None:
    made(tmp_path)
    hidden = tmp_path / ".set.x.qconv-tmp"
    hidden.mkdir()
    (tmp_path / "set").rename(hidden / "set.old")
    with pytest.raises(QconvError, match="holds NaN"), patched_look():
        made(tmp_path)
    assert len(samples(tmp_path / "set")) == 6
    assert not hidden.exists()


@contextlib.contextmanager
def patched_look() -> Iterator[None]:
    """Nothing is made."""

    def look(optimizer: object) -> list[float]:
        raise QconvError("It holds NaN.", "mend it.")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthesize.ImageOptimizer, "look", look)
        yield


def test_the_current_folder_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "set" / "inner").mkdir(parents=True)
    for folder in ("set", "set/inner"):
        monkeypatch.chdir(tmp_path / folder)
        with pytest.raises(QconvError, match="is the current folder, or holds it"):
            made(tmp_path)


def test_the_model_does_not_lie_in_the_output(tmp_path: Path) -> None:
    made(tmp_path)
    shutil.copy(tmp_path / "net.onnx", tmp_path / "set" / "000.png")
    inside = Source("000.png", tmp_path / "set" / "000.png")
    with pytest.raises(QconvError, match="lies in the output"):
        synthesize.synthesize(inside, tmp_path / "set", SynthesisOptions(RAW, count=2, steps=1))


def test_a_picture_stands_for_the_sample_beside_it(tmp_path: Path) -> None:
    made(tmp_path)
    listed = find_files([str(tmp_path / "set")], pattern=None, samples=10**9, seed=0)
    assert sorted(path.name for path in listed.paths) == [f"{i:03}.png" for i in range(6)]
    listed = find_files([str(tmp_path / "set")], pattern="*.npy", samples=10**9, seed=0)
    assert sorted(path.name for path in listed.paths) == [f"{i:03}.npy" for i in range(6)]
    (tmp_path / "set" / "000.png").unlink()
    listed = find_files([str(tmp_path / "set")], pattern=None, samples=10**9, seed=0)
    assert sorted(path.suffix for path in listed.paths) == [".npy", *[".png"] * 5]


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_a_network_that_remembers_nothing_is_refused(tmp_path: Path) -> None:
    write_folded_float(CIFAR, tmp_path / "folded.onnx")
    with pytest.raises(QconvError, match="has no BatchNormalization that remembers"):
        made(tmp_path, (tmp_path / "folded.onnx").read_bytes())
    assert not (tmp_path / "set").exists()


def test_statistics_that_were_never_measured_are_none(tmp_path: Path) -> None:
    fresh = {f"{name}{i}": np.full(6, name == "v", np.float32) for name in "mv" for i in (1, 2)}
    rest = {f"{name}{i}": np.ones(6, np.float32) for name in "gb" for i in (1, 2)}
    proto = network(BODY, ("N", 3, 12, 12), w=(6, 3, 3, 3), u=(6, 6, 1, 1), g=(6, 4), **fresh, **rest)
    with pytest.raises(QconvError, match="has no BatchNormalization that remembers"):
        made(tmp_path, proto.SerializeToString())


def test_few_batchnormalizations_are_told_of(tmp_path: Path) -> None:
    body = (
        "c = Conv(x, w) n = BatchNormalization(c, gamma, beta, mean, var) r = Relu(n) d = Conv(r, v) e = Relu(d)"
        " f = Conv(e, u) p = GlobalAveragePool(f) q = Flatten(p) y = Gemm(q, g)"
    )
    weights = {"w": (8, 3, 3, 3), "v": (6, 8, 3, 3), "u": (6, 6, 1, 1), "g": (6, 4)}
    proto = network(body, ("N", 3, 16, 16), **weights, **statistics(8))
    found = made(tmp_path, proto.SerializeToString(), steps=2).found
    assert [text for text in found.warnings if "1 BatchNormalization for 4 layers" in text]


def test_statistics_that_are_not_matched_are_told_of(tmp_path: Path) -> None:
    proto = onnx.ModelProto.FromString(remembering())
    for tensor in proto.graph.initializer:
        if tensor.name == "m2":
            far = onnx.numpy_helper.to_array(tensor) + np.float32(100)
            tensor.CopyFrom(onnx.numpy_helper.from_array(far, "m2"))
    found = made(tmp_path, proto.SerializeToString(), steps=2).found
    assert [text for text in found.warnings if text.startswith("the pictures are not like those of training")]
    assert [text for text in found.warnings if text.startswith("k: statistics were not matched")]


@pytest.mark.parametrize(
    "rest",
    [
        "t = Transpose<perm=[0,2,3,1]>(s) q = Reshape(t, rows) y = MatMul(q, g)",
        "p = GlobalAveragePool(s) f = Flatten(p) h = Gemm(f, g) y = Cast<to=6>(h)",
        "y = Identity(priors)",
    ],
)
@pytest.mark.parametrize("batch", ["N", 1])
def test_outputs_that_are_no_scores_are_left_alone(tmp_path: Path, rest: str, batch: int | str) -> None:
    body = BODY[: BODY.index(" p = ")] + " " + rest
    stored = {
        t.name: onnx.numpy_helper.to_array(t) for t in onnx.ModelProto.FromString(remembering()).graph.initializer
    }
    constants = {name: array for name, array in stored.items() if name in set(re.findall(r"\w+", body))}
    more = {"rows": ints(-1, 6), "priors": (1, 20)}
    constants |= {name: constant for name, constant in more.items() if name in body}
    proto = network(body, (batch, 3, 12, 12), outputs=("y",), **constants)  # type: ignore[arg-type]
    found = made(tmp_path, proto.SerializeToString(), count=2, steps=3).found
    assert found.after < found.before


def test_bytes_are_fed_as_they_are(tmp_path: Path) -> None:
    proto = onnx.ModelProto.FromString(remembering())
    proto.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.UINT8
    proto.graph.node.insert(0, onnx.helper.make_node("Cast", ["x"], ["as_float"], to=onnx.TensorProto.FLOAT))
    proto.graph.node[1].input[0] = "as_float"
    data = proto.SerializeToString()
    normalised = made(tmp_path, data, steps=1)  # which whole numbers cannot be: what is said of it is not used
    assert normalised.pixels.dtype == np.uint8
    assert samples(tmp_path / "set").dtype == np.uint8
    result = made(tmp_path, data, preprocessing=PreprocessingOptions(preset="raw"), steps=2)
    assert samples(tmp_path / "set").dtype == np.uint8
    assert np.array_equal(samples(tmp_path / "set").transpose(0, 2, 3, 1), result.pixels)


def test_the_printed_command_does_not_enlarge_what_has_its_size(tmp_path: Path) -> None:
    found = made(tmp_path, preprocessing=replace(RAW, resize=40, filter=ResizeFilter.BICUBIC), steps=1).found
    assert found.options == ("--preprocess", "unit")


def test_inputs_that_are_no_pictures_are_refused(tmp_path: Path) -> None:
    with pytest.raises(QconvError, match="channels"):
        made(tmp_path, remembering(channels=5))


# -- the command -------------------------------------------------------------------------------------------------------


def command(*words: object) -> Any:
    return runner().invoke(cli, [str(word) for word in words], standalone_mode=False)


def test_a_set_calibrates_a_network(tmp_path: Path) -> None:
    done = command(
        "synthesize",
        CIFAR,
        "-o",
        tmp_path / "set",
        "-n",
        12,
        "--iterations",
        10,
        "--preprocess",
        "imagenet",
        "--device",
        "cpu",
        "--json",
    )
    assert done.exception is None
    told = json.loads(done.stdout)
    assert told["pictures"] == 12
    assert told["distance"]["after"] < told["distance"]["before"]
    assert told["preprocessing"]["color"] == "rgb"
    on_disk = json.loads((tmp_path / "set" / "synthesized.json").read_text())
    assert set(told) - set(on_disk) == {"output", "device", "torch", "seconds", "peak_rss_mb"}
    out = tmp_path / "out.onnx"
    assert (
        command("quantize", CIFAR, "--calib", tmp_path / "set", "--effort", "fast", "-q", "-o", out).exception is None
    )
    done = command("evaluate", out, "--images", HERE.parent / "calib_samples", "--against", CIFAR, "--json")
    assert json.loads(done.stdout)["against"]["sqnr_db"] > 20


def test_the_summary_ends_with_the_command_that_uses_it(tmp_path: Path) -> None:
    folder = tmp_path / "a set"
    done = command(
        "synthesize", CIFAR, "-o", folder, "-n", 2, "--iterations", 1, "--preprocess", "unit", "--device", "cpu"
    )
    assert done.exception is None
    assert done.stdout.splitlines()[-1] == f"qconv quantize {CIFAR} --calib '{folder}' --preprocess unit"


def test_the_page_shows_the_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("plotly")
    page = tmp_path / "page.html"
    monkeypatch.setattr(sys, "argv", ["/usr/bin/qconv", "synthesize", "a model.onnx"])
    options = ("-n", 3, "--iterations", 2, "--preprocess", "imagenet", "--device", "cpu", "-q")
    assert command("synthesize", CIFAR, "-o", tmp_path / "set", *options, "--report", page).exception is None
    text = page.read_text("utf-8")
    assert text.count("<img") == 3
    assert "qconv synthesize &#39;a model.onnx&#39;" in text
    assert "How near the statistics came" in text


@pytest.mark.parametrize("option", ["--report", "--csv"])
@pytest.mark.parametrize("inside", ["", "page.html", "synthesized.json"])
def test_nothing_else_goes_into_the_folder(tmp_path: Path, option: str, inside: str) -> None:
    done = command("synthesize", CIFAR, "-o", tmp_path / "set", option, tmp_path / "set" / inside)
    assert isinstance(done.exception, Exception)
    assert "set" in str(done.exception)
    assert not (tmp_path / "set").exists()


# -- as a fallback -----------------------------------------------------------------------------------------------------


def test_what_nothing_tells_of_is_watched_on_synthesized_pictures(tmp_path: Path) -> None:
    body = (
        "c = Conv<pads=[1,1,1,1]>(x, w) n = BatchNormalization(c, g1, b1, m1, v1) r = Relu(n)"
        " d = Conv(r, u) e = Relu(d) h = Conv(e, o) s = Relu(h) p = GlobalAveragePool(s) f = Flatten(p) y = Gemm(f, g)"
    )
    stored = {
        t.name: onnx.numpy_helper.to_array(t) for t in onnx.ModelProto.FromString(remembering()).graph.initializer
    }
    constants = {name: stored[name] for name in ("w", "g1", "b1", "m1", "v1", "u", "g")} | {"o": (6, 6, 1, 1)}
    where = source(network(body, ("N", 3, 12, 12), **constants).SerializeToString(), tmp_path)
    recipe, data = Recipe(data_free=True, fallback="synthesized", threads=1), DataOptions(preprocessing=RAW)
    report, _ = quantize.quantize(where, tmp_path / "out.onnx", recipe, data)
    watched = {c.where for c in report.findings if isinstance(c, Change) and c.kind == "ranges by synthesized pictures"}
    assert "s" in watched
    quantize.quantize(where, tmp_path / "random.onnx", replace(recipe, fallback="random"), data)
    by_random, by_synthesized = (constants_in(tmp_path / f"{name}.onnx") for name in ("random", "out"))
    assert by_random.keys() == by_synthesized.keys()
    assert any(by_random[name] > 1.2 * scale for name, scale in by_synthesized.items() if scale > 0)


def test_a_network_that_remembers_nothing_has_no_synthesized_pictures(tmp_path: Path) -> None:
    write_folded_float(CIFAR, tmp_path / "folded.onnx")
    recipe, data = (
        Recipe(data_free=True, fallback="synthesized", threads=1),
        DataOptions(preprocessing=PreprocessingOptions("imagenet")),
    )
    with pytest.raises(QconvError, match="has no BatchNormalization that remembers"):
        quantize.quantize(tmp_path / "folded.onnx", tmp_path / "out.onnx", recipe, data)
    assert not (tmp_path / "out.onnx").exists()


@pytest.mark.skipif(not DATA.is_dir(), reason="the trained models are not here")
def test_a_trained_network_hardly_tells_them_from_photographs(tmp_path: Path) -> None:
    model = DATA / "models" / "resnet20_cifar10.onnx"
    shutil.copy(model, tmp_path / "net.onnx")
    found = made(tmp_path, model.read_bytes(), count=32, steps=20, preprocessing=PreprocessingOptions("imagenet")).found
    assert found.after < 0.1
    assert found.warnings == []
